"""How fast training is on a CPU: every piece of work against the authors' style, in one process, in turn.

    python benchmarks/speed.py            # some 20 minutes on 2 cores
    python benchmarks/speed.py --quick    # under 3 minutes on 2 cores
    python benchmarks/speed.py --only "vgg16 T=5 B=128"

Variant ``loop`` is the authors' style (``authors_style.py``), whose images wait ready on the device; ``engine`` is what
the scripts run: epochs of ``Trainer``, augmentation included. A figure is the median of n repeats, with the least and
the most; in each repeat all variants run one after the other, so a busy machine slows all of them.

``gpu.py`` times a GPU with the functions of this file.
"""

import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import authors_style  # noqa: E402
from benchmarks.loop import loop_of  # noqa: E402
from models import build_model  # noqa: E402
from models.layers import compile_blocks, fuse_blocks  # noqa: E402
from utils.data import Data, Split  # noqa: E402
from utils.datasets import DATASETS  # noqa: E402
from utils.experiment import PACKAGES  # noqa: E402
from utils.files import write_json, write_text  # noqa: E402
from utils.flags import Parser, get_args  # noqa: E402
from utils.machine import keep_memory, processor  # noqa: E402
from utils.masks import apply_mask, dense_mask, distance, prunable, sparsity_after  # noqa: E402
from utils.scores import magnitude_mask, prune_by_magnitude  # noqa: E402
from utils.training import EVALUATION_BATCH, Trainer, loss_over_time, make_optimizer, place  # noqa: E402

ARCHS = ("vgg16", "resnet19")
MASKS = ("dense", "sparse")
CLASSES = 10
SPARSE = sparsity_after(11, 0.25)  # 95.78 % of the prunable weights


class Part(NamedTuple):
    """Training steps that are timed together: a network, T, the images of a batch, the mask, the engine's options, the
    images that it trains on in a repeat, and the repeats."""

    arch: str
    timesteps: int
    batch: int
    mask: str
    options: tuple[str, ...]
    images: int
    repeats: int

    @property
    def title(self) -> str:
        return f"{self.arch} T={self.timesteps} B={self.batch} {self.mask} mask"


def plan(quick: bool) -> list[Part]:
    """What is measured, the most wanted first."""
    few = precisions("cpu")
    if quick:
        shapes = (("vgg16", 3, few), ("vgg16", 5, (*few, "fp32 --compile")), ("resnet19", 5, few))
        return [Part(arch, t, 8, "dense", options, 8, 3) for arch, t, options in shapes]
    options = tuple(f"{name}{more}" for name, more in product(few, ("", " --compile")))
    parts = [Part(arch, t, 16, mask, options, 16, 3) for arch, t, mask in product(ARCHS, range(1, 6), MASKS)]
    return parts + [Part(arch, 5, 128, "dense", options, 128, 3) for arch in ARCHS]  # the paper's batch


def precisions(device: str) -> tuple[str, ...]:
    """Those that are worth timing: a CPU without instructions for bf16 is many times slower with it."""
    slow = device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return ("fp32",) if slow else ("fp32", "bf16")


def main(argv=None):
    parser = Parser("speed.py", __doc__)
    flag = parser.section("what is measured")
    flag("--quick", bool, False, None, "T = 5 and 3, small batches, one compiled variant")
    flag("--only", str, "", "TEXT", "only parts with this in their name: vgg16 T=5 B=128", shown="all")
    flag("--out", str, str(ROOT / "runs" / "speed"), "DIR", "folder for the two files", shown="runs/speed")
    args = parser.parse(argv)
    parts = plan(args.quick)
    wanted = [part for part in parts if args.only in part.title]
    if not wanted:
        titles = ", ".join(part.title for part in parts)
        parser.error(f"argument --only: no part has {args.only!r}; choose from, or a piece of: {titles}")

    keep_memory()  # as the scripts do; it makes the authors' style faster, too
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    report = {"machine": machine("cpu"), "rows": other_rows("cpu", 3 if args.quick else 7)}
    path = folder / ("speed-" + re.sub("[^a-z0-9]+", "-", report["machine"]["name"].lower()).strip("-"))
    for part in wanted:
        print(part.title, file=sys.stderr, flush=True)
        torch._dynamo.reset()
        report["rows"] += part_rows("cpu", part)
        write_json(path.with_suffix(".json"), report)  # stopped half way, half is there
        write_text(path.with_suffix(".md"), as_markdown(report))
    print(as_markdown(report))
    print(f"written: {path}.json, .md")


def part_rows(device: str, part: Part, width: float = 1.0, evaluation: bool = True) -> list[dict]:
    """Rows ``train_step`` and, if wanted, ``evaluate`` of a part, per image."""
    torch.manual_seed(0)
    test_images = EVALUATION_BATCH["cuda"] if device == "cuda" else 2 * part.batch
    data = Data(random_split(part.images, device), random_split(test_images, device), CLASSES)
    dense = build_model(part.arch, 3, CLASSES, width=width).to(device)
    mask = dense_mask(dense) if part.mask == "dense" else magnitude_mask(dense, SPARSE)
    apply_mask(dense, mask)

    loop = loop_of(dense, part.arch, 3, CLASSES, width)
    optimizer = torch.optim.SGD(loop.parameters(), 0.01, 0.9, weight_decay=5e-4)
    images, labels = next(data.train.batches(part.batch))
    tests = torch.cat([inputs for inputs, _ in data.test.batches(part.batch)])
    steps = {"loop": (partial(authors_style.train_step, loop, optimizer, images, labels, part.timesteps), part.batch)}
    passes = {"loop": (partial(authors_style.evaluate, loop, tests, part.timesteps), len(data.test))}
    for options in part.options:
        flags = f"--arch {part.arch} --timestep {part.timesteps} --batch_size {part.batch} --device {device}"
        trainer, own = trainer_of(f"{flags} --width {width} --learning_rate 0.01 --precision {options}", data, dense)
        steps[f"engine {options}"] = partial(trainer.epoch, own, mask, 0, part.timesteps), part.images
        passes[f"engine {options}"] = partial(trainer.predict, data.test, part.timesteps), len(data.test)

    flops = flops_of(dense, images[:1], labels[:1], part.timesteps)
    shape = {"arch": part.arch, "timesteps": part.timesteps, "batch_size": part.batch, "mask": part.mask}
    rows = rows_of("train_step", steps, part.repeats, device, shape, flops["train_step"])
    if evaluation:
        loop.eval()
        rows += rows_of("evaluate", passes, part.repeats, device, shape, flops["evaluate"])
    return rows


def trainer_of(flags: str, data: Data, like: nn.Module | None = None) -> tuple[Trainer, torch.optim.Optimizer]:
    """What a script makes of its flags: a network with the weights of another, or new ones, its trainer and its
    optimizer."""
    args = get_args(__file__, "", None, flags.split())
    model = place(build_model(args.arch, data.channels, data.classes, width=args.width), args)
    if like is not None:
        model.load_state_dict(like.state_dict())
    if args.compile:
        compile_blocks(model)
    if args.fused:
        fuse_blocks(model)
    return Trainer(model, data, args), make_optimizer(model, args)


def other_rows(device: str, repeats: int) -> list[dict]:
    """Rows of a pruning and of a mask distance of VGG16, and of an augmented image of 32x32 pixels."""
    torch.manual_seed(0)
    model = build_model("vgg16", 3, CLASSES).to(device)
    mask = dense_mask(model)
    pruned = prune_by_magnitude(model, mask, 0.25)
    weights = {name: weight.detach().cpu().numpy() for name, weight in prunable(model).items()}
    masks, later = ({name: m.float().cpu().numpy() for name, m in each.items()} for each in (mask, pruned))
    split = random_split(10_000, device)
    loader = authors_style.loader(split.images[:1000].permute(0, 2, 3, 1).cpu().numpy(), 128)
    draws = torch.Generator(), torch.Generator()
    work = {
        "pruning": {
            "loop": (partial(authors_style.prune, weights, masks, 0.25), 1),
            "engine": (partial(prune_by_magnitude, model, mask, 0.25), 1),
        },
        "mask distance": {
            "loop": (partial(authors_style.mask_distance, masks, later), 1),
            "engine": (partial(distance, mask, pruned), 1),
        },
        "data": {
            "loop": (lambda: list(map(len, loader)), 1000),
            "engine": (lambda: [len(images) for images, _ in split.augmented_batches(128, *draws)], len(split)),
        },
    }
    return [row for what, calls in work.items() for row in rows_of(what, calls, repeats, device)]


def random_split(count: int, device: str) -> Split:
    """Random images [N,3,32,32] and labels on a device."""
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return Split(images, torch.arange(count) % CLASSES, DATASETS["cifar10"]).to(device)


def rows_of(
    what: str,
    calls: dict[str, tuple[Callable, int]],
    repeats: int,
    device: str,
    shape: dict | None = None,
    flops: int | None = None,
) -> list[dict]:
    """Time calls in turn: a row for each.

    Args:
        what: the work.
        calls: the ways to do it by name, ``loop`` the first, each with the items that it is divided by. A call that
            returns its ``seconds`` has timed itself.
        repeats: n, beside a first one that is not counted.
        device: waited for before and after.
        shape: further fields of the rows.
        flops: floating-point operations of an item.
    """
    seconds, memory = interleaved({name: call for name, (call, _) in calls.items()}, repeats, device)
    rows = []
    for name, (_, items) in calls.items():
        each = [value / items for value in seconds[name]]
        row = {"what": what, **(shape or {}), "variant": name, "n": repeats, "seconds": statistics.median(each)}
        row |= {"least": min(each), "most": max(each)}
        row["times_loop"] = (rows[0] if rows else row)["seconds"] / row["seconds"]
        if flops is not None:
            row["peak_share"] = flops / row["seconds"] / matrix_peak(device, "bf16" if "bf16" in name else "fp32")
        rows.append(row | {"memory_mib": memory[name]})
    return rows


def interleaved(calls: dict[str, Callable], repeats: int, device: str) -> tuple[dict, dict]:
    """Seconds of each call, all in turn, ``repeats`` times after a first one that is not counted; and the MiB of a GPU
    that the first one takes beyond what was held before (None on a CPU): gradients, momentum, activations, graphs."""
    gpu = torch.cuda if device == "cuda" else None
    seconds, memory = {name: [] for name in calls}, dict.fromkeys(calls)
    for repeat, (name, call) in product(range(1 + repeats), calls.items()):
        if gpu:
            gpu.reset_peak_memory_stats()
            held = gpu.memory_allocated()
            gpu.synchronize()
        started = time.perf_counter()
        result = call()
        if gpu:
            gpu.synchronize()
        taken = time.perf_counter() - started
        if repeat > 0:
            seconds[name].append(result.get("seconds", taken) if isinstance(result, dict) else taken)
        elif gpu:
            memory[name] = (gpu.max_memory_allocated() - held) / 2**20
    return seconds, memory


def flops_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, timesteps: int) -> dict[str, int]:
    """Floating-point operations of one image in convolutions and linear layers, 2 a multiply-accumulate."""
    with FlopCounterMode(display=False) as ahead:
        loss = loss_over_time(model.train()(images, timesteps), labels)
    with FlopCounterMode(display=False) as back:
        loss.backward()
    model.zero_grad()
    return {
        "evaluate": ahead.get_total_flops(),
        "train_step": ahead.get_total_flops() + back.get_total_flops(),
    }


@cache
def matrix_peak(device: str, precision: str) -> float:
    """The best rate of a large matrix product, FLOP/s; fp32 without TF32."""
    size = 2048 if device == "cpu" else 8192
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    seconds, _ = interleaved({"product": lambda: a @ b}, 5, device)
    return 2 * size**3 / min(seconds["product"])


def machine(device: str) -> dict:
    """Where the figures come from."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "name": gpu or f"{processor()} {torch.get_num_threads()} threads",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "peak_gflops": {precision: matrix_peak(device, precision) / 1e9 for precision in precisions(device)},
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in PACKAGES},
    }


def as_markdown(report: dict) -> str:
    """The machine, and a line for each row."""
    where = report["machine"]
    table = pd.DataFrame(report["rows"]).to_string(index=False, na_rep="", float_format="{:.3g}".format)
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    peaks = " and ".join(f"{peak:.0f} GFLOP/s in {precision}" for precision, peak in where["peak_gflops"].items())
    text = f"{where['date']}; {where['processor']}; a large matrix product reaches {peaks}; {versions}."
    units = (
        "Seconds are of a pruning, a mask distance or an image: the median, the least and the most of n. times_loop: "
        "how many times as fast as the loop. peak_share: the rate of convolutions and linear layers over that of the "
        "large product, which is measured once."
    )
    return f"# Speed on {where['name']}\n\n{text}\n{units}\n\n```\n{table}\n```\n"


if __name__ == "__main__":
    main()
