"""Iterative magnitude pruning (IMP) with late rewinding (sections 3.1 and 4.2 of the paper).

Train to convergence, prune the smallest 25 % of the surviving weights, set the survivors back to what they were after
epoch 20, and repeat. Every level yields a ticket and its accuracy; all of it is 15 trainings with 14 prunings between.

    python train_snn_laterewindlth.py --dataset cifar10 --arch vgg16
"""

from utils.experiment import script, start
from utils.flags import get_args
from utils.goal import imp_flags, level_name, prunings_of
from utils.masks import dense_mask, rewind, state_after_pruning
from utils.scores import prune_by_magnitude
from utils.training import Trainer, make_optimizer


@script
def main(argv=None):
    args = get_args(__file__, "IMP", __doc__, argv, imp_flags)
    run, data, model = start(args)
    trainer = Trainer(model, data, args)
    unpruned = level_name(0) if args.rewind == "weights" else None  # the ticket that holds the same weights unpruned
    origin = {"epoch": args.rewinding_epoch, "rewind": args.rewind, "dense": unpruned}

    # the rewind point: the dense network after exactly --rewinding_epoch epochs
    optimizer = make_optimizer(model, args)
    dense = run.stage("dense", model=model, optimizer=optimizer)
    for epoch in dense.epochs(range(args.rewinding_epoch)):
        dense.commit(epoch, trainer.epoch(optimizer, None, epoch, args.timestep))
    mask, rewind_point = run.ticket(level_name(0), dense_mask(model), model.state_dict(), level=0, **origin)

    # every level, the dense one too, starts from the rewind point (--rewind) and follows the same schedule
    state, stages = rewind_point, [dense]
    for level, fraction in enumerate([0.0, *prunings_of(args)]):
        if level > 0:
            mask = prune_by_magnitude(model, mask, fraction, args.pruning_scope)
            state = state_after_pruning(model, rewind_point, args.rewind)
            mask, state = run.ticket(level_name(level), mask, state, level, **origin)
        rewind(model, state, mask)
        optimizer = make_optimizer(model, args)  # momentum belongs to the weights just left behind
        lr_epoch = args.end_iter - 1 if args.rewind == "none" and level > 0 else None
        stage = run.stage("search", level, model=model, optimizer=optimizer)
        for epoch in stage.epochs(range(args.rewinding_epoch, args.end_iter)):
            stage.commit(epoch, trainer.epoch(optimizer, mask, epoch, args.timestep, level, lr_epoch))
        search = stages if level else []  # the dense network needs none
        run.save_result(level_name(level), level, mask, model, data.test, search, train=stage)
        stages.append(stage)
    run.finish()


if __name__ == "__main__":
    main()
