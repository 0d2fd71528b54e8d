import copy

import pytest
import torch
from conftest import kernels, lively, needs_a_compiler
from reference import loop_of
from torch.nn import functional as F

from models import build_model
from models.layers import BatchNorm, NormAndFire, compile_blocks
from models.lif import LIF
from utils.masks import prunable

ARCHS = ("vgg16", "resnet19", "resnet34", "alexnet")


# ResNet34: 9 * (3*64 + 6*64^2 + 64*128 + 7*128^2 + 128*256 + 11*256^2 + 256*512 + 5*512^2) in 3x3 kernels, 64*128 +
# 128*256 + 256*512 in shortcuts, 512*200 in the classifier; weight and bias of batch norm for 7*64 + 9*128 + 13*256 +
# 7*512 channels, 200 biases.
# AlexNet: 9 * (3*64 + 64*192 + 192*384 + 384*256 + 256^2) + 1024*4096 + 4096^2 + 4096*10 in kernels; a bias and batch
# norm's two for 64 + 192 + 384 + 256 + 256 channels, 2*4096 + 10 biases.
@pytest.mark.parametrize(
    ("arch", "classes", "parameters", "weights"),
    [
        ("vgg16", 10, 14_728_266, 14_715_584),
        ("resnet19", 10, 12_630_858, 12_619_968),
        ("resnet34", 200, 21_379_592, 21_362_368),
        ("alexnet", 10, 23_274_570, 23_262_912),
    ],
)
def test_parameter_counts_of_the_full_networks(arch, classes, parameters, weights):
    with torch.device("meta"):
        model = build_model(arch, 3, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in prunable(model).values()) == weights


def test_grey_images_cost_only_the_stem():
    with torch.device("meta"):
        colour, grey = (sum(p.numel() for p in build_model("vgg16", c, 10).parameters()) for c in (3, 1))
    assert colour - grey == 2 * 64 * 9


def test_lif_follows_a_trace_by_hand():
    # v <- 0.25 v + 0.75 x: 0.75; 0.1875 + 0.75 = 0.9375; 0.234375 + 0.9 > 1, fire and reset; 0.75; exactly 1 fires
    current = torch.tensor([1.0, 1.0, 1.2, 1.0, (1 - 0.1875) / 0.75]).view(5, 1, 1)
    assert LIF()(current).flatten().tolist() == [0, 0, 1, 0, 1]


def test_lif_gradient_is_the_surrogates_and_none_through_the_reset():
    current = torch.tensor([2.0, 0.5], dtype=torch.float64).view(2, 1, 1).requires_grad_()
    LIF()(current).sum().backward()
    charge = [1.5, 0.375]  # the first one fires, so nothing of it reaches the second

    def atan(h):
        return 1 / (1 + (torch.pi * (h - 1)) ** 2)

    expected = [0.75 * atan(h) for h in charge]
    torch.testing.assert_close(current.grad.flatten(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_multi_step_network_is_the_loop_over_timesteps(arch, training):
    torch.manual_seed(0)
    model = lively(build_model(arch, 3, 10, width=0.125).double(), torch.randn(8, 3, 32, 32, dtype=torch.float64))
    loop = loop_of(model, arch, 3, 10, 0.125)
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 7, 9])
    outputs = []
    for network in (model, loop):
        network.train(training)
        logits = network(images, 4)
        sum(F.cross_entropy(step, labels) for step in logits).backward()
        outputs.append(logits.detach())
    assert outputs[0].std() > 0
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    for (name, a), b in zip(model.state_dict().items(), loop.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)
    for (name, a), b in zip(model.named_parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9, msg=name)
    assert sum(p.grad.abs().sum() for p in prunable(model).values()) > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_causality_the_first_outputs_of_a_long_run_are_the_short_run(arch):
    torch.manual_seed(0)
    model = lively(
        build_model(arch, 3, 10, width=0.125).double(), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    ).eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    long = model(images, 5)
    assert (long[0] != long[4]).any()
    for t in range(1, 5):
        torch.testing.assert_close(model(images, t), long[:t], rtol=0, atol=1e-12)


def test_batch_norm_per_timestep_and_over_time():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, 5, 5) * torch.tensor([1.0, 2, 3]).view(3, 1, 1, 1, 1)
    per_timestep, over_time = BatchNorm(2), BatchNorm(2, "over_time")
    y = per_timestep(x)
    torch.testing.assert_close(y.mean((1, 3, 4)), torch.zeros(3, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((1, 3, 4), correction=0), torch.ones(3, 2), atol=1e-3, rtol=0)
    running = torch.zeros(2)
    for x_t in x:
        running = 0.9 * running + 0.1 * x_t.mean((0, 2, 3))
    torch.testing.assert_close(per_timestep.running_mean, running)
    assert per_timestep.num_batches_tracked == 3
    torch.testing.assert_close(over_time(x), torch.nn.BatchNorm2d(2)(x.flatten(0, 1)).unflatten(0, (3, 4)))
    torch.testing.assert_close(over_time.running_mean, 0.1 * x.mean((0, 1, 3, 4)))
    per_timestep.load_state_dict(over_time.state_dict())
    torch.testing.assert_close(per_timestep.eval()(x), over_time.eval()(x))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (33, 47)])
def test_any_image_from_32_pixels_up(arch, size):
    model = build_model(arch, 3, 7, width=0.0625).eval()
    assert model(torch.randn(2, 3, *size), 2).shape == (2, 2, 7)


@pytest.mark.parametrize("arch", ARCHS)
def test_relu_gives_the_ann_of_the_same_shape(arch):
    torch.manual_seed(0)
    snn, ann = (build_model(arch, 3, 10, neuron, width=0.125) for neuron in ("lif", "relu"))
    assert {n: p.shape for n, p in snn.named_parameters()} == {n: p.shape for n, p in ann.named_parameters()}
    logits = ann.eval()(torch.randn(2, 3, 32, 32), 2)
    assert torch.equal(logits[0], logits[1])


def test_membranes_stay_fp32_in_bf16():
    current = torch.full((2, 1, 1), 1.0, dtype=torch.bfloat16)
    seen = {}

    def spy(x, v, **kwargs):
        seen["dtype"] = v.dtype
        return x, v, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.lif.functional.lif_multi_step", spy)
        LIF()(current)
    assert seen["dtype"] == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "vgg11"}, "vgg16, resnet19"),
        ({"neuron": "if"}, "lif, relu"),
        ({"batch_norm": "layer"}, "per_timestep, over_time"),
        ({"width": 0}, "positive"),
    ],
)
def test_unknown_choices_name_the_choices(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_model(**({"arch": "vgg16", "channels": 3, "classes": 10} | kwargs))


@needs_a_compiler
@pytest.mark.parametrize("statistics", ["per_timestep", "over_time"])
def test_compiled_block_is_the_block(statistics):
    torch.manual_seed(0)
    eager = NormAndFire(4, "lif", statistics).double()
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled)
    outcomes, before = [], kernels()
    for block in (eager, compiled):
        torch.manual_seed(1)
        x = torch.randn(3, 6, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        spikes = [block(x, shortcut=x.flip(0)), block(x[:1], timesteps=3), block.eval()(x)]
        sum((s * torch.randn_like(s)).sum() for s in spikes).backward()
        outcomes.append([*spikes, x.grad, *(p.grad for p in block.parameters()), *block.state_dict().values()])
    assert kernels() > before
    assert all(0.01 < spikes.mean() < 0.99 for spikes in outcomes[0][:3])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@needs_a_compiler
def test_kernels_are_shared_and_a_change_of_timesteps_back_and_forth_ends():
    blocks = torch.nn.ModuleList(NormAndFire(3, "lif") for _ in range(12))
    compile_blocks(blocks)
    torch._dynamo.reset()
    seen = []
    for timesteps in (4, 2, 4, 2):
        before = kernels()
        for block in blocks:
            block(torch.randn(timesteps, 2, 3, 4, 4))
        seen.append(kernels() - before)
    assert seen == [1, 1, 0, 0]
    # past torch's own limit of 8 kernels, calls would run unfused
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch in range(3, 15):
            blocks[0](torch.randn(2, batch, 3, 4, 4))
