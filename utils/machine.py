"""What the machine offers, what a run makes of it, and what it lacks."""

import ctypes
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from spikingjelly.activation_based import functional
from torch import nn

from .files import InputError

CPU_INFO = Path("/proc/cpuinfo")
BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux calls them on x86 and on ARM
HIDDEN = ("", "-1", "NoDevFiles")  # CUDA_VISIBLE_DEVICES that keep every GPU from torch
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
VECTOR = 16  # numbers of fp32 that a CPU computes with at once, at most


def keep_memory() -> None:
    """Have this process keep the memory of tensors that are gone for those to come, in large pages.

    As they come, the C library hands large blocks back to the system, which maps and clears the pages of the next
    tensor anew: on a CPU that took about a quarter of a large batch's step (docs/speed.md). The process stays as large
    as it ever was.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries than glibc have none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def takes_channels_last(model: nn.Module, device: str) -> bool:
    """Whether a device can train a network with the channels innermost in memory.

    On a CPU, oneDNN's fp32 kernels can crash in the backward pass of a 1x1 convolution that skips pixels and has
    fewer channels than the CPU computes with at once (seen with torch 2.14.1, AVX2, fewer than 8).
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    skipping = [conv for conv in convolutions if conv.kernel_size == (1, 1) and conv.stride != (1, 1)]
    return device != "cpu" or all(conv.in_channels >= VECTOR for conv in skipping)


def has_bf16_units(device: str) -> bool:
    """Whether a device computes in bf16 rather than emulating it. A CPU that cannot be asked is believed to."""
    if device != "cpu":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return not CPU_INFO.exists() or bool(BF16_UNITS & set(CPU_INFO.read_text(encoding="utf-8").split()))


def unused_gpu() -> str:
    """Why torch sees no GPU although the driver does; empty if there is none, or if the user has hidden it."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in HIDDEN:
        return ""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if not found.stdout.startswith("GPU "):
        return ""
    if torch.version.cuda is None:
        return f"there is a GPU, but torch {torch.__version__} is a build without CUDA: install one with CUDA"
    return (
        f"there is a GPU, but its driver does not run CUDA {torch.version.cuda}, which torch {torch.__version__} is "
        "built for: update the driver, or install a torch built for an older CUDA"
    )


def neuron_implementation(device: str) -> str:
    """What computes the spiking neurons on a device: spikingjelly's choice."""
    return functional.neuron_implementation("lif", torch.device(device))["implementation"]


def check_compiler(args) -> None:
    """Look for what Triton, which computes the neurons on a GPU, builds its launchers with.

    Raises:
        InputError: there is no C compiler, or no ``Python.h``.
    """
    if args.device == "cpu" or args.neuron == "relu" or neuron_implementation(args.device) != "triton":
        return
    remedy = "or set SJ_LIF_CUDA_IMPLEMENTATION=torch, which is slower"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        raise InputError(
            f"the neuron's GPU kernels need a C compiler, and there is no {' or '.join(compilers)}: "
            f"install gcc (apt-get install gcc), {remedy}"
        )
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not header.exists():
        raise InputError(
            f"the neuron's GPU kernels need Python's headers, and there is no {header}: "
            f"install them (apt-get install python3-dev), {remedy}"
        )


def describe(args) -> str:
    """One line for the user: the device, the precision, and what computes the neurons; below it what is slow."""
    cuda = args.device != "cpu"
    parts = [args.precision + " without TF32" * (cuda and args.precision == "fp32")]
    parts += [f"neuron: {neuron_implementation(args.device)}"] if args.neuron == "lif" else []
    switches = {
        "compile": "compiled",
        "channels_last": "channels last",
        "cuda_graph": "captured steps",
        "fused": "fused blocks",
    }
    parts += [text for name, text in switches.items() if getattr(args, name)]
    line = f"{device_name(args.device)}: {', '.join(parts)}"
    if args.precision == "bf16" and not has_bf16_units(args.device):
        kind = "GPU" if cuda else "CPU"
        line += f"\nnote: this {kind} has no units for bf16: --precision fp32 can be hundreds of times faster"
    return line


def device_name(device: str) -> str:
    """The model of a GPU, or of the CPU with the instructions that torch uses."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()})"


def processor() -> str:
    """The model of the CPU."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"
