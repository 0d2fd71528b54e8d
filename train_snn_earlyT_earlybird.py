"""Early-Bird tickets, searched with fewer timesteps (EB + ET, Algorithm 1 of the paper).

After two epochs at T timesteps, take the fewest timesteps whose predictions are close to those of T. Train the dense
network with those until its magnitude mask has settled; then prune the initial weights once and train them at T.

    python train_snn_earlyT_earlybird.py --dataset cifar10 --arch vgg16 --sparsity_round 4
"""

import copy

from utils.data import balanced_part
from utils.early_bird import EarlyBird, early_bird_flags
from utils.early_time import EarlyTime, early_time_flags
from utils.experiment import script, start
from utils.flags import get_args
from utils.goal import goal_of, scope_flags, sparsity_flags
from utils.masks import rewind
from utils.scores import magnitude_mask
from utils.training import Trainer, make_optimizer


@script
def main(argv=None):
    args = get_args(__file__, "EB + ET", __doc__, argv, sparsity_flags, scope_flags, early_bird_flags, early_time_flags)
    goal = goal_of(args)
    run, data, model = start(args, goal.sparsity)
    trainer = Trainer(model, data, args)

    # search: train the dense network until its mask has settled
    initial = copy.deepcopy(model.state_dict())
    bird = EarlyBird(args.eb_window, args.eb_tolerance, args.eb_distance)
    clock = EarlyTime(args.timestep, args.early_time_epoch, args.early_time_threshold, args.divergence)
    probe = balanced_part(data.train, args.early_time_samples)
    optimizer = make_optimizer(model, args)
    search = run.stage("search", model=model, optimizer=optimizer, bird=bird, clock=clock)
    for epoch in search.epochs(range(args.end_iter)):
        row = trainer.epoch(optimizer, None, epoch, clock.timesteps)
        row |= clock.observe(epoch, trainer.predict(probe, args.timestep))
        row |= bird.observe(magnitude_mask(model, goal.sparsity, args.pruning_scope))
        search.commit(epoch, row, last=bird.settled)

    # the ticket: the settled mask on the initial weights
    mask, weights = run.ticket(goal.name, bird.mask, initial, goal.level, epoch=0)
    rewind(model, weights, mask)
    optimizer = make_optimizer(model, args)
    train = run.stage("train", goal.level, model=model, optimizer=optimizer)
    for epoch in train.epochs(range(args.end_iter)):
        train.commit(epoch, trainer.epoch(optimizer, mask, epoch, args.timestep, goal.level))
    settled = search.rows[-1]["settled"]
    run.save_result(goal.name, goal.level, mask, model, data.test, [search], train, settled=settled)
    run.finish()


if __name__ == "__main__":
    main()
