"""Parts of ``gpu.py``: does the GPU compute what it should?

A part is a generator of what it finds, which is reported as it comes; ``why`` is the line that the user reads. It ends
if all is well, and raises ``Failed`` or ``Skipped`` otherwise.
"""

import copy
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from benchmarks import speed
from models import ARCHITECTURES, BATCH_NORMS, build_model
from models.layers import GlobalAvgPool, NormAndFire, fuse_blocks
from models.lif import LIF
from utils.data import Data
from utils.machine import has_bf16_units
from utils.masks import apply_mask
from utils.scores import magnitude_mask
from utils.stages import read_rows
from utils.training import loss_over_time

Findings = Iterator[dict]
DEVICE = "cuda"
STEPWISE = "--no-cuda_graph"  # without it, steps are captured
FUSED = "--fused"
# how far GPU and CPU may be apart: all in fp64 (the loss is computed in fp32), then layer by layer in fp32
NUMERICS = {"logits": 1e-8, "gradients": 1e-5, "outputs of a layer": 1e-4, "its spikes": 1e-4, "its gradients": 1e-2}
STATISTICS = ("running_mean", "running_var")
LAYERS = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.BatchNorm2d, GlobalAvgPool, NormAndFire, LIF)


class Failed(Exception):
    """The GPU does something wrong. The message says what."""


class Skipped(Exception):
    """This machine cannot do what the part is about. The message says why."""


def require(fine: bool, why: str) -> None:
    if not fine:
        raise Failed(why)


def neuron() -> Findings:
    """spikingjelly's kernels against the neuron's equations in fp64. The equations are followed with the kernels' own
    spikes, so that one that differs does not lead to others; where the membrane is as good as at the threshold, it may.
    """
    kind = functional.neuron_implementation("lif", torch.device(DEVICE))
    yield {"implementation": kind}
    wrong, worst, lif = 0, {torch.float32: 0.0, torch.bfloat16: 0.0}, LIF()
    torch.manual_seed(0)
    for dtype, timesteps, layout in product(worst, range(1, 6), ("contiguous", "channels last", "one image")):
        x = (torch.randn(1 if layout == "one image" else timesteps, 4, 16, 9, 9) * 1.5 + 0.4).to(dtype)
        if layout == "channels last":
            x = x.movedim(2, -1).contiguous().movedim(-1, 2)
        weights = torch.randn(timesteps, *x.shape[1:]).to(dtype)
        own, reference = x.to(DEVICE).requires_grad_(), x.detach().double().requires_grad_()
        spikes = lif(own.expand(weights.shape))
        spikes.backward(weights.to(DEVICE))
        membranes, followed = followed_membranes(reference.expand(weights.shape), spikes.detach().cpu().double())
        followed.backward(weights.double())
        decided = (membranes - 1).abs() > 1e-5
        wrong += int(((membranes > 1) != spikes.detach().cpu().bool())[decided].sum())
        worst[dtype] = max(worst[dtype], difference(own.grad, reference.grad))
    fp32, bf16 = worst.values()
    yield {"spikes_wrong": wrong, "gradient_fp32": fp32, "gradient_bf16": bf16}
    why = f"{kind['implementation']}; {wrong} spikes wrong, gradients within {fp32:.0e} in fp32, {bf16:.0e} in bf16"
    require(wrong == 0 and fp32 < 1e-5 and bf16 < 1e-2, why)
    yield {"why": why}


def followed_membranes(current: Tensor, spikes: Tensor) -> tuple[Tensor, Tensor]:
    """Membranes [T, ...] of the paper's neuron (tau = 4/3, threshold 1) whose spikes are given, and these spikes with
    the gradient of the ATan surrogate of alpha 2."""
    membrane, membranes, followed = torch.zeros_like(current[0]), [], []
    for x, spike in zip(current, spikes, strict=True):
        membrane = 0.25 * membrane + 0.75 * x
        surrogate = torch.atan(math.pi * (membrane - 1)) / math.pi
        membranes.append(membrane.detach())
        followed.append(spike + surrogate - surrogate.detach())
        membrane = membrane * (1 - spike)
    return torch.stack(membranes), torch.stack(followed)


def difference(a: Tensor, b: Tensor) -> float:
    """Norm of the difference of two tensors, as a share of the second's."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def network() -> Findings:
    """A step of each network against the CPU's: all of it in fp64, where rounding flips no spikes, and every layer by
    itself in fp32 without TF32, given the CPU's inputs."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    images, labels, rows = torch.randn(8, 3, 32, 32), torch.arange(8), []
    for arch in ARCHITECTURES:
        torch.manual_seed(0)
        cpu = build_model(arch, 3, 10, width=0.25).train()
        card, ends = copy.deepcopy(cpu).to(DEVICE), []
        for model in (copy.deepcopy(cpu).double(), copy.deepcopy(card).double()):
            device = next(model.parameters()).device
            logits = model(images.double().to(device), 4)
            loss_over_time(logits, labels.to(device)).backward()
            ends.append((logits, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
        whole = map(difference, ends[1], ends[0])
        rows.append(dict(zip(("network", *NUMERICS), (arch, *whole, *layers_apart(cpu, card, images)), strict=True)))
        yield {"rows": rows}
    worst = {name: max(row[name] for row in rows) for name in NUMERICS}
    why = "; ".join(f"{name} within {value:.0e}" for name, value in worst.items())
    require(all(worst[name] < limit for name, limit in NUMERICS.items()), why)
    yield {"why": why}


def layers_apart(cpu: nn.Module, card: nn.Module, images: Tensor) -> tuple[float, float, float]:
    """How far the layers of two copies of a network are apart at most, each given the inputs that it has on the CPU:
    outputs, the share of spikes that differ, and gradients."""
    fused = {child for module in cpu.modules() if isinstance(module, NormAndFire) for child in module.children()}
    seen, hooks = {}, []
    for name, module in cpu.named_modules():
        if isinstance(module, LAYERS) and module not in fused:
            keep = partial(lambda name, module, *call: seen.update({name: (module, *call)}), name)
            hooks.append(module.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        cpu(images, 4)
    for hook in hooks:
        hook.remove()
    outputs, flipped, gradients = [], [], []
    for name, (module, inputs, options, _) in seen.items():
        expected, references = layer_step(module, inputs, options, "cpu")
        own, found = layer_step(card.get_submodule(name), inputs, options, DEVICE)
        if isinstance(module, NormAndFire | LIF):
            flipped.append((own.cpu() != expected).double().mean().item())
        else:
            outputs.append(difference(own, expected))
        gradients += map(difference, found, references)
    return max(outputs), max(flipped), max(gradients)


def layer_step(module: nn.Module, inputs: tuple, options: dict, device: str) -> tuple[Tensor, list[Tensor]]:
    """Output of a layer on a device, and the gradients of its inputs and parameters, weighted at random."""
    own = [x.detach().to(device).requires_grad_() for x in inputs]
    out = module(*own, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return out.detach(), list(torch.autograd.grad(out, [*own, *module.parameters()], weights))


def captured() -> Findings:
    """Captured steps against plain ones: epochs with full batches and one that is not, at two rates, with a mask that
    changes after every step. Two plain trainings tell how far cuDNN repeats itself."""
    rows = []
    cases = [("vgg16", "fp32"), ("resnet19", "fp32"), ("vgg16", "fp32 --optimizer adam")]
    cases += [("vgg16", "bf16")] if has_bf16_units(DEVICE) else []
    for arch, more in cases:
        rows.append(repeated(f"--arch {arch} --precision {more}"))
        yield {"rows": rows}
    worst = max(row["apart"] for row in rows)
    why = f"weights after 12 steps within {worst:.0e} of the plain step's"
    require(all(row["apart"] <= 1e-5 + 10 * row["plain again"] for row in rows), why)
    yield {"why": why}


def repeated(flags: str) -> dict:
    """How far the weights of a training are from those of the same one: again, and with captured steps."""
    first, again, captured = (trained(f"{flags} {more}")[1] for more in (STEPWISE, STEPWISE, ""))
    return {"case": flags, "plain again": difference(again, first), "apart": difference(captured, first)}


def trained(flags: str) -> tuple[float, Tensor]:
    """The last loss and the weights [n] after two epochs of a small network."""
    torch.manual_seed(0)
    data = Data(speed.random_split(22 * 8, DEVICE), speed.random_split(32, DEVICE), 10)
    flags += f" --batch_size 32 --width 0.25 --timestep 4 --learning_rate 0.01 --end_iter 3 --device {DEVICE}"
    trainer, optimizer = speed.trainer_of(flags, data)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    mask = magnitude_mask(trainer.model, 0.5)
    apply_mask(trainer.model, mask)

    def turn(step: int, generator: torch.Generator) -> None:
        name = list(mask)[step % len(mask)]
        mask[name].copy_(mask[name].roll(1, 0))

    *_, row = (trainer.epoch(optimizer, mask, epoch, 4, after_step=turn) for epoch in range(2))
    if trainer.args.cuda_graph:
        require(trainer._captured[1].graph is not None, "the step could not be captured")
    return row["loss"], torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def fused() -> Findings:
    """Fused blocks and plain ones, each against the block in fp64 on the CPU: the fused one may not be further off.
    Then trainings with them: the kernels repeat themselves, so captured steps end where others do."""
    if not has_bf16_units(DEVICE):
        raise Skipped("the kernels are for compute capability 8.0 and above")
    rows = []
    shapes = ("block", "shortcut", "one image")
    for precision, statistics, shape in product((torch.float32, torch.bfloat16), BATCH_NORMS, shapes):
        torch.manual_seed(0)
        block = NormAndFire(64, LIF, statistics).train()
        nn.init.normal_(block.norm.weight, 1, 0.2)
        nn.init.normal_(block.norm.bias, 0, 0.2)
        x = [torch.randn(1 if shape == "one image" else 5, 8, 9, 9, 64).to(precision).movedim(-1, 2)]
        x += [torch.randn(5, 8, 9, 9, 64).to(precision).movedim(-1, 2)] * (shape == "shortcut")
        options = {"timesteps": 5} if shape == "one image" else {}
        reference, plain, ours = copy.deepcopy(block).double(), block.to(DEVICE), copy.deepcopy(block).to(DEVICE)
        fuse_blocks(ours)
        expected, references = layer_step(reference, [each.double() for each in x], options, "cpu")
        row = {"precision": str(precision).removeprefix("torch."), "statistics": statistics, "case": shape}
        for way, module in (("plain", plain), ("fused", ours)):
            spikes, gradients = layer_step(module, x, options, DEVICE)
            row[f"{way} spikes"] = (spikes.cpu() != expected).double().mean().item()
            row[f"{way} gradients"] = max(map(difference, gradients, references))
            moved = ([getattr(each.norm, name) for name in STATISTICS] for each in (module, reference))
            row[f"{way} statistics"] = max(map(difference, *moved))
        rows.append(row)
        yield {"rows": rows}
    slack = {"spikes": 5e-5, "gradients": 1e-2, "statistics": 1e-5}  # one spike more changes the gradients by 2e-3
    further = [
        f"{row['precision']} {row['statistics']} {row['case']}: {kind} {row[f'fused {kind}']:.0e}"
        for row, kind in product(rows, slack)
        if not row[f"fused {kind}"] <= 1.5 * row[f"plain {kind}"] + slack[kind]
    ]
    require(not further, "; ".join(further))
    steps = [repeated(f"--arch {arch} --precision fp32 {FUSED}") for arch in speed.ARCHS]
    losses = [trained(f"--arch vgg16 --precision fp32 {flags}")[0] for flags in ("", FUSED)]
    yield {"steps": steps, "losses": losses}
    why = f"no further from fp64 than the plain ones; losses {losses[0]:.3f} plain and {losses[1]:.3f} fused"
    require(all(row["apart"] <= 1e-5 + 10 * row["plain again"] for row in steps), f"captured steps differ: {steps}")
    require(abs(losses[0] - losses[1]) < 0.05, why)
    yield {"why": why}


def scripts() -> Findings:
    """Scripts as a user starts them. One is also stopped by a signal and resumed: it logs the same epochs then."""
    tiny = (
        "--dataset synthetic --train_samples 1000 --test_samples 100 --arch alexnet --width 0.25 --batch_size 16 "
        "--timestep 3 --end_iter 3 --prune_iterations 2 --valid_freq 3 --learning_rate 0.1"
    )
    runs = {
        "earlyT_earlybird": "--eb_window 1 --eb_tolerance 0.2 --early_time_epoch 1 --early_time_samples 50",
        "rigl": "",
        "laterewindlth": "--rewinding_epoch 1",
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:

        def start(name: str, place: str) -> subprocess.Popen:
            words = [sys.executable, str(speed.ROOT / f"train_snn_{name}.py"), *tiny.split(), *runs[name].split()]
            words += ["--device", DEVICE, "--output_dir", f"{folder}/{place}"]
            return subprocess.Popen(words, stdout=subprocess.DEVNULL)

        for name in runs:
            code = start(name, "whole").wait()
            rows.append({"script": name, "exit code": code})
            yield {"rows": rows}
            require(code == 0, f"train_snn_{name}.py ended with exit code {code}")
        process = start(name, "stopped")
        while process.poll() is None and not logged(Path(folder, "stopped")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        stopped = process.wait(), len(logged(Path(folder, "stopped")))
        code = start(name, "stopped").wait()
        rows.append({"script": f"{name}, stopped after {stopped[1]} epochs", "exit code": stopped[0]})
        rows.append({"script": f"{name}, resumed", "exit code": code})
        yield {"rows": rows}
        require(stopped[0] == 128 + signal.SIGTERM, f"exit code {stopped[0]} after SIGTERM")
        require(code == 0, f"train_snn_{name}.py resumed ended with exit code {code}")
        whole, resumed = (
            {(row["phase"], row["level"], row["epoch"]): row["loss"] for row in logged(Path(folder, place, name))}
            for place in ("whole", "stopped")
        )
        require(list(whole) == list(resumed), f"a resumed train_snn_{name}.py logged other epochs than one in a piece")
    apart = max(abs(resumed[key] - loss) for key, loss in whole.items())
    yield {"why": f"{len(runs)} scripts ran, one was stopped and resumed; its losses within {apart:.0e}"}


def logged(folder: Path) -> list[dict]:
    """The rows of the run in a folder; none before it has begun."""
    return [row for path in folder.rglob("metrics.jsonl") for row in read_rows(path)]
