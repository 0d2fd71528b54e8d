"""Parts of ``gpu.py``: the card, and the memory and time that a training takes. See ``gpu_checks.py``."""

import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import speed
from benchmarks.gpu_checks import FUSED, STEPWISE, Findings, Skipped, require
from utils.data import Data
from utils.machine import check_compiler, has_bf16_units, neuron_implementation
from utils.masks import dense_mask

CARD = 11e9  # bytes: the smallest card that the paper's batch is meant to fit
OUTSIDE = 0.6e9  # of them for CUDA itself, which torch does not count
EPOCH = 50_000  # images
BEGIN_UNTIL = 150  # seconds; no figure of speed is begun later


def environment() -> Findings:
    """The card, what the first step of a training needs, and what the card can do at most."""
    card = torch.cuda.get_device_properties(0)
    yield {
        "name": card.name,
        "capability": f"{card.major}.{card.minor}",
        "gib": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpus": os.cpu_count(),
    }
    check_compiler(SimpleNamespace(device="cuda", neuron="lif"))
    yield {"neurons": neuron_implementation("cuda")}
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=driver_version,pstate,clocks.max.sm,power.limit,memory.used"
        answer = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
        yield {"nvidia_smi": answer.stdout.strip(), "driver": answer.stdout.split(",")[0].strip() or "unknown"}
    data = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    seconds, _ = speed.interleaved({"copy": data.clone}, 20, "cuda")
    rates = {kind: speed.matrix_peak("cuda", kind) / 1e12 for kind in ("fp32", "bf16")}
    copied = 2 * len(data) / min(seconds["copy"]) / 1e9
    yield {"tflops": rates, "copy_gb_per_s": copied}
    yield {
        "why": f"{card.name}, {card.total_memory / 2**30:.1f} GiB, {rates['fp32']:.0f} TFLOP/s in fp32, "
        f"{rates['bf16']:.0f} in bf16, copies {copied:.0f} GB/s"
    }


def memory() -> Findings:
    """The peak of a few steps and an evaluation at the paper's batch, where torch may use what a card of 11 GB has."""
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (CARD - OUTSIDE) / torch.cuda.get_device_properties(0).total_memory)
    )
    rows = []
    for arch, options in product(speed.ARCHS, dict.fromkeys([*options_of("", FUSED), "fp32"])):
        peak = None
        try:
            peak = peak_memory(f"--arch {arch} --precision {options}")
        except torch.OutOfMemoryError as error:
            print(error, file=sys.stderr)
        rows.append({"network": arch, "flags": options, "GB": peak})
        yield {"rows": rows}
        gc.collect()
        torch.cuda.empty_cache()
    too_much = [f"{row['network']} {row['flags']}" for row in rows if row["GB"] is None]
    require(not too_much, f"more than {CARD / 1e9:.0f} GB: {', '.join(too_much)}")
    yield {"why": f"at most {max(row['GB'] for row in rows):.1f} GB at batch 128 and T = 5, CUDA itself included"}


def peak_memory(flags: str) -> float:
    """GB that torch has taken from the card after an epoch of 6 steps and its test."""
    torch.cuda.reset_peak_memory_stats()
    data = Data(speed.random_split(6 * 128, "cuda"), speed.random_split(1000, "cuda"), 10)
    trainer, optimizer = speed.trainer_of(f"{flags} --end_iter 1 --device cuda", data)
    trainer.epoch(optimizer, dense_mask(trainer.model), 0, 5)
    return (torch.cuda.max_memory_reserved() + OUTSIDE) / 1e9


def timing() -> Findings:
    """Training against the authors' style, the most wanted first. No more than two are in memory at a time."""
    began, rows, left_out = time.monotonic(), [], []
    for arch, mask, timesteps, options, images in timed():
        part = speed.Part(arch, timesteps, 128, mask, (options,), images, 2 if images == EPOCH else 7)
        title = f"{part.title} {options}"
        if time.monotonic() - began > BEGIN_UNTIL:
            left_out.append(title)
            continue
        gc.collect()
        torch.cuda.empty_cache()
        try:
            found = speed.part_rows("cuda", part, evaluation=False)
        except torch.OutOfMemoryError as error:
            print(error, file=sys.stderr)
            left_out.append(title)
            continue
        for row in found:
            step = {"ms a step": 1000 * 128 * row["seconds"], "epoch, s": EPOCH * row["seconds"]}
            names = ("arch", "mask", "timesteps", "variant", "n", "times_loop", "peak_share", "memory_mib")
            rows.append({name: row[name] for name in names} | step | {"images": images})
        yield {"rows": rows, "left_out": left_out}
    best = [min((row for row in rows if row["arch"] == arch), key=lambda row: row["ms a step"]) for arch in speed.ARCHS]
    told = [
        f"{row['arch']} {row['ms a step']:.1f} ms a step, x {row['times_loop']:.1f} ({row['variant']})" for row in best
    ]
    yield {"why": "; ".join(told) + (f"; left out: {', '.join(left_out)}" if left_out else "")}


def timed() -> Iterator[tuple[str, str, int, str, int]]:
    """Network, mask, T, options and images of an epoch, of all that is timed."""
    few = 20 * 128
    best = options_of("", FUSED)
    for options, arch in product(best, speed.ARCHS):
        yield arch, "dense", 5, options, few
    for options, arch in product(best, speed.ARCHS):
        yield arch, "dense", 5, options, EPOCH
    for options, arch in product(options_of(STEPWISE, f"{STEPWISE} --no-channels_last"), speed.ARCHS):
        yield arch, "dense", 5, options, few
    for arch in speed.ARCHS:
        yield arch, "dense", 5, "fp32", few
        yield arch, "dense", 3, best[0], few
        yield arch, "sparse", 5, best[0], few


def options_of(*flags: str) -> list[str]:
    """The precision that is usual on this card with each of the flags that the card can do."""
    precision = "bf16" if has_bf16_units("cuda") else "fp32"
    return [f"{precision} {each}".strip() for each in flags if precision == "bf16" or FUSED not in each]


def kernels() -> Findings:
    """The kernels that take most of a step."""
    rows = []
    for arch, options in product(speed.ARCHS, options_of(STEPWISE, f"{STEPWISE} {FUSED}")):
        data = Data(speed.random_split(6 * 128, "cuda"), speed.random_split(100, "cuda"), 10)
        flags = f"--arch {arch} --precision {options} --end_iter 9 --device cuda"
        trainer, optimizer = speed.trainer_of(flags, data)
        trainer.epoch(optimizer, dense_mask(trainer.model), 0, 5)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            trainer.epoch(optimizer, dense_mask(trainer.model), 1, 5)
        found = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in found)
        if not total:
            raise Skipped("the profiler sees no kernels: it may need the right to read the GPU's counters")
        rows += [
            {
                "network": arch,
                "flags": options,
                "kernel": event.key[:100],
                "launches a step": event.count / trainer.steps,
                "us a step": event.self_device_time_total / trainer.steps,
                "share": event.self_device_time_total / total,
            }
            for event in found[:15]
        ]
        yield {"rows": rows}
    yield {"why": f"{rows[0]['kernel']} takes {100 * rows[0]['share']:.0f} % of a step of {rows[0]['network']}"}
