"""Gradual magnitude pruning: one training in which the sparsity rises (Zhu & Gupta 2017), that leaves a ticket, too.

After --dense_epochs epochs prune the smallest weights after each epoch, until the sparsity is reached at --prune_until.
Then (a) train on to the end with that mask, in place; and (b) put the mask on the weights of epoch --dense_epochs, and
train it like any ticket. With --regrow dropped connections come back where the gradient is large (GraNet, Liu et al.,
NeurIPS 2021); with --early_time all up to --prune_until runs with fewer timesteps.

    python train_snn_gradual.py --dataset cifar10 --arch vgg16 --sparsity 98
"""

import copy
import math

from utils.data import balanced_part
from utils.early_time import EarlyTime, early_time_flags
from utils.experiment import script, start
from utils.flags import between, get_args, positive_int, whole
from utils.goal import goal_of, scope_flags, sparsity_flags
from utils.masks import dense_mask, rewind, sparsity
from utils.rewiring import drop_and_grow, replace_mask
from utils.scores import magnitude_mask
from utils.training import Trainer, make_optimizer


def gradual_flags(parser):
    flag = parser.section("gradual pruning")
    text = "epochs before the first pruning; the ticket starts from the weights after them"
    flag("--dense_epochs", whole, lambda f: f.end_iter // 15, "EPOCHS", text, shown="end_iter / 15")
    text = "epochs until the sparsity is reached"
    flag("--prune_until", positive_int, lambda f: math.ceil(0.6 * f.end_iter), "EPOCHS", text, shown="0.6 end_iter")
    flag("--regrow", between(0, 1), 0.0, "SHARE", "share of the survivors that the first pruning moves elsewhere")
    parser.check(lambda flags: parser.require_below(flags, "prune_until", "end_iter"))
    parser.check(lambda flags: parser.require_below(flags, "dense_epochs", "prune_until"))
    early_time_flags(parser, switch=True)
    parser.check(lambda flags: flags.early_time and parser.require_below(flags, "early_time_epoch", "prune_until"))


@script
def main(argv=None):
    args = get_args(__file__, "gradual", __doc__, argv, sparsity_flags, scope_flags, gradual_flags)
    goal = goal_of(args)
    run, data, model = start(args, goal.sparsity)
    trainer = Trainer(model, data, args)
    clock = EarlyTime(args.timestep, args.early_time_epoch, args.early_time_threshold, args.divergence)
    probe = balanced_part(data.train, args.early_time_samples)

    # search: the sparsity rises as a cubic of time, fast at first
    mask, rewind_point = dense_mask(model), copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, args)
    state = {"mask": mask, "rewind_point": rewind_point, "clock": clock}
    search = run.stage("search", goal.level, model=model, optimizer=optimizer, **state)
    for epoch in search.epochs(range(args.prune_until)):
        row = trainer.epoch(optimizer, mask, epoch, clock.timesteps, goal.level)
        if args.early_time:
            row |= clock.observe(epoch, trainer.predict(probe, args.timestep))
        done = (epoch + 1 - args.dense_epochs) / (args.prune_until - args.dense_epochs)
        if done == 0:
            rewind_point.update(copy.deepcopy(model.state_dict()))
        elif done > 0:
            target = goal.sparsity * (1 - (1 - done) ** 3)
            replace_mask(model, optimizer, mask, magnitude_mask(model, target, args.pruning_scope))
            if args.regrow:  # by the gradient of the epoch's last batch
                moved = args.regrow * (1 + math.cos(math.pi * done)) / 2
                drop_and_grow(model, optimizer, mask, moved, "gradient")
        search.commit(epoch, row | {"sparsity": 100 * sparsity(mask)})
    origin = {"level": goal.level, "dense": None}
    in_place = f"{goal.name}_in_place"
    ticket = run.ticket(goal.name, mask, rewind_point, epoch=args.dense_epochs, **origin)
    run.ticket(in_place, mask, model.state_dict(), epoch=args.prune_until, **origin)

    # (a) in place: train on
    rest = run.stage("in_place", goal.level, model=model, optimizer=optimizer, mask=mask)
    for epoch in rest.epochs(range(args.prune_until, args.end_iter)):
        rest.commit(epoch, trainer.epoch(optimizer, mask, epoch, args.timestep, goal.level))
    own = {"method": f"{args.method}-in_place", "label": args.label.replace("gradual", "gradual in place")}
    own["search_timesteps"] = search.rows[-1]["timesteps"]
    run.save_result(in_place, goal.level, mask, model, data.test, [search, rest], rest, **own)

    # (b) the ticket: train from the rewind point
    mask, weights = ticket
    rewind(model, weights, mask)
    optimizer = make_optimizer(model, args)
    train = run.stage("train", goal.level, model=model, optimizer=optimizer)
    for epoch in train.epochs(range(args.dense_epochs, args.end_iter)):
        train.commit(epoch, trainer.epoch(optimizer, mask, epoch, args.timestep, goal.level))
    run.save_result(goal.name, goal.level, mask, model, data.test, [search], train)
    run.finish()


if __name__ == "__main__":
    main()
