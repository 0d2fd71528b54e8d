"""What a ticket costs to run, counted again in other ways."""

import json
from itertools import product

import pytest
import torch
from conftest import ROOT, folder_of, lively, script
from spikingjelly.activation_based import layer
from spikingjelly.activation_based.monitor import InputMonitor, OutputMonitor
from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SynOpCounter
from torch import nn
from torch.nn import functional as F

from models import build_model
from models.layers import GlobalAvgPool
from models.lif import LIF
from utils import activity, runs
from utils.activity import measure
from utils.data import DATASETS, Split
from utils.masks import apply_mask, dense_mask, drop_lowest, random_scores

SPIKING = ("spikes_per_image", "firing_rates", "synops_per_image")
FIELDS = (*SPIKING, "macs_per_image", "dense_macs_per_image", "energy_uj_per_image", "ann_energy_uj_per_image")
ENERGY = "energy_uj_per_image"


def images(count, height=32, width=32, channels=3):
    pixels = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)
    return Split(pixels, torch.zeros(count, dtype=torch.long), DATASETS["cifar10" if channels == 3 else "fmnist"])


def inputs_of(split):
    return next(split.batches(len(split)))[0]


def network(arch, split, sparsity=0.0, **more):
    """A small network that fires, and its mask: pruned at random, so that every layer keeps and loses weights."""
    torch.manual_seed(0)
    model = build_model(arch, 3, 10, width=0.125, **more)
    mask = drop_lowest(random_scores(model), dense_mask(model), sparsity)
    apply_mask(model, mask)
    return lively(model, inputs_of(split)), mask


class Odd(nn.Module):
    """Kernels, strides, paddings and dilations of all sorts on images 9x7; a linear layer on spikes, one on means."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            layer.Conv2d(1, 3, 3, padding=1, bias=False, step_mode="m"),
            LIF(),
            layer.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(1, 2), step_mode="m"),
            LIF(),
            layer.MaxPool2d(2, step_mode="m"),
            layer.Conv2d(4, 3, 2, stride=2, padding=1, dilation=2, step_mode="m"),
            LIF(),
            nn.Flatten(2),
            layer.Linear(6, 5, step_mode="m"),
            LIF(),
            nn.Unflatten(2, (5, 1, 1)),
            layer.Conv2d(5, 3, 3, padding=2, step_mode="m"),
            LIF(),
            GlobalAvgPool(),
            layer.Linear(3, 2, step_mode="m"),
        )
        for module in self.layers:
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, 0.4, 1)

    def forward(self, x, timesteps):
        return self.layers[1:](self.layers[0](x.unsqueeze(0)).expand(timesteps, -1, -1, -1, -1))


def operations_by_hand(module, x, kept):
    """Loops over every timestep, image, output and kernel tap; x [T,B,C,H,W] or [T,B,C]."""
    if isinstance(module, nn.Linear):
        return sum(
            bool(x[t, b, i] != 0 and kept[o, i])
            for t, b, o, i in product(*map(range, (*x.shape[:2], *module.weight.shape)))
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
    mask = drop_lowest(random_scores(model), dense_mask(model), 0.4)
    apply_mask(model, mask)
    timesteps, synops, macs, spikes, rates = 3, 0, 0, 0, {}
    with torch.no_grad():
        x = inputs_of(split).unsqueeze(0)
        for index, module in enumerate(model.layers):
            if isinstance(module, nn.Conv2d | nn.Linear):
                count = operations_by_hand(module, x, mask[f"layers.{index}.weight"])
                assert count > 0
                if index in (0, len(model.layers) - 1):
                    macs += count
                else:
                    synops += count
            x = module(x)
            if index == 0:
                x = x.expand(timesteps, -1, -1, -1, -1)
            if isinstance(module, LIF):
                spikes += int(x.sum())
                rates[f"layers.{index}"] = x.mean().item()
    cost = measure(model, mask, split, timesteps)
    assert (cost["synops_per_image"], cost["macs_per_image"]) == (synops / 2, macs / 2)
    assert cost["spikes_per_image"] == spikes / 2
    assert list(cost["firing_rates"]) == list(rates)
    assert cost["firing_rates"] == pytest.approx(rates)
    dense = 3 * 9 * 9 * 7 + 4 * 45 * 5 * 7 + 3 * 16 * 2 * 1 + 5 * 6 + 3 * 45 * 3 * 3 + 2 * 3
    assert cost["dense_macs_per_image"] == dense
    assert cost[ENERGY] == pytest.approx((0.9 * synops + 4.6 * macs) / 2 / 1e6)
    assert cost["ann_energy_uj_per_image"] == pytest.approx(4.6 * dense / 1e6)


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
    split = images(5, size, size)
    model, mask = network(arch, split, 0.7)
    monkeypatch.setattr(activity, "BATCH", 2)  # the last batch is smaller
    cost = measure(model, mask, split, 4)
    monitors = [InputMonitor(model, kind) for kind in (nn.Conv2d, nn.Linear)]
    spikes = OutputMonitor(model, LIF)
    with torch.no_grad():
        for x, _ in split.batches(2):  # the same batches, for the same rounding
            model.eval()(x, 4)
    synops, macs = 0, 0
    for monitor in monitors:
        for name in monitor.monitored_layers:
            module, ones = model.get_submodule(name), mask[f"{name}.weight"].double()
            x = torch.cat(monitor[name], dim=1).flatten(0, 1).ne(0).double()
            if isinstance(module, nn.Linear):
                count = F.linear(x, ones).sum().item()
            else:
                count = F.conv2d(x, ones, None, module.stride, module.padding).sum().item()
            assert count > 0, name
            if name in real:
                macs += count
            else:
                synops += count
    assert cost["synops_per_image"] == synops / 5
    assert cost["macs_per_image"] == macs / 5
    assert list(cost["firing_rates"]) == spikes.monitored_layers
    assert cost["spikes_per_image"] == sum(record.sum().item() for record in spikes.records) / 5
    for name, rate in cost["firing_rates"].items():
        assert rate == pytest.approx(torch.cat(spikes[name], dim=1).mean().item()), name
        assert 0 < rate < 1


@pytest.mark.parametrize("arch", ["vgg16", "resnet19"])
def test_spikingjelly_agrees_on_the_dense_network_and_counts_pruned_connections_too(arch):
    split = images(4)

    def theirs(model):
        synops, macs = SynOpCounter(), MACCounter()
        with torch.no_grad(), DispatchCounterMode([synops, macs]):
            model.eval()(inputs_of(split), 3)
        linear = macs.get_counts()["Global"].get(torch.ops.aten.addmm.default, 0)
        return synops.get_total() / 4, linear / 4

    model, mask = network(arch, split)
    cost = measure(model, mask, split, 3)
    synops, linear = theirs(model)
    assert cost["synops_per_image"] == synops
    # theirs counts zeros and padding as MACs: the hidden layer sees no more than it says, the stem less by its border
    stem = model.stem.weight.numel() / 9 * (3 * 32 - 2) ** 2
    assert 0 <= linear - (cost["macs_per_image"] - stem) <= 0.5 * linear
    model, mask = network(arch, split, 0.7)
    pruned = measure(model, mask, split, 3)
    dense = measure(model, dense_mask(model), split, 3)
    assert theirs(model)[0] == dense["synops_per_image"] > 2 * pruned["synops_per_image"]
    assert {name: dense[name] for name in ("spikes_per_image", "firing_rates", "dense_macs_per_image")} == {
        name: pruned[name] for name in ("spikes_per_image", "firing_rates", "dense_macs_per_image")
    }


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


def test_the_image_is_convolved_once_and_more_timesteps_cost_more_spikes():
    split = images(3)
    model, mask = network("vgg16", split, 0.5)
    short, long = (measure(model, mask, split, timesteps) for timesteps in (2, 6))
    assert short["macs_per_image"] == long["macs_per_image"] > 0
    assert 2 * short["synops_per_image"] < long["synops_per_image"]
    assert short["dense_macs_per_image"] == long["dense_macs_per_image"]


def test_a_relu_network_does_not_spike_and_its_zeros_cost_nothing():
    split = images(3)
    model, mask = network("vgg16", split, 0.5, neuron="relu")
    cost = measure(model, mask, split, 1)
    assert all(cost[name] is None for name in SPIKING)
    assert 0 < cost["macs_per_image"] < cost["dense_macs_per_image"] / 2
    assert cost[ENERGY] == pytest.approx(4.6e-6 * cost["macs_per_image"])


def test_a_network_without_connections_is_silent_and_costs_nothing():
    split = images(2)
    model = build_model("vgg16", 3, 10, width=0.125)
    mask = {name: torch.zeros_like(m) for name, m in dense_mask(model).items()}
    apply_mask(model, mask)
    cost = measure(model, mask, split, 2)
    assert cost["spikes_per_image"] == cost["synops_per_image"] == cost["macs_per_image"] == cost[ENERGY] == 0
    assert set(cost["firing_rates"].values()) == {0}


def test_bf16_counts_what_the_bf16_network_fires():
    split = images(3)
    model, mask = network("vgg16", split, 0.5)
    spikes = OutputMonitor(model, LIF)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.eval()(inputs_of(split), 3)
    spikes.close()
    fired = sum(record.double().sum().item() for record in spikes.records) / 3
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
    loss = model(inputs_of(split), 2).sum()
    loss.backward()  # no inference tensor has stayed behind


def test_compiled_layers_are_counted_too():
    split = images(2)
    model, mask = network("vgg16", split, 0.5)
    eager = measure(model, mask, split, 2)
    model.features.compile(backend="eager")
    with torch.inference_mode():
        model.eval()(inputs_of(split), 2)
    assert measure(model, mask, split, 2) == eager


def test_result_rows_say_what_the_trained_network_costs(run):
    done = run("laterewindlth", "--sparsity_round", "1", arch="resnet19")
    dense, ticket = done.results
    for row in (dense, ticket):
        assert row.keys() >= {*FIELDS, "ticket_bytes"}
        path = done.folder / "tickets" / f"level_{row['level']:02d}.safetensors"
        assert row["ticket_bytes"] == path.stat().st_size
    assert dense["dense_macs_per_image"] == ticket["dense_macs_per_image"]
    assert 0 < ticket["macs_per_image"] < dense["macs_per_image"]
    assert all(f"`{field}`" in (ROOT / "README.md").read_text(encoding="utf-8") for field in (*FIELDS, "ticket_bytes"))


def test_a_row_that_is_there_is_not_measured_again(tmp_path, tiny, monkeypatch):
    script("laterewindlth")(tiny)
    path = folder_of(tmp_path, "laterewindlth") / "results.json"
    rows = json.loads(path.read_text())
    measured = []

    def spy(model, mask, *rest):
        measured.append(mask)
        return measure(model, mask, *rest)

    monkeypatch.setattr(runs, "measure", spy)
    path.write_text(json.dumps(rows[:-1]))
    script("laterewindlth")(tiny)
    assert len(measured) == 1
    assert json.loads(path.read_text()) == rows
