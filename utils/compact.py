"""Channels that a pruned network can do without, taken out of its graph: the logits stay those of the whole.

A channel goes where all weights that read it are 0, or where its neurons provably never fire: their current is at most
b + sum over the inputs of max(w, 0), since a spike is 0 or 1, and the membrane never exceeds the largest current. What
then reads or feeds nothing any more goes too. Channels that are summed, as along the shortcuts of a residual network,
stay or go together.
"""

from dataclasses import replace

import numpy as np

from .export import Node

BELOW = 1 - 1e-4  # of the threshold: sums of fp32 weights may round up, by much less
Bounds = tuple[np.ndarray, np.ndarray]  # smallest and largest value of each channel, fp64 [C]


def compact(graph: list[Node]) -> list[Node]:
    """The graph without those channels; it shares no weights with the other, and keeps one channel of every layer.

    Args:
        graph: see ``utils.export.network_graph``. The image's channels and the logits stay.
    """
    spaces = _spaces(graph)
    channels = {node.name: _channels(node, graph) for node in graph}
    fixed = {spaces[graph[0].name], spaces[graph[-1].name]}
    keep = {space: np.full(channels[name], space in fixed) for name, space in spaces.items()}
    speaks = {name: (low != 0) | (high != 0) for name, (low, high) in _bounds(graph, channels).items()}
    layers = [node for node in graph if node.weight is not None]
    while True:
        before = sum(kept.sum() for kept in keep.values())
        for node in reversed(layers):
            read = _by_channel(node, channels)[keep[spaces[node.name]]].any((0, 2))  # [I]
            for source in node.inputs:
                keep[spaces[source]] |= read & speaks[source]
        if before == sum(kept.sum() for kept in keep.values()):
            break
    for kept in keep.values():
        kept[0] |= not kept.any()
    return [_cut(node, keep[spaces[node.name]], [keep[spaces[name]] for name in node.inputs[:1]]) for node in graph]


def _spaces(graph: list[Node]) -> dict[str, str]:
    """For each node, which set of channels its output has, by the name of one node that has it."""
    spaces: dict[str, str] = {}
    for node in graph:
        joined = {spaces[name] for name in node.inputs}  # those that are summed are one
        spaces = {name: node.inputs[0] if space in joined else space for name, space in spaces.items()}
        spaces[node.name] = node.name if node.weight is not None or not node.inputs else node.inputs[0]
    return spaces


def _channels(node: Node, graph: list[Node]) -> int:
    """Channels of a node's output; flattened, a channel is a run of h*w values."""
    before = {other.name: other for other in graph}
    while node.kind in ("flatten", "lif"):
        node = before[node.inputs[0]]
    return node.shape[0]


def _by_channel(node: Node, channels: dict[str, int]) -> np.ndarray:
    """Whether weights are not 0, [O, I, weights of a channel]."""
    return (node.weight != 0).reshape(len(node.weight), channels[node.inputs[0]], -1)


def _bounds(graph: list[Node], channels: dict[str, int]) -> dict[str, Bounds]:
    """Bounds of what each node gives, at any timestep, pixel and image."""
    bounds: dict[str, Bounds] = {}
    for node in graph:
        if not node.inputs:
            anything = np.full(channels[node.name], np.inf)
            bounds[node.name] = -anything, anything
            continue
        low, high = (sum(bounds[name][side] for name in node.inputs) for side in (0, 1))
        if node.kind == "lif":
            can_fire = high >= node.settings["v_threshold"] * BELOW
            low, high = np.zeros_like(high), can_fire.astype(np.float64)
        elif node.weight is not None:
            weight = node.weight.astype(np.float64).reshape(len(node.weight), len(low), -1)
            with np.errstate(invalid="ignore"):  # a pruned weight takes nothing of an unbounded input
                ends = [np.where(weight == 0, 0, weight * end[:, None]) for end in (low, high)]
            # the zeros are padding's
            low = node.bias + np.minimum(0, np.minimum(*ends)).sum((1, 2))
            high = node.bias + np.maximum(0, np.maximum(*ends)).sum((1, 2))
        bounds[node.name] = low, high
    return bounds


def _cut(node: Node, keep: np.ndarray, before: list[np.ndarray]) -> Node:
    """A node with the channels that are kept, reading those that are kept of what comes before it."""
    size = [int(keep.sum()) * node.shape[0] // len(keep), *node.shape[1:]]
    if node.weight is None:
        return replace(node, shape=size)
    shape = node.weight.shape
    weight = node.weight.reshape(shape[0], len(before[0]), -1)[keep][:, before[0]]
    return replace(node, shape=size, weight=weight.reshape(len(weight), -1, *shape[2:]), bias=node.bias[keep])


def dense_cost(graph: list[Node]) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image at one timestep, where zeros are stored and computed."""
    layers = [node for node in graph if node.weight is not None]
    parameters = sum(node.weight.size + node.bias.size for node in layers)
    return parameters, sum(node.weight.size * int(np.prod(node.shape[1:])) for node in layers)
