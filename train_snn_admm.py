"""ADMM: train dense, pull the weights towards their sparse projection, prune, and train on (Deng et al., TNNLS 2021).

After the dense training each round is an epoch with the penalty rho/2 |W - Z + U|^2; then Z becomes the largest weights
of W + U, and U gathers what is left between W and Z. In the end the network is pruned to the sparsity and trained once
more, from the weights that it has.

    python train_snn_admm.py --dataset cifar10 --arch vgg16 --sparsity 90
"""

from utils.admm import Admm
from utils.experiment import script, start
from utils.flags import get_args, positive, positive_int
from utils.goal import goal_of, scope_flags, sparsity_flags
from utils.masks import rewind
from utils.scores import magnitude_mask
from utils.training import Trainer, make_optimizer


def admm_flags(parser):
    flag = parser.section("ADMM")
    flag("--rho", positive, 1e-2, "RHO", "weight of the penalty")
    text = "epochs with the penalty, at the rates of the last epochs of the dense training"
    default = "a fifth of --end_iter"
    flag("--admm_epochs", positive_int, lambda f: max(1, f.end_iter // 5), "EPOCHS", text, shown=default)

    def check(flags):
        if flags.admm_epochs > flags.end_iter:
            text = f"must be at most --end_iter, {flags.end_iter}; got {flags.admm_epochs}"
            parser.error(f"argument --admm_epochs: {text}")

    parser.check(check)


@script
def main(argv=None):
    args = get_args(__file__, "ADMM", __doc__, argv, sparsity_flags, scope_flags, admm_flags)
    goal = goal_of(args)
    run, data, model = start(args, goal.sparsity)
    trainer = Trainer(model, data, args)

    # a dense training
    optimizer = make_optimizer(model, args)
    dense = run.stage("dense", model=model, optimizer=optimizer)
    for epoch in dense.epochs(range(args.end_iter)):
        dense.commit(epoch, trainer.epoch(optimizer, None, epoch, args.timestep))

    # rounds of W, Z and U
    admm = Admm(model, goal.sparsity, args.pruning_scope, args.rho)
    optimizer = make_optimizer(model, args)
    optimizer.register_step_pre_hook(admm.pull)
    state = {"target": admm.target, "dual": admm.dual}
    rounds = run.stage("search", goal.level, model=model, optimizer=optimizer, **state)
    for epoch in rounds.epochs(range(args.end_iter - args.admm_epochs, args.end_iter)):
        row = trainer.epoch(optimizer, None, epoch, args.timestep, goal.level)
        rounds.commit(epoch, row | {"residual": admm.update()})

    # the ticket: pruned, it keeps its weights
    mask = magnitude_mask(model, goal.sparsity, args.pruning_scope)
    origin = {"epoch": 0, "rewind": "lr", "dense": None}
    mask, state = run.ticket(goal.name, mask, model.state_dict(), goal.level, **origin)
    rewind(model, state, mask)
    optimizer = make_optimizer(model, args)
    train = run.stage("train", goal.level, model=model, optimizer=optimizer)
    for epoch in train.epochs(range(args.end_iter)):
        train.commit(epoch, trainer.epoch(optimizer, mask, epoch, args.timestep, goal.level))
    run.save_result(goal.name, goal.level, mask, model, data.test, [dense, rounds], train)
    run.finish()


if __name__ == "__main__":
    main()
