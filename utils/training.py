"""Training and evaluation: everything a script calls that is not its method."""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from models.layers import synchronise_batch_norms

from . import distributed
from .data import Data, Split
from .engine import Graphed
from .errors import DivergedError
from .files import checksum
from .masks import Mask, prunable
from .runs import Run, clock
from .signals import Stopped, stop_deferred

EVALUATION_BATCH = {"cpu": 100, "cuda": 500}  # images; on a CPU larger ones leave its caches and are slower
SECONDS_BETWEEN_READS = 0.5  # a read of the loss waits for the device


def place(model: nn.Module, args) -> nn.Module:
    """Move a network to ``args.device``; with ``args.channels_last``, the kernels of its convolutions have the channels
    innermost in memory, and its activations will follow."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return model.to(args.device, memory_format=layout)


def make_optimizer(model: nn.Module, args) -> torch.optim.Optimizer:
    """A fresh optimizer without momentum, the weight decay on all parameters (section 4.1)."""
    rate, decay = args.learning_rate, args.weight_decay
    if args.cuda_graph:  # a captured step reads its rate from memory
        rate = torch.tensor(rate, device=next(model.parameters()).device)
    if args.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), rate, weight_decay=decay, fused=True, capturable=args.cuda_graph)
    return torch.optim.SGD(model.parameters(), rate, args.momentum, weight_decay=decay, fused=True)


def learning_rate(args, epoch: int, level: int = 0) -> float:
    """Learning rate of an absolute epoch, 0 .. ``args.end_iter`` - 1.

    ``cosine`` falls from ``args.learning_rate`` and would reach 0 at ``end_iter``; ``step`` divides by 10 when half
    and when three quarters of the epochs are done. All levels follow the same schedule, but with ``--rewind none``: a
    pruned network is then fine-tuned at the rate that the schedule ends with (Renda et al., ICLR 2020).
    """
    if args.rewind == "none" and level > 0:
        epoch = args.end_iter - 1
    if args.scheduler == "cosine":
        return args.learning_rate * (1 + math.cos(math.pi * epoch / args.end_iter)) / 2
    return args.learning_rate * 0.1 ** sum(epoch >= share * args.end_iter for share in (1 / 2, 3 / 4))


def forward(model: nn.Module, inputs: Tensor, timesteps: int, precision: str, batch_size: int) -> Tensor:
    """Logits [T,B,classes] of normalised images [B,C,H,W].

    Args:
        model: the network.
        inputs: the images.
        timesteps: T.
        precision: ``fp32``, or ``bf16`` for autocast; weights stay fp32.
        batch_size: images in a full batch. Only full batches run compiled, if the model was built so: a last one that
            is not full would need kernels of its own.
    """
    stance = "default" if len(inputs) == batch_size else "force_eager"
    autocast = torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.compiler.set_stance(stance), autocast:
        return model(inputs, timesteps)


def loss_over_time(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each timestep's logits [T,B,classes], averaged over the timesteps run and the batch; 0 without
    images."""
    if len(labels) == 0:
        return logits.sum()
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.repeat(len(logits)))


def fit(
    model: nn.Module,
    data: Data,
    args,
    optimizer: torch.optim.Optimizer,
    mask: Mask,
    epochs: range,
    timesteps: int,
    run: Run,
    phase: str = "search",
    level: int = 0,
    checkpoint: Path | None = None,
    observe: Callable[[], dict] | None = None,
) -> None:
    """Train for a range of epochs of the one absolute schedule; pruned weights are exactly 0 after every step.

    An epoch's order and augmentation depend on the seed, the level and the epoch alone. With a checkpoint, training
    goes on from it, and a range that it has finished is read back instead. An epoch that a signal stopped goes on with
    its next step. On several ranks each trains on its part of every batch, and all end with the same weights.

    Args:
        model: trained in place.
        data: its training split is trained on, its test split measured every ``args.valid_freq`` epochs.
        args: the flags of the script.
        optimizer: of the model's parameters; its learning rate is set here.
        mask: what the ticket keeps.
        epochs: absolute epochs.
        timesteps: number of timesteps T of every forward pass.
        run: where the epochs are logged.
        phase: ``dense``, ``search`` or ``train``, for the log.
        level: prunings behind ``mask``; for the log, the random numbers and the learning rate.
        checkpoint: file to go on from and to write after every epoch; None leaves both to the caller.
        observe: what to log beside the loss; called after every epoch, it must leave the model as it is. Its time is
            not counted.

    Raises:
        DivergedError: the loss or the weights are not finite; the checkpoint of the epoch before stays.
        OSError: a checkpoint could not be written.
        RanksDifferError: the ranks have not come to the same weights or mask.
        Stopped: a signal came; the epoch is saved as far as it is done.
    """
    first = epochs.start
    if checkpoint is not None:
        first = run.resume(checkpoint, phase, level, epochs, model, optimizer)
        here = {"phase": phase, "level": level, "epoch": first, "timesteps": timesteps}
        distributed.check_same(
            "the start of training", lambda: here | {"weights": checksum(model.state_dict()), "mask": checksum(mask)}
        )
    if distributed.ranks() > 1 and args.sync_batch_norm:
        synchronise_batch_norms(model)
    torch.backends.cudnn.benchmark = True  # on CUDA: the fastest algorithm for each shape, tried at the first
    network, images = distributed.parallel(model), len(data.train)
    update, step = MaskedUpdate(optimizer, model, mask), None
    for epoch in range(first, epochs.stop):
        update.set_learning_rate(learning_rate(args, epoch, level))
        title = f"{phase} level {level} epoch {epoch + 1}/{args.end_iter} T={timesteps}"
        progress = run.resume_epoch(phase, level, epoch, model, optimizer, math.ceil(images / args.batch_size))
        if step is None or progress.step:  # what is read back into the optimizer lies elsewhere in memory
            step = TrainingStep(network, update, timesteps, args, images)
        batches = data.train.augmented_batches(args.batch_size, run.generator(level, epoch), progress.step)
        left = partial(run.time_left, phase, timesteps)
        last = epoch + 1 == args.end_iter
        tested = last or (epoch + 1) % args.valid_freq == 0
        try:
            loss, accuracy = _train_epoch(step, images, batches, progress, args, title, left)
            if not args.sync_batch_norm:
                distributed.from_rank_0(model.buffers())
            _check_weights(model, title, update.learning_rate)
            run.log_epoch(
                phase=phase,
                level=level,
                epoch=epoch,
                timesteps=timesteps,
                lr=update.learning_rate,
                loss=loss,
                train_accuracy=accuracy,
                test_accuracy=evaluate(model, data.test, timesteps, args.precision) if tested else None,
                seconds=progress.seconds,
                **(observe() if observe is not None else {}),
            )
            run.report_epoch(title, images_per_second=images / progress.seconds)
        except Stopped:
            if not args.sync_batch_norm:
                distributed.from_rank_0(model.buffers())
            with stop_deferred():  # a scheduler may signal twice
                _check_weights(model, title, update.learning_rate)
                run.save_epoch(phase, level, epoch, model, optimizer, progress)
                if distributed.rank() == 0:  # not to stdout: where that is a pipe, Ctrl-C has closed it
                    done = f"{progress.step} of {len(progress.losses)}"
                    print(f"{title}: stopped and saved after step {done}", file=sys.stderr)
            raise
        except DivergedError:
            run.wait_for_checkpoint()
            raise
        if checkpoint is not None:
            # the last epoch of the schedule leaves nothing to go on with
            run.save_checkpoint(checkpoint, epoch + 1, model, None if last else optimizer)
    run.wait_for_checkpoint()


class MaskedUpdate:
    """An optimizer step that keeps the pruned weights at 0.

    Args:
        optimizer: of the model's parameters.
        model: the network.
        mask: what its ticket keeps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, mask: Mask):
        weights = prunable(model)
        pruned = [name for name in mask if not mask[name].all()]
        self.optimizer = optimizer
        self.weights = [weights[name].detach() for name in pruned]  # shares the parameter's memory
        self.keep = [torch.empty_like(weights[name]).copy_(mask[name]) for name in pruned]
        self.learning_rate: float | None = None

    def set_learning_rate(self, rate: float) -> None:
        self.learning_rate = rate
        for group in self.optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.weights:
            torch._foreach_mul_(self.weights, self.keep)


class TrainingStep:
    """Forward, backward and update with one batch; with ``args.cuda_graph``, a full batch's as a CUDA graph.

    Args:
        network: what is run.
        update: of its parameters.
        timesteps: T.
        args: the flags of the script.
        images: in an epoch, of all ranks together.
    """

    def __init__(self, network: nn.Module, update: MaskedUpdate, timesteps: int, args, images: int):
        self.network, self.update = network, update
        global_batch = min(args.batch_size, images)
        part = distributed.part_of(global_batch)
        self.local_batch = part.stop - part.start
        self.plain = partial(_train_on, network, update, timesteps, args.precision, self.local_batch)
        self.graphed = Graphed(partial(self.plain, global_batch)) if args.cuda_graph else None

    def __call__(self, inputs: Tensor, labels: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        """Mean loss and number of correct predictions of this rank's images [B,C,H,W] and labels [B] in a batch of
        ``whole`` images; not yet known to the host."""
        if self.graphed is not None and len(labels) == self.local_batch:
            return self.graphed(inputs, labels)
        return self.plain(whole, inputs, labels)


def _train_on(network, update, timesteps, precision, local_batch, whole, inputs, labels) -> tuple[Tensor, Tensor]:
    logits = forward(network, inputs, timesteps, precision, local_batch)
    loss = loss_over_time(logits, labels)
    update(distributed.weighted(loss, len(labels), whole))
    return loss.detach(), (logits.detach().mean(0).argmax(-1) == labels).sum()


def _train_epoch(step, images, batches, progress, args, title, time_left) -> tuple[float, float]:
    """What is left of one pass over the training images: mean loss, and accuracy in % on the augmented images. A
    signal to stop waits for the end of the step, and on several ranks all stop after the same one."""
    step.network.train()
    rate, began = step.update.learning_rate, progress.step
    started = time.perf_counter() - progress.seconds
    next_read = time.perf_counter() + SECONDS_BETWEEN_READS
    seen = min(progress.step * args.batch_size, images)
    bar = tqdm(total=images, initial=seen, desc=title, unit="image", leave=False, file=sys.stdout, disable=None)
    with bar, stop_deferred() as asked:

        def wishes():
            return [max(asked, default=0), time.perf_counter() > next_read]

        for inputs, labels in batches:
            agreed = distributed.begin_maxima(wishes)
            whole = min(args.batch_size, images - seen)
            loss, correct = step(inputs, labels, whole)
            progress.losses[progress.step] = loss * len(labels)
            progress.correct += correct
            progress.step += 1
            seen += whole
            bar.update(whole)
            progress.seconds = time.perf_counter() - started
            stop, read = agreed()
            if stop:
                break
            if read:
                losses, correct = distributed.sums(progress.losses, progress.correct)
                _check_finite(losses, title, rate)
                left = clock(time_left(progress.seconds * images / seen) - progress.seconds)
                loss, accuracy = losses.sum().item() / seen, 100 * correct.item() / seen
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1f} %, run {left} left")
                next_read = time.perf_counter() + SECONDS_BETWEEN_READS
        progress.losses, progress.correct = distributed.sums(progress.losses, progress.correct)
        _check_finite(progress.losses, title, rate)
        if progress.step > began:
            progress.seconds = time.perf_counter() - started  # the device is done, too
        stop, progress.seconds = distributed.begin_maxima(lambda: [max(asked, default=0), progress.seconds])()
        if stop:
            raise Stopped(int(stop))
    return progress.losses.sum().item() / images, 100 * progress.correct.item() / images


def _check_finite(losses: Tensor, title: str, rate: float) -> None:
    if not losses.isfinite().all():
        step = int((~losses.isfinite()).nonzero()[0])
        raise DivergedError(f"the loss is not finite in {title}, step {step}, learning rate {rate:.4g}; {_KEPT}")


def _check_weights(model: nn.Module, title: str, rate: float) -> None:
    """The last step of an epoch can ruin the weights after a finite loss; such weights must not become a checkpoint."""
    finite = [tensor.isfinite().all() for tensor in model.state_dict().values()]
    if not torch.stack(finite).all():
        raise DivergedError(f"the weights are not finite after {title}, learning rate {rate:.4g}; {_KEPT}")


_KEPT = "what was saved before stays; try a lower --learning_rate in a run of its own (--exp_name)"


@torch.inference_mode()
def predict(model: nn.Module, split: Split, timesteps: int, precision: str = "fp32") -> Tensor:
    """Logits fp32 [T,N,classes] of un-augmented images in eval mode; the model's statistics do not change. On several
    ranks each runs some of the batches, and all have all logits."""
    training = model.training
    model.eval()
    logits = []
    batch_size = min(EVALUATION_BATCH[split.images.device.type], len(split))
    own = distributed.part_of(len(split), batch_size)
    for inputs, _ in split.part(own).batches(batch_size):
        logits.append(forward(model, inputs, timesteps, precision, batch_size).float())
    model.train(training)
    return distributed.gather(torch.cat(logits, dim=1), own, len(split))


def evaluate(model: nn.Module, split: Split, timesteps: int, precision: str = "fp32") -> float:
    """Accuracy in %: the prediction is the argmax of the logits' mean over the timesteps."""
    logits = predict(model, split, timesteps, precision)
    return 100 * (logits.mean(0).argmax(-1) == split.labels).double().mean().item()
