"""The yardstick of the benchmark does the same work as the engine, and what it reports is arithmetic."""

import copy

import numpy as np
import pytest
import torch
from conftest import ROOT, lively
from torch.nn import functional as F

from benchmarks import authors_style, speed
from benchmarks.loop import loop_of
from models import build_model
from utils.masks import dense_mask, distance, magnitude_mask, prunable, prune_by_magnitude, rewind
from utils.training import MaskedUpdate, forward, make_optimizer


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("arch", speed.ARCHS)
def test_steps_of_the_engine_are_those_of_the_authors_style(arch, sparsity):
    torch.manual_seed(0)
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.randint(10, (6,))
    model = lively(build_model(arch, 3, 10, width=0.125).double(), images).train()
    mask = magnitude_mask(model, sparsity)
    for weight in prunable(model).values():  # smaller ones count as pruned in the authors' style
        weight.data = torch.where(weight.abs() < 1e-4, 1e-4, weight.data)
    rewind(model, copy.deepcopy(model.state_dict()), mask)
    loop = loop_of(model, arch, 3, 10, 0.125)
    optimizer = torch.optim.SGD(loop.parameters(), 0.01, 0.9, weight_decay=5e-4)
    update = MaskedUpdate(make_optimizer(model, speed.SETTINGS), model, mask)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        logits = forward(model, images, 3, "fp32", 6)
        update(F.cross_entropy(logits.flatten(0, 1), labels.repeat(3)))  # loss_over_time would round to fp32
        authors_style.train_step(loop, optimizer, images, labels, 3)
    for (name, a), b in zip(model.state_dict().items(), loop.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)
    moved = [name for name in prunable(model) if not torch.equal(before[name], model.state_dict()[name])]
    assert moved == [name for name in mask if mask[name].any()]


def test_masks_of_the_engine_are_those_of_the_authors_style():
    torch.manual_seed(0)
    model = build_model("vgg16", 3, 10, width=0.125)
    mask = dense_mask(model)
    masks = {name: m.float().numpy() for name, m in mask.items()}
    weights = {name: weight.detach().numpy() for name, weight in prunable(model).items()}
    for _ in range(3):
        before, theirs = mask, masks
        mask, masks = prune_by_magnitude(model, mask, 0.25), authors_style.prune(weights, masks, 0.25)
        # a quarter that is no whole number is cut off there
        assert sum((mask[name].numpy() != (masks[name] > 0)).sum() for name in mask) <= 1
        assert distance(before, mask) == pytest.approx(authors_style.mask_distance(theirs, masks), abs=1e-5)


def test_batches_of_the_authors_style():
    images = np.full((5, 32, 32, 3), 255, np.uint8)
    batches = list(authors_style.loader(images, 2))
    assert [batch.shape for batch in batches] == [(2, 3, 32, 32), (2, 3, 32, 32), (1, 3, 32, 32)]
    assert all((batch == 0).any() and (batch > 2).any() for batch in batches)


def test_calls_take_turns_and_the_first_is_not_counted():
    order = []
    seconds = speed.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 3, "cpu")
    assert "".join(order) == "abababab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_floating_point_operations_are_those_of_the_convolutions():
    with torch.device("meta"):
        model, images, labels = build_model("vgg16", 3, 10), torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    dense_macs, stem = 313_201_664, 64 * 27 * 32 * 32
    flops = speed.flops_of(model, images, labels, 5)
    # the stem runs once, and its input needs no gradient; all else runs 5 times, thrice
    assert flops == {
        "evaluate": 2 * (5 * (dense_macs - stem) + stem),
        "train_step": 2 * (15 * (dense_macs - stem) + 2 * stem),
    }


def test_a_report_of_a_small_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "WIDTH", 0.125)
    monkeypatch.setattr(speed, "matrix_peak", lambda device, precision: 1e9)
    monkeypatch.setattr(speed, "other_rows", lambda device, repeats: _other_rows())
    plan = [("vgg16", t, 1, mask, [speed.Option("fp32")], 1) for t in (3, 5) for mask in ("dense", "sparse")]
    monkeypatch.setattr(speed, "plan", lambda device, quick: plan)
    speed.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    (report,) = speed.newest(tmp_path)
    assert report.keys() == {"machine", "versions", "rows"}
    assert all(list(row) == speed.ROW for row in report["rows"])
    rows = [row for row in report["rows"] if row["what"] == "train_step"]
    assert [(row["timesteps"], row["mask"], row["variant"]) for row in rows] == [
        (t, mask, variant) for t in (3, 5) for mask in ("dense", "sparse") for variant in ("loop", "engine")
    ]
    for loop, engine in zip(rows[::2], rows[1::2], strict=True):
        assert loop["ratio"] == 1
        assert engine["ratio"] == pytest.approx(loop["seconds_per_image"] / engine["seconds_per_image"])
        # weights, gradients and momentum, and what a step needs beside them
        parameters = sum(p.numel() for p in build_model("vgg16", 3, 10, width=0.125).parameters())
        assert engine["peak_memory_mib"] > 3 * 4 * parameters / 2**20
    (text,) = tmp_path.glob("*.md")
    assert speed.summary(report) in text.read_text()


def _other_rows():
    row = dict.fromkeys(speed.ROW) | {"n": 1, "seconds_per_image": 1.0, "ratio": 1.0}
    return [
        row | {"what": w, "variant": v} for w in ("mask_update", "mask_distance", "data") for v in ("loop", "engine")
    ]


def test_a_row_of_whole_epochs(monkeypatch):
    monkeypatch.setattr(speed, "WIDTH", 0.0625)
    monkeypatch.setattr(speed, "EPOCH", 40)
    monkeypatch.setattr(speed, "matrix_peak", lambda device, precision: 1e9)
    loop = dict.fromkeys(speed.ROW) | {"arch": "vgg16", "timesteps": 3, "batch_size": 16, "seconds_per_image": 1.0}
    row = speed.epoch_row("vgg16", "cpu", speed.Option("bf16", channels_last=True), loop)
    assert list(row) == speed.ROW
    assert (row["variant"], row["precision"], row["compile"], row["n"]) == (
        "engine, channels last, epochs",
        "bf16",
        False,
        2,
    )
    assert 0 < row["seconds_per_image"] < 1
    assert row["ratio"] == pytest.approx(1 / row["seconds_per_image"])
    assert row["peak_share"] > 0


def test_a_gpus_rows_end_in_time_and_with_memory_the_most_wanted_first(monkeypatch):
    clock, measured = [0.0], []

    def rows_of(device, arch, timesteps, batch_size, tests, mask, options, repeats):
        clock[0] += 40
        measured.append((arch, timesteps, mask))
        if len(measured) == 2:
            assert any(option.cuda_graph for option in options)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [{"what": "train_step"}]

    monkeypatch.setattr(speed, "network_rows", rows_of)
    monkeypatch.setattr(speed, "epoch_row", lambda *_: {"what": "epoch"})
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    found = list(speed.all_network_rows("cuda", quick=False, only="", started=0.0))
    assert len(measured) == speed.MINUTES * 60 / 40
    # the second had no memory for its graphs, the rest no time
    assert measured[:4] == [("vgg16", 5, "dense"), *[("vgg16", 5, "sparse")] * 2, ("resnet19", 5, "dense")]
    assert [len(rows) for rows, _ in found] == [1, *[1] * 2, 1, 1, *[1] * 2, *[1] * 5, *[0] * 12]
    assert len(found) == len(speed.plan("cuda", quick=False)) + 2 * 2


def test_names_of_variants():
    row = {"variant": speed.Option("bf16", cuda_graph=True).variant, "precision": "bf16", "compile": True}
    assert speed._variant(row) == "bf16, compiled, CUDA graph"
    assert speed._variant(row | {"variant": "engine", "compile": False}) == "bf16"
    assert speed._variant(row | {"variant": "loop"}) == "authors' style"


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--device abacus", "choose from cpu, cuda"), ("--device cpu --only T=9", "vgg16 T=5 B=128 dense mask")],
)
def test_bad_flag_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        speed.main(flags.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_only_what_was_asked_for_is_measured(monkeypatch):
    monkeypatch.setattr(speed, "network_rows", lambda *part: [part[1:4]])
    found = list(speed.all_network_rows("cpu", quick=False, only="vgg16 T=5", started=0.0))
    assert [rows for rows, _ in found] == [[("vgg16", 5, 16)], [("vgg16", 5, 16)], [("vgg16", 5, 128)]]


def test_the_readme_shows_the_newest_of_each_kind_of_machine():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    reports = speed.newest(ROOT / "benchmarks" / "results")
    assert reports
    for report in reports:
        assert speed.summary(report) in readme
