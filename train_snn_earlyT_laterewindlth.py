"""Iterative magnitude pruning with late rewinding, searched with fewer timesteps (IMP + ET, Algorithm 1 of the paper).

After two epochs at T timesteps, take the fewest timesteps whose predictions are close to those of T. Train, prune and
rewind with those; then train the tickets that matter at T from the rewind point.

    python train_snn_earlyT_laterewindlth.py --dataset cifar10 --arch vgg16
"""

import copy
from functools import partial
from itertools import pairwise

import torch

from models import build_model
from utils.data import load_data
from utils.early_time import divergences, early_time
from utils.errors import one_line_errors
from utils.flags import get_args
from utils.masks import dense_mask, prune_by_magnitude, rewind, state_after_pruning
from utils.runs import Run
from utils.tickets import load_fitting_ticket
from utils.training import fit, make_optimizer, place, predict


@one_line_errors
def main(argv=None):
    args = get_args("earlyT_laterewindlth", __doc__, argv)
    run = Run(args)
    if run.finished:
        return run.report_finished()
    data = load_data(args)
    run.begin(data)
    torch.manual_seed(run.seed)
    model = build_model(args.arch, data.channels, data.classes, args.neuron, args.width, args.batch_norm, args.compile)
    place(model, args)
    train = partial(fit, model, data, args, run=run)

    def probe():
        return predict(model, data.probe, args.timestep, args.precision)  # [T,N,classes]

    def observe():
        return {"divergences": divergences(probe(), args.divergence)}

    def choose_timesteps():
        return early_time(probe(), args.early_time_threshold, args.divergence)

    # the dense network: T_early after --early_time_epoch epochs, the rewind point after --rewinding_epoch
    mask = dense_mask(model)
    optimizer = make_optimizer(model, args)
    timesteps, rewind_point = args.timestep, copy.deepcopy(model.state_dict())
    for start, stop in pairwise(sorted({0, args.early_time_epoch, args.rewinding_epoch})):
        epochs, checkpoint = range(start, stop), run.checkpoint(f"dense_{stop}")
        train(optimizer, mask, epochs, timesteps, phase="dense", checkpoint=checkpoint, observe=observe)
        if stop == args.rewinding_epoch:
            rewind_point = copy.deepcopy(model.state_dict())
        if stop == args.early_time_epoch:
            timesteps = run.once("early_time", choose_timesteps)

    # line 15: find the tickets with T_early
    state = rewind_point
    run.save_ticket(0, mask, state, args.rewinding_epoch)
    for level in range(args.sparsity_round):
        rewind(model, state, mask)
        optimizer = make_optimizer(model, args)  # momentum belongs to the weights just left behind
        epochs, checkpoint = range(args.rewinding_epoch, args.end_iter), run.checkpoint(f"level_{level:02d}")
        train(optimizer, mask, epochs, timesteps, level=level, checkpoint=checkpoint, observe=observe)
        mask = prune_by_magnitude(model, mask, args.prune_percent / 100, args.pruning_scope)
        state = state_after_pruning(model, rewind_point, args.rewind)
        run.save_ticket(level + 1, mask, state, args.rewinding_epoch)

    # line 16: train those that matter with T
    for level in args.evaluate_levels:
        mask, state, _ = load_fitting_ticket(run.ticket_path(level), model)
        rewind(model, state, mask)
        optimizer = make_optimizer(model, args)
        epochs, checkpoint = range(args.rewinding_epoch, args.end_iter), run.checkpoint(f"train_{level:02d}")
        train(optimizer, mask, epochs, args.timestep, phase="train", level=level, checkpoint=checkpoint)
        run.save_result(level, mask, model, data.test)
    run.report()


if __name__ == "__main__":
    main()
