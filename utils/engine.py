"""A training step as one CUDA graph."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture


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
            self._capture(arguments)
        for captured, argument in zip(self.arguments, arguments, strict=True):
            captured.copy_(argument)
        self.graph.replay()
        return self.results

    def _capture(self, arguments: tuple[Tensor, ...]) -> None:
        self.arguments = [argument.clone() for argument in arguments]
        self.graph = torch.cuda.CUDAGraph()
        # a kernel or another graph that is freed within a capture ends it
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.results = self.function(*self.arguments)
        finally:
            if enabled:
                gc.enable()
