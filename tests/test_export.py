"""Folded graphs, npz files, and the tool."""

import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from networks import lively
from torch import nn

import export_ticket
from models import build_model
from models.layers import BatchNorm, Conv3x3
from models.lif import LIF
from utils.export import kept_weights, network_graph, npz_bytes
from utils.files import InputError
from utils.masks import apply_mask, dense_mask, drop_lowest
from utils.onnx_export import FoldedNetwork
from utils.scores import random_scores

ARCHITECTURES = ("vgg16", "resnet19", "resnet34", "alexnet")


def sparse_network(arch, size=32, dtype=torch.float64, **changes):
    """A pruned network that fires in every layer, in eval mode; its mask; images [3,3,size,size]."""
    torch.manual_seed(0)
    images = torch.randn(3, 3, size, size, dtype=dtype)
    model = build_model(arch, 3, 10, width=0.08, **changes).to(dtype)
    mask = drop_lowest(random_scores(model, torch.Generator().manual_seed(0)), dense_mask(model), 0.7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "shortcut.1" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    apply_mask(model, mask)
    return lively(model, images).eval(), mask, images


@pytest.mark.parametrize(("arch", "size"), [*((arch, 32) for arch in ARCHITECTURES), ("alexnet", 48), ("vgg16", 64)])
def test_the_graph_computes_what_the_network_does(arch, size):
    model, mask, images = sparse_network(arch, size)
    before = {name: tensor.clone() for name, tensor in model.train().state_dict().items()}
    graph = network_graph(model, (3, size, size))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    weights = {node.name: node.weight for node in graph if node.weight is not None}
    assert [f"{name}.weight" for name in weights] == list(mask)
    assert all(np.array_equal(weights[name.removesuffix(".weight")] != 0, m) for name, m in mask.items())
    assert kept_weights(graph) == (sum(int(m.sum()) for m in mask.values()), sum(m.numel() for m in mask.values()))
    folded = FoldedNetwork(graph, 3)
    with torch.no_grad():
        values = folded.values(images)
        torch.testing.assert_close(values[graph[-1].name], model.eval()(images, 3), rtol=1e-12, atol=1e-12)
    assert all(list(values[node.name].shape[2:]) == node.shape for node in graph)


def test_where_batch_norm_took_its_statistics_from_does_not_matter():
    model, _, _ = sparse_network("resnet19")
    other = build_model("resnet19", 3, 10, width=0.08, batch_norm="over_time").double()
    other.load_state_dict(model.state_dict())
    graphs = [network_graph(network, (3, 32, 32)) for network in (model, other)]
    assert npz_bytes(graphs[0]) == npz_bytes(graphs[1])


class TwoNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = Conv3x3(3, 4), BatchNorm(4), BatchNorm(4)

    def forward(self, images, timesteps):
        return self.second(self.first(self.conv(images.unsqueeze(0))))


class MaxOfCurrents(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = Conv3x3(3, 4), nn.MaxPool2d(2)

    def forward(self, images, timesteps):
        return self.pool(self.conv(images.unsqueeze(0)).flatten(0, 1)).unsqueeze(0)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Conv3x3(3, 4)

    def forward(self, images, timesteps):
        return 2 * self.conv(images.unsqueeze(0))


class OtherLIF(LIF):
    """A neuron that a user adds; a graph has no node for it."""


def with_other_neurons(arch, layer):
    """A network in which the neurons behind one layer are others."""
    model = build_model(arch, 3, 10, width=0.05)
    model.set_submodule(layer, OtherLIF())
    return model


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (build_model("vgg16", 3, 10, neuron="relu", width=0.05), "stem_fire.*ReLU"),
        (with_other_neurons("vgg16", "stem_fire.neuron"), "stem_fire.*OtherLIF"),
        (with_other_neurons("resnet19", "hidden_neuron"), "hidden_neuron.*OtherLIF"),
        (TwoNorms(), "second"),
        (MaxOfCurrents(), "flatten"),
        (Scaled(), "mul"),
    ],
)
def test_what_a_graph_cannot_hold_is_named(model, named):
    with pytest.raises(InputError, match=named):
        network_graph(model, (3, 32, 32))


def shown():
    """The functions that docs/hardware.md shows, by name."""
    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def read" in block]
    names = {}
    exec(code, names)
    return names


@pytest.mark.parametrize(("arch", "size"), [("resnet19", 32), ("alexnet", 48)])
def test_the_docs_read_and_run_npz_files(arch, size, tmp_path):
    model, _, images = sparse_network(arch, size, torch.float32)
    graph = network_graph(model, (3, size, size))
    (tmp_path / "network.npz").write_bytes(npz_bytes(graph))
    nodes = shown()["read"](tmp_path / "network.npz")
    for node, ours in zip(nodes, graph, strict=True):
        assert all(node[field] == getattr(ours, field) for field in ("name", "kind", "inputs", "shape"))
        assert ours.settings.items() <= node.items()
        if ours.weight is not None:
            assert node["weight"].dtype == np.float32
            assert np.array_equal(node["weight"], ours.weight)
            assert np.array_equal(node["bias"], ours.bias)
    with torch.no_grad():
        expected = model(images, 3).numpy()
    np.testing.assert_allclose(shown()["run"](nodes, images.numpy(), 3), expected, rtol=1e-4, atol=1e-4)


def test_npz_integers_are_as_small_as_they_can_be_and_values_are_those_that_are_left():
    model, mask, _ = sparse_network("alexnet")
    file = np.load(io.BytesIO(npz_bytes(network_graph(model, (3, 32, 32)))))
    for name, m in mask.items():
        name = name.removesuffix(".weight")
        columns, starts = file[f"{name}.columns"], file[f"{name}.starts"]
        assert columns.dtype == (np.uint8 if m[0].numel() <= 256 else np.uint16)
        assert starts.dtype == (np.uint8 if len(columns) < 256 else np.uint16)
        assert np.array_equal(np.diff(starts.astype(int)), m.flatten(1).sum(1))
    kinds = {node["kind"] for node in json.loads(str(file["graph"]))}
    assert kinds == {"input", "conv", "lif", "maxpool", "flatten", "linear"}


@pytest.fixture
def refused(refused):
    """The one line that the tool ends with."""
    return lambda *words: refused(export_ticket.main, *words)


def test_the_tool_writes_a_runs_network_and_a_ticket(finished, tmp_path, capsys):
    run, out = finished("rigl"), tmp_path / "network.npz"
    export_ticket.main([str(run.folder), "--format", "npz", "--out", str(out)])
    printed = capsys.readouterr().out
    mask, _, _ = run.network(run.results[0]["ticket"])
    kept = sum(int(m.sum()) for m in mask.values())
    assert f"{kept:,} of {sum(m.numel() for m in mask.values()):,} weights" in printed
    assert f"{out.stat().st_size:,} bytes" in printed
    assert len(shown()["read"](out)) > 10
    ticket = run.folder / "tickets" / f"{run.results[0]['ticket']}.safetensors"
    export_ticket.main([str(ticket), "--format", "npz", "--out", str(out)])
    assert "to start training from" in capsys.readouterr().out


def test_bad_input_is_one_line(finished, tmp_path, refused, monkeypatch):
    out = ("--out", tmp_path / "file")
    npz = ("--format", "npz", *out)
    several = finished("laterewindlth").folder
    line = refused(several, *npz)
    assert all(str(path) in line for path in (several / "networks").iterdir())
    assert str(tmp_path / "typo") in refused(several, "--format", "npz", "--out", tmp_path / "typo" / "network.npz")
    assert not (tmp_path / "typo").exists()
    assert "no/run" in refused("no/run", *npz)
    assert "not the folder of a run" in refused(ROOT / "docs", *npz)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "args.json").write_text("{}")
    assert "not finished" in refused(tmp_path / "begun", *npz)
    assert "--timestep" in refused(several, *npz, "--timestep", 3)
    assert "--image_size" in refused(several / "networks" / "level_01.safetensors", *npz, "--image_size", 8, 8)
    monkeypatch.setattr(export_ticket, "find_spec", lambda name: None)
    assert "pip install onnx onnxscript" in refused(several, "--format", "onnx", *out)
    assert "pip install nir" in refused(several, "--format", "nir", *out)
    assert not (tmp_path / "file").exists()
