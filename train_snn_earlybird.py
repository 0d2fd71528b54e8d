"""Early-Bird tickets (EB, section 3.2 of the paper).

Train the dense network and take its magnitude mask after every epoch. When the mask has hardly changed over the last
q = 5 epochs it is the ticket: back to the initial weights, prune once, and train that.

    python train_snn_earlybird.py --dataset cifar10 --arch vgg16 --sparsity_round 4
"""

import copy

from utils.early_bird import EarlyBird, early_bird_flags
from utils.experiment import script, start
from utils.flags import get_args
from utils.goal import goal_of, scope_flags, sparsity_flags
from utils.masks import rewind
from utils.scores import magnitude_mask
from utils.training import Trainer, make_optimizer


@script
def main(argv=None):
    args = get_args(__file__, "EB", __doc__, argv, sparsity_flags, scope_flags, early_bird_flags)
    goal = goal_of(args)
    run, data, model = start(args, goal.sparsity)
    trainer = Trainer(model, data, args)

    # search: train the dense network until its mask has settled
    initial = copy.deepcopy(model.state_dict())
    bird = EarlyBird(args.eb_window, args.eb_tolerance, args.eb_distance)
    optimizer = make_optimizer(model, args)
    search = run.stage("search", model=model, optimizer=optimizer, bird=bird)
    for epoch in search.epochs(range(args.end_iter)):
        row = trainer.epoch(optimizer, None, epoch, args.timestep)
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
