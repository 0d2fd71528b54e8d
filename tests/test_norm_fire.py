"""The fused block: its kernels in Triton's interpreter against the plain layers in fp64, and compiled without a GPU."""

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from in_the_interpreter import BLOCKS, NETWORKS
from test_captured import Recorder
from torch import nn

from models.layers import MOST_FUSED_TIMESTEPS, NormAndFire, fuse_blocks
from models.lif import LIF

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="this torch came without Triton"),
    pytest.mark.xdist_group("norm_fire"),
]


@pytest.fixture(scope="module")
def found():
    """What every case found. A process decides once, before it imports Triton, whether that interprets its kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "in_the_interpreter.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", BLOCKS)
def test_fused_block_is_the_block(found, case):
    """In bf16 the gradients that go on are rounded to 8 bits, by the plain block also what lies between its layers."""
    fused, plain = found[case]["fused"], found[case]["plain"]
    assert 0.05 < found[case]["rate"] < 0.95
    assert fused.pop("spikes") == 0
    assert plain.pop("spikes") < 0.01
    most = dict.fromkeys(fused, 1e-4 if case == "far from 0" else 1e-5)
    if "bf16" in case:
        most |= {name: min(2**-8, plain[name] + 1e-3) for name in ("x", "shortcut") if name in fused}
    assert all(error < most[name] for name, error in fused.items()), (fused, most)
    assert found[case]["batches"] == found[case]["training"]
    assert found[case]["dtype"] == f"torch.{'bfloat16' if 'bf16' in case else 'float32'}"
    assert found[case]["innermost"]


@pytest.mark.slow
@pytest.mark.parametrize("case", NETWORKS)
def test_fused_network_is_the_network(found, case):
    assert found[case].pop("blocks") > 10
    for name, error in found[case].items():
        assert error < 1e-4, name


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Has kernels compiled for a kind of card, and not launched, whatever the tensors; the names of those that were."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, names = JITFunction.run, []

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        binary = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        assert binary.asm["cubin"]
        names.append(kernel.__name__)

    def start(capability):
        card = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
        )
        monkeypatch.setattr(driver, "_active", card)
        return names

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "kind", "shape", "dtype"),
    [
        *((capability, "shortcut", (2, 2, 128, 4, 4), torch.bfloat16) for capability in (80, 90, 120)),
        (90, "plain", (2, 2, 20, 4, 4), torch.float32),
        (90, "stem", (2, 2, 128, 4, 4), torch.bfloat16),
        (90, "plain", (2, 7, 1), torch.bfloat16),
    ],
)
def test_every_kernel_compiles_and_none_of_the_rest_waits_for_the_device(compiled, capability, kind, shape, dtype):
    names, timesteps = compiled(capability), shape[0]
    block = NormAndFire(shape[2], LIF)
    fuse_blocks(block)
    x = torch.randn(shape).to(dtype)[: 1 if kind == "stem" else None].requires_grad_()
    shortcut = torch.rand(shape).to(dtype).requires_grad_() if kind == "shortcut" else None
    with Recorder():  # as in a capture
        block(x, shortcut, timesteps if kind == "stem" else None).sum().backward()
    assert names == ["_moments", "_statistics", "_fire", "_backward", "_backward"]
    block.eval()(x, shortcut, timesteps if kind == "stem" else None)
    assert names[5:] == ["_fire"]


@pytest.fixture
def launches(monkeypatch):
    """Inputs that went to the kernels, which are not launched."""
    from models import norm_fire

    inputs = []

    def note(x, shortcut, weight, bias, norm, neuron, timesteps):
        inputs.append(x)
        return x.new_zeros(timesteps, *x.shape[1:])

    monkeypatch.setattr(norm_fire, "_NormFire", SimpleNamespace(apply=note))
    return inputs


@pytest.mark.parametrize(
    ("statistics", "arguments"),
    [
        ("per_timestep", (torch.randn(3, 1, 4, 1, 1),)),  # no variance
        ("over_time", (torch.randn(1, 1, 4),)),
        ("over_time", (torch.randn(3, 0, 4, 2, 2),)),
        ("over_time", (torch.randn(3, 2, 4, 2, 2).double(),)),
        ("over_time", (torch.randn(MOST_FUSED_TIMESTEPS + 1, 2, 4, 2, 2),)),
        ("over_time", (torch.randn(3, 2, 4, 2, 2), torch.randn(1, 2, 4, 2, 2))),
        ("over_time", (torch.randn(3, 2, 4, 2, 2).bfloat16(), torch.randn(3, 2, 4, 2, 2))),
    ],
)
def test_what_the_kernels_do_not_serve_goes_the_plain_way(launches, statistics, arguments):
    plain = NormAndFire(4, LIF, statistics).to(arguments[0].dtype if arguments[0].dtype == torch.double else None)
    nn.init.constant_(plain.norm.bias, 1.5)
    fused = copy.deepcopy(plain)
    fuse_blocks(fused)
    assert torch.equal(fused(*arguments), plain(*arguments))
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert not launches


def test_hooks_on_the_neuron_see_spikes(launches):
    """Spikes are counted that way."""
    block, seen = NormAndFire(4, LIF), []
    fuse_blocks(block)
    x = torch.randn(3, 2, 4, 2, 2)
    hook = block.neuron.register_forward_hook(lambda _, inputs, spikes: seen.append(spikes))
    block(x)
    assert len(seen) == 1
    assert not launches
    hook.remove()
    block(x)
    assert (len(seen), len(launches)) == (1, 1)


def test_channels_that_are_innermost_are_not_copied(launches):
    block = NormAndFire(4, LIF)
    fuse_blocks(block)
    images = torch.randn(3, 2, 5, 6, 4)
    units = torch.randn(3, 2, 4)
    for x in (images.movedim(-1, 2), units):
        block(x)
    assert [x.data_ptr() for x in launches] == [images.data_ptr(), units.data_ptr()]


def test_a_fused_network_keeps_its_state_and_can_be_copied(launches):
    block = NormAndFire(4, LIF)
    names = list(block.state_dict())
    fuse_blocks(block)
    own = copy.deepcopy(block)
    own(torch.randn(3, 2, 4, 2, 2))
    assert list(own.state_dict()) == names
    assert (own.norm.num_batches_tracked, block.norm.num_batches_tracked) == (1, 0)
    with pytest.raises(ValueError, match="ReLU"):
        fuse_blocks(NormAndFire(4, nn.ReLU))
