"""Layers over sequences [T, B, ...]: spikingjelly's stateless ones in multi-step mode, batch norm, and the block that
is compiled."""

from collections.abc import Callable
from functools import partial

import torch
from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn
from torch.nn import functional as F

from .lif import LIF

Conv3x3 = partial(layer.Conv2d, kernel_size=3, padding=1, step_mode="m")
Conv1x1 = partial(layer.Conv2d, kernel_size=1, step_mode="m")
Linear = partial(layer.Linear, step_mode="m")
HalvingMaxPool = partial(layer.MaxPool2d, kernel_size=2, stride=2, step_mode="m")
AvgPoolTo = partial(layer.AdaptiveAvgPool2d, step_mode="m")

MOST_FUSED_TIMESTEPS = 16  # a fused block holds the membranes of all timesteps in registers
MOST_KERNELS = 256  # shapes x timesteps x training or not; past torch's own limit of 8, calls would run unfused


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of sequences [T, B, C, H, W] or [T, B, C].

    Where a channel has a single value (one image without pixels), it has no variance: it is then normalised with the
    running statistics, which stay as they are.

    Args:
        channels: C.
        statistics: where training takes mean and variance from. ``per_timestep``: from each timestep's batch, and the
            running statistics move T times a step, as in a loop over timesteps; ``num_batches_tracked`` counts steps.
            ``over_time``: from all timesteps together, as spikingjelly's multi-step layers and tdBN do.
    """

    def __init__(self, channels: int, statistics: str = "per_timestep"):
        super().__init__(channels)
        self.statistics = statistics

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        if self.training and self.statistics == "per_timestep":
            # unlike a stack, this keeps the layout of images
            return torch.cat([self._normalise(x_t) for x_t in x]).unflatten(0, x.shape[:2])
        return functional.seq_to_ann_forward(x, self._normalise)

    def _normalise(self, x: Tensor) -> Tensor:
        """Batch norm of [N, C, H, W] or [N, C]."""
        learns = self.training and x.numel() > self.num_features
        running = self.running_mean, self.running_var
        return F.batch_norm(x, *running, self.weight, self.bias, learns, self.momentum, self.eps)


class NormAndFire(nn.Module):
    """What stands between two layers of weights: batch norm, the shortcut if there is one, the neuron.

    ``compile_blocks`` or ``fuse_blocks`` make one kernel of it: these operations compute little, and each would read
    and write whole activations of every timestep.

    Args:
        channels: C.
        neuron: makes the neuron.
        statistics: see ``BatchNorm``.
    """

    def __init__(self, channels: int, neuron: Callable[[], nn.Module], statistics: str = "per_timestep"):
        super().__init__()
        self.norm = BatchNorm(channels, statistics)
        self.neuron = neuron()

    def forward(self, x: Tensor, shortcut: Tensor | None = None, timesteps: int | None = None) -> Tensor:
        """Currents [T, B, C, ...] to spikes of the same shape. With ``timesteps`` a current [1, B, C, ...] is that of
        every timestep (direct encoding): it is normalised once and not copied."""
        x = self.norm(x)
        if shortcut is not None:
            x = x + shortcut
        if timesteps is not None:
            x = x.expand(timesteps, *x.shape[1:])
        return self.neuron(x)


def compile_blocks(model: nn.Module) -> None:
    """Have torch.compile fuse every ``NormAndFire``, and the batch norms of shortcuts, in place.

    That happens at the first call with a shape and a number of timesteps; blocks of the same shape share a kernel.
    Convolutions have good kernels of their own.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_KERNELS)
    for module in model.modules():
        if isinstance(module, (NormAndFire, BatchNorm)):
            module.compile(dynamic=False)


def fuse_blocks(model: nn.Module) -> None:
    """Have the Triton kernels of ``models.norm_fire`` compute every ``NormAndFire``, in place; parameters, statistics
    and ``state_dict`` are as before. For a GPU, and for activations with the channels innermost in memory.

    Raises:
        ValueError: a block's neuron is not ``LIF``.
    """
    from .norm_fire import norm_and_fire  # needs Triton, which not every torch comes with

    for module in model.modules():
        if isinstance(module, NormAndFire):
            if type(module.neuron) is not LIF:
                raise ValueError(f"only blocks of LIF neurons can be fused, got {type(module.neuron).__name__}")
            module.forward = partial(norm_and_fire, module)


class GlobalAvgPool(nn.Module):
    """Mean over the image plane, [T, B, C, H, W] to [T, B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(-2, -1))


def scaled(channels: int, width: float) -> int:
    """Number of channels at a width factor, at least 1."""
    return max(1, round(channels * width))
