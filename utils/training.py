"""Training and evaluation: everything a script calls that is not its method."""

import math
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from . import distributed, machine
from .data import Data, Split
from .engine import Graphed
from .files import InputError
from .masks import Mask, prunable

EVALUATION_BATCH = {"cpu": 100, "cuda": 500}  # images of 32x32; on a CPU larger ones leave its caches and are slower
AfterStep = Callable[[int, torch.Generator], None]


class DivergedError(Exception):
    """The training loss or the weights are no longer finite. Exit code 1."""


def effective_seed(args) -> int:
    """What ``--seed`` and ``--round`` come to."""
    return int(np.random.SeedSequence([args.seed, args.round]).generate_state(1)[0])


def generator(args, purpose: str, level: int | None = 0, epoch: int = 0) -> torch.Generator:
    """CPU generator of all that is drawn for one purpose at a level and epoch. It depends on ``--seed``, ``--round``
    and these three alone, so a run that was stopped draws what it would have drawn."""
    words = [effective_seed(args), zlib.crc32(purpose.encode()), level or 0, epoch]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def place(model: nn.Module, args) -> nn.Module:
    """Move a network to ``args.device``; with ``args.channels_last``, the kernels of its convolutions have the channels
    innermost in memory, and its activations follow. Where the flag was left open, that is so if the device can do it.

    Raises:
        InputError: it was asked for, and the device cannot.
    """
    possible = machine.takes_channels_last(model, args.device)
    if args.channels_last and not possible:
        raise InputError(
            "argument --channels_last: torch's CPU kernels can crash with strided 1x1 convolutions of fewer than "
            f"{machine.VECTOR} channels, which this network has: leave it out, or use a larger --width"
        )
    if args.channels_last is None:
        args.channels_last = possible
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return model.to(args.device, memory_format=layout)


def make_optimizer(model: nn.Module, args, undecayed: Iterable[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """A fresh optimizer, which remembers nothing. Weight decay (section 4.1) acts on all parameters, as in the official
    code, except ``undecayed``; with ``args.decay_kernels_only`` only on what can be pruned, so not on biases and batch
    norm."""
    rate, decay = args.learning_rate, args.weight_decay
    free = {id(parameter) for parameter in undecayed}
    if args.decay_kernels_only:
        free |= {id(parameter) for parameter in model.parameters() if parameter.dim() < 2}
    groups = [{"params": [p for p in model.parameters() if id(p) not in free]}]
    groups += [{"params": [p for p in model.parameters() if id(p) in free], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "adam":
        return torch.optim.Adam(groups, rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(groups, rate, args.momentum, weight_decay=decay, fused=True)


def learning_rate(args, epoch: int) -> float:
    """Learning rate of an absolute epoch, 0 .. ``args.end_iter`` - 1; every level follows the same schedule.

    ``cosine`` falls from ``args.learning_rate`` and would reach 0 at ``end_iter``; ``step`` divides by 10 when half
    and when three quarters of the epochs are done.
    """
    if args.scheduler == "cosine":
        return args.learning_rate * (1 + math.cos(math.pi * epoch / args.end_iter)) / 2
    return args.learning_rate * 0.1 ** sum(epoch >= share * args.end_iter for share in (1 / 2, 3 / 4))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, captured: bool = False) -> None:
    """Set the rate of all parameters, also of an optimizer whose state is from a run with or without captured steps.

    Args:
        optimizer: of the model's parameters.
        rate: the learning rate.
        captured: whether its steps are captured: these read the rate from the device's memory.
    """
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = captured
        if not captured:
            group["lr"] = rate
        elif torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.tensor(rate, device=group["params"][0].device)


def forward(model: nn.Module, inputs: Tensor, timesteps: int, precision: str, full: bool = True) -> Tensor:
    """Logits [T,B,classes] of normalised images [B,C,H,W].

    Args:
        model: the network.
        inputs: the images.
        timesteps: T.
        precision: ``fp32``, or ``bf16`` for autocast; weights stay fp32.
        full: whether this is a full batch. Only full batches run compiled, if the model was built so: a last one that
            is not full would need kernels of its own.
    """
    autocast = torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.compiler.set_stance("default" if full else "force_eager"), autocast:
        return model(inputs, timesteps)


def loss_over_time(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each timestep's logits [T,B,classes], averaged over the timesteps run and the batch."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.repeat(len(logits)))


class Trainer:
    """Trains and tests a network for the whole of a run. On several ranks each trains on its part of every batch, and
    all end with the same weights.

    Args:
        model: trained in place.
        data: its training split is trained on, the others are measured every ``args.valid_freq`` epochs.
        args: the flags of the script.

    Attributes:
        steps: steps of an epoch.
    """

    def __init__(self, model: nn.Module, data: Data, args):
        self.model, self.data, self.args = model, data, args
        self.network = distributed.parallel(model)
        self.batch = min(args.batch_size, len(data.train))  # images of a full batch, of all ranks
        self.steps = math.ceil(len(data.train) / self.batch)
        self._captured: tuple = ()
        self._prepared: set[int] = set()
        torch.backends.cudnn.benchmark = True  # on CUDA: the fastest algorithm for each shape, tried at the first
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is fp32

    def epoch(
        self,
        optimizer: torch.optim.Optimizer,
        mask: Mask | None,
        epoch: int,
        timesteps: int,
        level: int | None = 0,
        lr_epoch: int | None = None,
        after_step: AfterStep | None = None,
    ) -> dict:
        """Train for one epoch of the absolute schedule; what is pruned is exactly 0 after every step.

        Args:
            optimizer: of the model's parameters; its learning rate is set here.
            mask: what is kept, None for a dense network. It is live: what ``after_step`` writes into its tensors counts
                from the next step on.
            epoch: absolute epoch, from 0.
            timesteps: T of every forward pass.
            level: prunings done; order and augmentation of the images depend on seed, round, level and epoch alone.
            lr_epoch: take the learning rate of this epoch instead.
            after_step: called after every step with its number, counted from epoch 0 of the schedule, and a CPU
                generator of the epoch; ``.grad`` still holds the step's dense gradient.

        Returns:
            For the log: timesteps, lr, mean loss, train_accuracy on the augmented images and test_accuracy (None
            between tests) in %, and the seconds of the training alone, without what is compiled or captured for it;
            with ``--valid_samples`` also valid_accuracy, on the images held out.

        Raises:
            DivergedError: the loss or the weights are not finite.
        """
        args, images = self.args, len(self.data.train)
        rate = learning_rate(args, epoch if lr_epoch is None else lr_epoch)
        set_learning_rate(optimizer, rate, args.cuda_graph)
        step = self._step(optimizer, mask, timesteps)
        draws = {purpose: generator(args, purpose, level, epoch) for purpose in ("shuffle", "augment", "after_step")}
        batches = self.data.train.augmented_batches(self.batch, draws["shuffle"], draws["augment"], _share)
        loss_sum = torch.zeros((), dtype=torch.float64, device=args.device)
        correct_sum = torch.zeros((), dtype=torch.int64, device=args.device)
        self.model.train()
        self._prepare(timesteps)
        captured = self._capture_seconds()
        started = time.perf_counter()
        title = f"epoch {epoch + 1}/{args.end_iter} T={timesteps}"
        bar = tqdm(total=images, desc=title, unit="image", leave=False, file=sys.stdout, disable=None, mininterval=0.5)
        with bar:
            for number, (inputs, labels) in enumerate(batches):
                whole = min(self.batch, images - number * self.batch)
                losses, correct = step(whole, inputs, labels)
                loss_sum += losses
                correct_sum += correct
                if after_step is not None:
                    after_step(epoch * self.steps + number, draws["after_step"])
                if bar.update(whole):  # now and then: a read waits for the device
                    bar.set_postfix_str(f"loss {losses.item() / len(labels):.3f}", refresh=False)
        loss_sum, correct_sum = distributed.sums(loss_sum, correct_sum)
        loss, accuracy = loss_sum.item() / images, 100 * correct_sum.item() / images
        seconds = distributed.largest(time.perf_counter() - started - (self._capture_seconds() - captured))
        distributed.from_rank_0(self.model.buffers())
        self._check_finite(loss, f"in {title}, learning rate {rate:.4g}")
        tested = (epoch + 1) % args.valid_freq == 0 or epoch + 1 == args.end_iter
        row = {"timesteps": timesteps, "lr": rate, "loss": loss, "train_accuracy": accuracy}
        splits = {"valid_accuracy": self.data.valid, "test_accuracy": self.data.test}
        for name, split in splits.items():
            if split is not None:
                row[name] = self.evaluate(split, timesteps) if tested else None
        return row | {"seconds": seconds}

    def predict(self, split: Split, timesteps: int) -> Tensor:
        """Logits fp32 [T,N,classes] of un-augmented images in eval mode; the model's statistics do not change. On
        several ranks each runs some of the batches, and all have all logits."""
        return predict(self.model, split, timesteps, self.args.precision)

    def evaluate(self, split: Split, timesteps: int) -> float:
        """Accuracy in %: the prediction is the argmax of the logits' mean over the timesteps."""
        predicted = self.predict(split, timesteps).mean(0).argmax(-1)
        return 100 * (predicted == split.labels).double().mean().item()

    def _step(self, optimizer, mask, timesteps) -> Callable:
        """What trains on a batch of ``whole`` images, of which this rank has some: (whole, images, labels) -> summed
        loss and number of correct predictions. With ``--cuda_graph`` a full batch's step is captured once, for as long
        as the optimizer, the layers that have a mask, and the timesteps stay."""
        mask = mask or {}
        plain = partial(self._train_on, optimizer, tuple(mask), timesteps)
        if not self.args.cuda_graph:
            return lambda whole, *batch: plain(whole, *batch, *mask.values())
        parameters = list(self.model.parameters())
        made_for = (optimizer, tuple(mask), timesteps)
        if not self._captured or self._captured[0] != made_for:
            full = partial(plain, self.batch)
            self._captured = (made_for, Graphed(lambda *batch: (*full(*batch), *(p.grad for p in parameters))))
        graphed = self._captured[1]

        def step(whole, *batch):
            if whole != self.batch:
                return plain(whole, *batch, *mask.values())
            losses, correct, *gradients = graphed(*batch, *mask.values())
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient  # a smaller batch has left others
            return losses, correct

        return step

    def _capture_seconds(self) -> float:
        return self._captured[1].seconds if self._captured else 0.0

    def _prepare(self, timesteps: int) -> None:
        """Before the clock starts, have kernels compiled, loaded and chosen for both sizes of a batch, where that
        takes time: by passes after which weights, statistics, gradients and random numbers are as they were."""
        args, cuda = self.args, self.args.device != "cpu"
        if timesteps in self._prepared or not (args.compile or cuda):
            return
        self._prepared.add(timesteps)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        images = len(self.data.train)
        with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
            for whole in {self.batch, images - (self.steps - 1) * self.batch}:
                split = self.data.train.part(_share(whole))
                ((inputs, labels),) = split.augmented_batches(len(split), torch.Generator(), torch.Generator())
                logits = forward(self.model, inputs, timesteps, args.precision, whole == self.batch)
                torch.autograd.grad(loss_over_time(logits, labels), parameters, allow_unused=True)
        for buffer, before in buffers:
            buffer.copy_(before)
        if cuda:
            torch.cuda.synchronize()
        distributed.barrier()  # no rank's clock runs while it waits for another's passes

    def _train_on(self, optimizer, masked, timesteps, whole, inputs, labels, *masks) -> tuple[Tensor, Tensor]:
        own = distributed.part_of(whole)
        images = own.stop - own.start  # 0 where one was only borrowed
        optimizer.zero_grad()
        logits = forward(self.network, inputs, timesteps, self.args.precision, whole == self.batch)
        loss = loss_over_time(logits, labels)
        distributed.weighted(loss, images, whole).backward()
        optimizer.step()
        if masked:
            weights = prunable(self.model)
            torch._foreach_mul_([weights[name].detach() for name in masked], masks)
        correct = logits.detach().float().mean(0).argmax(-1) == labels
        return loss.detach() * images, correct.sum() * (images > 0)

    def _check_finite(self, loss: float, where: str) -> None:
        finite = torch.stack([tensor.isfinite().all() for tensor in self.model.state_dict().values()]).all()
        if not (math.isfinite(loss) and finite):
            raise DivergedError(f"the loss or the weights are not finite {where}: try a lower --learning_rate")


def _share(count: int) -> slice:
    """This rank's part of a batch; where that is empty, one image that does not count: every rank has to take part."""
    own = distributed.part_of(count)
    return own if own.stop > own.start else slice(0, 1)


@torch.inference_mode()
def predict(model: nn.Module, split: Split, timesteps: int, precision: str = "fp32") -> Tensor:
    """See ``Trainer.predict``."""
    training = model.training
    model.eval()
    batch_size = split.batch(EVALUATION_BATCH[split.images.device.type])
    own = distributed.part_of(len(split), batch_size)
    logits = [
        forward(model, inputs, timesteps, precision, len(inputs) == batch_size).float()
        for inputs, _ in split.part(own).batches(batch_size)
    ]
    model.train(training)
    return distributed.gather(torch.cat(logits, dim=1), own, len(split))
