"""Early-Bird tickets (EB, section 3.2 of the paper).

Train the dense network and take its magnitude mask after every epoch. When the mask has hardly changed over the last
q = 5 epochs it is the ticket: back to the initial weights, prune once, and train that.

    python train_snn_earlybird.py --dataset cifar10 --arch vgg16 --sparsity_round 4
"""

import copy
from functools import partial

import torch

from models import build_model
from utils.data import load_data
from utils.early_bird import has_settled, recent_masks, window_distance
from utils.errors import one_line_errors
from utils.flags import get_args
from utils.masks import dense_mask, magnitude_mask, rewind, sparsity_after
from utils.runs import Run
from utils.signals import stop_deferred
from utils.training import fit, make_optimizer, place


@one_line_errors
def main(argv=None):
    args = get_args("earlybird", __doc__, argv)
    run = Run(args)
    if run.finished:
        return run.report_finished()
    data = load_data(args)
    run.begin(data)
    torch.manual_seed(run.seed)
    model = build_model(args.arch, data.channels, data.classes, args.neuron, args.width, args.batch_norm, args.compile)
    place(model, args)
    train = partial(fit, model, data, args, run=run)

    # search: train the dense network until its mask has settled
    target = sparsity_after(args.sparsity_round, args.prune_percent / 100)
    initial = copy.deepcopy(model.state_dict())
    dense = dense_mask(model)
    optimizer = make_optimizer(model, args)
    recent = recent_masks(args.eb_window)
    epoch = run.resume(run.checkpoint("search"), "search", 0, range(args.end_iter), model, optimizer, recent)
    while epoch < args.end_iter and not has_settled(recent, args.eb_tolerance, args.eb_distance):
        train(optimizer, dense, range(epoch, epoch + 1), args.timestep)
        epoch += 1
        with stop_deferred():
            recent.append(magnitude_mask(model, target, args.pruning_scope))
            run.note(hamming=window_distance(recent, "hamming"), jaccard=window_distance(recent, "jaccard"))
            run.save_checkpoint(run.checkpoint("search"), epoch, model, optimizer, recent)

    # the ticket: the settled mask on the initial weights
    ticket, level = recent[-1], args.sparsity_round
    run.save_ticket(level, ticket, initial, epoch=0)
    rewind(model, initial, ticket)
    optimizer = make_optimizer(model, args)
    epochs, checkpoint = range(args.end_iter), run.checkpoint("train")
    train(optimizer, ticket, epochs, args.timestep, phase="train", level=level, checkpoint=checkpoint)
    settled = has_settled(recent, args.eb_tolerance, args.eb_distance)
    run.save_result(level, ticket, model, data.test, settled=settled)
    run.report()


if __name__ == "__main__":
    main()
