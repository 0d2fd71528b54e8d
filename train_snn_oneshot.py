"""Baselines and controls: one ticket, made once, then trained at T timesteps (Figs. 4, 6, 9 and 10 of the paper).

The mask is random, SNIP's, the magnitude mask of a network trained to the end at T_PRE timesteps, or a saved ticket's.
The controls keep the mask and draw fresh weights, or keep the weights and shuffle the mask within each layer.

    python train_snn_oneshot.py --ticket random --dataset cifar10 --arch vgg16 --sparsity_round 8
"""

import copy
from functools import partial

import torch

from models import build_model
from utils.data import balanced_part, load_data
from utils.errors import one_line_errors
from utils.flags import TICKETS, get_args
from utils.masks import dense_mask, drop_lowest, magnitude_mask, random_scores, rewind, shuffle_layers, sparsity_after
from utils.runs import Run
from utils.snip import snip_scores
from utils.tickets import load_fitting_ticket
from utils.training import fit, make_optimizer, place


@one_line_errors
def main(argv=None):
    args = get_args("oneshot", __doc__, argv)
    run = Run(args)
    if run.finished:
        return run.report_finished()
    data = load_data(args)
    torch.manual_seed(run.seed)
    build = partial(build_model, args.arch, data.channels, data.classes, args.neuron, args.width, args.batch_norm)
    model = place(build(args.compile), args)
    saved = None if args.ticket in TICKETS else load_fitting_ticket(args.ticket, model)
    run.begin(data)
    train = partial(fit, model, data, args, run=run)

    # the ticket: a mask, and weights that have been trained up to some epoch
    dense, target = dense_mask(model), sparsity_after(args.sparsity_round, args.prune_percent / 100)
    weights, first, level, source = copy.deepcopy(model.state_dict()), 0, args.sparsity_round, None
    if args.ticket == "random":
        scope = "local" if args.random_scope == "layer" else "global"
        mask = drop_lowest(random_scores(model), dense, target, scope)
    elif args.ticket == "snip":
        samples = balanced_part(data.train, args.snip_samples)
        mask = drop_lowest(snip_scores(model, samples, args.timestep), dense, target, args.pruning_scope)
    elif args.ticket == "magnitude":
        optimizer = make_optimizer(model, args)
        train(optimizer, dense, range(args.end_iter), args.search_timestep, checkpoint=run.checkpoint("search"))
        mask = magnitude_mask(model, target, args.pruning_scope)
    else:
        mask, weights, source = saved
        first, level = source["epoch"], source["level"]

    if args.control == "shuffle":
        mask = shuffle_layers(mask)
    elif args.control == "reinit":
        weights, first = build().to(args.device).state_dict(), 0

    run.save_ticket(level, mask, weights, first, source)
    rewind(model, weights, mask)
    optimizer = make_optimizer(model, args)
    epochs, checkpoint = range(first, args.end_iter), run.checkpoint("train")
    train(optimizer, mask, epochs, args.timestep, phase="train", level=level, checkpoint=checkpoint)
    run.save_result(level, mask, model, data.test)
    run.report()


if __name__ == "__main__":
    main()
