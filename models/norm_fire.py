"""Batch norm, shortcut and neuron as Triton kernels, over activations with the channels innermost.

For each row (an image's pixel) and channel, with v_0 = 0 and all arithmetic in fp32, timestep t = 1 .. T is

    n_t = (x_t - mean) / sqrt(variance + eps)            y_t = weight n_t + bias + shortcut_t
    h_t = v_{t-1} + (y_t - v_{t-1}) / tau                s_t = (h_t >= threshold)
    v_t = (1 - s_t) h_t

and backwards, with a_t = pi/2 alpha (h_t - threshold), no gradient through the reset, and means over what the
statistics are taken from,

    dh_t = ds_t (alpha / 2) / (1 + a_t^2) + (1 - s_t) (1 - 1/tau) dh_{t+1}
    dy_t = dh_t / tau, which is also the shortcut's gradient
    dx_t = weight / sqrt(variance + eps) (dy_t - mean(dy) - n_t mean(dy n))
    dbias = sum(dy)                                      dweight = sum(dy n)

These are the equations of ``NormAndFire`` and of spikingjelly's neuron. Nothing but x and the shortcut is kept for the
backward pass, which computes the membrane again. Sums are of a fixed order, so the results repeat themselves.

Importing this module needs Triton, which comes with torch for CUDA alone.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layers import MOST_FUSED_TIMESTEPS, NormAndFire

HALF_PI = tl.constexpr(math.pi / 2)
TILE = 1024  # elements that a program works on together, at most: 8 for each of its 128 threads
COLUMNS = 64  # channels of a tile, at most
PROGRAMS = 1024  # of a kernel that sums, about: what fills the largest cards
COUNTS = ("rows", "chunk_rows", "chunks")  # a kernel is not compiled anew for other values of these


@triton.jit
def _tile(first, c, rows, channels, ROWS: tl.constexpr):
    """Offsets [ROWS, COLUMNS] of channels c from row ``first`` on, in 64 bits, and which of them exist."""
    row = first + tl.arange(0, ROWS)[:, None]
    return row.to(tl.int64) * channels + c[None, :], (row < rows) & (c[None, :] < channels)


@triton.jit(do_not_specialize=COUNTS)
def _moments(x_ptr, moments_ptr, rows, channels, chunk_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Means and sums of squared deviations of the chunks of each group, x [G, rows, C] to moments [2, G, chunks, C].

    Grid: chunks, columns of channels, groups.
    """
    chunk, group = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x_ptr += group.to(tl.int64) * rows * channels
    first = chunk * chunk_rows
    end = tl.minimum(rows, first + chunk_rows)
    # of differences from the chunk's first value: the squares of values far from 0 would cancel
    shift = tl.load(x_ptr + first.to(tl.int64) * channels + c, mask=c < channels, other=0.0).to(tl.float32)
    sums, squares = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in range(first, end, ROWS):
        at, inside = _tile(row, c, rows, channels, ROWS)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, x - shift[None, :], 0.0)
        sums += difference
        squares += difference * difference
    total = tl.sum(sums, 0)
    mean = total / (end - first).to(tl.float32)
    to = (group * tl.num_programs(0) + chunk) * channels + c
    second = tl.num_programs(2) * tl.num_programs(0) * channels
    tl.store(moments_ptr + to, shift + mean, mask=c < channels)
    tl.store(moments_ptr + second + to, tl.sum(squares, 0) - total * mean, mask=c < channels)


@triton.jit(do_not_specialize=COUNTS)
def _statistics(
    moments_ptr,
    statistics_ptr,
    running_mean_ptr,
    running_var_ptr,
    rows,
    channels,
    chunk_rows,
    chunks,
    momentum,
    eps,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Moments of the chunks [2, G, chunks, C] to statistics [2, G, C], mean and 1/sqrt(variance + eps); the running
    statistics [C] move once a group, in their order. Grid: columns of channels."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.arange(0, CHUNKS)[:, None]
    inside = (chunk < chunks) & (c[None, :] < channels)
    count = tl.where(inside, tl.minimum(rows - chunk * chunk_rows, chunk_rows).to(tl.float32), 0.0)
    of_group = rows.to(tl.float32)
    running_mean = tl.load(running_mean_ptr + c, mask=c < channels, other=0.0)
    running_var = tl.load(running_var_ptr + c, mask=c < channels, other=0.0)
    for group in range(GROUPS):
        at = (group * chunks + chunk) * channels + c[None, :]
        means = tl.load(moments_ptr + at, mask=inside, other=0.0)
        squares = tl.load(moments_ptr + GROUPS * chunks * channels + at, mask=inside, other=0.0)
        mean = tl.sum(count * means, 0) / of_group
        apart = means - mean[None, :]
        variance = tl.sum(squares + count * apart * apart, 0) / of_group
        tl.store(statistics_ptr + group * channels + c, mean, mask=c < channels)
        tl.store(statistics_ptr + (GROUPS + group) * channels + c, 1.0 / tl.sqrt_rn(variance + eps), mask=c < channels)
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (variance * (of_group / (of_group - 1.0)) - running_var)
    tl.store(running_mean_ptr + c, running_mean, mask=c < channels)
    tl.store(running_var_ptr + c, running_var, mask=c < channels)


@triton.jit
def _normalised(x_ptr, statistics_ptr, t, at, inside, c, rows, channels, IMAGES: tl.constexpr, GROUPS: tl.constexpr):
    """n_t of a tile [ROWS, COLUMNS], and 1/sqrt(variance + eps) [COLUMNS]."""
    x = tl.load(x_ptr + (t % IMAGES) * rows.to(tl.int64) * channels + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(statistics_ptr + (t % GROUPS) * channels + c, mask=c < channels, other=0.0)
    scale = tl.load(statistics_ptr + (GROUPS + t % GROUPS) * channels + c, mask=c < channels, other=0.0)
    return (x - mean[None, :]) * scale[None, :], scale


@triton.jit
def _charged(v, normed, shortcut_ptr, t, at, inside, weight, bias, rows, channels, tau):
    """h_t of a tile [ROWS, COLUMNS]."""
    y = normed * weight[None, :] + bias[None, :]
    if shortcut_ptr is not None:
        y += tl.load(shortcut_ptr + t * rows.to(tl.int64) * channels + at, mask=inside, other=0.0).to(tl.float32)
    return v + tl.div_rn(y - v, tl.zeros_like(y) + tau)


@triton.jit(do_not_specialize=COUNTS)
def _fire(
    x_ptr,
    shortcut_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    spikes_ptr,
    rows,
    channels,
    tau,
    threshold,
    TIMESTEPS: tl.constexpr,
    IMAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Spikes [T, rows, C] of x [IMAGES, rows, C]. Grid: tiles of rows, columns of channels."""
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = _tile(tl.program_id(0) * ROWS, c, rows, channels, ROWS)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0)
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0)
    v = tl.zeros([ROWS, COLUMNS], tl.float32)
    for t in tl.static_range(TIMESTEPS):
        normed, _ = _normalised(x_ptr, statistics_ptr, t, at, inside, c, rows, channels, IMAGES, GROUPS)
        h = _charged(v, normed, shortcut_ptr, t, at, inside, weight, bias, rows, channels, tau)
        spike = h >= threshold
        tl.store(spikes_ptr + t * rows.to(tl.int64) * channels + at, spike.to(tl.float32), mask=inside)
        v = tl.where(spike, 0.0, h)


@triton.jit(do_not_specialize=COUNTS)
def _backward(
    x_ptr,
    shortcut_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    spikes_grad_ptr,
    sums_ptr,
    means_ptr,
    x_grad_ptr,
    shortcut_grad_ptr,
    rows,
    channels,
    chunk_rows,
    tau,
    threshold,
    alpha,
    TIMESTEPS: tl.constexpr,
    IMAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_POWER_OF_2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One of the two passes backwards over x [IMAGES, rows, C] and the spikes' gradient [T, rows, C].

    With ``sums_ptr``: sum(dy) and sum(dy n) of each chunk of rows, into [chunks, 2, G, C]. With ``means_ptr`` instead,
    which holds mean(dy) and mean(dy n) as [2, G, C]: the gradients of x and of the shortcut. Where x is one image of
    time, its dy is the sum over the timesteps. Grid: chunks, columns of channels.
    """
    chunk = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0)
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0)
    step = rows.to(tl.int64) * channels
    groups = tl.arange(0, GROUPS_POWER_OF_2)[:, None]
    sums = tl.zeros([GROUPS_POWER_OF_2, COLUMNS], tl.float32)
    products = tl.zeros([GROUPS_POWER_OF_2, COLUMNS], tl.float32)
    for row in range(chunk * chunk_rows, tl.minimum(rows, (chunk + 1) * chunk_rows), ROWS):
        at, inside = _tile(row, c, rows, channels, ROWS)
        v = tl.zeros([ROWS, COLUMNS], tl.float32)
        charged = ()
        for t in tl.static_range(TIMESTEPS):
            normed, _ = _normalised(x_ptr, statistics_ptr, t, at, inside, c, rows, channels, IMAGES, GROUPS)
            h = _charged(v, normed, shortcut_ptr, t, at, inside, weight, bias, rows, channels, tau)
            charged = charged + (h,)  # noqa: RUF005
            v = tl.where(h >= threshold, 0.0, h)
        carry, dy = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for t in tl.static_range(TIMESTEPS - 1, -1, -1):
            h = charged[t]
            ds = tl.load(spikes_grad_ptr + t * step + at, mask=inside, other=0.0).to(tl.float32)
            a = HALF_PI * alpha * (h - threshold)
            dh = ds * (0.5 * alpha / (1.0 + a * a)) + tl.where(h >= threshold, 0.0, carry)
            carry = dh * (1.0 - 1.0 / tau)
            if shortcut_grad_ptr is not None:
                tl.store(shortcut_grad_ptr + t * step + at, dh / tau, mask=inside)
            dy += dh / tau
            if t < IMAGES:
                normed, scale = _normalised(x_ptr, statistics_ptr, t, at, inside, c, rows, channels, IMAGES, GROUPS)
                if means_ptr is not None:
                    of_group = (t % GROUPS) * channels + c
                    mean = tl.load(means_ptr + of_group, mask=c < channels, other=0.0)
                    product = tl.load(means_ptr + GROUPS * channels + of_group, mask=c < channels, other=0.0)
                    dx = (weight * scale)[None, :] * (dy - mean[None, :] - normed * product[None, :])
                    tl.store(x_grad_ptr + t * step + at, dx, mask=inside)
                else:
                    own = groups == t % GROUPS
                    sums += tl.where(own, tl.sum(dy, 0)[None, :], 0.0)
                    products += tl.where(own, tl.sum(dy * normed, 0)[None, :], 0.0)
                dy = tl.zeros([ROWS, COLUMNS], tl.float32)
    if sums_ptr is not None:
        to = (chunk * 2 * GROUPS + groups) * channels + c[None, :]
        exists = (groups < GROUPS) & (c[None, :] < channels)
        tl.store(sums_ptr + to, sums, mask=exists)
        tl.store(sums_ptr + GROUPS * channels + to, products, mask=exists)


class _NormFire(torch.autograd.Function):
    """x [IMAGES, rows, C], and a shortcut [T, rows, C] or None, to spikes [T, rows, C], all contiguous."""

    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, norm, neuron, timesteps):
        images, rows, channels = x.shape
        ctx.per_timestep = norm.training and norm.statistics == "per_timestep"
        groups = images if ctx.per_timestep else 1
        if norm.training:
            statistics = _training_statistics(x.view(groups, -1, channels), norm)
        else:
            statistics = torch.stack([norm.running_mean, (norm.running_var + norm.eps).rsqrt()])  # [2,C]
        spikes = x.new_empty(timesteps, rows, channels)
        tile = _tile_of(channels)
        _fire[triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["COLUMNS"])](
            x,
            shortcut,
            statistics,
            weight,
            bias,
            spikes,
            rows,
            channels,
            neuron.tau,
            neuron.v_threshold,
            TIMESTEPS=timesteps,
            IMAGES=images,
            GROUPS=groups,
            **tile,
        )
        ctx.save_for_backward(x, shortcut, weight, bias, statistics)
        ctx.groups, ctx.training, ctx.timesteps = groups, norm.training, timesteps
        ctx.constants = neuron.tau, neuron.v_threshold, neuron.surrogate.alpha
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx, spikes_grad):
        x, shortcut, weight, bias, statistics = ctx.saved_tensors
        images, rows, channels = x.shape
        spikes_grad = spikes_grad.contiguous()
        tile = _tile_of(channels, 4 * TILE // triton.next_power_of_2(ctx.timesteps))  # it holds h_t of every timestep
        columns = triton.cdiv(channels, tile["COLUMNS"])
        chunk_rows = _chunk_rows(rows, columns, tile)
        chunks = triton.cdiv(rows, chunk_rows)

        def run(**tensors):
            _backward[chunks, columns](
                x,
                shortcut,
                statistics,
                weight,
                bias,
                spikes_grad,
                rows=rows,
                channels=channels,
                chunk_rows=chunk_rows,
                tau=ctx.constants[0],
                threshold=ctx.constants[1],
                alpha=ctx.constants[2],
                TIMESTEPS=ctx.timesteps,
                IMAGES=images,
                GROUPS=ctx.groups,
                GROUPS_POWER_OF_2=triton.next_power_of_2(ctx.groups),
                **tile,
                **tensors,
            )

        sums = x.new_empty(chunks, 2, ctx.groups, channels, dtype=torch.float32)
        run(sums_ptr=sums, means_ptr=None, x_grad_ptr=None, shortcut_grad_ptr=None)
        totals = sums.sum(0)  # [2,G,C]
        means = totals / (images * rows // ctx.groups) if ctx.training else torch.zeros_like(totals)
        x_grad, shortcut_grad = torch.empty_like(x), None if shortcut is None else torch.empty_like(shortcut)
        run(sums_ptr=None, means_ptr=means, x_grad_ptr=x_grad, shortcut_grad_ptr=shortcut_grad)
        bias_grad, weight_grad = totals.sum(1)
        return x_grad, shortcut_grad, weight_grad, bias_grad, None, None, None


def norm_and_fire(
    block: NormAndFire, x: Tensor, shortcut: Tensor | None = None, timesteps: int | None = None
) -> Tensor:
    """What ``NormAndFire.forward`` computes, on a GPU; spikes [T, B, C, ...] have the channels innermost in memory.

    Currents and spikes are fp32 or bf16, all else is fp32. Tensors with another layout are copied. Where the kernels do
    not serve, the block's own ``forward`` is called: a channel with a single value, more than
    ``MOST_FUSED_TIMESTEPS``, other dtypes, a shortcut that would be broadcast, and while hooks watch the batch norm
    or the neuron (the counting of spikes does).
    """
    norm, neuron, steps = block.norm, block.neuron, timesteps or len(x)
    groups = len(x) if norm.statistics == "per_timestep" else 1
    fits = x.dtype in (torch.float32, torch.bfloat16) and steps <= MOST_FUSED_TIMESTEPS
    fits &= x.numel() > groups * norm.num_features and not (norm._forward_hooks or neuron._forward_hooks)
    if shortcut is not None:
        fits &= shortcut.dtype == x.dtype and shortcut.shape == (steps, *x.shape[1:])
    if not fits:
        return NormAndFire.forward(block, x, shortcut, timesteps)
    if norm.training:
        norm.num_batches_tracked.add_(1)
    inputs = (None if tensor is None else _as_rows(tensor) for tensor in (x, shortcut))
    spikes = _NormFire.apply(*inputs, norm.weight, norm.bias, norm, neuron, steps)
    return spikes.view(steps, len(x[0]), *x.shape[3:], norm.num_features).movedim(-1, 2)


def _as_rows(x: Tensor) -> Tensor:
    """[T, B, C, ...] to [T, rows, C], contiguous; a view where the channels are innermost."""
    return x.movedim(2, -1).flatten(1, -2).contiguous()


def _training_statistics(x: Tensor, norm) -> Tensor:
    """Statistics [2, G, C] of x [G, rows, C], mean and 1/sqrt(variance + eps); the running statistics move."""
    groups, rows, channels = x.shape
    tile = _tile_of(channels)
    columns = triton.cdiv(channels, tile["COLUMNS"])
    chunk_rows = _chunk_rows(rows, columns * groups, tile)
    chunks = triton.cdiv(rows, chunk_rows)
    moments = x.new_empty(2, groups, chunks, channels, dtype=torch.float32)
    _moments[chunks, columns, groups](x, moments, rows, channels, chunk_rows, **tile)
    statistics = x.new_empty(2, groups, channels, dtype=torch.float32)
    height = triton.next_power_of_2(chunks)
    width = max(1, min(16, 4 * TILE // height))
    _statistics[(triton.cdiv(channels, width),)](
        moments,
        statistics,
        norm.running_mean,
        norm.running_var,
        rows,
        channels,
        chunk_rows,
        chunks,
        norm.momentum,
        norm.eps,
        GROUPS=groups,
        CHUNKS=height,
        COLUMNS=width,
    )
    return statistics


def _tile_of(channels: int, most: int = TILE) -> dict[str, int]:
    """Rows and channels of a tile of at most ``most`` elements."""
    columns = min(COLUMNS, triton.next_power_of_2(channels))
    return {"ROWS": min(TILE, most) // columns, "COLUMNS": columns}


def _chunk_rows(rows: int, others: int, tile: dict[str, int]) -> int:
    """Rows that a program sums over, whole tiles, where it is one of ``others`` that share them."""
    chunks = max(1, PROGRAMS // others)
    return triton.cdiv(rows, chunks * tile["ROWS"]) * tile["ROWS"]
