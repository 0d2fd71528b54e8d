"""What a ticket costs to run: its spikes and the operations they cause, layer by layer.

Each input that is not 0 costs one operation at every unpruned connection that it reaches: pruned connections, silent
neurons and zero padding cost nothing. It is an accumulation (a synaptic operation) in a layer whose inputs are spikes,
and a multiply-accumulate (MAC) in a layer whose inputs are real numbers: the first convolution, which sees the image
once however many timesteps follow, and a linear layer behind an average pool, which sees averaged spikes at every
timestep.

spikingjelly's ``SynOpCounter`` agrees for a dense network; it counts pruned connections too, and in inference mode
nothing at all.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import GlobalAvgPool
from models.lif import LIF

from . import distributed
from .data import Split
from .energy import operations_uj
from .files import InputError
from .masks import Mask

BATCH = 250  # images of 32x32; a layer's input and its comparisons are in memory together
COUNTABLE = (
    nn.Conv2d,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    GlobalAvgPool,
    nn.Flatten,
    nn.Identity,
    nn.Sequential,  # an empty one is an identity; of others, the layers are looked at
    LIF,
    nn.ReLU,
)


@dataclass
class _Neurons:
    """A layer of neurons, as a forward hook sees it."""

    spikes: Tensor | int = 0  # int64 [...]: of each neuron

    def __call__(self, layer: LIF, inputs: tuple[Tensor], spikes: Tensor) -> None:
        self.spikes += spikes.sum((0, 1), dtype=torch.float32).long()

    def costs(self) -> dict[str, float]:
        """See ``measure``; of all images together."""
        return {
            "neurons": self.spikes.numel(),
            "silent": (self.spikes == 0).sum().item(),
            "spikes": self.spikes.sum().item(),
        }


@dataclass
class _Connections:
    """A convolution or linear layer, as a forward hook sees it."""

    active: Tensor | int = 0  # fp64 [C,H,W] or [C]: how often each input was not 0
    real: Tensor | int = 0  # int64 []: batches with an input that is neither 0 nor 1
    positions: int = 0  # outputs that share one kernel
    calls: int = 0  # timesteps that it runs for

    def __call__(self, layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].flatten(0, -layer.weight.ndim)  # [T*B,C,H,W] or [T*B,C]
        self.positions = output.shape[2:].numel() // len(layer.weight)
        self.calls = len(output)
        self.active += (x != 0).sum(0, dtype=torch.float32).double()  # a batch's counts are exact in fp32, and fast
        self.real += ((x != 0) & (x != 1)).any()

    def costs(self, layer: nn.Conv2d | nn.Linear, kept: Tensor) -> dict[str, float]:
        """See ``measure``; of all images together. ``kept`` is the layer's mask."""
        operations = self._operations(layer, kept, self.active)
        everywhere = torch.ones_like(self.active) * (self.positions if isinstance(layer, nn.Linear) else 1)
        return {
            "weights": kept.numel(),
            "weights_left": int(kept.sum()),
            "fan_in": kept[0].numel(),
            "inputs": self.active.numel() * (self.positions if isinstance(layer, nn.Linear) else 1),
            "outputs": len(kept) * self.positions,
            "connections": round(self._operations(layer, torch.ones_like(kept), everywhere)),
            "connections_left": round(self._operations(layer, kept, everywhere)),
            "calls": self.calls,
            "synops": 0.0 if self.real else operations,
            "macs": operations if self.real else 0.0,
            "dense_macs": self.positions * kept.numel(),
        }

    def _operations(self, layer: nn.Conv2d | nn.Linear, kept: Tensor, active: Tensor) -> float:
        """Connections that are passed where each input is passed so often, exact up to 2^53."""
        uses = active  # how often a connection of one output channel is passed: [C] or, tap by tap, [C*h*w]
        if isinstance(layer, nn.Conv2d):
            columns = F.unfold(uses[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            uses = columns[0].sum(-1)
        return (kept.flatten(1).sum(0) * uses).sum().item()


def check_countable(model: nn.Module) -> None:
    """Check that ``measure`` knows every layer of a network.

    Raises:
        InputError: it does not; the message names the layer.
    """
    inside_neurons = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LIF))
    for name, module in model.named_modules():
        is_layer = not list(module.children()) or list(module.parameters(recurse=False))
        if is_layer and not name.startswith(inside_neurons) and not isinstance(module, COUNTABLE):
            kinds = ", ".join(kind.__name__.lstrip("_") for kind in COUNTABLE)
            raise InputError(f"the cost of {name} ({type(module).__name__}) cannot be counted: choose from {kinds}")
        if isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros"):
            raise InputError(f"the cost of {name} cannot be counted: a convolution must be in one group, zero-padded")


@torch.inference_mode()
def measure(model: nn.Module, mask: Mask, split: Split, timesteps: int, precision: str = "fp32") -> dict:
    """Run the un-augmented images in eval mode and count; the model does not change. On several ranks each runs its
    part, and all have the counts of all.

    Args:
        model: of layers that ``check_countable`` accepts, on sequences [T, B, ...].
        mask: the connections that survive.
        split: the images.
        timesteps: T.
        precision: of the forward pass, ``fp32`` or ``bf16``.

    Returns:
        Means over the images, of all T timesteps together:

        - ``spikes_per_image``: of all neurons (Fig. 11).
        - ``firing_rates``: layer of neurons -> spikes per neuron and timestep, 0 to 1, in the network's order.
        - ``synops_per_image``, ``macs_per_image``: operations, see above.
        - ``dense_macs_per_image``: MACs of the dense ANN of this shape, which passes an image once. As is usual,
          kernel weights x outputs: padding and zeros count.
        - ``energy_uj_per_image``, ``ann_energy_uj_per_image``: microjoules of these operations in fp32 at 45 nm.
          ``utils.energy`` has other precisions, and memory.
        - ``layer_costs``: layer with weights -> its ``weights`` and ``weights_left``; ``connections`` and
          ``connections_left``, which are these at every place of the kernel but for padding; ``synops``, ``macs``,
          ``dense_macs``; ``fan_in``, weights of one output; ``inputs`` and ``outputs``, at one timestep; ``calls``,
          timesteps that it is computed for.
        - ``neuron_costs``: layer of neurons -> ``neurons``, ``silent`` of them, which fired for no image, ``spikes``.
        - ``neurobench``: what NeuroBench's metrics of these names say (Yik et al. 2025): ``footprint`` in bytes of all
          parameters and buffers, pruned ones too; ``connection_sparsity``, ``activation_sparsity``, 0 to 1;
          ``Effective_MACs``, ``Effective_ACs``, and ``Dense``, the operations if nothing were 0.

        Without spiking neurons the first three and the activation sparsity are None, and all operations are MACs.

    Raises:
        InputError: the network has a layer that cannot be counted.
    """
    check_countable(model)
    modules = dict(model.named_modules())
    neurons = {name: _Neurons() for name, module in modules.items() if isinstance(module, LIF)}
    layers = {name: _Connections() for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)}
    training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # hooks do not run in compiled code
        for name, hook in (neurons | layers).items():
            stack.enter_context(modules[name].register_forward_hook(hook))
        model.eval()
        batch = split.batch(BATCH)
        for images, _ in split.part(distributed.part_of(len(split), batch)).batches(batch):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                model(images, timesteps)
    for layer in neurons.values():
        (layer.spikes,) = distributed.sums(layer.spikes)
    for layer in layers.values():
        layer.active, layer.real = distributed.sums(layer.active, layer.real)

    of_layers = {n: layer.costs(modules[n], mask[f"{n}.weight"]) for n, layer in layers.items()}
    of_neurons = {name: layer.costs() for name, layer in neurons.items()}
    totals = {field: sum(layer[field] for layer in of_layers.values()) for field in ("synops", "macs", "dense_macs")}
    spikes, places = (sum(layer[field] for layer in of_neurons.values()) for field in ("spikes", "neurons"))
    synops, macs, spikes = (total / len(split) for total in (totals["synops"], totals["macs"], spikes))
    for layer in (*of_layers.values(), *of_neurons.values()):
        layer.update({f: layer[f] / len(split) for f in ("synops", "macs", "spikes") if f in layer})
    weights, left = (sum(layer[field] for layer in of_layers.values()) for field in ("weights", "weights_left"))
    stored = [*model.parameters(), *model.buffers()]
    return {
        "spikes_per_image": spikes if neurons else None,
        "firing_rates": {name: layer["spikes"] / (layer["neurons"] * timesteps) for name, layer in of_neurons.items()}
        or None,
        "synops_per_image": synops if neurons else None,
        "macs_per_image": macs,
        "dense_macs_per_image": totals["dense_macs"],
        "energy_uj_per_image": operations_uj(synops, macs),
        "ann_energy_uj_per_image": operations_uj(0, totals["dense_macs"]),
        "layer_costs": of_layers,
        "neuron_costs": of_neurons,
        "neurobench": {
            "footprint": sum(tensor.numel() * tensor.element_size() for tensor in stored),
            "connection_sparsity": 1 - left / weights,
            "activation_sparsity": 1 - spikes / (places * timesteps) if neurons else None,
            "Effective_MACs": macs,
            "Effective_ACs": synops,
            "Dense": sum(layer["connections"] * layer["calls"] for layer in of_layers.values()),
        },
    }
