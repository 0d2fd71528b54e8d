"""Layers over sequences [T, B, ...]: spikingjelly's stateless ones in multi-step mode, and our batch norm."""

from functools import partial

import torch
from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

Conv3x3 = partial(layer.Conv2d, kernel_size=3, padding=1, step_mode="m")
Conv1x1 = partial(layer.Conv2d, kernel_size=1, step_mode="m")
Linear = partial(layer.Linear, step_mode="m")
HalvingMaxPool = partial(layer.MaxPool2d, kernel_size=2, stride=2, step_mode="m")


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of sequences [T, B, C, H, W].

    Args:
        channels: C.
        statistics: where training takes mean and variance from. ``per_timestep``: from each timestep's batch, and the
            running statistics move T times a step, as in a loop over timesteps. ``over_time``: from all timesteps
            together, as spikingjelly's multi-step layers and tdBN do.
    """

    def __init__(self, channels: int, statistics: str = "per_timestep"):
        super().__init__(channels)
        self.statistics = statistics

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.statistics == "per_timestep":
            return torch.stack([super(BatchNorm, self).forward(x_t) for x_t in x])
        return functional.seq_to_ann_forward(x, super().forward)


class GlobalAvgPool(nn.Module):
    """Mean over the image plane, [T, B, C, H, W] to [T, B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(-2, -1))


def over_timesteps(x: Tensor, timesteps: int) -> Tensor:
    """Direct encoding: the same input current at every timestep, [1, B, ...] to [T, B, ...] without a copy."""
    return x.expand(timesteps, *x.shape[1:])


def scaled(channels: int, width: float) -> int:
    """Number of channels at a width factor, at least 1."""
    return max(1, round(channels * width))
