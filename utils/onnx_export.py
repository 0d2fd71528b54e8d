"""The graph of ``utils.export`` as a torch module with the neurons written out, and as an ONNX file."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .export import IMAGE, Node


class FoldedNetwork(nn.Module):
    """Runs a graph for T timesteps, images [B,C,H,W] to logits [T,B,classes].

    A value is [T,B,...], or [1,B,...] where it is the same at every timestep: what comes before the first neuron is
    computed once per image.

    Args:
        graph: see ``utils.export.network_graph``.
        timesteps: T.
    """

    def __init__(self, graph: list[Node], timesteps: int):
        super().__init__()
        self.graph, self.timesteps = graph, timesteps
        for index, node in enumerate(graph):
            if node.weight is not None:
                self.register_buffer(f"weight{index}", torch.from_numpy(node.weight))
                self.register_buffer(f"bias{index}", torch.from_numpy(node.bias))

    def forward(self, images: Tensor) -> Tensor:
        return self.values(images)[self.graph[-1].name]

    def values(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs of all nodes by name."""
        values = {IMAGE: images.unsqueeze(0)}
        for index, node in enumerate(self.graph[1:], 1):
            x = values[node.inputs[0]]
            for name in node.inputs[1:]:
                x = x + values[name]
            if node.kind == "lif":
                values[node.name] = self._fire(x, **node.settings)
            elif node.kind == "flatten":
                values[node.name] = x.flatten(2)
            else:
                values[node.name] = self._layer(index, node, x.flatten(0, 1)).unflatten(0, (len(x), -1))
        return values

    def _layer(self, index: int, node: Node, x: Tensor) -> Tensor:
        """A layer without memory, [N, ...] to [N, ...]."""
        if node.kind == "maxpool":
            return F.max_pool2d(x, node.settings["kernel"], node.settings["stride"])
        if node.kind == "avgpool":
            return F.avg_pool2d(x, node.settings["kernel"], node.settings["stride"])
        weight, bias = self.get_buffer(f"weight{index}"), self.get_buffer(f"bias{index}")
        if node.kind == "linear":
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, **node.settings)

    def _fire(self, current: Tensor, tau: float, v_threshold: float) -> Tensor:
        """The equations of ``models.lif.LIF``."""
        membrane, spikes = torch.zeros_like(current[0]), []
        for t in range(self.timesteps):
            membrane = membrane + (current[t if len(current) > 1 else 0] - membrane) / tau
            spikes.append((membrane >= v_threshold).to(current.dtype))
            membrane = membrane * (1 - spikes[-1])
        return torch.stack(spikes)


def onnx_bytes(graph: list[Node], timesteps: int) -> bytes:
    """The content of an ONNX file: ``images`` [B,C,H,W] to ``logits`` [T,B,classes], for any B; needs the packages onnx
    and onnxscript."""
    images = torch.zeros(2, *graph[0].shape, dtype=torch.from_numpy(graph[-1].weight).dtype)
    program = torch.onnx.export(
        FoldedNetwork(graph, timesteps).eval(),
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        verbose=False,
    )
    return program.model_proto.SerializeToString()
