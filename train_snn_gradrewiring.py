"""Grad R: connections come and go by gradients of hidden strengths (Chen et al., IJCAI 2021).

A weight is a fixed sign times a strength where that is positive, else 0. Strengths start as the dense network's and
follow the dense gradient also where they are negative, so a connection can come back; a prior pulls all of them down.
How sparse the network gets depends on the prior's --penalty; without one, short trainings look for it.

    python train_snn_gradrewiring.py --dataset cifar10 --arch vgg16 --sparsity 95
"""

import math

import torch

from utils.experiment import script, start
from utils.flags import get_args, positive, positive_int
from utils.goal import goal_of, sparsity_flags
from utils.masks import prunable, sparsity, surviving
from utils.rewiring import gradient_rewiring, next_penalty, signs_of
from utils.scores import magnitude_scores
from utils.training import Trainer, learning_rate, make_optimizer


def grad_r_flags(parser):
    flag = parser.section("Grad R")
    text = "what the prior takes from each strength, per unit of learning rate"
    flag("--penalty", positive, None, "ALPHA", text, shown="searched")
    flag("--trials", positive_int, 5, "N", "trainings that search for the penalty of the sparsity")
    text = "epochs of a trial"
    flag("--trial_epochs", positive_int, lambda f: max(1, f.end_iter // 10), "EPOCHS", text, shown="end_iter / 10")

    def check(flags):
        for name in sorted(parser.given & {"--trials", "--trial_epochs"}) if flags.penalty is not None else ():
            parser.error(f"argument {name}: not with --penalty")

    parser.check(check)


@script
def main(argv=None):
    args = get_args(__file__, "Grad R", __doc__, argv, sparsity_flags, grad_r_flags)
    goal = goal_of(args)
    run, data, model = start(args, goal.sparsity)
    trainer = Trainer(model, data, args)
    initial, signs, weights = run.read_ticket("initial")[1], signs_of(model), prunable(model)

    def train_with(penalty, phase, level, epochs):
        """Train from the initial weights; the whole schedule of rates passes in so many epochs."""
        model.load_state_dict(initial)
        strengths = magnitude_scores(model)
        optimizer = make_optimizer(model, args, undecayed=weights.values())
        stretch = args.end_iter / epochs  # the fewer steps, the stronger the pull of each
        mean = min(0.0, math.log(2 * (1 - goal.sparsity)) / penalty)  # of the prior for that sparsity

        def rewire(step, generator):
            rate = learning_rate(args, step // trainer.steps * stretch)
            gradient_rewiring(model, strengths, signs, rate * penalty * stretch, mean)

        stage = run.stage(phase, level, model=model, optimizer=optimizer, strengths=strengths)
        for epoch in stage.epochs(range(epochs)):
            row = trainer.epoch(optimizer, None, epoch, args.timestep, level, epoch * stretch, after_step=rewire)
            stage.commit(epoch, row | {"penalty": penalty, "sparsity": 100 * sparsity(surviving(model))})
        return stage

    # search: short trainings, each with the penalty that those before it point to; the first is that of no gradients
    penalty, search, tried = args.penalty, [], {}
    if penalty is None:
        sizes = torch.cat([strength.flatten() for strength in magnitude_scores(model).values()])
        rates = trainer.steps * sum(learning_rate(args, epoch) for epoch in range(args.end_iter))
        penalty = sizes.kthvalue(max(1, math.ceil(goal.sparsity * len(sizes)))).values.item() / rates
        for trial in range(args.trials):
            search.append(train_with(penalty, "search", trial, args.trial_epochs))
            tried[penalty] = 1 - search[-1].rows[-1]["sparsity"] / 100
            penalty = next_penalty(tried, 1 - goal.sparsity)

    # train; the ticket is what is left at the end, with the initial weights
    stage = train_with(penalty, "train", None, args.end_iter)
    mask, _ = run.ticket(goal.name, surviving(model), initial, None, epoch=0)
    run.save_result(goal.name, None, mask, model, data.test, [*search, stage], stage, penalty=penalty)
    run.finish()


if __name__ == "__main__":
    main()
