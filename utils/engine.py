"""What makes training fast beside the network: memory that is kept, layouts, and a step as one CUDA graph."""

import ctypes
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM_UP = 3  # calls before the capture
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
NEVER = -1


def set_up(device: torch.device) -> None:
    """Set this process up for training on a device; a second call changes nothing.

    On a CPU glibc gives the memory of every tensor of 32 MiB or more back to the system, and the next step waits for
    the same pages to be mapped and cleared again: at batch 128 that is half the step. Here memory that was used is kept
    until the process ends. Where the environment holds settings of malloc's, they stay.

    On a GPU cuDNN tries its algorithms on the first step and keeps the fastest.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    elif sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc's
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def place(model: nn.Module, args) -> nn.Module:
    """Move a network to ``args.device``; with ``args.channels_last``, the kernels of its convolutions have the channels
    innermost in memory, and its activations will follow."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return model.to(args.device, memory_format=layout)


class Graphed:
    """A function of tensors on a GPU, captured as a CUDA graph: one launch instead of one for each of its kernels.

    The first calls run as they are, so that libraries, kernels and optimizer are set up; then the function is captured,
    and every later call copies the arguments to where the captured kernels read them, and replays those. What else the
    function reads and writes has to stay where it is in memory; what Python decides in it is decided for good.

    Args:
        function: maps tensors, in every call of the same shapes, to a tuple of tensors; it never waits for the device.
            The tuple is that of the newest call: a later one writes to the same tensors.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]):
        self.function = function
        self.calls = 0
        self.stream = torch.cuda.Stream()  # autograd remembers the stream; the default one cannot be captured

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.calls <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.function(*arguments)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if self.calls == WARM_UP + 1:
            self.arguments = [argument.clone() for argument in arguments]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.results = self.function(*self.arguments)
        for captured, argument in zip(self.arguments, arguments, strict=True):
            captured.copy_(argument)
        self.graph.replay()
        return self.results
