"""A network as a plain graph for other software and hardware: folded layers, LIF neurons, pools; and as an npz file.

Batch norm is folded into the convolution or linear layer before it. In eval mode it is the same affine map at every
timestep, wherever its statistics came from in training. A pruned weight stays exactly 0.
"""

import copy
import io
import json
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, fx, nn

from models.layers import GlobalAvgPool, NormAndFire
from models.lif import LIF

from .files import InputError

LEAVES = (NormAndFire, LIF, GlobalAvgPool)  # layers that are not looked into, beside those without children
IMAGE = "input"  # name of the first node


@dataclass
class Node:
    """A layer.

    Attributes:
        name: that of its module in the network.
        kind: ``input``, ``conv``, ``linear``, ``lif``, ``maxpool``, ``avgpool`` or ``flatten``.
        inputs: names of the nodes whose outputs, summed, are its input.
        shape: of its output, without time and batch.
        settings: numbers that JSON can hold. ``conv``: stride, padding; ``maxpool``, ``avgpool``: kernel, stride (each
            a pair, rows first); ``lif``: tau (in timesteps), v_threshold.
        weight: of ``conv`` [O,I,h,w] and ``linear`` [O,I], in the network's precision.
        bias: [O].
    """

    name: str
    kind: str
    inputs: list[str]
    shape: list[int]
    settings: dict = field(default_factory=dict)
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None


def fold(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias, fp64, of a layer with the batch norm behind it in eval mode:
    w * s and (b - mean) * s + beta with s = gamma / sqrt(var + eps)."""
    weight = layer.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    if norm is not None:
        scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        bias = (bias - norm.running_mean.double()) * scale + norm.bias.detach().double()
    return weight, bias


def network_graph(model: nn.Module, image: tuple[int, int, int]) -> list[Node]:
    """The graph of a network in eval mode; the network does not change.

    The first node is the image, which is the input of every timestep: what comes before the first ``lif`` is the same
    at every timestep. The last node gives a timestep's logits.

    Args:
        model: ``model(images, timesteps)`` of convolutions and linear layers, batch norm, LIF, pools and sums.
        image: channels, height and width of an image.

    Returns:
        The nodes, every node behind its inputs.

    Raises:
        InputError: the network holds what such a graph cannot hold; the message names it.
    """
    root = _OneTimestep(copy.deepcopy(model).eval())
    try:
        shapes = _Shapes(fx.GraphModule(root, _Tracer().trace(root)))
    except fx.proxy.TraceError as error:
        raise InputError(f"the network cannot be exported: its forward depends on values ({error})") from error
    with torch.no_grad():
        shapes.run(next(model.parameters()).new_zeros(1, *image))
    builder = _Builder(dict(root.named_modules()), shapes.found)
    for node in shapes.module.graph.nodes:
        builder.add(node)
    return builder.nodes


class _OneTimestep(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, 1)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, LEAVES) or not (list(module.children()) or isinstance(module, nn.Sequential))


class _Shapes(fx.Interpreter):
    """Runs a traced network and notes every output's shape, without time and batch."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.found = {}

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        self.found[node] = list(result.shape[1 if node.op == "placeholder" else 2 :])
        return result


class _Builder:
    """Makes the graph's nodes of those of a trace."""

    def __init__(self, modules: dict[str, nn.Module], shapes: dict[fx.Node, list[int]]):
        self.modules, self.shapes = modules, shapes
        self.nodes: list[Node] = []
        self.layers: dict[str, tuple[Node, nn.Module]] = {}  # those with weights and no batch norm so far, by name
        self.origin: dict[fx.Node, list[str]] = {}  # nodes whose sum a traced value is

    def add(self, traced: fx.Node) -> None:
        sources = [arg for arg in [*traced.args, *traced.kwargs.values()] if isinstance(arg, fx.Node)]
        inputs = [name for source in sources for name in self.origin[source]]
        if traced.op == "placeholder":
            self._node(traced, IMAGE, "input", [])
        elif traced.op == "call_module":
            self._module(traced, self.modules[traced.target], traced.target.removeprefix("network."), sources, inputs)
        elif traced.op == "output" or (traced.op, traced.target) == ("call_method", "unsqueeze"):
            self.origin[traced] = inputs
        else:
            raise InputError(f"the network cannot be exported: {traced.target} stands between its layers")

    def _node(self, traced: fx.Node, name: str, kind: str, inputs: list[str], shape=None, **settings) -> Node:
        if any(node.name == name for node in self.nodes):
            raise InputError(f"{name} cannot be exported: it is used twice")
        self.nodes.append(Node(name, kind, inputs, shape or self.shapes[traced], settings))
        self.origin[traced] = [name]
        return self.nodes[-1]

    def _module(self, traced: fx.Node, module: nn.Module, name: str, sources: list[fx.Node], inputs: list[str]) -> None:
        before = self.shapes[sources[0]]
        match module:
            case nn.Conv2d(groups=1, dilation=(1, 1), padding_mode="zeros", padding=tuple()):
                settings = {"stride": list(module.stride), "padding": list(module.padding)}
                self._weigh(self._node(traced, name, "conv", inputs, **settings), module)
                self.layers[name] = self.nodes[-1], module
            case nn.Linear():
                self._weigh(self._node(traced, name, "linear", inputs), module)
                self.layers[name] = self.nodes[-1], module
            case nn.BatchNorm2d():
                self._fold(name, module, sources[0])
                self.origin[traced] = inputs
            case NormAndFire() if type(module.neuron) is LIF:  # a subclass may compute something else
                self._fold(f"{name}.norm", module.norm, sources[0])
                self._neuron(traced, f"{name}.neuron", module.neuron, inputs)
            case LIF() if type(module) is LIF:
                self._neuron(traced, name, module, inputs)
            case nn.MaxPool2d(padding=0, dilation=1, ceil_mode=False) if self._spikes(inputs):
                kernel, stride = _pair(module.kernel_size), _pair(module.stride)
                self._node(traced, name, "maxpool", inputs, kernel=kernel, stride=stride)
            case nn.AdaptiveAvgPool2d():
                kernel, stride = _windows(name, before[1:], self.shapes[traced][1:])
                self._average(traced, name, inputs, self.shapes[traced], kernel, stride)
            case GlobalAvgPool():
                self._average(traced, f"{name}.mean", inputs, [before[0], 1, 1], before[1:], before[1:])
                self._node(traced, name, "flatten", self.origin[traced])
            case nn.Flatten(start_dim=2, end_dim=-1):
                self._node(traced, name, "flatten", inputs)
            case nn.Identity():
                self.origin[traced] = inputs
            case NormAndFire():
                raise InputError(
                    f"{name} has neurons that are {type(module.neuron).__name__}: only LIF can be exported"
                )
            case _:
                raise InputError(f"{name} ({type(module).__name__}) cannot be exported where it stands")

    def _weigh(self, node: Node, layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None = None) -> None:
        dtype = layer.weight.dtype
        node.weight, node.bias = (tensor.to(dtype).cpu().numpy() for tensor in fold(layer, norm))

    def _fold(self, name: str, norm: nn.BatchNorm2d, source: fx.Node) -> None:
        """Fold a batch norm into the node that feeds it, and nothing else."""
        names = self.origin[source]
        if len(names) != 1 or names[0] not in self.layers or len(source.users) != 1:
            raise InputError(f"{name} cannot be folded: it does not stand behind a convolution or linear layer alone")
        node, layer = self.layers.pop(names[0])
        self._weigh(node, layer, norm)

    def _average(self, traced: fx.Node, name: str, inputs: list[str], shape: list[int], kernel, stride) -> None:
        self.origin[traced] = inputs
        if kernel != [1, 1]:
            self._node(traced, name, "avgpool", inputs, shape, kernel=kernel, stride=stride)

    def _neuron(self, traced: fx.Node, name: str, neuron: LIF, inputs: list[str]) -> None:
        self._node(traced, name, "lif", inputs, tau=float(neuron.tau), v_threshold=float(neuron.v_threshold))

    def _spikes(self, names: list[str]) -> bool:
        """Whether a value is 0 or 1."""
        kinds = {node.name: node.kind for node in self.nodes}
        return len(names) == 1 and kinds[names[0]] in ("lif", "maxpool")


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _windows(name: str, size: list[int], out: list[int]) -> tuple[list[int], list[int]]:
    """Kernel and stride of an adaptive pool: window i reaches from floor(i n / m) to ceil((i + 1) n / m)."""
    kernel, stride = [], []
    for n, m in zip(size, out, strict=True):
        starts = [i * n // m for i in range(m)]
        steps = {b - a for a, b in pairwise(starts)} or {n}
        lengths = {-(-(i + 1) * n // m) - start for i, start in enumerate(starts)}
        if len(steps) > 1 or len(lengths) > 1 or 0 in steps:
            raise InputError(f"{name} averages {n} pixels to {m} in windows that differ: it cannot be exported")
        kernel += lengths
        stride += steps
    return kernel, stride


def kept_weights(graph: list[Node]) -> tuple[int, int]:
    """Weights of convolutions and linear layers that are not 0, and all."""
    weights = [node.weight for node in graph if node.weight is not None]
    return sum(int(np.count_nonzero(weight)) for weight in weights), sum(weight.size for weight in weights)


def npz_bytes(graph: list[Node]) -> bytes:
    """The content of an npz file: weights in compressed sparse rows, a row for an output channel or unit.

    ``graph`` is a JSON string, a list of nodes as ``Node`` describes them, with ``weight_shape`` where there are
    weights. Of each of these nodes, with the weight as a matrix [O, I*h*w]: ``<name>.starts`` [O+1], where a row begins
    in the next two; ``<name>.columns`` [N] and ``<name>.values`` [N], fp32, the weights that are not 0; ``<name>.bias``
    [O], fp32. Integers are unsigned, of the smallest size that fits.
    """
    arrays, rows = {}, []
    for node in graph:
        row = {"name": node.name, "kind": node.kind, "inputs": node.inputs, "shape": node.shape, **node.settings}
        if node.weight is not None:
            row["weight_shape"] = list(node.weight.shape)
            matrix = node.weight.reshape(len(node.weight), -1).astype(np.float32)
            outputs, columns = matrix.nonzero()
            starts = np.searchsorted(outputs, np.arange(len(matrix) + 1))
            arrays[f"{node.name}.starts"] = starts.astype(np.min_scalar_type(len(columns)))
            arrays[f"{node.name}.columns"] = columns.astype(np.min_scalar_type(matrix.shape[1] - 1))
            arrays[f"{node.name}.values"] = matrix[outputs, columns]
            arrays[f"{node.name}.bias"] = node.bias.astype(np.float32)
        rows.append(row)
    content = io.BytesIO()
    np.savez_compressed(content, graph=json.dumps(rows), **arrays)
    return content.getvalue()
