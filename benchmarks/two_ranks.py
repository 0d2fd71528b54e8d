"""What two CPU ranks of one thread cost against one process of two threads: training steps, in turn.

torchrun --standalone --nproc_per_node 2 benchmarks/two_ranks.py     # some minutes on 2 cores, into benchmarks/results/
"""

import os
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.speed import SETTINGS, machine  # noqa: E402
from models import build_model  # noqa: E402
from models.layers import synchronise_batch_norms  # noqa: E402
from utils import distributed  # noqa: E402
from utils.files import write_text  # noqa: E402
from utils.masks import dense_mask  # noqa: E402
from utils.runs import versions  # noqa: E402
from utils.training import MaskedUpdate, forward, loss_over_time, make_optimizer  # noqa: E402

REPEATS = 7
BATCH, TIMESTEPS, WIDTH = 32, 5, 0.25
ARCHS = ("vgg16", "resnet19")
TEXT = f"""# Two CPU ranks against one process

A step of {BATCH} images at T = {TIMESTEPS} and width {WIDTH}, fp32, batch norm per timestep: one process of two
threads against two ranks of one thread each (gloo), in turn; the first step of each is not counted. Median, least and
most; a ratio is of steps that follow one another.
(`torchrun --standalone --nproc_per_node 2 benchmarks/two_ranks.py`)

| network | variant | seconds a step | x one process | n |
|---|---|---|---|---|
{{rows}}

{{machine}} (the mean of the minute before: what else ran there); {{versions}}.
"""
VARIANTS = ("one process", "two ranks", "two ranks, local batch norm")


def make_step(arch: str, variant: str):
    """A training step as ``fit`` runs it."""
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    model = build_model(arch, 3, 10, width=WIDTH).train()
    update = MaskedUpdate(make_optimizer(model, SETTINGS), model, dense_mask(model))
    if variant == "one process":
        return lambda: update(loss_over_time(forward(model, images, TIMESTEPS, "fp32", BATCH), labels))
    if variant == "two ranks":
        synchronise_batch_norms(model)
    network, own = distributed.parallel(model), distributed.part_of(BATCH)
    images, labels = images[own], labels[own]

    def step():
        agreed = distributed.begin_maxima(lambda: [0, 0])
        loss = loss_over_time(forward(network, images, TIMESTEPS, "fp32", len(labels)), labels)
        update(distributed.weighted(loss, len(labels), BATCH))
        agreed()

    return step


def measure() -> list[str]:
    """Rows of the table."""
    steps = {key: make_step(*key) for key in product(ARCHS, VARIANTS)}
    seconds = {key: [] for key in steps}
    for repeat in range(REPEATS + 1):
        for key, step in steps.items():
            alone = key[1] == "one process"
            torch.set_num_threads(2 if alone else 1)
            distributed.barrier()
            started = time.perf_counter()
            if distributed.rank() == 0 or not alone:  # the other rank sleeps
                step()
            distributed.barrier()
            if repeat:  # the first is not counted
                seconds[key].append(time.perf_counter() - started)
    rows = []
    for (arch, variant), times in seconds.items():
        ratios = [own / one for own, one in zip(times, seconds[arch, VARIANTS[0]], strict=True)]
        cells = (f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in (times, ratios))
        rows.append(f"| {arch} | {variant} | {' | '.join(cells)} | {len(times)} |")
    return rows


def main() -> None:
    with distributed.group():
        before = os.getloadavg()[0]
        rows = measure()
        text = TEXT.format(
            rows="\n".join(rows),
            machine=f"{machine('cpu')['processor']}, {os.cpu_count()} cores, load {before:.1f}",
            versions=", ".join(f"{name} {value}" for name, value in versions().items()),
        )
        if distributed.rank() == 0:
            write_text(ROOT / "benchmarks" / "results" / "two-ranks-cpu.md", text)
            print(text)


if __name__ == "__main__":
    main()
