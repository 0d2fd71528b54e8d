"""One run on several ranks: all of torch.distributed that is not a layer's.

torchrun starts the same script once per rank, and every rank does the same with its part of the images. In a single
process there is no group of ranks, and the functions here do nothing.
"""

import hashlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(seconds=2)  # for rank 0 to say first what is wrong
MESSAGE = 1024  # bytes that a rank sends of its results: their checksum, and how they begin


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


def take_card() -> None:
    """Let ``cuda`` mean the card of this rank's number on its machine."""
    if ranks() > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


@contextmanager
def group() -> Iterator[Callable[[str], None]]:
    """Join the ranks that torchrun has started. Gloo carries tensors on the CPU and NCCL those on CUDA. Ranks but the
    first print nothing.

    A rank that fails leaves at once, which ends the others: the interpreter's own way out would wait for them.

    Returns:
        What prints an error: once, if it is that of rank 0 too.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1):
        yield lambda line: print(line, file=sys.stderr)
        return
    try:
        store, number, size = next(dist.rendezvous("env://"))
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, store=store, rank=number, world_size=size)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        print(f"rank {os.environ['RANK']}: error: the ranks do not find each other ({reason})", file=sys.stderr)
        raise SystemExit(1) from error
    errors = sys.stderr

    def complain(line: str) -> None:
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, signal.SIG_IGN)  # torchrun ends all ranks as soon as one has ended
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
        except SystemExit as end:
            if end.code:
                _leave(store, number, end.code)
            raise
        except BaseException:
            print(f"rank {number}:\n{traceback.format_exc()}", file=errors)
            _leave(store, number, 1)
    dist.destroy_process_group()


def _leave(store: dist.Store, number: int, code: int) -> None:
    """End this process now, but not before rank 0 has said what is wrong."""
    if number == 0:
        store.set("end", "")
    else:
        _of_rank_0(store, "end")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _of_rank_0(store: dist.Store, key: str) -> str | None:
    """What rank 0 has left in the store; None if nothing comes."""
    try:
        store.wait([key], PATIENCE)
        return store.get(key).decode()
    except RuntimeError:  # it is late, or its machine is gone
        return None


def lost_contact(error: RuntimeError) -> bool:
    """Whether this is how torch.distributed says that another rank is gone."""
    gone = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "remote process exited")
    return isinstance(error, dist.DistNetworkError | dist.DistStoreError) or any(text in str(error) for text in gone)


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
    return sums(whole)[0]


def sums(*own: Tensor) -> tuple[Tensor, ...]:
    """Sums over the ranks of tensors that every rank has."""
    if ranks() == 1:
        return own
    total = [tensor.clone() for tensor in own]
    for tensor in total:
        dist.all_reduce(tensor)
    return tuple(total)


def begin_maxima(own: Callable[[], Iterable[float]]) -> Callable[[], list[float]]:
    """The largest of each number on any rank, agreed on while other work goes on.

    Args:
        own: this rank's numbers. They are asked for at once; in a single process when they are wanted.

    Returns:
        What waits for the other ranks and gives the maxima.
    """
    if ranks() == 1:
        return lambda: list(own())
    largest = torch.tensor([float(number) for number in own()], dtype=torch.float64)  # on the CPU, no device waits
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
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        # torch 2.15 calls it forward_sync_buffers
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def weighted(mean: Tensor, images: int, of: int) -> Tensor:
    """A mean over this rank's ``images`` such that the ranks' mean is the mean over all ``of`` of a batch."""
    return mean if ranks() == 1 else mean * (images * ranks() / of)


# --- what is the same everywhere -------------------------------------------------------------------------------------


def barrier() -> None:
    """Wait for all ranks."""
    _any(False)


@contextmanager
def in_turn() -> Iterator[None]:
    """Rank 0 goes first, then the first rank of every other machine, then the rest: what the first writes, the others
    find. All leave together; if one fails, so do the others, and leave it to it to say why."""
    mine = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for turn in range(3):
        failed = None
        if turn == mine:
            try:
                yield
            except Exception as error:
                failed = error
        any_failed = _any(failed is not None)
        if failed is not None:
            raise failed
        if any_failed:
            raise SystemExit(1)


def _any(own: bool) -> bool:
    (largest,) = begin_maxima(lambda: [own])()
    return bool(largest)


def check_same(place: str, results: Callable[[], dict]) -> None:
    """Check that all ranks are at the same place of the program with the same results.

    Args:
        place: for the message.
        results: numbers, checksums and what else JSON holds, by name; asked for on several ranks only.

    Raises:
        RanksDifferError: on all ranks; the message shows what differs.
    """
    if ranks() == 1:
        return
    lines = [place, *(f"{name} {json.dumps(value)}" for name, value in results().items())]
    text = "\n".join(lines).encode()
    message = hashlib.sha256(text).digest() + text[: MESSAGE - 32].ljust(MESSAGE - 32)
    own = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    everyones = [torch.empty_like(own) for _ in range(ranks())]
    dist.all_gather(everyones, own)
    if any(not torch.equal(one, everyones[0]) for one in everyones):
        said = [bytes(one[32:].tolist()).decode(errors="replace").strip().split("\n") for one in everyones]
        odd = next(n for n, one in enumerate(everyones) if not torch.equal(one, everyones[0]))
        differ = [f"rank {n}: {', '.join(line for line in said[n] if line not in said[m])}"
                  for n, m in ((0, odd), (odd, 0))]  # fmt: skip
        raise RanksDifferError(f"the ranks differ at {said[0][0]} ({'; '.join(differ)}): {_KEPT}")


_KEPT = "what was saved before stays; the same command goes on from there"
