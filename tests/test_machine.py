"""What is chosen, refused and said for a machine; the GPUs here are pretended ones."""

import platform
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import FLAGS, ROOT, script
from torch import nn

from models import build_model
from utils import machine
from utils.files import InputError
from utils.flags import get_args
from utils.machine import has_bf16_units
from utils.training import place


def args_of(line=""):
    return get_args("train_snn_mine.py", "mine", None, line.split())


@pytest.fixture
def gpu(monkeypatch):
    """A card that torch sees: with units for bf16, or after ``gpu(False)`` without."""

    def units(there):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or there
        )

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "device": nullcontext,
        "get_device_name": lambda device: "Card 3000",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(machine.functional, "neuron_implementation", lambda *_: {"implementation": "triton"})
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    units(True)
    return units


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Puts an nvidia-smi on the path of a machine where torch sees no GPU."""

    def put(text, code=0):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return put


# --- defaults --------------------------------------------------------------------------------------------------------


def test_on_a_card_steps_are_captured_and_in_bf16_where_it_has_units(gpu):
    args = args_of()
    assert (args.device, args.precision, args.cuda_graph) == ("cuda", "bf16", True)
    args = args_of("--no-cuda_graph --precision fp32")
    assert (args.precision, args.cuda_graph) == ("fp32", False)
    gpu(False)
    assert args_of("--device cuda:0").precision == "fp32"
    assert args_of("--precision bf16").precision == "bf16"
    args = args_of("--device cpu")
    assert (args.precision, args.cuda_graph) == ("fp32", False)


@pytest.mark.parametrize(
    ("arch", "width", "possible"),
    [("vgg16", 0.05, True), ("resnet19", 0.25, True), ("resnet19", 0.125, False), ("resnet19", 0.05, False)],
)
def test_channels_last_is_the_default_unless_a_cpus_kernels_would_crash(arch, width, possible):
    chosen, refusing, without = map(args_of, ("--device cpu", "--device cpu --channels_last", "--no-channels_last"))
    networks = [build_model(arch, 3, 10, width=width) for _ in range(3)]
    assert place(networks[0], chosen) is networks[0]
    assert chosen.channels_last == possible
    assert machine.takes_channels_last(networks[0], "cuda")
    kernels = [module.weight for module in networks[0].modules() if isinstance(module, nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels) == possible
    if not possible:
        with pytest.raises(InputError, match="--channels_last"):
            place(networks[1], refusing)
    place(networks[2], without)
    assert without.channels_last is False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory in their own way")
def test_memory_of_a_tensor_that_is_gone_is_kept_for_the_next():
    code = (
        "import resource, torch; from utils.machine import keep_memory; keep_memory()\n"
        "pages = lambda: int(open('/proc/self/statm').read().split()[1])  # in memory, of this process\n"
        "before = pages(); torch.zeros(2**25); print((pages() - before) * resource.getpagesize() / 2**20)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(run.stdout) > 100, "the tensor's 128 MiB"


def test_several_ranks_do_not_capture(gpu, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not args_of().cuda_graph
    assert args_of("--cuda_graph").cuda_graph, "which is refused with a reason"


def test_compile_is_left_out_on_a_card_and_the_user_is_told(gpu, capsys):
    assert not args_of("--compile").compile
    (note,) = capsys.readouterr().out.splitlines()
    assert "--compile" in note
    assert args_of("--compile --device cpu").compile
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n", False),
        ("flags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: avx512f amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        (None, True),
    ],
)
def test_a_cpu_tells_whether_it_has_units_for_bf16(monkeypatch, tmp_path, text, units):
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    if text is not None:
        machine.CPU_INFO.write_text(f"model name\t: Some CPU\n{text}")
    assert has_bf16_units("cpu") == units
    notes = machine.describe(args_of("--device cpu --precision bf16")).splitlines()[1:]
    assert len(notes) == (not units)
    assert not machine.describe(args_of("--device cpu")).splitlines()[1:]


# --- what is said, and what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "named", "not_named"),
    [
        ("--channels_last", "bf16 triton channels captured", "TF32 note"),
        ("--precision fp32 --no-cuda_graph --no-channels_last", "fp32 TF32", "captured channels"),
        ("--neuron relu --timestep 1", "bf16", "triton"),
    ],
)
def test_a_run_says_what_it_runs_on(gpu, line, named, not_named):
    (said,) = machine.describe(args_of(line)).splitlines()
    assert all(word in said for word in ["Card 3000", *named.split()])
    assert not any(word in said for word in not_named.split())
    gpu(False)
    assert len(machine.describe(args_of(f"{line} --precision bf16")).splitlines()) == 2


def test_it_is_said_before_the_first_epoch(run, capsys):
    run("oneshot", "--end_iter", "1")
    said, *rest = capsys.readouterr().out.splitlines()
    assert all(word in said for word in (torch.backends.cpu.get_cpu_capability(), "fp32", "neuron", "channels"))
    assert "epoch 1/1" in "".join(rest)


@pytest.mark.parametrize("version", [None, "13.0"])
def test_a_gpu_that_torch_does_not_see_is_not_passed_over(smi, monkeypatch, refused, version):
    monkeypatch.setattr(torch.version, "cuda", version)
    smi("GPU 0: Card 3000 (UUID: GPU-1)")
    for line in ("", "--device cuda"):
        message = refused(lambda words: args_of(*words), line)
        assert ("driver" if version else "without CUDA") in message
    assert args_of("--device cpu").device == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert args_of().device == "cpu"


def test_a_machine_without_a_gpu_needs_no_flag(smi, monkeypatch, tmp_path):
    smi("No devices were found", code=6)
    assert args_of().device == "cpu"
    smi("NVIDIA-SMI has failed because it could not reach the driver of the GPU", code=9)
    assert args_of().device == "cpu"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert args_of().device == "cpu"


def test_what_tritons_kernels_are_built_with_is_looked_for_before_anything_is_written(
    gpu, monkeypatch, tmp_path, refused
):
    monkeypatch.chdir(tmp_path)

    def complaint():
        line = refused(script("oneshot"), *FLAGS["oneshot"].split(), "--device", "cuda")
        assert not list(tmp_path.glob("runs*"))
        return line

    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)
    assert "install gcc" in complaint()
    monkeypatch.setenv("CC", "mycc")
    assert "mycc" in complaint()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mycc").write_text("")
    (tmp_path / "bin" / "mycc").chmod(0o755)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    assert "python3-dev" in complaint()
    (tmp_path / "Python.h").write_text("")
    machine.check_compiler(args_of())


@pytest.mark.parametrize(
    ("device", "neuron", "chosen"), [("cpu", "lif", ""), ("cuda", "relu", "triton"), ("cuda", "lif", "torch")]
)
def test_without_triton_no_compiler_is_needed(gpu, monkeypatch, tmp_path, device, neuron, chosen):
    monkeypatch.setattr(machine.functional, "neuron_implementation", lambda *_: {"implementation": chosen})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    machine.check_compiler(SimpleNamespace(device=device, neuron=neuron))
