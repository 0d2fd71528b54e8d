"""IMP, EB, gradual pruning, short cycles and their Early-Time variants once more, as plain loops: what the scripts must
agree with, bit for bit.

Only the seeds of the draws, the images and their augmentation are those of the scripts.
"""

import copy
import math
from argparse import Namespace
from collections import namedtuple

import torch
from torch.nn import functional as F

from models import build_model
from utils.augment import augment, draw, normalise
from utils.training import effective_seed, generator

# a ticket and its network: the mask, the trained weights, their accuracy; the state and epoch that its training begins
# with, whether that state is kept unpruned, too; and the epochs and epochs x T of its search
Found = namedtuple("Found", "mask weights accuracy start first unpruned search")


def sorted_away(model, mask, fraction, scope):
    """The mask without the smallest weights; sorting is stable, so the first of equals goes first."""
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    entries = [(value, name, i) for name, p in weights.items() for i, value in enumerate(p.abs().flatten().tolist())]
    alive = {name: mask[name].flatten().tolist() for name in mask}
    entries = [(value, name, i) for value, name, i in entries if alive[name][i]]
    for layers in [set(weights)] if scope == "global" else [{name} for name in weights]:
        own = [entry for entry in entries if entry[1] in layers]
        for _, name, i in sorted(own, key=lambda entry: entry[0])[: round(fraction * len(own))]:
            alive[name][i] = False
    return {name: torch.tensor(alive[name]).view_as(p) for name, p in weights.items()}


def apart(a, b, kind):
    """The part of the weights that differs between two masks."""
    a, b = (torch.cat([m.flatten() for m in mask.values()]).tolist() for mask in (a, b))
    differing = sum(x != y for x, y in zip(a, b, strict=True))
    return differing / (len(a) if kind == "hamming" else sum(x or y for x, y in zip(a, b, strict=True)))


class Plain:
    """A network in training. ``args``: the ``args.json`` of the script's run."""

    def __init__(self, args, data):
        self.args, self.data = Namespace(**args), data
        torch.manual_seed(effective_seed(self.args))
        names = ("arch", "width", "neuron", "tau", "v_threshold", "surrogate_alpha", "batch_norm")
        self.model = build_model(channels=3, classes=10, **{name: args[name] for name in names})
        self.model.to(memory_format=torch.channels_last)  # as ``place`` does: other kernels round differently
        self.dense = {
            name: torch.ones_like(p, dtype=torch.bool) for name, p in self.model.named_parameters() if p.dim() > 1
        }
        self.early_time = self.args.timestep
        self.spent = []
        self.restart(self.state(), self.dense)

    def state(self):
        return copy.deepcopy(self.model.state_dict())

    def restart(self, state, mask):
        args = self.args
        self.model.load_state_dict(state)
        with torch.no_grad():
            for name, kept in mask.items():
                self.model.get_parameter(name)[~kept] = 0
        options = {"momentum": args.momentum, "weight_decay": args.weight_decay, "fused": True}
        self.optimizer = torch.optim.SGD(self.model.parameters(), args.learning_rate, **options)

    def inputs(self, images):
        spec = self.data.train.spec
        return normalise(images, torch.tensor(spec.mean), torch.tensor(spec.std))

    def epoch(self, epoch, timesteps, level, mask, rate_epoch=None, after_step=None):
        args, train = self.args, self.data.train
        rate_epoch = epoch if rate_epoch is None else rate_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate / 2 * (1 + math.cos(math.pi * rate_epoch / args.end_iter))
        self.spent.append(timesteps)
        order = torch.randperm(len(train), generator=generator(args, "shuffle", level, epoch))
        drawn = draw(train.spec.recipe, len(train), (32, 32), generator(args, "augment", level, epoch))
        self.model.train()
        for start in range(0, len(train), args.batch_size):
            batch = slice(start, start + args.batch_size)
            images, labels = train.images[order[batch]], train.labels[order[batch]]
            logits = self.model(self.inputs(augment(images, train.spec.recipe, drawn[batch])), timesteps)
            self.optimizer.zero_grad()
            F.cross_entropy(logits.reshape(-1, 10), labels.repeat(timesteps)).backward()
            self.optimizer.step()
            for name, kept in mask.items():
                self.model.get_parameter(name).data[~kept] = 0
            if after_step:
                after_step()

    def change(self, mask, new):
        """Another mask, in the middle of a training."""
        for name, kept in new.items():
            weight, gone = self.model.get_parameter(name), ~(mask[name] & kept)
            weight.data[gone] = 0
            self.optimizer.state[weight]["momentum_buffer"][gone] = 0
            mask[name] = kept

    def moved(self, mask, fraction, draws=None):
        """In each layer the smallest survivors give way to where the gradient is largest, or where it is drawn."""
        new = {}
        for name, kept in mask.items():
            weight = self.model.get_parameter(name)
            wishes = weight.grad if draws is None else torch.rand(weight.numel(), generator=draws)
            sizes, wishes = (t.abs().flatten().tolist() for t in (weight, wishes))
            alive = {i for i, one in enumerate(kept.flatten().tolist()) if one}
            count = round(fraction * len(alive))
            alive -= set(sorted(alive, key=lambda i: (sizes[i], i))[:count])
            others = sorted(set(range(len(sizes))) - alive, key=lambda i: (-wishes[i], i))
            new[name] = torch.tensor([i in alive for i in range(len(sizes))])
            new[name][others[:count]] = True
            new[name] = new[name].view_as(weight)
        return new

    def logits(self, split, timesteps):
        with torch.no_grad():
            return self.model.eval()(self.inputs(split.images), timesteps)

    def accuracy(self):
        right = self.logits(self.data.test, self.args.timestep).mean(0).argmax(1) == self.data.test.labels
        return 100 * right.sum().item() / len(right)

    def found(self, mask, start, first, search, unpruned=True):
        """The network as it is now."""
        return Found(mask, self.state(), self.accuracy(), start, first, unpruned, search)

    def cost(self, share=1):
        """Epochs and epochs x T so far; of the last epoch a share."""
        if not self.spent:
            return 0, 0
        return len(self.spent) - 1 + share, sum(self.spent[:-1]) + share * self.spent[-1]

    def choose_time(self, probe):
        """Eq. 1, divided by its value at two timesteps."""
        args, logits = self.args, self.logits(probe, self.args.timestep).double()
        final = logits.mean(0).softmax(1)
        divergences = {}
        for t in range(2, args.timestep):
            p = logits[:t].mean(0).softmax(1)
            divergences[t] = (p * (p / final).log()).sum(1).mean().item()
        close = [t for t, value in divergences.items() if value / divergences[2] < args.early_time_threshold]
        self.early_time = min(close, default=args.timestep)


def imp(args, data, probe=None):
    """IMP, with ``probe`` IMP + ET: per level that is reported, mask, final weights and accuracy."""
    plain = Plain(args, data)
    args, found, mask = plain.args, {}, plain.dense
    point = plain.state()
    for epoch in range(max(args.rewinding_epoch, args.early_time_epoch if probe else 0)):
        plain.epoch(epoch, plain.early_time, 0, {})
        if probe and epoch + 1 == args.early_time_epoch:
            plain.choose_time(probe)
        if epoch + 1 == args.rewinding_epoch:
            point = plain.state()

    def train(level, state, mask, timesteps):
        plain.restart(state, mask)
        for epoch in range(args.rewinding_epoch, args.end_iter):
            plain.epoch(
                epoch, timesteps, level, mask, rate_epoch=args.end_iter - 1 if level and args.rewind == "none" else None
            )

    def keep(level):
        name, first = f"level_{level:02d}", args.rewinding_epoch
        found[name] = plain.found(mask, state, first, search, unpruned=args.rewind == "weights")

    starts = [(point, mask, (0, 0))]
    for level in range(args.sparsity_round + 1):
        state, mask, search = starts[level]
        if not probe or level < args.sparsity_round:
            train(level, state, mask, plain.early_time)
            after = plain.state()
            if not probe:
                keep(level)
            smaller = sorted_away(plain.model, mask, args.prune_percent / 100, args.pruning_scope)
            starts.append((point if args.rewind == "weights" else after, smaller, plain.cost()))
    for level in args.evaluate_levels if probe else ():
        state, mask, search = starts[level]
        train(level, state, mask, args.timestep)
        keep(level)
    return found, plain.early_time


def eb(args, data, probe=None):
    """EB, with ``probe`` EB + ET."""
    plain = Plain(args, data)
    args, initial, masks = plain.args, plain.state(), []
    target = 1 - (1 - args.prune_percent / 100) ** args.sparsity_round
    for epoch in range(args.end_iter):
        plain.epoch(epoch, plain.early_time, 0, {})
        if probe and epoch + 1 == args.early_time_epoch:
            plain.choose_time(probe)
        masks.append(sorted_away(plain.model, plain.dense, target, args.pruning_scope))
        window = masks[-args.eb_window - 1 : -1]
        close = [apart(masks[-1], mask, args.eb_distance) < args.eb_tolerance for mask in window]
        if len(close) == args.eb_window and all(close):
            break
    search = plain.cost()
    plain.restart(initial, masks[-1])
    for epoch in range(args.end_iter):
        plain.epoch(epoch, args.timestep, args.sparsity_round, masks[-1])
    return {f"level_{args.sparsity_round:02d}": plain.found(masks[-1], initial, 0, search)}, plain.early_time


def gradual(args, data, probe=None):
    """Gradual pruning, with ``probe`` with Early-Time: the network trained in place, and the ticket's."""
    plain = Plain(args, data)
    args, mask, point = plain.args, dict(plain.dense), plain.state()
    level = args.sparsity_round
    wanted = args.sparsity / 100 if level is None else 1 - (1 - args.prune_percent / 100) ** level
    name = f"level_{level:02d}" if level is not None else f"sparsity_{args.sparsity:g}"
    for epoch in range(args.end_iter):
        if epoch == args.prune_until:
            pruned, search = plain.state(), plain.cost()
        plain.epoch(epoch, plain.early_time if epoch < args.prune_until else args.timestep, level, mask)
        if probe and epoch + 1 == args.early_time_epoch:
            plain.choose_time(probe)
        if epoch + 1 == args.dense_epochs:
            point = plain.state()
        if args.dense_epochs < epoch + 1 <= args.prune_until:
            time = (epoch + 1 - args.dense_epochs) / (args.prune_until - args.dense_epochs)
            plain.change(
                mask, sorted_away(plain.model, plain.dense, wanted * (1 - (1 - time) ** 3), args.pruning_scope)
            )
            if args.regrow:
                plain.change(mask, plain.moved(mask, args.regrow * (1 + math.cos(math.pi * time)) / 2))
    found = {f"{name}_in_place": plain.found(mask, pruned, args.prune_until, plain.cost(), unpruned=False)}
    plain.restart(point, mask)
    for epoch in range(args.dense_epochs, args.end_iter):
        plain.epoch(epoch, args.timestep, level, mask)
    found[name] = plain.found(mask, point, args.dense_epochs, search, unpruned=False)
    return found, plain.early_time


def short_cycles(args, data, probe=None):
    """Short-cycle IMP, with ``probe`` with Early-Time."""
    plain = Plain(args, data)
    args, mask, first, step = plain.args, dict(plain.dense), plain.args.rewinding_epoch, 0
    masks, point, costs = [plain.dense], plain.state(), [(0, 0)]
    steps = math.ceil(len(data.train) / args.batch_size)
    cycle = math.floor(args.cycle_epochs * steps + 1e-6)

    def prune():
        nonlocal step
        step += 1
        if step % cycle == 0 and len(masks) <= args.sparsity_round:
            plain.change(mask, sorted_away(plain.model, mask, args.prune_percent / 100, args.pruning_scope))
            masks.append(dict(mask))
            costs.append(plain.cost(((step - 1) % steps + 1) / steps))

    epoch = 0
    while len(masks) <= args.sparsity_round:
        plain.epoch(epoch, plain.early_time, 0, mask, min(epoch, first), prune if epoch >= first else None)
        epoch += 1
        if epoch == first:
            point = plain.state()
        if probe and epoch == args.early_time_epoch:
            plain.choose_time(probe)
    found = {}
    for level in args.evaluate_levels:
        plain.restart(point, masks[level])
        for epoch in range(first, args.end_iter):
            plain.epoch(epoch, args.timestep, level, masks[level])
        found[f"level_{level:02d}"] = plain.found(masks[level], point, first, costs[level])
    return found, plain.early_time
