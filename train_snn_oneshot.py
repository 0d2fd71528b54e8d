"""Baselines and controls: one ticket, made once, then trained at T timesteps (Figs. 4, 6, 9 and 10 of the paper).

The mask is random, random with a density for each layer (Erdos-Renyi-Kernel, ERK), SNIP's, the magnitude mask of a
network trained to the end at T_PRE timesteps, or a saved ticket's.
The controls keep the mask and draw fresh weights, or keep the weights and shuffle the mask within each layer.

    python train_snn_oneshot.py --ticket random --dataset cifar10 --arch vgg16 --sparsity_round 8
"""

import hashlib
from pathlib import Path

import torch

from models import build_model
from utils.data import balanced_part
from utils.experiment import script, start
from utils.files import InputError
from utils.flags import count, get_args, positive_int
from utils.goal import goal_for, goal_of, scope_flags, sparsity_flags
from utils.masks import dense_mask, drop_lowest, rewind, shuffle_layers, sparsity
from utils.scores import erk_scores, magnitude_mask, random_scores, snip_scores
from utils.tickets import load_dense_weights, load_fitting_ticket, load_ticket
from utils.training import Trainer, generator, make_optimizer

LABELS = {"random": "random", "erk": "ERK", "snip": "SNIP", "magnitude": "magnitude"}  # of the kinds of ticket
CONTROLS = ("none", "reinit", "shuffle")
SPARSITY = {"--sparsity", "--sparsity_round", "--prune_percent", "--pruning_scope"}


def oneshot_flags(parser):
    flag = parser.section("one-shot ticket")
    flag("--ticket", str, "random", f"{{{','.join(LABELS)},PATH}}", "what the mask comes from; PATH is a saved ticket")
    flag("--control", CONTROLS, "none", None, "fresh weights with its mask, or a mask shuffled in each layer")
    flag("--random_scope", ("global", "layer"), "global", None, "random: prune anywhere, or every layer alike")
    flag("--snip_samples", positive_int, 1000, "N", "snip: class-balanced training images for the gradient, at most")
    flag("--search_timestep", count, lambda flags: flags.timestep, "T_PRE", "magnitude: T of the training", shown="T")
    parser.only_with("--random_scope", "--ticket", "random")
    parser.only_with("--snip_samples", "--ticket", "snip")
    parser.only_with("--search_timestep", "--ticket", "magnitude")

    def name_the_run(flags):
        kind = flags.ticket if flags.ticket in LABELS else "transfer"
        control = "" if flags.control == "none" else flags.control
        flags.method = "-".join(filter(None, [flags.method, kind, control]))
        flags.label = " ".join(filter(None, [LABELS.get(kind, kind), control]))
        if kind in ("random", "erk") and "--pruning_scope" in parser.given:
            parser.error(f"argument --pruning_scope: not with --ticket {kind}, which ranks no weights")
        if kind == "transfer":
            for name in sorted(parser.given & SPARSITY):
                parser.error(f"argument {name}: not with a saved ticket")
            if not Path(flags.ticket).is_file():
                text = f"choose from {', '.join(LABELS)}, or name a ticket's file, which {flags.ticket!r} is not"
                parser.error(f"argument --ticket: {text}")
            if Path(flags.ticket).absolute().parent.name == "networks":
                parser.error(f"argument --ticket: {flags.ticket} is a trained network: tickets lie in tickets/")
            flags.ticket_checksum = hashlib.sha256(Path(flags.ticket).read_bytes()).hexdigest()[:16]

    parser.check(name_the_run)


@script
def main(argv=None):
    args = get_args(__file__, "one-shot", __doc__, argv, sparsity_flags, scope_flags, oneshot_flags)
    goal, first, lr_epoch = goal_of(args), 0, None
    if args.ticket not in LABELS:
        mask, _, args.ticket_origin = load_ticket(args.ticket)
        first = args.ticket_origin["epoch"] if args.control != "reinit" else 0
        if first >= args.end_iter:
            raise InputError(
                f"argument --end_iter: must be more than {first}, the epoch that {args.ticket} starts with"
            )
        goal = goal_for(args.ticket_origin["level"], sparsity(mask))

    def read_saved(model):
        mask, weights, origin = load_fitting_ticket(args.ticket, model)
        return mask, load_dense_weights(args.ticket, model) if args.control == "shuffle" else weights, origin

    run, data, model = start(args, goal.sparsity, check=None if args.ticket in LABELS else read_saved)
    trainer = Trainer(model, data, args)

    # the ticket: a mask, and weights that have been trained up to some epoch
    dense, weights, search = dense_mask(model), model.state_dict(), []
    if args.ticket == "random":
        scores = random_scores(model, generator(args, "random"))
        mask = drop_lowest(scores, dense, goal.sparsity, "local" if args.random_scope == "layer" else "global")
    elif args.ticket == "erk":
        mask = drop_lowest(erk_scores(model, 1 - goal.sparsity, generator(args, "random")), dense, goal.sparsity)
    elif args.ticket == "snip":
        scores = snip_scores(model, balanced_part(data.train, args.snip_samples), args.timestep)
        mask = drop_lowest(scores, dense, goal.sparsity, args.pruning_scope)
    elif args.ticket == "magnitude":
        weights = run.read_ticket("initial")[1]
        optimizer = make_optimizer(model, args)
        search = [run.stage("search", model=model, optimizer=optimizer)]
        for epoch in search[0].epochs(range(args.end_iter)):
            search[0].commit(epoch, trainer.epoch(optimizer, None, epoch, args.search_timestep))
        mask = magnitude_mask(model, goal.sparsity, args.pruning_scope)
    else:
        mask, weights, origin = read_saved(model)
        if origin.get("rewind") == "none":  # it is fine-tuned
            lr_epoch = args.end_iter - 1

    if args.control == "shuffle":
        mask = shuffle_layers(mask, generator(args, "control"))
    elif args.control == "reinit":
        torch.manual_seed(generator(args, "control").initial_seed())
        weights, lr_epoch = build_model(**run.network).to(args.device).state_dict(), None

    unpruned = "initial" if args.ticket in LABELS and args.control != "reinit" else None  # the file that holds them
    mask, weights = run.ticket(goal.name, mask, weights, goal.level, first, dense=unpruned)
    rewind(model, weights, mask)
    optimizer = make_optimizer(model, args)
    train = run.stage("train", goal.level, model=model, optimizer=optimizer)
    for epoch in train.epochs(range(first, args.end_iter)):
        train.commit(epoch, trainer.epoch(optimizer, mask, epoch, args.timestep, goal.level, lr_epoch))
    run.save_result(goal.name, goal.level, mask, model, data.test, search, train)
    run.finish()


if __name__ == "__main__":
    main()
