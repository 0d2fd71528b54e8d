"""What a ticket costs to run, counted again in other ways."""

from itertools import product

import pytest
import torch
from networks import Exact, firing_rates, lively, recorded
from spikingjelly.activation_based import layer
from torch import nn
from torch.nn import functional as F

from models import build_model
from models.layers import BatchNorm
from models.lif import LIF
from utils import activity
from utils.activity import check_countable, measure
from utils.data import Split
from utils.datasets import DATASETS
from utils.files import InputError
from utils.masks import apply_mask, dense_mask

SPIKING = ("spikes_per_image", "firing_rates", "synops_per_image")
ENERGY = "energy_uj_per_image"
WEIGHTS = nn.Conv2d | nn.Linear


def images(count, height=32, width=32, channels=3):
    pixels = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=seeded())
    return Split(pixels, torch.zeros(count, dtype=torch.long), DATASETS["cifar10" if channels == 3 else "fmnist"])


def seeded():
    return torch.Generator().manual_seed(0)


def inputs_of(split):
    return next(split.batches(len(split)))[0]


def pruned_at_random(model, sparsity):
    """A mask that keeps and prunes weights of every layer; the model keeps its weights."""
    return {name: torch.rand(m.shape, generator=seeded()) >= sparsity for name, m in dense_mask(model).items()}


def network(arch, split, sparsity=0.0, **more):
    """A small network that fires, and its mask."""
    torch.manual_seed(0)
    model = build_model(arch, 3, 10, width=0.125, **more)
    mask = pruned_at_random(model, sparsity)
    apply_mask(model, mask)
    return lively(model, inputs_of(split)), mask


class Odd(nn.Module):
    """Kernels, strides, paddings and dilations of all sorts on images 9x7; linear layers on spikes [T,B,N], on spikes
    [T,B,P,N] with P pixels, and on real numbers; batch norm on [T,B,C]."""

    def __init__(self):
        super().__init__()
        self.stem = layer.Conv2d(1, 3, 3, padding=1, bias=False, step_mode="m")
        self.strided = layer.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(1, 2), step_mode="m")
        self.pool = layer.MaxPool2d(2, step_mode="m")
        self.dilated = layer.Conv2d(4, 3, 2, stride=2, padding=1, dilation=2, step_mode="m")
        self.by_pixel, self.hidden = nn.Linear(3, 6), nn.Linear(12, 5)
        self.norm = BatchNorm(5)
        self.classifier = nn.Linear(5, 2)
        self.fire = nn.ModuleList(LIF() for _ in range(5))
        for module in self.modules():
            if isinstance(module, WEIGHTS):
                nn.init.normal_(module.weight, 0.4, 1)

    def forward(self, x, timesteps):
        x = self.fire[0](self.stem(x.unsqueeze(0)).expand(timesteps, -1, -1, -1, -1))
        x = self.fire[1](self.strided(x))
        x = self.fire[2](self.dilated(self.pool(x)))
        x = self.fire[3](self.by_pixel(x.flatten(3).mT))
        x = self.fire[4](self.norm(self.hidden(x.flatten(2))))
        return self.classifier(x + 0.5)


def operations_by_hand(module, x, kept):
    """Loops over every timestep, image, output and kernel tap; x [T,B,C,H,W] or [T,B,...,C]."""
    if isinstance(module, nn.Linear):
        return sum(
            bool(row[i] != 0 and kept[o, i])
            for row, o, i in product(x.flatten(0, -2), *map(range, module.weight.shape))
        )
    count = 0
    timesteps, batch, _, height, width = x.shape
    outputs = module(x).shape[-2:]
    for t, b, row, column in product(range(timesteps), range(batch), *map(range, outputs)):
        for o, i, p, q in product(*map(range, module.weight.shape)):
            y = row * module.stride[0] + p * module.dilation[0] - module.padding[0]
            z = column * module.stride[1] + q * module.dilation[1] - module.padding[1]
            if 0 <= y < height and 0 <= z < width:
                count += bool(x[t, b, i, y, z] != 0 and kept[o, i, p, q])
    return count


def test_counts_are_those_of_loops_over_every_connection():
    torch.manual_seed(3)
    split, model = images(2, 9, 7, channels=1), Odd()
    mask = pruned_at_random(model, 0.4)
    apply_mask(model, mask)
    lively(model, inputs_of(split))
    seen = recorded(model, inputs_of(split), 3, WEIGHTS)
    counts = {n: operations_by_hand(model.get_submodule(n), x, mask[f"{n}.weight"]) for n, (x, _) in seen.items()}
    assert min(counts.values()) > 0
    synops = {name: count for name, count in counts.items() if name not in ("stem", "classifier")}
    macs = counts["stem"] + counts["classifier"]
    neurons = {name: spikes for name, (_, spikes) in recorded(model, inputs_of(split), 3, LIF).items()}
    spikes = sum(each.sum().item() for each in neurons.values())
    cost = measure(model, mask, split, 3)
    assert (cost["synops_per_image"], cost["macs_per_image"]) == (sum(synops.values()) / 2, macs / 2)
    assert cost["spikes_per_image"] == spikes / 2
    assert cost["firing_rates"] == pytest.approx(firing_rates(model, inputs_of(split), 3))
    dense = 3 * 9 * 9 * 7 + 4 * 45 * 5 * 7 + 3 * 16 * 2 * 1 + 3 * 6 * 2 + 12 * 5 + 5 * 2
    assert cost["dense_macs_per_image"] == dense
    assert cost[ENERGY] == pytest.approx((0.9 * sum(synops.values()) + 4.6 * macs) / 2 / 1e6)
    assert cost["ann_energy_uj_per_image"] == pytest.approx(4.6 * dense / 1e6)

    everything = 0
    for name, (x, y) in seen.items():
        layer, found, kept = model.get_submodule(name), cost["layer_costs"][name], mask[f"{name}.weight"]
        one = torch.ones_like(x[:1, :1])
        assert (found["weights"], found["weights_left"]) == (kept.numel(), kept.sum())
        assert found["connections"] == operations_by_hand(layer, one, torch.ones_like(kept))
        assert found["connections_left"] == operations_by_hand(layer, one, kept)
        assert (found["inputs"], found["outputs"], found["calls"]) == (x[0, 0].numel(), y[0, 0].numel(), len(y))
        assert (found["synops"], found["macs"]) == ((counts[name] / 2, 0) if name in synops else (0, counts[name] / 2))
        assert found["fan_in"] * len(kept) == kept.numel()
        everything += found["connections"] * found["calls"]
    assert sum(found["dense_macs"] for found in cost["layer_costs"].values()) == dense
    for name, each in neurons.items():
        silent = (each.sum((0, 1)) == 0).sum().item()
        assert cost["neuron_costs"][name] == {"neurons": each[0, 0].numel(), "silent": silent, "spikes": each.sum() / 2}
    assert any(found["silent"] for found in cost["neuron_costs"].values())
    assert cost["neurobench"] == {
        "footprint": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "connection_sparsity": pytest.approx(
            sum((~m).sum() for m in mask.values()) / sum(map(torch.numel, mask.values()))
        ),
        "activation_sparsity": pytest.approx(1 - spikes / sum(each.numel() for each in neurons.values())),
        "Effective_MACs": macs / 2,
        "Effective_ACs": sum(synops.values()) / 2,
        "Dense": everything,
    }


@pytest.mark.parametrize(
    ("arch", "size", "real"),
    [
        ("vgg16", 32, {"stem"}),
        ("vgg16", 64, {"stem", "classifier"}),
        ("resnet19", 32, {"stem", "hidden"}),
        ("resnet34", 32, {"stem", "classifier"}),
        ("alexnet", 32, {"stem"}),
        ("alexnet", 64, {"stem", "hidden.0"}),
    ],
)
def test_counts_of_the_networks_are_convolutions_with_ones(arch, size, real, monkeypatch):
    split = images(3, size, size)
    model, mask = network(arch, split, 0.7)
    model.double()  # spikes do not depend on how the images are batched
    split = Exact(*vars(split).values())
    monkeypatch.setattr(activity, "BATCH", 2)  # the last batch is smaller
    cost = measure(model, mask, split, 3)
    synops, macs = 0, 0
    for name, (x, _) in recorded(model, inputs_of(split), 3, WEIGHTS).items():
        module, ones = model.get_submodule(name), mask[f"{name}.weight"].double()
        active = x.flatten(0, 1).ne(0).double()
        if isinstance(module, nn.Linear):
            count = F.linear(active, ones).sum().item()
        else:
            count = F.conv2d(active, ones, None, module.stride, module.padding).sum().item()
        assert count > 0, name
        if name in real:
            macs += count
        else:
            synops += count
    assert cost["synops_per_image"] == synops / 3
    assert cost["macs_per_image"] == macs / 3
    layers = recorded(model, inputs_of(split), 3, LIF)
    assert list(cost["firing_rates"]) == list(layers)
    assert cost["spikes_per_image"] == sum(spikes.sum().item() for _, spikes in layers.values()) / 3
    assert cost["firing_rates"] == pytest.approx(firing_rates(model, inputs_of(split), 3))


@pytest.mark.parametrize("arch", ["vgg16", "resnet19"])
def test_dense_macs_of_the_full_networks(arch):
    if arch == "vgg16":
        shapes = [(3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), *2 * [(256, 256, 8)]]
        shapes += [(256, 512, 4), *2 * [(512, 512, 4)], *3 * [(512, 512, 2)]]
        macs = sum(9 * a * b * side**2 for a, b, side in shapes) + 512 * 10
        assert macs == 313_201_664
    else:
        macs = 9 * 3 * 64 * 32**2 + 512 * 256 + 256 * 10
        for before, channels, blocks, side in ((64, 128, 3, 16), (128, 256, 3, 8), (256, 512, 2, 4)):
            macs += (9 + 1) * before * channels * side**2 + (2 * blocks - 1) * 9 * channels**2 * side**2
    torch.manual_seed(0)
    for neuron, timesteps in (("lif", 2), ("relu", 1)):
        model = build_model(arch, 3, 10, neuron)
        cost = measure(model, dense_mask(model), images(1), timesteps)
        assert cost["dense_macs_per_image"] == macs
        assert cost["ann_energy_uj_per_image"] == pytest.approx(4.6e-6 * macs)


def test_a_relu_network_does_not_spike_and_its_zeros_cost_nothing():
    split = images(3)
    model, mask = network("vgg16", split, 0.5, neuron="relu")
    cost = measure(model, mask, split, 1)
    assert all(cost[name] is None for name in SPIKING)
    assert (cost["neuron_costs"], cost["neurobench"]["activation_sparsity"]) == ({}, None)
    assert 0 < cost["macs_per_image"] < cost["dense_macs_per_image"] / 2
    assert cost[ENERGY] == pytest.approx(4.6e-6 * cost["macs_per_image"])


def test_bf16_counts_what_the_bf16_network_fires():
    split = images(3)
    model, mask = network("vgg16", split, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        spikes = recorded(model, inputs_of(split), 3, LIF)
    fired = sum(spikes.double().sum().item() for _, spikes in spikes.values()) / 3
    assert measure(model, mask, split, 3, "bf16")["spikes_per_image"] == fired
    assert measure(model, mask, split, 3)["spikes_per_image"] != fired


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(training, fails, monkeypatch):
    split = images(3)
    model, mask = network("resnet19", split, 0.5)
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        with monkeypatch.context() as patch:
            patch.setattr(LIF, "forward", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                measure(model, mask, split, 2)
    else:
        measure(model, mask, split, 2)
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    model(inputs_of(split), 2).sum().backward()  # no inference tensor has stayed behind


def test_compiled_layers_are_counted_too():
    split = images(2)
    model, mask = network("vgg16", split, 0.5)
    eager = measure(model, mask, split, 2)
    model.features.compile(backend="eager")
    with torch.inference_mode():
        model.eval()(inputs_of(split), 2)
    assert measure(model, mask, split, 2) == eager


class IF(nn.Module):
    def forward(self, current):
        return (current.cumsum(0) >= 1).to(current)


@pytest.mark.parametrize(
    "strange",
    [
        IF(),
        layer.Conv2d(4, 4, 3, groups=2, step_mode="m"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(4, 4, 3),
        nn.MultiheadAttention(4, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_layers_that_cannot_be_counted_are_named(strange):
    split = images(1)
    model, mask = network("vgg16", split)
    model.features.add_module("strange", strange)
    for refuse in (lambda: check_countable(model), lambda: measure(model, mask, split, 2)):
        with pytest.raises(InputError, match=r"features\.strange"):
            refuse()
