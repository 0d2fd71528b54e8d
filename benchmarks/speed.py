"""How fast the engine is: every piece of work against the authors' style, in one process, interleaved.

    python benchmarks/speed.py            # some 20 minutes on 2 cores, into benchmarks/results/
    python benchmarks/speed.py --quick    # under 3 minutes on 2 cores, into runs/speed/
    python benchmarks/speed.py --only "vgg16 T=5 B=128"

Variant ``loop`` is the authors' style (``authors_style.py``), ``engine`` is what ``fit`` and ``evaluate`` run. A figure
is the median of n repeats; in each repeat all variants run one after the other: a busy machine slows all of them. The
process is set up as for training (huge pages, cuDNN's benchmark), which makes the authors' style faster, too.

On a GPU it begins nothing after 6 minutes, needs no data, and times more variants: with channels last, with CUDA
graphs, and ``epochs``, whole ones of ``fit`` over 50,000 augmented images. What there was no time for is named at the
end.
"""

import argparse
import gc
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler counts memory here and has nothing to say

from benchmarks import authors_style  # noqa: E402
from benchmarks.loop import loop_of  # noqa: E402
from models import build_model  # noqa: E402
from utils.data import DATASETS, Data, Split  # noqa: E402
from utils.engine import WARM_UP, use_huge_pages  # noqa: E402
from utils.errors import InputError, one_line_errors  # noqa: E402
from utils.files import read_json, write_json, write_text  # noqa: E402
from utils.flags import get_args  # noqa: E402
from utils.masks import dense_mask, distance, magnitude_mask, prunable, prune_by_magnitude, sparsity_after  # noqa: E402
from utils.runs import Run, versions  # noqa: E402
from utils.training import (  # noqa: E402
    EVALUATION_BATCH,
    MaskedUpdate,
    TrainingStep,
    fit,
    forward,
    loss_over_time,
    make_optimizer,
    place,
)

ARCHS = ("vgg16", "resnet19")
PRECISIONS = ("fp32", "bf16")
EPOCH = 50_000  # images
MINUTES = 6  # on a GPU, no part of the plan is begun later
SPARSE = 11  # prunings of 25 %: 95.69 % of all parameters of VGG16, 95.78 % of its prunable weights
CLASSES, WIDTH = 10, 1.0
TIES = 10  # weights of the same size as the threshold: the authors' style keeps them all, the engine the last ones
SETTINGS = SimpleNamespace(
    optimizer="sgd", learning_rate=0.01, momentum=0.9, weight_decay=5e-4, batch_size=128, precision="fp32",
    channels_last=False, cuda_graph=False,
)  # fmt: skip
ROW = (
    "what arch timesteps batch_size mask variant precision compile n seconds_per_image ratio peak_share peak_memory_mib"
).split()


class Option(NamedTuple):
    """How the engine runs a step."""

    precision: str
    compile: bool = False
    channels_last: bool = False
    cuda_graph: bool = False

    @property
    def variant(self) -> str:
        return "engine" + ", channels last" * self.channels_last + ", CUDA graph" * self.cuda_graph


ON_A_CPU = tuple(Option(*option) for option in product(PRECISIONS, (False, True)))
# fp32 without the rest: bf16 is the default there, and a card of 11 GB has no room for more graphs
ON_A_GPU = (*ON_A_CPU[:2], *(Option("bf16", *option) for option in product((False, True), repeat=3)))
DEFAULT, BEST_GUESS = Option("bf16"), Option("bf16", True, True, True)


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="T = 5 and 3, small batches, one compiled variant")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only parts with this in their name: vgg16 T=5 B=128"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", metavar="DIR", help="folder for the two files (default: see above)")
    args = parser.parse_args(argv)
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device {args.device}: choose from cpu, cuda (a GPU must be there)")
    started = time.perf_counter()
    titles = [_title(*part) for part in plan(args.device, args.quick)]
    if not any(args.only in title for title in titles):
        raise InputError(f"--only {args.only}: choose from, or a part of: {', '.join(titles)}")
    in_part = args.quick or args.only
    folder = Path(args.out or (ROOT / "runs" / "speed" if in_part else ROOT / "benchmarks" / "results"))

    use_huge_pages()
    torch.backends.cudnn.benchmark = True
    report = {"machine": machine(args.device), "versions": versions(), "rows": []}
    path = folder / ("speed-" + re.sub("[^a-z0-9]+", "-", report["machine"]["name"].lower()).strip("-"))
    half = path.with_suffix(".partial.json")
    report["rows"] += other_rows(args.device, repeats=3 if args.quick else 7)
    left_out = []
    for rows, title in all_network_rows(args.device, args.quick, args.only, started):
        report["rows"] += rows
        left_out += [] if rows else [title]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(half, report)  # stopped half way, half is there
    half.replace(path.with_suffix(".json"))
    write_text(path.with_suffix(".md"), as_markdown(report))
    print(as_markdown(report))
    if left_out:
        print(f"no time or memory was left for: {'; '.join(left_out)}")
    print(f"written: {path}.json, .md")


def plan(device: str, quick: bool) -> list[tuple]:
    """What is measured, the most wanted first: (arch, timesteps, batch size, mask, options, repeats)."""
    if quick:
        few = [Option("fp32"), Option("bf16")]
        return [
            ("vgg16", 3, 8, "dense", few, 3),
            ("vgg16", 5, 8, "dense", [*few, Option("fp32", compile=True)], 3),
            ("resnet19", 5, 8, "dense", few, 3),
        ]
    masks = ("dense", "sparse")
    if device == "cuda":
        # every T has kernels of its own to compile
        few = [option for option in ON_A_GPU if not option.compile]
        options = {5: ON_A_GPU, 3: [*few, BEST_GUESS], 1: few, 2: few, 4: few}
        return [(arch, t, 128, mask, options[t], 7) for t, arch, mask in product(options, ARCHS, masks)]
    rows = [(arch, t, 16, mask, ON_A_CPU, 3) for arch, t, mask in product(ARCHS, range(1, 6), masks)]
    return rows + [(arch, 5, 128, "dense", ON_A_CPU, 3) for arch in ARCHS]  # the paper's batch


def all_network_rows(device: str, quick: bool, only: str, started: float) -> Iterator[tuple[list[dict], str]]:
    """Rows of each part of the plan that was asked for, none where there is no time or memory left, and its name."""
    shape = None
    tests = EVALUATION_BATCH[device] if device == "cuda" else 20 if quick else 32
    for part in plan(device, quick):
        arch, timesteps, batch_size, mask, options, repeats = part
        title, rows = _title(*part), []
        if only not in title:
            continue
        if shape != (arch, timesteps):  # the two masks share their kernels
            torch._dynamo.reset()
            shape = arch, timesteps
        if device == "cpu" or time.perf_counter() - started < 60 * MINUTES:
            print(title, file=sys.stderr, flush=True)
            for fewer in (options, [option for option in options if not option.cuda_graph]):
                gc.collect()  # of kernels, too: none may go while a CUDA graph is captured
                try:
                    rows = network_rows(device, arch, timesteps, batch_size, tests, mask, fewer, repeats)
                    break
                except torch.OutOfMemoryError as error:
                    print(f"{title}: {str(error).splitlines()[0]}", file=sys.stderr)
        yield rows, title
        if rows and device == "cuda" and (timesteps, mask) == (5, "dense"):
            for option in (DEFAULT, BEST_GUESS):
                yield [epoch_row(arch, device, option, rows[0])], title


def _title(arch, timesteps, batch_size, mask, *_) -> str:
    return f"{arch} T={timesteps} B={batch_size} {mask} mask"


def interleaved(calls: dict, repeats: int, device: str, uncounted: int = 1) -> dict:
    """Seconds of each call, ``repeats`` times after some that are not counted, all calls in turn."""
    seconds = {key: [] for key in calls}
    for repeat in range(uncounted + repeats):
        for key, call in calls.items():
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            if repeat >= uncounted:
                seconds[key].append(time.perf_counter() - started)
    return seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def network_rows(device, arch, timesteps, batch_size, tests, mask, options, repeats) -> list[dict]:
    """Rows of ``train_step`` and ``evaluate``."""
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(CLASSES, (batch_size,), device=device)
    test = torch.randn(tests, 3, 32, 32, device=device)
    dense = build_model(arch, 3, CLASSES, width=WIDTH).to(device)
    ticket = dense_mask(dense) if mask == "dense" else magnitude_mask(dense, sparsity_after(SPARSE, 0.25))
    with torch.no_grad():
        for name, weight in prunable(dense).items():
            weight.mul_(ticket[name])

    loop = loop_of(dense, arch, 3, CLASSES, WIDTH)
    optimizer = torch.optim.SGD(
        loop.parameters(), SETTINGS.learning_rate, SETTINGS.momentum, weight_decay=SETTINGS.weight_decay
    )
    key = ("loop", "fp32", False)
    steps = {key: partial(authors_style.train_step, loop, optimizer, images, labels, timesteps)}
    passes = {key: partial(_in_eval_mode, loop, partial(authors_style.evaluate, loop, test, timesteps))}
    for option in options:
        settings = SimpleNamespace(**vars(SETTINGS) | option._asdict() | {"device": device})
        model = place(build_model(arch, 3, CLASSES, width=WIDTH, compile=option.compile), settings)
        model.load_state_dict(dense.state_dict())
        update = MaskedUpdate(make_optimizer(model, settings), model, ticket)
        step = TrainingStep(model, update, timesteps, settings, batch_size)
        key = option.variant, option.precision, option.compile
        steps[key] = partial(step, images, labels, batch_size)
        if not option.cuda_graph:
            run = torch.inference_mode()(partial(forward, model, test, timesteps, option.precision, len(test)))
            passes[key] = partial(_in_eval_mode, model, run)

    peaks = {precision: matrix_peak(device, precision) for precision in PRECISIONS}
    work = flops_of(dense, images[:1], labels[:1], timesteps)
    weights = sum(p.numel() * p.element_size() for p in dense.parameters())
    uncounted = WARM_UP + 2 if any(option.cuda_graph for option in options) else 1  # the captures, and one more
    rows = []
    # a step's memory: the network, its gradients and momentum, and what comes and goes
    for what, calls, count, flops, resident in (
        ("train_step", steps, batch_size, work["train_step"], 3 * weights),
        ("evaluate", passes, len(test), work["evaluate"], weights),
    ):
        for (variant, precision, compiled), seconds in interleaved(calls, repeats, device, uncounted).items():
            each = statistics.median(seconds) / count
            memory = None  # a graph has its memory from the capture on; see the row of whole epochs
            if "CUDA graph" not in variant:
                memory = (resident + _transient_memory(calls[variant, precision, compiled], device)) / 2**20
            rows.append(
                {
                    "what": what,
                    "arch": arch,
                    "timesteps": timesteps,
                    "batch_size": count,
                    "mask": mask,
                    "variant": variant,
                    "precision": precision,
                    "compile": compiled,
                    "n": repeats,
                    "seconds_per_image": each,
                    "peak_share": flops / each / peaks[precision],
                    "peak_memory_mib": memory,
                }
            )
    return _with_ratios(rows)


def _in_eval_mode(model, call) -> None:
    model.eval()
    call()
    model.train()


def epoch_row(arch: str, device: str, option: Option, loop: dict, epochs: int = 3) -> dict:
    """Row of whole epochs as a script trains them, data, augmentation and update included: the median of all but the
    first; against the row of the authors' step, whose data wait ready on the device. Memory is all that torch's
    allocator takes, with what cuDNN tries out."""
    torch.manual_seed(0)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        flags = f"--dataset cifar10 --arch {arch} --width {WIDTH} --timestep {loop['timesteps']} --device {device} "
        flags += f"--batch_size {loop['batch_size']} --precision {option.precision} --output_dir {folder}"
        flags += "".join(f" --{name}" for name, value in option._asdict().items() if value is True)
        args = get_args("laterewindlth", None, flags.split())
        images = torch.randint(256, (EPOCH, 3, 32, 32), dtype=torch.uint8)
        split = Split(images, torch.arange(EPOCH) % CLASSES, DATASETS["cifar10"]).to(device)
        data, run = Data(split, split, split, CLASSES), Run(args)
        run.begin(data)
        model = place(build_model(arch, 3, CLASSES, width=WIDTH, compile=option.compile), args)
        fit(model, data, args, make_optimizer(model, args), dense_mask(model), range(epochs), args.timestep, run)
        each = statistics.median([row["seconds"] for row in run.rows[1:]]) / EPOCH
    with torch.device("meta"):
        image, label = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
        work = flops_of(build_model(arch, 3, CLASSES, width=WIDTH), image, label, args.timestep)["train_step"]
    row = loop | {"variant": f"{option.variant}, epochs", "precision": option.precision, "compile": option.compile}
    row |= {"n": epochs - 1, "seconds_per_image": each, "ratio": loop["seconds_per_image"] / each}
    memory = torch.cuda.max_memory_reserved() / 2**20 if device == "cuda" else None
    return row | {"peak_share": work / each / matrix_peak(device, option.precision), "peak_memory_mib": memory}


def flops_of(model, images, labels, timesteps) -> dict[str, int]:
    """Floating-point operations of one image in convolutions and linear layers, 2 a multiply-accumulate."""
    with FlopCounterMode(display=False) as ahead:
        logits = model(images, timesteps)
    with FlopCounterMode(display=False) as back:
        loss_over_time(logits, labels).backward()
    model.zero_grad()
    forward_flops = ahead.get_total_flops()
    return {"evaluate": forward_flops, "train_step": forward_flops + back.get_total_flops()}


def matrix_peak(device: str, precision: str) -> float:
    """The best rate of a large matrix product, FLOP/s; in fp32 on a GPU with TF32 where convolutions use it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
            for _ in range(2))  # fmt: skip
    return 2 * size**3 / min(interleaved({0: lambda: a @ b}, 5, device)[0])


def _transient_memory(call: Callable, device: str) -> int:
    """Most bytes that tensors take during a call beyond those before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def other_rows(device: str, repeats: int) -> list[dict]:
    """Rows of ``mask_update``, ``mask_distance`` (of VGG16, time per pruning) and ``data``."""
    torch.manual_seed(0)
    model = build_model("vgg16", 3, CLASSES, width=WIDTH).to(device)
    mask = dense_mask(model)
    weights = {name: weight.detach().cpu().numpy() for name, weight in prunable(model).items()}
    masks = {name: m.float().cpu().numpy() for name, m in mask.items()}
    pruned, theirs = prune_by_magnitude(model, mask, 0.25), authors_style.prune(weights, masks, 0.25)
    differing = sum(int((pruned[name].cpu().numpy() != (theirs[name] > 0)).sum()) for name in mask)
    if differing > TIES:
        raise RuntimeError(f"the two ways to prune differ in {differing} weights")
    count = 10_000
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    split = Split(pixels, torch.zeros(count, dtype=torch.long, device=device), DATASETS["cifar10"])
    loader = authors_style.loader(pixels[:1000].permute(0, 2, 3, 1).cpu().numpy(), 128)
    # an item: a pruning, a distance, an image
    work = {
        ("mask_update", "loop"): (partial(authors_style.prune, weights, masks, 0.25), 1),
        ("mask_update", "engine"): (partial(prune_by_magnitude, model, mask, 0.25), 1),
        ("mask_distance", "loop"): (partial(authors_style.mask_distance, masks, theirs), 1),
        ("mask_distance", "engine"): (partial(distance, mask, pruned), 1),
        ("data", "loop"): (lambda: [len(batch) for batch in loader], 1000),
        ("data", "engine"): (lambda: [len(x) for x, _ in split.augmented_batches(128, torch.Generator())], count),
    }
    rows = []
    for (what, variant), seconds in interleaved(
        {key: call for key, (call, _) in work.items()}, repeats, device
    ).items():
        batch = 128 if what == "data" else None
        row = dict.fromkeys(ROW) | {"what": what, "variant": variant, "n": repeats, "batch_size": batch}
        row["arch"] = None if what == "data" else "vgg16"
        rows.append(row | {"seconds_per_image": statistics.median(seconds) / work[what, variant][1]})
    return _with_ratios(rows)


def _with_ratios(rows: list[dict]) -> list[dict]:
    """Rows with their speed-up over the loop's row of the same work."""
    loops = {row["what"]: row["seconds_per_image"] for row in rows if row["variant"] == "loop"}
    rows = [row | {"ratio": loops[row["what"]] / row["seconds_per_image"]} for row in rows]
    return [{field: row[field] for field in ROW} for row in rows]


def machine(device: str) -> dict:
    """Where the figures come from."""
    processor = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    processor = processor if processor != "unknown processor" else platform.processor() or processor
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    peaks = {precision: matrix_peak(device, precision) / 1e9 for precision in PRECISIONS}
    return {
        "name": gpu or f"{processor} {torch.get_num_threads()} threads",
        "kind": "GPU" if gpu else "CPU",
        "processor": processor,
        "threads": torch.get_num_threads(),
        "matrix_peak_gflops": peaks,
        "date": time.strftime("%Y-%m-%d"),
    }


def as_markdown(report: dict) -> str:
    """The whole report, its summary first."""
    lines = [f"# Speed on {report['machine']['name']}", "", summary(report), "", "## All rows", ""]
    shown = ROW[:1] + ROW[1:9] + ["seconds per image", "x loop", "% of peak", "MiB"]
    lines += ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    for row in report["rows"]:
        cells = ["" if row[field] is None else str(row[field]) for field in ROW[:9]]
        share = "" if row["peak_share"] is None else f"{100 * row['peak_share']:.0f}"
        memory = "" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
        cells += [f"{row['seconds_per_image']:.3g}", f"{row['ratio']:.2f}", share, memory]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(report: dict) -> str:
    """What the README shows of a report: dense mask, T = 5; speed-ups over the authors' style."""
    rows = [row for row in report["rows"] if row["mask"] == "dense"]
    lines = [
        "| network, batch | variant | x authors' style | % of matrix peak | MiB | T = 3 / T = 5 | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for arch in dict.fromkeys(row["arch"] for row in rows):
        at = [row for row in rows if (row["what"], row["arch"], row["timesteps"]) == ("train_step", arch, 5)]
        lines += [_summary_line(row, rows) for row in at]
    epochs = [row for row in rows if row["variant"].endswith("epochs")]
    if epochs:
        lines += ["", f"An epoch of {EPOCH:,} augmented images, T = 5: " + "; ".join(
            f"{row['arch']} {_variant(row)} {EPOCH * row['seconds_per_image']:.2f} s" for row in epochs
        ) + "."]  # fmt: skip
    where = report["machine"]
    others = {row["what"]: row for row in report["rows"] if row["variant"] == "engine"}
    lines += [
        "",
        f"Mask update x {others['mask_update']['ratio']:.0f}, mask distance x {others['mask_distance']['ratio']:.0f}, "
        f"{1 / others['data']['seconds_per_image']:.0f} augmented 32x32 images/s (x {others['data']['ratio']:.1f}), "
        f"n = {others['data']['n']}.",
        f"{where['name']}, {where['date']}; matrix peak {where['matrix_peak_gflops']['fp32']:.0f} GFLOP/s in fp32, "
        f"{where['matrix_peak_gflops']['bf16']:.0f} in bf16; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
    ]
    return "\n".join(lines)


def _summary_line(row: dict, rows: list[dict]) -> str:
    same = [other for other in rows if all(other[f] == row[f] for f in ("arch", "variant", "precision", "compile"))]
    steps = {
        (other["timesteps"], other["batch_size"]): other["seconds_per_image"]
        for other in same
        if other["what"] == "train_step"
    }
    short = steps.get((3, row["batch_size"]))
    cells = [f"{row['arch']}, {row['batch_size']}", _variant(row), f"{row['ratio']:.2f}"]
    cells += [
        f"{100 * row['peak_share']:.0f}",
        "" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}",
    ]
    cells += [f"{short / row['seconds_per_image']:.2f}" if short else "", str(row["n"])]
    return "| " + " | ".join(cells) + " |"


def _variant(row: dict) -> str:
    """Name of a row's variant: ``bf16, compiled, CUDA graph``."""
    if row["variant"] == "loop":
        return "authors' style"
    return row["variant"].replace("engine", row["precision"] + ", compiled" * row["compile"], 1)


def newest(folder: Path) -> list[dict]:
    """The newest report of each kind of machine in a folder."""
    reports = [read_json(path, "measure again") for path in folder.glob("speed-*.json") if ".partial" not in path.name]
    kinds: dict[str, dict] = {}
    for report in sorted(reports, key=lambda report: report["machine"]["date"]):
        kinds[report["machine"]["kind"]] = report
    return list(kinds.values())


if __name__ == "__main__":
    main()
