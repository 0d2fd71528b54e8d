"""The yardstick of the benchmark does the same work as the engine, and what it reports is arithmetic."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import lively
from torch.nn import functional as F

from benchmarks import authors_style, speed
from benchmarks.loop import loop_of
from models import build_model
from utils.masks import apply_mask, dense_mask, distance, prunable
from utils.scores import magnitude_mask, prune_by_magnitude
from utils.training import forward, make_optimizer

SETTINGS = SimpleNamespace(
    optimizer="sgd", learning_rate=0.01, momentum=0.9, weight_decay=5e-4, decay_kernels_only=False, cuda_graph=False
)


@pytest.mark.parametrize(("arch", "sparsity"), [*((arch, 0.5) for arch in speed.ARCHS), ("vgg16", 0.0)])
def test_steps_are_those_of_the_authors_style(arch, sparsity):
    torch.manual_seed(0)
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.randint(10, (6,))
    model = lively(build_model(arch, 3, 10, width=0.125).double(), images)
    mask = magnitude_mask(model, sparsity)
    for weight in prunable(model).values():  # smaller ones count as pruned in the authors' style
        weight.data = torch.where(weight.abs() < 1e-4, 1e-4, weight.data)
    apply_mask(model, mask)
    loop = loop_of(model, arch, 3, 10, 0.125)
    theirs = torch.optim.SGD(loop.parameters(), 0.01, 0.9, weight_decay=5e-4)
    ours, before = make_optimizer(model, SETTINGS), copy.deepcopy(model.state_dict())
    for _ in range(2):
        ours.zero_grad()
        logits = forward(model, images, 3, "fp32")
        F.cross_entropy(logits.flatten(0, 1), labels.repeat(3)).backward()  # loss_over_time would round to fp32
        ours.step()
        apply_mask(model, mask)
        authors_style.train_step(loop, theirs, images, labels, 3)
    for (name, a), b in zip(model.state_dict().items(), loop.state_dict().values(), strict=True):
        if "num_batches_tracked" not in name:  # nothing reads it
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)
    moved = [name for name in prunable(model) if not torch.equal(before[name], model.state_dict()[name])]
    assert moved == [name for name in mask if mask[name].any()]


def test_masks_are_those_of_the_authors_style():
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
    calls = {name: lambda name=name: order.append(name) for name in "ab"} | {"own": lambda: {"seconds": 7.0}}
    seconds, memory = speed.interleaved(calls, 3, "cpu")
    assert "".join(order) == "abababab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "own": 3}
    assert seconds["own"] == [7.0] * 3
    assert memory == {"a": None, "b": None, "own": None}


def test_rows_are_medians_of_an_item_against_the_first_call(monkeypatch):
    seconds = {"loop": [8.0, 2.0, 4.0], "engine bf16": [3.0, 2.0, 7.0]}
    monkeypatch.setattr(speed, "interleaved", lambda calls, repeats, device: (seconds, dict.fromkeys(calls)))
    monkeypatch.setattr(speed, "matrix_peak", lambda device, precision: {"fp32": 100, "bf16": 1000}[precision])
    calls = {"loop": (None, 2), "engine bf16": (None, 6)}
    loop, engine = speed.rows_of("work", calls, 3, "cpu", {"arch": "vgg16"}, flops=50)
    assert (loop["seconds"], loop["least"], loop["most"], loop["times_loop"]) == (2.0, 1.0, 4.0, 1.0)
    assert (engine["seconds"], engine["times_loop"]) == (0.5, 4.0)
    assert (loop["peak_share"], engine["peak_share"]) == (50 / 2 / 100, 50 / 0.5 / 1000)
    assert {row["what"] for row in (loop, engine)} == {"work"}
    assert {row["n"] for row in (loop, engine)} == {3}


def test_floating_point_operations_are_those_of_the_convolutions():
    with torch.device("meta"):
        model, images, labels = build_model("vgg16", 3, 10), torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    dense_macs, stem = 313_201_664, 64 * 27 * 32 * 32
    # the stem runs once, and its input needs no gradient; all else runs 5 times, thrice
    assert speed.flops_of(model, images, labels, 5) == {
        "evaluate": 2 * (5 * (dense_macs - stem) + stem),
        "train_step": 2 * (15 * (dense_macs - stem) + 2 * stem),
    }


def test_both_ways_start_from_the_same_network_and_run_in_their_modes(monkeypatch):
    modes, classes = [], {}

    def rows_of(what, calls, *_):
        for name, (call, items) in calls.items():
            result = call()
            model = call.args[0] if name == "loop" else call.func.__self__.model
            modes.append((what, name, items, model.training))
            if what == "evaluate":
                classes[name] = result if name == "loop" else result.mean(0).argmax(-1)
                emptied = sum(int((weight == 0).sum()) for weight in prunable(model).values())
                weights = sum(weight.numel() for weight in prunable(model).values())
                assert emptied / weights == pytest.approx(speed.SPARSE, abs=0.01)
        return []

    monkeypatch.setattr(speed, "rows_of", rows_of)
    part = speed.Part("vgg16", 2, 4, "sparse", ("fp32", "fp32 --no-channels_last"), 8, 1)
    assert speed.part_rows("cpu", part, width=0.125) == []
    names = ["loop", "engine fp32", "engine fp32 --no-channels_last"]
    assert modes[:3] == [("train_step", name, items, True) for name, items in zip(names, (4, 8, 8), strict=True)]
    assert [mode[:3] for mode in modes[3:]] == [("evaluate", name, 8) for name in names]
    assert not modes[3][-1], "the authors' style evaluates in eval mode"
    assert all(len(found) == 8 for found in classes.values())


def test_a_report_of_a_small_plan_is_written_after_every_part(tmp_path, monkeypatch, capsys):
    plan = [speed.Part("vgg16", t, 2, mask, ("fp32",), 2, 1) for t in (3, 5) for mask in ("dense", "sparse")]
    part_rows, written = speed.part_rows, []

    def rows(device, part):
        written.append([len(json.loads(path.read_text())["rows"]) for path in tmp_path.glob("*.json")])
        return part_rows(device, part, width=0.125)

    monkeypatch.setattr(speed, "matrix_peak", lambda device, precision: 1e9)
    monkeypatch.setattr(speed, "other_rows", lambda device, repeats: [])
    monkeypatch.setattr(speed, "plan", lambda quick: plan)
    monkeypatch.setattr(speed, "part_rows", rows)
    speed.main(["--quick", "--only", "dense", "--out", str(tmp_path)])
    assert written == [[], [4]]
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    found = [(row["timesteps"], row["mask"], row["what"], row["variant"]) for row in report["rows"]]
    work = [(what, variant) for what in ("train_step", "evaluate") for variant in ("loop", "engine fp32")]
    assert found == [(t, "dense", *each) for t in (3, 5) for each in work]
    text = next(tmp_path.glob("*.md")).read_text()
    assert text in capsys.readouterr().out
    assert text.count("engine fp32") == 4
    assert report["machine"]["name"] in text


@pytest.mark.parametrize(
    ("flags", "named"), [("--device cuda", "--device"), ("--only T=9", "vgg16 T=5 B=128 dense mask")]
)
def test_bad_flag_is_one_line(refused, flags, named):
    assert named in refused(speed.main, *flags.split())
