"""The graph of ``utils.export`` as a NIR file (Neuromorphic Intermediate Representation, Pedersen et al. 2024).

The neuron here is v <- v + (x - v) / tau per timestep, fires at v >= v_threshold and is then reset to 0. NIR's is
tau' dv/dt = (v_leak - v) + r x, fires at v > v_threshold and is then set to v_reset. Its Euler step of length dt is
v <- v + (dt / tau') ((v_leak - v) + r x), so the two are equal with tau' = tau dt, r = 1, v_leak = 0, v_reset = 0. And
v >= b means v > a for the largest number a below b, so NIR's threshold is the number before ours: 0.99999994 for 1 in
fp32. A reader that fires at v >= v_threshold differs only where v is exactly that number.

dt is not part of NIR. It is that of NIR's readers, 0.1 ms, and is written to the graph's metadata.

NIR has no max-pool. A maximum of spikes is an OR: SumPool2d, then Threshold(0.5). Edges that meet in a node are summed:
a shortcut is a second edge to the neuron. The image is the graph's input at every timestep. Shapes are without batch.
"""

import io

import nir
import numpy as np

from .export import Node

DT = 1e-4  # seconds; what spikingjelly and snnTorch assume


def nir_graph(graph: list[Node]) -> nir.NIRGraph:
    """The NIR graph; numbers are in the network's precision. The nodes have the graph's names; ``<max-pool>.sum``
    stands before its threshold, ``output`` at the end."""
    dtype = graph[-1].weight.dtype
    shapes = {node.name: node.shape for node in graph}
    nodes, edges = {}, []
    for node in graph:
        target = node.name
        if node.kind == "maxpool":
            target = f"{node.name}.sum"
            nodes[target] = _pool(nir.SumPool2d, node)
            edges.append((target, node.name))
        edges += [(source, target) for source in node.inputs]
        nodes[node.name] = _node(node, shapes.get(node.inputs[0]) if node.inputs else None, dtype)
    nodes["output"] = nir.Output({"output": np.array(graph[-1].shape)})
    return nir.NIRGraph(nodes, [*edges, (graph[-1].name, "output")], metadata={"dt": DT})


def _node(node: Node, before: list[int] | None, dtype: np.dtype) -> nir.NIRNode:
    """The NIR node of a node; ``before`` is the shape of its input."""
    match node.kind:
        case "input":
            return nir.Input({"input": np.array(node.shape)})
        case "conv":
            stride, padding = tuple(node.settings["stride"]), tuple(node.settings["padding"])
            return nir.Conv2d(tuple(before[1:]), node.weight, stride, padding, (1, 1), 1, node.bias)
        case "linear":
            return nir.Affine(node.weight, node.bias)
        case "lif":
            ones = np.ones(node.shape, dtype)
            threshold = np.nextafter(dtype.type(node.settings["v_threshold"]), dtype.type(0))
            tau = dtype.type(node.settings["tau"] * DT)
            return nir.LIF(tau * ones, r=ones, v_leak=0 * ones, v_threshold=threshold * ones, v_reset=0 * ones)
        case "maxpool":
            return nir.Threshold(np.full(node.shape, 0.5, dtype))
        case "avgpool":
            return _pool(nir.AvgPool2d, node)
        case "flatten":
            return nir.Flatten({"input": np.array(before)}, start_dim=0)
    raise AssertionError(node.kind)


def _pool(kind: type, node: Node) -> nir.NIRNode:
    return kind(np.array(node.settings["kernel"]), np.array(node.settings["stride"]), padding=np.array([0, 0]))


def nir_bytes(graph: list[Node]) -> bytes:
    """The content of a NIR file."""
    content = io.BytesIO()
    nir.write(content, nir_graph(graph))
    return content.getvalue()
