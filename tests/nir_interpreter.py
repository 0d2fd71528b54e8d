"""An interpreter of NIR graphs in plain numpy, by NIR's text alone: Euler steps, v > v_threshold, edges are summed."""

from graphlib import TopologicalSorter

import nir
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def run(path, images, timesteps):
    """The outputs of every node at every timestep, name -> [T, B, ...]; images [B, C, H, W] are the input of each."""
    graph = nir.read(path)
    dt = images.dtype.type(graph.metadata["dt"])
    sources = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    order = list(TopologicalSorter(sources).static_order())
    voltages, steps = {}, {name: [] for name in order}
    for _ in range(timesteps):
        values = {}
        for name in order:
            x = (
                sum((values[source] for source in sources[name][1:]), values[sources[name][0]])
                if sources[name]
                else images
            )
            node = graph.nodes[name]
            if isinstance(node, nir.LIF):
                v = voltages.get(name, np.zeros_like(x))
                v = v + dt / node.tau * ((node.v_leak - v) + node.r * x)
                values[name] = (v > node.v_threshold).astype(x.dtype)
                voltages[name] = np.where(values[name] == 1, node.v_reset, v)
            else:
                values[name] = stateless(node, x)
            steps[name].append(values[name])
    return {name: np.stack(values) for name, values in steps.items()}


def stateless(node, x):
    match node:
        case nir.Input() | nir.Output():
            return x
        case nir.Affine():
            return x @ node.weight.T + node.bias
        case nir.Conv2d():
            assert (node.groups, tuple(node.dilation)) == (1, (1, 1))
            patches = windows(x, node.weight.shape[2:], node.stride, node.padding)
            y = np.tensordot(patches, node.weight, axes=((1, 4, 5), (1, 2, 3))) + node.bias
            return np.moveaxis(y, -1, 1)
        case nir.SumPool2d():
            return windows(x, node.kernel_size, node.stride, node.padding).sum((-2, -1))
        case nir.AvgPool2d():
            return windows(x, node.kernel_size, node.stride, node.padding).mean((-2, -1))
        case nir.Threshold():
            return (x > node.threshold).astype(x.dtype)
        case nir.Flatten():
            assert (node.start_dim, node.end_dim) == (0, -1)
            return x.reshape(len(x), -1)
    raise AssertionError(node)


def windows(x, kernel, stride, padding):
    """[B, C, H, W] to [B, C, H', W', *kernel], padded with zeros."""
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    return sliding_window_view(x, tuple(kernel), (2, 3))[:, :, :: stride[0], :: stride[1]]
