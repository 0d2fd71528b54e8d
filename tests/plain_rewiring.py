"""RigL, SET, Deep R, Grad R and ADMM once more as plain loops, see ``plain``. ERK's scores, one step of Deep R and one
round of ADMM are tested by themselves and called here; when, at which rates and from which weights is written out."""

import math

import torch
from plain import Plain, sorted_away

from utils.admm import Admm
from utils.rewiring import deep_rewiring, next_penalty
from utils.scores import erk_scores
from utils.training import generator


def name_and_share(args):
    """Of the ticket, and what is pruned."""
    if args.sparsity_round is None:
        return f"sparsity_{args.sparsity:g}", args.sparsity / 100
    return f"level_{args.sparsity_round:02d}", 1 - (1 - args.prune_percent / 100) ** args.sparsity_round


def rate_of(args, epoch):
    return args.learning_rate / 2 * (1 + math.cos(math.pi * epoch / args.end_iter))


def pruned_anywhere(scores, share):
    """The mask without a share of the entries, the lowest scores."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[: round(share * len(flat))]] = False
    parts = kept.split([score.numel() for score in scores.values()])
    return {n: part.view_as(scores[n]).clone() for n, part in zip(scores, parts, strict=True)}


def rigl(args, data, probe=None):
    """RigL, with ``--grow random`` SET."""
    plain = Plain(args, data)
    args, level = plain.args, args["sparsity_round"]
    name, share = name_and_share(args)
    state, draws, step = plain.state(), generator(args, "random"), 0
    if args.distribution == "erk":
        scores = erk_scores(plain.model, 1 - share, draws)
    else:
        scores = {n: torch.rand(m.shape, generator=draws) for n, m in plain.dense.items()}
    mask = pruned_anywhere(scores, share)
    last = args.update_until * args.end_iter * math.ceil(len(data.train) / args.batch_size)

    def change(draws):
        nonlocal step
        if step % args.update_every == 0 and 0 < step < last:
            fraction = args.drop_fraction / 2 * (1 + math.cos(math.pi * step / last))
            plain.change(mask, plain.moved(mask, fraction, draws if args.grow == "random" else None))
        step += 1

    plain.restart(state, mask)
    for epoch in range(args.end_iter):
        draws = generator(args, "after_step", level, epoch)
        plain.epoch(epoch, args.timestep, level, mask, after_step=lambda draws=draws: change(draws))
    return {name: plain.found(mask, state, 0, plain.cost())}, args.timestep


def deep_r(args, data, probe=None):
    plain = Plain(args, data)
    args, level = plain.args, args["sparsity_round"]
    name, share = name_and_share(args)
    state, mask = plain.state(), dict(plain.dense)
    signs = {n: torch.where(state[n] < 0, -1.0, 1.0) for n in mask}
    wanted = {(n,): m.numel() - round(share * m.numel()) for n, m in mask.items()}
    if not args.from_dense:
        draws = generator(args, "random")
        mask = pruned_anywhere({n: torch.rand(m.shape, generator=draws) for n, m in mask.items()}, share)
        wanted = {tuple(mask): sum(int(m.sum()) for m in mask.values())}
    plain.restart(state, mask)
    for epoch in range(args.end_iter):
        rate, draws = rate_of(args, epoch), generator(args, "after_step", level, epoch)
        sizes = rate * args.l1, rate * args.noise
        step = [plain.model, plain.optimizer, mask, signs, wanted, *sizes, draws]
        plain.epoch(epoch, args.timestep, level, mask, after_step=lambda step=step: deep_rewiring(*step))
    return {name: plain.found(mask, state, 0, plain.cost())}, args.timestep


def grad_r(args, data, probe=None):
    plain = Plain(args, data)
    args, state, names = plain.args, plain.state(), list(plain.dense)
    (name, share), weights = name_and_share(args), [plain.model.get_parameter(name) for name in plain.dense]
    signs = [torch.where(state[name] < 0, -1.0, 1.0) for name in names]

    def train(penalty, level, epochs):
        plain.model.load_state_dict(state)
        strengths, stretch = [state[name].abs() for name in names], args.end_iter / epochs
        others = [p for p in plain.model.parameters() if p.dim() == 1]
        groups = [{"params": others, "weight_decay": args.weight_decay}, {"params": weights}]
        plain.optimizer = torch.optim.SGD(groups, args.learning_rate, args.momentum, fused=True)
        for epoch in range(epochs):
            pull = rate_of(args, epoch * stretch) * penalty * stretch

            def follow(pull=pull):
                mean = min(0, math.log(2 * (1 - share)) / penalty)
                for i, (weight, sign) in enumerate(zip(weights, signs, strict=True)):
                    old = strengths[i]
                    strengths[i] = old + (sign * weight.data - old.relu() - pull * (old - mean).sign())
                    weight.data = sign * strengths[i].relu()

            plain.epoch(epoch, args.timestep, level, {}, rate_epoch=epoch * stretch, after_step=follow)
        return {name: weight.data != 0 for name, weight in zip(names, weights, strict=True)}

    sizes = sorted(size for name in names for size in state[name].abs().flatten().tolist())
    steps = math.ceil(len(data.train) / args.batch_size)
    penalty, tried = args.penalty, {}
    if penalty is None:
        penalty = sizes[math.ceil(share * len(sizes)) - 1] / (
            steps * sum(rate_of(args, epoch) for epoch in range(args.end_iter))
        )
        for trial in range(args.trials):
            mask = train(penalty, trial, args.trial_epochs)
            tried[penalty] = sum(int(m.sum()) for m in mask.values()) / len(sizes)
            penalty = next_penalty(tried, 1 - share)
    mask = train(penalty, 0, args.end_iter)
    return {name: plain.found(mask, state, 0, plain.cost())}, args.timestep


def admm(args, data, probe=None):
    plain = Plain(args, data)
    args, level = plain.args, args["sparsity_round"]
    name, share = name_and_share(args)
    for epoch in range(args.end_iter):
        plain.epoch(epoch, args.timestep, 0, {})
    rounds = Admm(plain.model, share, args.pruning_scope, args.rho)
    plain.restart(plain.state(), plain.dense)
    plain.optimizer.register_step_pre_hook(rounds.pull)
    for epoch in range(args.end_iter - args.admm_epochs, args.end_iter):
        plain.epoch(epoch, args.timestep, level, {})
        rounds.update()
    mask = sorted_away(plain.model, plain.dense, share, args.pruning_scope)
    state, search = plain.state(), plain.cost()
    plain.restart(state, mask)
    for epoch in range(args.end_iter):
        plain.epoch(epoch, args.timestep, level, mask)
    return {name: plain.found(mask, state, 0, search, unpruned=False)}, args.timestep
