"""Layers over sequences [T, B, ...]: spikingjelly's stateless ones in multi-step mode, our batch norm, and the block
that is compiled."""

from functools import partial

import torch
import torch.distributed as dist
from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

from .lif import make_neuron

Conv3x3 = partial(layer.Conv2d, kernel_size=3, padding=1, step_mode="m")
Conv1x1 = partial(layer.Conv2d, kernel_size=1, step_mode="m")
Linear = partial(layer.Linear, step_mode="m")
HalvingMaxPool = partial(layer.MaxPool2d, kernel_size=2, stride=2, step_mode="m")
AvgPoolTo = partial(layer.AdaptiveAvgPool2d, step_mode="m")

MOST_KERNELS = 256  # shapes x timesteps x training or not; past torch's own limit of 8, calls would run unfused


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
        self.synchronised = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.synchronised:
            return self._synchronised(x)
        if self.training and self.statistics == "per_timestep":
            # unlike a stack, this keeps the layout of images
            return torch.cat([super(BatchNorm, self).forward(x_t) for x_t in x]).unflatten(0, x.shape[:2])
        return functional.seq_to_ann_forward(x, super().forward)

    @torch.compiler.disable  # a graph ends at a collective
    def _synchronised(self, x: Tensor) -> Tensor:
        """As in ``forward``, with the statistics of the images of all ranks."""
        groups = x if self.statistics == "per_timestep" else x.flatten(0, 1).unsqueeze(0)  # [G,N,C,H,W]
        y, means, variances = _NormAcrossRanks.apply(groups, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += len(groups)
            # what a step of momentum per group comes to
            left = (1 - self.momentum) ** torch.arange(len(groups), -1, -1, dtype=torch.float64, device=x.device)
            shares = self.momentum * left[1:]  # [G]
            for running, new in ((self.running_mean, means), (self.running_var, variances)):
                running.mul_(left[0]).add_((shares @ new.double()).to(running.dtype))
        return y.view_as(x)


class _NormAcrossRanks(torch.autograd.Function):
    """Batch norm of groups [G, N, C, H, W], each over the N images that this rank and all others have; N may be 0.

    One all-reduce forward and one backward. Sums are taken in fp64, so they are the same however the images are
    divided. Beside the output: mean and unbiased variance [G, C] for the running statistics, which get no gradient.
    torch's ``SyncBatchNorm`` knows no CPU, and takes one group at a time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        wide, channels = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[2]
        total = _over_images(wide)
        own = total.new_full((len(x), 1), x[0, :, 0].numel())  # values of a group and channel
        sums = torch.cat([total, _over_images(wide.square()), own], dim=1)  # [G,2C+1]
        dist.all_reduce(sums)
        total, squares, count = sums.split([channels, channels, 1], dim=1)
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        unbiased = variance * (count / (count - 1))
        scale = (variance + eps).rsqrt()
        mean, unbiased, scale = (term.to(weight.dtype) for term in (mean, unbiased, scale))  # [G,C]
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, unbiased)
        factor = weight * scale
        y = torch.addcmul(_per_channel(bias - mean * factor), x, _per_channel(factor))
        return y.to(x.dtype), mean, unbiased

    @staticmethod
    def backward(ctx, dy: Tensor, *_):
        x, weight, mean, scale, count = ctx.saved_tensors
        wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
        d_bias = _over_images(wide)  # [G,C]
        d_weight = scale * (_over_images(wide * x) - mean * d_bias)
        own = d_weight.sum(0).to(weight.dtype), d_bias.sum(0).to(weight.dtype)  # DDP adds the others'
        sums = torch.cat([d_weight, d_bias], dim=1)
        dist.all_reduce(sums)
        d_weight, d_bias = (sums / count).to(weight.dtype).chunk(2, dim=1)
        # weight * scale * (dy - mean of dy - z * mean of dy z), where z = scale * (x - mean)
        factor, slope = weight * scale, -weight * scale.square() * d_weight
        dx = torch.addcmul(_per_channel(-factor * d_bias - slope * mean), x, _per_channel(slope))
        return torch.addcmul(dx, dy, _per_channel(factor)).to(x.dtype), *own, None


def _over_images(x: Tensor) -> Tensor:
    """Sum of [G, N, C, H, W] to [G, C], in fp64."""
    return x.sum((1, 3, 4), dtype=torch.float64)


def _per_channel(terms: Tensor) -> Tensor:
    """Terms [G, C] as [G, 1, C, 1, 1]."""
    return terms[:, None, :, None, None]


def synchronise_batch_norms(model: nn.Module) -> None:
    """Let all batch norms take their training statistics from the images of all ranks of torch.distributed's default
    group. Every rank must then run every training pass, with images or without."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.synchronised = True


class NormAndFire(nn.Module):
    """What stands between two convolutions: batch norm, the shortcut if there is one, the neuron.

    ``compile_blocks`` makes one kernel of it: these operations compute little, and each would read and write whole
    activations of every timestep.
    """

    def __init__(self, channels: int, neuron: str, statistics: str = "per_timestep"):
        super().__init__()
        self.norm = BatchNorm(channels, statistics)
        self.neuron = make_neuron(neuron)

    def forward(self, x: Tensor, shortcut: Tensor | None = None, timesteps: int | None = None) -> Tensor:
        """Currents [T, B, C, H, W] to spikes of the same shape. With ``timesteps`` the current [1, B, C, H, W] is the
        same at every timestep (direct encoding): normalised once, without a copy."""
        x = self.norm(x)
        if shortcut is not None:
            x = x + shortcut
        if timesteps is not None:
            x = x.expand(timesteps, *x.shape[1:])
        return self.neuron(x)


def compile_blocks(model: nn.Module) -> None:
    """Have torch.compile fuse every ``NormAndFire``, and the batch norms of shortcuts, at the first call with a shape
    and a number of timesteps; blocks of the same shape share a kernel. Convolutions have good kernels of their own."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_KERNELS)
    for module in model.modules():
        if isinstance(module, (NormAndFire, BatchNorm)):
            module.compile(dynamic=False)


class GlobalAvgPool(nn.Module):
    """Mean over the image plane, [T, B, C, H, W] to [T, B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(-2, -1))


def scaled(channels: int, width: float) -> int:
    """Number of channels at a width factor, at least 1."""
    return max(1, round(channels * width))
