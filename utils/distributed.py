"""One run on several ranks: all of torch.distributed that is not a layer's.

torchrun starts the same script once per rank, and every rank does the same with its part of the images. In a single
process there is no group of ranks, and the functions here do nothing.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(seconds=2)  # for rank 0 to say first what is wrong
DESCRIPTION = 4096  # bytes that ``check_same`` compares


class RanksDifferError(Exception):
    """The ranks have come to different results, or to different places of the program. Exit code 1."""


# --- the group -------------------------------------------------------------------------------------------------------


def ranks() -> int:
    """Number of ranks; 1 in a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among the ranks. Rank 0 prints and writes."""
    return dist.get_rank() if ranks() > 1 else 0


def ranks_here() -> int:
    """Number of ranks on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if ranks() > 1 else 1


@contextmanager
def group() -> Iterator[Callable[[str], None]]:
    """Join the ranks that torchrun has started. Gloo carries tensors on the CPU and NCCL those on CUDA, where each rank
    takes the card of its local number. Ranks but the first print nothing.

    A rank that fails leaves at once, which ends the others: the interpreter's own way out would wait for them.

    Returns:
        What prints an error: once, if it is that of rank 0 too.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1):
        yield lambda line: print(line, file=sys.stderr)
        return
    cards = torch.cuda.device_count()
    if cards:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % cards)  # --device refuses more ranks than cards
    store, number, size = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", store=store, rank=number, world_size=size)
    errors = sys.stderr

    def complain(line: str) -> None:
        if number == 0:
            print(line, file=errors, flush=True)
            store.set("error", line)
        elif _of_rank_0(store, "error") != line:
            print(f"rank {number}: {line}", file=errors, flush=True)

    with open(os.devnull, "w") as nowhere:
        out, error = (nowhere, nowhere) if number else (sys.stdout, sys.stderr)
        try:
            with redirect_stdout(out), redirect_stderr(error):
                yield complain
        except BaseException as failure:
            code = failure.code if isinstance(failure, SystemExit) else 1
            if code:
                if not isinstance(failure, SystemExit):
                    print(f"rank {number}:\n{traceback.format_exc()}", file=errors, flush=True)
                if number == 0:
                    store.set("end", "")
                else:
                    _of_rank_0(store, "end")
                sys.stdout.flush()
                os._exit(code)
            raise
        finally:
            dist.destroy_process_group()


def _of_rank_0(store: dist.Store, key: str) -> str | None:
    """What rank 0 has left in the store; None if nothing comes."""
    try:
        store.wait([key], PATIENCE)
        return store.get(key).decode()
    except RuntimeError:  # it is late, or its machine is gone
        return None


def lost_contact(error: RuntimeError) -> bool:
    """Whether this is how torch.distributed says that another rank is gone."""
    return isinstance(error, dist.DistError) or any(text in str(error) for text in ("gloo", "NCCL", "closed by peer"))


# --- what is divided, and put together again -------------------------------------------------------------------------


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


def gather(own: Tensor, where: slice, count: int) -> Tensor:
    """All ranks' parts [T,n,...] of a tensor [T,count,...], of which this rank's stands at ``where``."""
    if ranks() == 1:
        return own
    whole = own.new_zeros(len(own), count, *own.shape[2:])
    whole[:, where] = own
    all_sum(whole)
    return whole


def all_sum(*tensors: Tensor) -> None:
    """Sum over the ranks, in place."""
    if ranks() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def begin_maximum(*values: float) -> Callable[[], list[float]]:
    """The largest of each value on any rank, agreed on while other work goes on.

    Returns:
        What waits for the other ranks and gives the maxima.
    """
    if ranks() == 1:
        return lambda: list(values)
    largest = torch.tensor(values, dtype=torch.float64)  # on the CPU: no wait for a device
    work = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True)

    def wait() -> list[float]:
        work.wait()
        return largest.tolist()

    return wait


def from_rank_0(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of rank 0, in place."""
    if ranks() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def parallel(model: nn.Module) -> nn.Module:
    """What runs a training pass: gradients become their mean over the ranks, while the backward pass goes on."""
    if ranks() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


# --- what is the same everywhere -------------------------------------------------------------------------------------


def barrier() -> None:
    """Wait for all ranks."""
    begin_maximum(0)()


@contextmanager
def in_turn() -> Iterator[None]:
    """Rank 0 goes first, then the first rank of every other machine, then the rest: what the first writes, the others
    find. If it fails, they fail by themselves."""
    turn = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn):
        barrier()
    try:
        yield
    finally:
        for _ in range(turn, 2):
            barrier()


def check_same(place: str, **what) -> None:
    """Check that all ranks are at the same place with the same results.

    Args:
        place: for the message.
        what: short results that JSON can hold: numbers and checksums.

    Raises:
        RanksDifferError: on all ranks; the message names what differs.
    """
    if ranks() == 1:
        return
    own = json.dumps({"place": place} | what).encode()
    if len(own) > DESCRIPTION:
        raise ValueError(f"{len(own)} bytes to compare, more than {DESCRIPTION}")
    own = torch.frombuffer(bytearray(own.ljust(DESCRIPTION)), dtype=torch.uint8)
    everyones = [torch.empty_like(own) for _ in range(ranks())]
    dist.all_gather(everyones, own)
    first, *others = (json.loads(bytes(one.tolist())) for one in everyones)
    for number, other in enumerate(others, start=1):
        differ = [f"{name} is {first.get(name)} on rank 0, {other.get(name)} on rank {number}"
                  for name in first | other if first.get(name) != other.get(name)]  # fmt: skip
        if differ:
            raise RanksDifferError(f"the ranks differ ({'; '.join(differ)})")
