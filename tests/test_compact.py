"""Networks without the channels that change nothing, against the whole networks."""

import itertools

import numpy as np
import pytest
import torch
from test_export import ARCHITECTURES, sparse_network
from torch import nn

import export_ticket
from models.layers import AvgPoolTo, Conv3x3, Linear
from models.lif import LIF
from utils.compact import compact, dense_cost
from utils.export import Node, network_graph
from utils.masks import apply_mask
from utils.onnx_export import FoldedNetwork
from utils.tickets import write_ticket

PLAIN, PADDED = ({"stride": [1, 1], "padding": [p, p]} for p in (0, 1))


def thinned(arch, size=32, share=0.4, **changes):
    """A network of which a share of all channels is not read, not fed, or held far below its threshold."""
    model, mask, images = sparse_network(arch, size, **changes)
    draw = torch.Generator().manual_seed(1)
    for m in mask.values():
        rows, columns = (torch.rand(n, generator=draw) < share for n in m.shape[:2])
        m[rows] = False
        m[:, columns if len(columns) > 3 else []] = False  # the image's channels stay
    for name, parameter in model.named_parameters():
        if "norm.bias" in name:
            parameter.data -= 20 * (torch.rand(len(parameter), generator=draw) < share / 2)
    apply_mask(model, mask)
    return model, images


def logits(graph, images, timesteps=4):
    with torch.no_grad():
        return FoldedNetwork(graph, timesteps)(images)


def kept(whole, smaller):
    """Channels before and after, by node with weights."""
    pairs = ((a, b) for a, b in zip(whole, smaller, strict=True) if a.weight is not None)
    return {a.name: (len(a.weight), len(b.weight)) for a, b in pairs}


@pytest.mark.parametrize(
    ("arch", "size", "share"),
    [*((arch, 32, 0.4) for arch in ARCHITECTURES), ("alexnet", 64, 0.3), ("vgg16", 64, 0.9), ("resnet19", 32, 0.95)],
)
def test_the_logits_are_those_of_the_whole_network(arch, size, share):
    model, images = thinned(arch, size, share)
    whole = network_graph(model, (3, size, size))
    before = [None if node.weight is None else node.weight.copy() for node in whole]
    smaller = compact(whole)
    assert all(a is None or np.array_equal(a, node.weight) for a, node in zip(before, whole, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(logits(smaller, images), model(images, 4), rtol=1e-12, atol=1e-12)
        values = FoldedNetwork(smaller, 2).values(images)
    assert all(list(values[node.name].shape[2:]) == node.shape for node in smaller)
    assert dense_cost(smaller)[0] < 0.7 * dense_cost(whole)[0]
    assert dense_cost(smaller)[1] < 0.9 * dense_cost(whole)[1]
    assert [node.name for node in smaller] == [node.name for node in whole]


@pytest.mark.parametrize("arch", ["vgg16", "alexnet"])
def test_every_channel_that_stays_is_read_and_can_fire(arch):
    model, _ = thinned(arch, share=0.15, v_threshold=0.8)
    graph = compact(network_graph(model, (3, 32, 32)))
    layers = [node for node in graph if node.weight is not None]
    for number, (node, reader) in enumerate(itertools.pairwise(layers)):
        size = len(node.weight)
        assert size > 1
        assert reader.weight.reshape(len(reader.weight), size, -1).any((0, 2)).all(), f"{node.name} is not read"
        if number:  # the image is not a spike
            most = [bias + weight[weight > 0].sum() for weight, bias in zip(node.weight, node.bias, strict=True)]
            assert min(most) >= 0.8 * (1 - 1e-4), f"{node.name} cannot fire"


class Chain(nn.Module):
    """Image -> 4 channels -> 4 channels -> 3 units -> 2 logits, of weights that a test sets."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Conv3x3(1, 4), Conv3x3(4, 4)
        self.fire, self.again, self.third = LIF(), LIF(), LIF()
        self.features = nn.Sequential(AvgPoolTo(2), nn.Flatten(2))
        self.hidden, self.classifier = Linear(16, 3), Linear(3, 2)
        for layer in (self.first, self.second, self.hidden, self.classifier):
            nn.init.constant_(layer.weight, 1.0)
            nn.init.zeros_(layer.bias)
        self.double()

    def forward(self, images, timesteps):
        x = self.again(self.second(self.fire(self.first(images.unsqueeze(0)))))  # for the graph: T = 1
        return self.classifier(self.third(self.hidden(self.features(x))))


def sizes(model):
    graph = network_graph(model, (1, 8, 8))
    smaller = compact(graph)
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(logits(smaller, images), logits(graph, images), rtol=1e-12, atol=1e-12)
    return [after for _, after in kept(graph, smaller).values()]


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: None, [4, 4, 3, 2]),
        # not read, and what it alone reads
        (lambda m: m.hidden.weight[:, 4:8].zero_(), [4, 3, 3, 2]),
        (
            lambda m: (m.second.weight[:, 2].zero_(), m.second.weight[1, 2].fill_(1), m.hidden.weight[:, 4:8].zero_()),
            [3, 3, 3, 2],
        ),
        (lambda m: m.hidden.weight[:, 5:8].zero_(), [4, 4, 3, 2]),  # one pixel of it is read
        # never fires: 36 taps of 1 must pass the threshold of 1
        (lambda m: m.second.bias[0].fill_(-35.1), [4, 3, 3, 2]),
        (lambda m: m.second.bias[0].fill_(-35.0), [4, 4, 3, 2]),
        (lambda m: (m.second.weight[0].fill_(-1), m.second.bias[0].fill_(0.9)), [4, 3, 3, 2]),
        (lambda m: (m.second.weight[0].fill_(-1), m.second.bias[0].fill_(1.0)), [4, 4, 3, 2]),  # fires alone
        # an average of spikes is at most 1
        (lambda m: m.hidden.bias[2].fill_(-15.1), [4, 4, 2, 2]),
        # an image has no bounds; without weights, its channel is its bias
        (lambda m: m.first.bias[0].fill_(-1e9), [4, 4, 3, 2]),
        (lambda m: (m.first.weight[0].zero_(), m.first.bias[0].fill_(0.5)), [3, 4, 3, 2]),
        (lambda m: (m.first.weight[0].zero_(), m.first.bias[0].fill_(1.5)), [4, 4, 3, 2]),
        # what a silent channel feeds loses that input, and falls silent too
        (lambda m: (m.first.weight[0].zero_(), m.second.bias[3].fill_(-27.0)), [3, 3, 3, 2]),
        # one channel is left of what is not needed at all
        (lambda m: m.classifier.weight.zero_(), [1, 1, 1, 2]),
    ],
)
def test_which_channels_go(change, expected):
    torch.manual_seed(0)
    model = Chain()
    change(model)
    assert sizes(model) == expected


@torch.no_grad()
def test_summed_channels_go_together():
    model, _, images = sparse_network("resnet19")
    second, third = model.blocks[1:3]  # one stage with the first: their outputs are summed
    readers = [second.conv1, third.conv1, model.blocks[3].conv1, model.blocks[3].shortcut[0]]
    stage = [f"blocks.{block}.conv2" for block in range(3)] + ["blocks.0.shortcut.0"]
    for reader in readers:
        reader.weight[:, 2] = 0
    whole = network_graph(model, (3, 32, 32))
    smaller = compact(whole)
    before, after = zip(*(kept(whole, smaller)[name] for name in stage), strict=True)
    assert len(set(after)) == 1
    assert after[0] == before[0] - 1
    torch.testing.assert_close(logits(smaller, images), model(images, 4), rtol=1e-12, atol=1e-12)
    readers[3].weight[0, 2] = 0.5  # one reader, behind the last block, is enough to keep it in all
    whole = network_graph(model, (3, 32, 32))
    assert {after for name, (_, after) in kept(whole, compact(whole)).items() if name in stage} == {before[0]}


def test_the_tool_says_what_went_and_the_file_is_smaller(tmp_path, capsys):
    model, mask, _ = sparse_network("alexnet", dtype=torch.float32)
    for m in mask.values():
        m[::2] = False
    network = {"arch": "alexnet", "channels": 3, "classes": 10, "width": 0.08}
    write_ticket(
        tmp_path / "t.safetensors",
        mask,
        model.state_dict(),
        {"level": 0, "epoch": 0, "network": network, "dense": None},
    )
    for name, more in (("whole", []), ("small", ["--compact", "--timestep", "2"])):
        export_ticket.main([str(tmp_path / "t.safetensors"), "--format", "npz", "--out", str(tmp_path / name), *more])
    graph = network_graph(apply(model, mask), (3, 32, 32))
    printed = capsys.readouterr().out
    for before, after in zip(dense_cost(graph), dense_cost(compact(graph)), strict=True):
        assert f"{before:,} -> {after:,}" in printed
    assert f"{(tmp_path / 'whole').stat().st_size:,} -> {(tmp_path / 'small').stat().st_size:,}" in printed


def apply(model, mask):
    apply_mask(model, mask)
    return model.eval()


def test_padding_is_a_zero_among_inputs_that_are_never_zero():
    pointwise = np.array([[1.0, 0.0], [0.0, -1.0]])[:, :, None, None]
    graph = [
        Node("input", "input", [], [1, 4, 4]),
        Node("first", "conv", ["input"], [2, 4, 4], PLAIN, np.zeros((2, 1, 1, 1)), np.array([-1.0, 1.0])),
        # at the border they see padding alone
        Node("second", "conv", ["first"], [2, 6, 6], PADDED, pointwise, np.ones(2)),
        Node("fire", "lif", ["second"], [2, 6, 6], {"tau": 2.0, "v_threshold": 0.9}),
        Node("flatten", "flatten", ["fire"], [72]),
        Node("logits", "linear", ["flatten"], [1], {}, np.ones((1, 72)), np.zeros(1)),
    ]
    images = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    assert logits(graph, images)[-1] == 2 * 20
    assert torch.equal(logits(compact(graph), images), logits(graph, images))
