"""Iterative magnitude pruning with late rewinding, searched with fewer timesteps (IMP + ET, Algorithm 1 of the paper).

After two epochs at T timesteps, take the fewest timesteps whose predictions are close to those of T. Train, prune and
rewind with those; then train the tickets that matter at T from the rewind point.

    python train_snn_earlyT_laterewindlth.py --dataset cifar10 --arch vgg16
"""

import copy

from utils.data import balanced_part
from utils.early_time import EarlyTime, early_time_flags
from utils.experiment import script, start
from utils.flags import get_args
from utils.goal import evaluation_flags, imp_flags, level_name, prunings_of
from utils.masks import dense_mask, rewind, state_after_pruning
from utils.scores import prune_by_magnitude
from utils.training import Trainer, make_optimizer


@script
def main(argv=None):
    args = get_args(__file__, "IMP + ET", __doc__, argv, imp_flags, evaluation_flags, early_time_flags)
    run, data, model = start(args)
    trainer = Trainer(model, data, args)
    unpruned = level_name(0) if args.rewind == "weights" else None  # the ticket that holds the same weights unpruned
    origin = {"epoch": args.rewinding_epoch, "rewind": args.rewind, "dense": unpruned}

    # the dense network: T_early after --early_time_epoch epochs, the rewind point after --rewinding_epoch
    clock = EarlyTime(args.timestep, args.early_time_epoch, args.early_time_threshold, args.divergence)
    probe = balanced_part(data.train, args.early_time_samples)
    rewind_point = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, args)
    dense = run.stage("dense", model=model, optimizer=optimizer, clock=clock, rewind_point=rewind_point)
    for epoch in dense.epochs(range(max(args.early_time_epoch, args.rewinding_epoch))):
        row = trainer.epoch(optimizer, None, epoch, clock.timesteps)
        row |= clock.observe(epoch, trainer.predict(probe, args.timestep))
        if epoch + 1 == args.rewinding_epoch:
            rewind_point.update(copy.deepcopy(model.state_dict()))
        dense.commit(epoch, row)
    mask, rewind_point = run.ticket(level_name(0), dense_mask(model), rewind_point, level=0, **origin)

    # line 15: find the tickets with T_early
    state, stages = rewind_point, [dense]
    for level, fraction in enumerate(prunings_of(args)):
        rewind(model, state, mask)
        optimizer = make_optimizer(model, args)  # momentum belongs to the weights just left behind
        lr_epoch = args.end_iter - 1 if args.rewind == "none" and level > 0 else None
        stage = run.stage("search", level, model=model, optimizer=optimizer, clock=clock)
        for epoch in stage.epochs(range(args.rewinding_epoch, args.end_iter)):
            row = trainer.epoch(optimizer, mask, epoch, clock.timesteps, level, lr_epoch)
            stage.commit(epoch, row | clock.observe(epoch, trainer.predict(probe, args.timestep)))
        stages.append(stage)
        mask = prune_by_magnitude(model, mask, fraction, args.pruning_scope)
        state = state_after_pruning(model, rewind_point, args.rewind)
        mask, state = run.ticket(level_name(level + 1), mask, state, level + 1, **origin)

    # line 16: train those that matter with T
    for level in args.evaluate_levels:
        mask, state = run.read_ticket(level_name(level))
        rewind(model, state, mask)
        optimizer = make_optimizer(model, args)
        lr_epoch = args.end_iter - 1 if args.rewind == "none" and level > 0 else None
        train = run.stage("train", level, model=model, optimizer=optimizer)
        for epoch in train.epochs(range(args.rewinding_epoch, args.end_iter)):
            train.commit(epoch, trainer.epoch(optimizer, mask, epoch, args.timestep, level, lr_epoch))
        search = stages[: level + 1] if level else []  # up to the training that its last pruning follows
        run.save_result(level_name(level), level, mask, model, data.test, search, train)
    run.finish()


if __name__ == "__main__":
    main()
