"""Deep R: a network with a fixed number of connections that come and go while it trains (Bellec et al., ICLR 2018).

Every connection has a sign for good. After each step an l1 penalty and noise act on the active ones; those whose weight
changes its sign go dormant, and as many dormant ones, drawn at random, take their place. --from_dense is the variant
behind Table 2 of the paper: it starts dense, has no noise, and stops pruning a layer at the wanted sparsity.

    python train_snn_deeprewiring.py --dataset cifar10 --arch vgg16 --sparsity 98
"""

from utils.experiment import script, start
from utils.flags import get_args, not_negative
from utils.goal import goal_of, scope_flags, sparsity_flags
from utils.masks import apply_mask, dense_mask, drop_lowest
from utils.rewiring import deep_rewiring, signs_of
from utils.scores import random_scores
from utils.training import Trainer, generator, learning_rate, make_optimizer


def deep_r_flags(parser):
    flag = parser.section("Deep R")
    flag("--l1", not_negative, 1e-5, "L1", "penalty on the size of each active weight, per unit of learning rate")
    flag("--noise", not_negative, 1e-5, "SIGMA", "standard deviation of a step's noise, per unit of learning rate")
    flag("--from_dense", bool, False, None, "start dense and prune each layer to the sparsity at most, without noise")

    def name_the_run(flags):
        if flags.from_dense:
            for name in sorted(parser.given & {"--noise", "--pruning_scope"}):
                parser.error(f"argument {name}: not with --from_dense")
            flags.method, flags.label = f"{flags.method}-dense", f"{flags.label} from dense"
            flags.noise, flags.pruning_scope = 0.0, "local"

    parser.check(name_the_run)


@script
def main(argv=None):
    args = get_args(__file__, "Deep R", __doc__, argv, sparsity_flags, scope_flags, deep_r_flags)
    goal = goal_of(args)
    run, data, model = start(args, goal.sparsity)
    trainer = Trainer(model, data, args)

    # the start: random connections of the initial network; their number is fixed, in all or in each layer
    signs, dense = signs_of(model), dense_mask(model)
    sparse = drop_lowest(random_scores(model, generator(args, "random")), dense, goal.sparsity, args.pruning_scope)
    groups = [tuple(sparse)] if args.pruning_scope == "global" else [(name,) for name in sparse]
    least = {names: sum(int(sparse[name].count_nonzero()) for name in names) for names in groups}
    mask, _ = run.ticket("start", dense if args.from_dense else sparse, model.state_dict(), None, epoch=0)
    apply_mask(model, mask)
    optimizer = make_optimizer(model, args)

    def rewire(step, generator):
        rate = learning_rate(args, step // trainer.steps)
        deep_rewiring(model, optimizer, mask, signs, least, rate * args.l1, rate * args.noise, generator)

    train = run.stage("train", goal.level, model=model, optimizer=optimizer, mask=mask)
    for epoch in train.epochs(range(args.end_iter)):
        train.commit(epoch, trainer.epoch(optimizer, mask, epoch, args.timestep, goal.level, after_step=rewire))

    # the ticket: the last connections with the initial weights
    mask, _ = run.ticket(goal.name, mask, run.read_ticket("initial")[1], goal.level, epoch=0)
    run.save_result(goal.name, goal.level, mask, model, data.test, search=[train], train=train)
    run.finish()


if __name__ == "__main__":
    main()
