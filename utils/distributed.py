"""One run on several ranks (torchrun): every rank trains on its part of every batch and reads the folder, rank 0 prints
and writes. In a single process the functions here do nothing."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def ranks() -> int:
    """Number of ranks; 1 in a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among the ranks."""
    return dist.get_rank() if ranks() > 1 else 0


@contextmanager
def group() -> Iterator[None]:
    """Join the ranks that torchrun has started, on CUDA each with the card of its number. Gloo carries tensors of the
    CPU, NCCL those of CUDA. Ranks other than 0 print errors only."""
    if not (dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1):
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open for good
    yield
    dist.destroy_process_group()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Let one rank of each machine go before its others: what it downloads or decodes, they find."""
    waits = ranks() > 1 and os.environ["LOCAL_RANK"] != "0"
    if waits:
        barrier()
    yield
    if not waits:
        barrier()


def barrier() -> None:
    """Wait for all ranks."""
    if ranks() > 1:
        dist.barrier()


def part_of(count: int, together: int = 1) -> slice:
    """This rank's part of ``count`` images in a row, which may be empty; all of them in a single process.

    Args:
        count: images.
        together: a batch of evaluation; it is not divided, so that every image is computed in the batch that it is in
            on one rank.
    """
    batches = -(-count // together)
    start, stop = (batches * number // ranks() * together for number in (rank(), rank() + 1))
    return slice(min(start, count), min(stop, count))


def sums(*own: Tensor) -> tuple[Tensor, ...]:
    """Sums over the ranks of tensors that every rank has."""
    total = own
    if ranks() > 1:
        total = tuple(tensor.clone() for tensor in own)
        for tensor in total:
            dist.all_reduce(tensor)
    return total


def largest(own: float) -> float:
    """The largest of a number that every rank has."""
    if ranks() == 1:
        return own
    most = torch.tensor(float(own), dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def gather(own: Tensor, where: slice, count: int) -> Tensor:
    """All ranks' parts [T,n,...] of a tensor [T,count,...], of which this rank's stands at ``where``."""
    if ranks() == 1:
        return own
    whole = own.new_zeros(len(own), count, *own.shape[2:])
    whole[:, where] = own
    return sums(whole)[0]


def from_rank_0(tensors) -> None:
    """Overwrite tensors with those of rank 0, in place."""
    if ranks() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def parallel(model: nn.Module) -> nn.Module:
    """What runs a training pass: gradients become their mean over the ranks, while the backward pass goes on."""
    if ranks() == 1:
        return model
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        # torch 2.15 calls it forward_sync_buffers
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def weighted(mean: Tensor, images: int, of: int) -> Tensor:
    """A mean over this rank's ``images`` such that the ranks' mean is the mean over all ``of`` of a batch."""
    return mean if ranks() == 1 else mean * (images * ranks() / of)
