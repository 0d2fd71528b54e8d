"""RigL: a network that is sparse from the start and moves its connections while it trains (Evci et al., ICML 2020).

Every 100 steps each layer drops its smallest weights and grows as many where the dense gradient is largest, ever fewer,
until three quarters of the training are done. With --grow random it is SET (Mocanu et al. 2018).

    python train_snn_rigl.py --dataset cifar10 --arch vgg16 --sparsity 98
"""

import math

from utils.data import balanced_part
from utils.experiment import script, start
from utils.flags import between, get_args, positive_int
from utils.goal import goal_of, sparsity_flags
from utils.masks import dense_mask, drop_lowest, rewind
from utils.rewiring import GROWTHS, drop_and_grow
from utils.scores import erk_scores, random_scores, snip_scores
from utils.training import Trainer, generator, make_optimizer

SNIP_SAMPLES = 1000  # training images, as many as the one-shot script takes by default


def rigl_flags(parser):
    flag = parser.section("RigL")
    text = "densities of the layers, kept throughout; snip starts with SNIP's mask"
    flag("--distribution", ("erk", "uniform", "global", "snip"), "erk", None, text)
    flag("--grow", GROWTHS, "gradient", None, "where the gradient is largest, or at random (SET)")
    flag("--update_every", positive_int, 100, "STEPS", "steps between two changes of the mask")
    flag("--update_until", between(0, 1), 0.75, "SHARE", "share of the training after which the mask is fixed")
    flag("--drop_fraction", between(0, 1), 0.3, "SHARE", "share of a layer's survivors that the first change moves")

    def name_the_run(flags):
        if flags.grow == "random":
            flags.method, flags.label = f"{flags.method}-random", "SET"

    parser.check(name_the_run)


@script
def main(argv=None):
    args = get_args(__file__, "RigL", __doc__, argv, sparsity_flags, rigl_flags)
    goal = goal_of(args)
    run, data, model = start(args, goal.sparsity)
    trainer = Trainer(model, data, args)

    # the start: a random mask, or SNIP's, on the initial weights
    draws = generator(args, "random")
    if args.distribution == "snip":
        scores = snip_scores(model, balanced_part(data.train, SNIP_SAMPLES), args.timestep)
    elif args.distribution == "erk":
        scores = erk_scores(model, 1 - goal.sparsity, draws)
    else:
        scores = random_scores(model, draws)
    scope = "local" if args.distribution == "uniform" else "global"
    mask = drop_lowest(scores, dense_mask(model), goal.sparsity, scope)
    mask, initial = run.ticket("start", mask, model.state_dict(), goal.level, epoch=0)
    rewind(model, initial, mask)
    optimizer = make_optimizer(model, args)
    last = args.update_until * args.end_iter * trainer.steps
    if args.update_every >= last:
        print(f"note: the mask never changes: --update_every is {args.update_every}, changes end at step {last:g}")

    def change_mask(step, generator):
        if 0 < step < last and step % args.update_every == 0:
            fraction = args.drop_fraction * (1 + math.cos(math.pi * step / last)) / 2
            drop_and_grow(model, optimizer, mask, fraction, args.grow, generator)

    train = run.stage("train", goal.level, model=model, optimizer=optimizer, mask=mask)
    for epoch in train.epochs(range(args.end_iter)):
        row = trainer.epoch(optimizer, mask, epoch, args.timestep, goal.level, after_step=change_mask)
        train.commit(epoch, row)

    # the ticket: the last mask on the initial weights
    mask, _ = run.ticket(goal.name, mask, run.read_ticket("initial")[1], goal.level, epoch=0)
    run.save_result(goal.name, goal.level, mask, model, data.test, search=[train], train=train)
    run.finish()


if __name__ == "__main__":
    main()
