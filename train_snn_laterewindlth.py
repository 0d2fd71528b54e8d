"""Iterative magnitude pruning (IMP) with late rewinding (sections 3.1 and 4.2 of the paper).

Train to convergence, prune the smallest 25 % of the surviving weights, set the survivors back to what they were after
epoch 20, and repeat. Every level yields a ticket and its accuracy; all of it is 15 trainings with 14 prunings between.

    python train_snn_laterewindlth.py --dataset cifar10 --arch vgg16
"""

import copy
from functools import partial

import torch

from models import build_model
from utils.data import load_data
from utils.errors import one_line_errors
from utils.flags import get_args
from utils.masks import dense_mask, prune_by_magnitude, rewind, state_after_pruning
from utils.runs import Run
from utils.training import fit, make_optimizer, place


@one_line_errors
def main(argv=None):
    args = get_args("laterewindlth", __doc__, argv)
    run = Run(args)
    if run.finished:
        return run.report_finished()
    data = load_data(args)
    run.begin(data)
    torch.manual_seed(run.seed)
    model = build_model(args.arch, data.channels, data.classes, args.neuron, args.width, args.batch_norm, args.compile)
    place(model, args)
    train = partial(fit, model, data, args, run=run)

    # the rewind point: the dense network after exactly --rewinding_epoch epochs
    mask = dense_mask(model)
    optimizer = make_optimizer(model, args)
    epochs = range(args.rewinding_epoch)
    train(optimizer, mask, epochs, args.timestep, phase="dense", checkpoint=run.checkpoint("dense"))
    rewind_point = copy.deepcopy(model.state_dict())

    # every level, the dense one too, starts from the rewind point (--rewind) and follows the same schedule
    state = rewind_point
    for level in range(args.sparsity_round + 1):
        if level > 0:
            mask = prune_by_magnitude(model, mask, args.prune_percent / 100, args.pruning_scope)
            state = state_after_pruning(model, rewind_point, args.rewind)
        run.save_ticket(level, mask, state, args.rewinding_epoch)
        rewind(model, state, mask)
        optimizer = make_optimizer(model, args)  # momentum belongs to the weights just left behind
        epochs = range(args.rewinding_epoch, args.end_iter)
        train(optimizer, mask, epochs, args.timestep, level=level, checkpoint=run.checkpoint(f"level_{level:02d}"))
        run.save_result(level, mask, model, data.test)
    run.report()


if __name__ == "__main__":
    main()
