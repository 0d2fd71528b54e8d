"""A training step as one CUDA graph."""

import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture


class Graphed:
    """A function of tensors on a GPU, captured as a CUDA graph: one launch instead of one for each of its kernels.

    The first calls run as they are, so that libraries, kernels and optimizer are set up; then the function is captured,
    and every later call copies the arguments to where the captured kernels read them, and replays those. What else the
    function reads and writes has to stay where it is in memory; what Python decides in it is decided for good. If the
    capture fails, a note says so, and all calls run as they are.

    Args:
        function: maps tensors, in every call of the same shapes, to a tuple of tensors; it never waits for the device.
            The tuple is that of the newest call: a later one writes to the same tensors.

    Attributes:
        seconds: what the capture took, in which nothing was computed.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]):
        self.function = function
        self.calls, self.seconds = 0, 0.0
        self.graph: torch.cuda.CUDAGraph | None = None
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
        if self.graph is None:
            return self.function(*arguments)
        for captured, argument in zip(self.arguments, arguments, strict=True):
            captured.copy_(argument)
        self.graph.replay()
        return self.results

    def _capture(self, arguments: tuple[Tensor, ...]) -> None:
        torch.cuda.synchronize()  # the calls before it are not part of its time
        started = time.perf_counter()
        self.arguments = [argument.clone() for argument in arguments]
        graph = torch.cuda.CUDAGraph()
        # a kernel or another graph that is freed within a capture ends it
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            # the outer one puts the current stream back, which a capture that fails does not
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=self.stream):
                self.results = self.function(*self.arguments)
            self.graph = graph
        except RuntimeError as error:
            del self.arguments
            reason = str(error.__context__ or error).partition("\n")[0]
            print(f"note: the training step cannot be captured and is launched kernel by kernel ({reason})")
        finally:
            if enabled:
                gc.enable()
        self.seconds = time.perf_counter() - started
