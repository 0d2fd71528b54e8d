"""Short-cycle IMP: iterative magnitude pruning in one training, without rewinding between the levels.

Train to --rewinding_epoch, as IMP does. Train on from there at that epoch's learning rate, and every --cycle_epochs
epochs prune the smallest weights. Each level's mask on the rewind point is a ticket; the levels asked for are trained.
With --early_time the search runs with fewer timesteps.

    python train_snn_shortcycle.py --dataset cifar10 --arch vgg16
"""

import math

from utils.data import balanced_part
from utils.early_time import EarlyTime, early_time_flags
from utils.experiment import script, start
from utils.flags import get_args, positive, whole
from utils.goal import evaluation_flags, level_name, prunings_of, scope_flags, sparsity_flags
from utils.masks import dense_mask, rewind
from utils.rewiring import replace_mask
from utils.scores import prune_by_magnitude
from utils.training import Trainer, make_optimizer


def cycle_flags(parser):
    sparsity_flags(parser, default_round=None)
    scope_flags(parser)
    flag = parser.section("short cycles")
    text = "epochs before the search; the tickets start from the weights after them"
    flag("--rewinding_epoch", whole, 20, "EPOCHS", text, below="end_iter")
    text = "epochs between two prunings, also a fraction"
    flag("--cycle_epochs", positive, one_training, "EPOCHS", text, shown="the search takes --end_iter epochs in all")
    evaluation_flags(parser)
    early_time_flags(parser, switch=True)

    def leave_some_for_early_time(flags):
        epochs = flags.rewinding_epoch + flags.cycle_epochs * len(prunings_of(flags))
        if flags.early_time and flags.early_time_epoch >= epochs:
            text = f"must be less than the {epochs:g} epochs of the search, got {flags.early_time_epoch}"
            parser.error(f"argument --early_time_epoch: {text}")

    parser.check(leave_some_for_early_time)


def one_training(flags):
    return (flags.end_iter - flags.rewinding_epoch) / max(1, len(prunings_of(flags)))


@script
def main(argv=None):
    args = get_args(__file__, "short cycles", __doc__, argv, cycle_flags)
    prunings, first = prunings_of(args), args.rewinding_epoch
    run, data, model = start(args)
    trainer = Trainer(model, data, args)
    clock = EarlyTime(args.timestep, args.early_time_epoch, args.early_time_threshold, args.divergence)
    probe = balanced_part(data.train, args.early_time_samples)

    # the dense network: the rewind point after exactly --rewinding_epoch epochs
    optimizer = make_optimizer(model, args)
    dense = run.stage("dense", model=model, optimizer=optimizer, clock=clock)
    for epoch in dense.epochs(range(first)):
        row = trainer.epoch(optimizer, None, epoch, clock.timesteps)
        if args.early_time:
            row |= clock.observe(epoch, trainer.predict(probe, args.timestep))
        dense.commit(epoch, row)
    origin = {"epoch": first, "dense": level_name(0)}
    mask, rewind_point = run.ticket(level_name(0), dense_mask(model), model.state_dict(), level=0, **origin)

    # search: train on, and prune after every cycle; each level's mask is a ticket
    cycle = max(1, math.floor(args.cycle_epochs * trainer.steps + 1e-6))  # steps

    def prune(step, _):
        level, rest = divmod(step + 1 - first * trainer.steps, cycle)
        if rest == 0 and level <= len(prunings):
            smaller = prune_by_magnitude(model, mask, prunings[level - 1], args.pruning_scope)
            smaller, _ = run.ticket(level_name(level), smaller, rewind_point, level, **origin)
            replace_mask(model, optimizer, mask, smaller)

    search = run.stage("search", model=model, optimizer=optimizer, mask=mask, clock=clock)
    for epoch in search.epochs(range(first, first + math.ceil(len(prunings) * cycle / trainer.steps))):
        row = trainer.epoch(optimizer, mask, epoch, clock.timesteps, lr_epoch=first, after_step=prune)
        if args.early_time:
            row |= clock.observe(epoch, trainer.predict(probe, args.timestep))
        search.commit(epoch, row)

    # train those that matter
    for level in args.evaluate_levels:
        mask, weights = run.read_ticket(level_name(level))
        rewind(model, weights, mask)
        optimizer = make_optimizer(model, args)
        train = run.stage("train", level, model=model, optimizer=optimizer)
        for epoch in train.epochs(range(first, args.end_iter)):
            train.commit(epoch, trainer.epoch(optimizer, mask, epoch, args.timestep, level))
        until = first + level * cycle / trainer.steps if level else 0  # what comes later is for other levels
        stages = [dense, search]
        run.save_result(level_name(level), level, mask, model, data.test, stages, train, until=until)
    run.finish()


if __name__ == "__main__":
    main()
