import copy
import shutil
from functools import partialmethod

import pytest
import torch
from networks import lively, loop_of
from torch import nn
from torch.nn import functional as F

from models import build_model
from models.layers import BatchNorm, NormAndFire, compile_blocks
from models.lif import LIF

ARCHS = ("vgg16", "resnet19", "resnet34", "alexnet")
OTHER_CONSTANTS = {"tau": 1.5, "v_threshold": 0.8, "surrogate_alpha": 3.0}
needs_a_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on the CPU")


# ResNet34: 9 * (3*64 + 6*64^2 + 64*128 + 7*128^2 + 128*256 + 11*256^2 + 256*512 + 5*512^2) in 3x3 kernels, 64*128 +
# 128*256 + 256*512 in shortcuts, 512*200 in the classifier; weight and bias of batch norm for 7*64 + 9*128 + 13*256 +
# 7*512 channels, 200 biases.
# AlexNet: 9 * (3*64 + 64*192 + 192*384 + 384*256 + 256^2) + 1024*4096 + 4096^2 + 4096*10 in kernels; a bias and batch
# norm's two for 64 + 192 + 384 + 256 + 256 channels and 2*4096 units, 10 biases.
@pytest.mark.parametrize(
    ("arch", "classes", "parameters", "weights"),
    [
        ("vgg16", 10, 14_728_266, 14_715_584),
        ("resnet19", 10, 12_630_858, 12_619_968),
        ("resnet34", 200, 21_379_592, 21_362_368),
        ("alexnet", 10, 23_290_954, 23_262_912),
    ],
)
def test_parameter_counts_of_the_full_networks(arch, classes, parameters, weights):
    with torch.device("meta"):
        model, grey = (build_model(arch, channels, classes) for channels in (3, 1))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == weights
    assert parameters - sum(p.numel() for p in grey.parameters()) == 2 * 64 * 9


@pytest.mark.parametrize(
    ("constants", "passes"),
    [({}, [(3, False), (1, True), (4, True)]), (OTHER_CONSTANTS, [(2, True)])],
    ids=["paper", "other"],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_network_is_the_loop_over_timesteps(arch, constants, passes):
    torch.manual_seed(0)
    model = build_model(arch, 3, 10, width=0.125, **constants).double()
    lively(model, torch.randn(8, 3, 32, 32, dtype=torch.float64))
    loop = loop_of(model, arch, 3, 10, 0.125, **constants)
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 7, 9])
    for timesteps, training in passes:
        outputs, gradients = [], []
        for network in (model, loop):
            network.train(training)
            logits = network(images, timesteps)
            loss = sum(F.cross_entropy(step, labels) for step in logits)
            gradients.append(torch.autograd.grad(loss, [images, *network.parameters()]))
            outputs.append(logits.detach())
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-11)
        for (name, a), b in zip(model.state_dict().items(), loop.state_dict().values(), strict=True):
            if name.endswith("num_batches_tracked"):  # one a forward pass, where the loop counts timesteps
                continue
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=name)
        for (name, _), a, b in zip([("images", 0), *model.named_parameters()], *gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)
    assert outputs[0].std(1).min() > 0
    assert all(gradient.any() for gradient in gradients[0])


def test_lif_follows_a_trace_by_hand():
    # v <- 0.25 v + 0.75 x: 0.75; 0.1875 + 0.75 = 0.9375; 0.234375 + 0.9 > 1, fire and reset; 0.75; exactly 1 fires
    current = torch.tensor([1.0, 1.0, 1.2, 1.0, (1 - 0.1875) / 0.75]).view(5, 1, 1)
    assert LIF()(current).flatten().tolist() == [0, 0, 1, 0, 1]
    # v <- 0.5 v + 0.5 x: 0.5; 0.75 is below 0.8; 0.875 fires; 0.5
    assert LIF(2.0, 0.8)(torch.ones(4, 1, 1)).flatten().tolist() == [0, 0, 1, 0]
    # v <- x
    assert LIF(1.0)(torch.tensor([0.9, 1.0, 0.9, 2.0]).view(4, 1, 1)).flatten().tolist() == [0, 1, 0, 1]


def test_lif_gradient_is_the_surrogates_and_none_flows_through_the_reset():
    current = torch.tensor([2.0, 0.5], dtype=torch.float64).view(2, 1, 1).requires_grad_()
    LIF()(current).sum().backward()
    # the charges are 1.5, which fires, so that nothing of it reaches the second, and 0.375; ATan's slope at alpha 2
    expected = [0.75 / (1 + (torch.pi * (charge - 1)) ** 2) for charge in (1.5, 0.375)]
    torch.testing.assert_close(current.grad.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_membranes_stay_fp32_in_bf16():
    torch.manual_seed(0)
    current = torch.randn(6, 1000, 10).add(0.5).bfloat16()
    assert torch.equal(LIF()(current).float(), LIF()(current.float()))


@pytest.mark.parametrize("shape", [(3, 4, 2, 5, 5), (3, 4, 2)])
def test_batch_norm_per_timestep_and_over_time_is_torchs(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * torch.tensor([1.0, 2, 3]).view(3, *[1] * (len(shape) - 1))
    x.requires_grad_()
    kind = nn.BatchNorm2d if len(shape) == 5 else nn.BatchNorm1d
    for statistics in ("per_timestep", "over_time"):
        ours, torchs = BatchNorm(2, statistics).double(), kind(2).double()
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
        torchs.load_state_dict(ours.state_dict())
        for training in (True, False):
            y = ours.train(training)(x)
            torchs.train(training)
            expected = (
                torch.stack([torchs(x_t) for x_t in x])
                if statistics == "per_timestep"
                else torchs(x.flatten(0, 1)).view_as(x)
            )
            torch.testing.assert_close(y, expected)
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(ours.state_dict()[name], torchs.state_dict()[name])
            weights = torch.randn_like(x)
            a, b = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, expected))
            torch.testing.assert_close(a, b)
        assert ours.num_batches_tracked == 1


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (33, 47)])
def test_any_image_from_32_pixels_up(arch, size):
    torch.manual_seed(0)
    model = build_model(arch, 3, 7, width=0.0625).eval()
    assert model(torch.randn(2, 3, *size), 2).shape == (2, 2, 7)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_of_one_image_or_none_can_be_trained_on(arch, count):
    torch.manual_seed(0)
    model = build_model(arch, 3, 7, width=0.0625)
    logits = model(torch.randn(count, 3, 32, 32), 3)
    assert logits.shape == (3, count, 7)
    logits.sum().backward()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_relu_gives_the_ann_of_the_same_shape(arch):
    torch.manual_seed(0)
    snn, ann = (build_model(arch, 3, 10, neuron, width=0.125) for neuron in ("lif", "relu"))
    assert {n: p.shape for n, p in snn.named_parameters()} == {n: p.shape for n, p in ann.named_parameters()}
    assert not any(isinstance(module, LIF) for module in ann.modules())
    logits = ann.eval()(torch.randn(2, 3, 32, 32), 2)
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"arch": "vgg11"}, ["arch", "vgg11", *ARCHS]),
        ({"neuron": "if"}, ["neuron", "lif", "relu"]),
        ({"batch_norm": "layer"}, ["batch_norm", "per_timestep", "over_time"]),
        ({"width": 0}, ["width"]),
        ({"tau": 0.99}, ["tau"]),
        ({"v_threshold": 0.0}, ["v_threshold"]),
        ({"surrogate_alpha": -1.0}, ["surrogate_alpha"]),
    ],
)
def test_bad_choices_are_named(kwargs, named):
    with pytest.raises(ValueError, match=named[0]) as error:
        build_model(**({"arch": "vgg16", "channels": 3, "classes": 10} | kwargs))
    assert all(name in str(error.value) for name in named)


def graphs():
    """How many graphs torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["per_timestep", "over_time"])
def test_compiled_block_is_the_block(statistics):
    torch.manual_seed(0)
    eager = NormAndFire(4, LIF, statistics).double()
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled)
    outcomes, before = [], graphs()
    for block in (eager, compiled):
        torch.manual_seed(1)
        x = torch.randn(3, 6, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        spikes = [block(x, shortcut=x.flip(0)), block(x[:1], timesteps=3), block.eval()(x)]
        sum((s * torch.randn_like(s)).sum() for s in spikes).backward()
        outcomes.append([*spikes, x.grad, *(p.grad for p in block.parameters()), *block.state_dict().values()])
    assert graphs() > before
    assert all(0.01 < spikes.mean() < 0.99 for spikes in outcomes[0][:3])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_graphs_are_shared_and_a_change_of_timesteps_back_and_forth_ends(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    blocks = nn.ModuleList(NormAndFire(3, LIF) for _ in range(12))
    compile_blocks(blocks)
    torch._dynamo.reset()
    seen = []
    for timesteps in (4, 2, 4, 2):
        before = graphs()
        for block in blocks:
            block(torch.randn(timesteps, 2, 3, 4, 4))
        seen.append(graphs() - before)
    assert seen == [1, 1, 0, 0]
    # past torch's own limit of 8 graphs, calls would run unfused
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch in range(3, 15):
            blocks[0](torch.randn(2, batch, 3, 4, 4))
