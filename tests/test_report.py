"""The report against numbers computed here, on run folders written by hand."""

import base64
import csv
import io
import json
import re
import statistics

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from report import main
from utils.files import sealed
from utils.records import identity, read_args, write_results, write_rows
from utils.report_figures import (
    accuracy_and_early_time,
    accuracy_by_early_time,
    chosen_timesteps,
    controls,
    divergence_over_epochs,
    divergences_at_t,
    early_time_and_threshold,
    early_time_by_threshold,
    transfer,
)
from utils.report_runs import read_runs, sections_of
from utils.report_tables import every_ticket, markdown, paper_table, remarks, shown_columns, table_1, tables_csv

FLAGS = {
    "dataset": "cifar10", "arch": "vgg16", "width": 1.0, "train_samples": None, "test_samples": None, "neuron": "lif",
    "timestep": 5, "batch_norm": "per_timestep", "optimizer": "sgd", "scheduler": "cosine", "batch_size": 128,
    "learning_rate": 0.3, "momentum": 0.9, "weight_decay": 5e-4, "end_iter": 300, "valid_freq": 50,
    "prune_percent": 25.0, "prune_iterations": 15, "pruning_scope": "global", "sparsity_round": 14,
    "rewinding_epoch": 20, "eb_window": 5, "eb_tolerance": 0.02, "eb_distance": "hamming", "early_time_epoch": 2,
    "early_time_threshold": 0.6, "early_time_samples": 1000, "evaluate_levels": [14], "seed": 1234, "device": "cpu",
    "precision": "fp32", "device_name": "CPU", "threads": 1, "data_checksum": "crc32:00000000",
}  # fmt: skip
ACCURACY = {1: 92.1, 2: 91.7, 3: 92.6}  # by round
SECONDS = {1: 3600.0, 2: 4000.0, 3: 3900.0}
PAPER = {8: ("92.54", "29.86"), 14: ("91.81", "51.99")}


def result(level, accuracy, seconds=100.0, timesteps=5, search=50, **more):
    row = {
        "level": level, "sparsity": 100 * (1 - 0.75**level), "sparsity_all_parameters": 99.9 * (1 - 0.75**level),
        "timesteps": 5, "search_timesteps": timesteps, "test_accuracy": accuracy, "best_test_accuracy": accuracy + 0.5,
        "search_seconds": seconds if level else 0, "search_epochs": search if level else 0,
        "search_timestep_epochs": search * timesteps if level else 0, "train_seconds": 60.0,
        "layers": {"features.1.weight": 10.0 * level ** 0.5, "classifier.weight": 90.0},
    }  # fmt: skip
    return row | more


def epochs(phase, level, count, **more):
    return [
        {
            "phase": phase, "level": level, "epoch": epoch, "timesteps": 5, "lr": 0.3, "loss": 2 / (epoch + 1),
            "train_accuracy": 50.0, "test_accuracy": 80.0 + epoch, "seconds": 10.0,
        } | more
        for epoch in range(count)
    ]  # fmt: skip


def write_run(root, name, method, round, results, rows=(), **flags):
    folder = root / name / f"{flags.get('dataset', 'cifar10')}-{flags.get('arch', 'vgg16')}-round{round}"
    folder.mkdir(parents=True)
    args = FLAGS | {"method": method, "round": round, "exp_name": name, "output_dir": str(root)} | flags
    args["effective_seed"] = hash((name, round)) % 2**32
    (folder / "args.json").write_text(json.dumps(sealed(args)))
    write_rows(folder / "metrics.jsonl", rows, identity(args))
    if results is not None:
        write_results(folder / "results.json", results, identity(args))
    return folder


def write_pair(root, **flags):
    """IMP and IMP + ET over three rounds, at two sparsities and dense."""
    for round, accuracy in ACCURACY.items():
        rows = epochs("dense", 0, 4) + epochs("search", 14, 4)
        results = [result(level, accuracy - level / 10, SECONDS[round] * level) for level in (0, 8, 14)]
        write_run(root, "laterewindlth", "laterewindlth", round, results, rows, **flags)
        rows = epochs("dense", 0, 4, divergences=[1.0, 0.35, 0.2]) + epochs("train", 14, 4)
        rows[1]["early_time"] = 3
        results = [result(level, accuracy - level / 8, SECONDS[round] * level / 1.5, 3) for level in (8, 14)]
        more = flags | {"evaluate_levels": [8, 14]}
        write_run(root, "earlyT_laterewindlth", "earlyT_laterewindlth", round, results, rows, **more)


def report(tmp_path):
    """Where the report was written, and the lines of its tables.csv by experiment and level."""
    out = tmp_path / "out"
    main([str(tmp_path / "runs"), "--out", str(out)])
    return out, rows_of((out / "tables.csv").read_text(encoding="utf-8"))


def rows_of(text):
    return {(row["experiment"], int(row["level"])): row for row in csv.DictReader(io.StringIO(text))}


def numbers(tmp_path):
    """What tables.csv would hold, without drawing."""
    runs, _ = read_runs(tmp_path / "runs")
    return rows_of(tables_csv(sections_of(runs), paper_table()))


def labels(tmp_path):
    runs, _ = read_runs(tmp_path / "runs")
    return {experiment.label: experiment for section in sections_of(runs) for experiment in section.experiments}


def test_numbers_are_means_and_sample_deviations(tmp_path):
    write_pair(tmp_path / "runs")
    out, rows = report(tmp_path)
    for level in (8, 14):
        values = np.array([accuracy - level / 10 for accuracy in ACCURACY.values()])
        row = rows["IMP", level]
        assert row["n"] == "3"
        assert row["rounds"] == "1 2 3"
        assert float(row["accuracy_mean"]) == pytest.approx(values.mean(), rel=1e-5)
        assert float(row["accuracy_std"]) == pytest.approx(values.std(ddof=1), rel=1e-4)
        seconds = np.array(list(SECONDS.values())) * level
        assert float(row["search_seconds_mean"]) == pytest.approx(seconds.mean(), rel=1e-5)
        assert float(row["search_seconds_std"]) == pytest.approx(seconds.std(ddof=1), rel=1e-4)
        assert float(row["search_timestep_epochs_mean"]) == 250
        shown = f"{values.mean():.2f} ± {values.std(ddof=1):.2f} (n=3)"
        assert shown in (out / "tables.md").read_text()
        assert shown in (out / "report.html").read_text()
    assert float(rows["IMP", 0]["sparsity"]) == 0


def test_change_and_speed_gain_of_early_time(tmp_path):
    write_pair(tmp_path / "runs")
    out, rows = report(tmp_path)
    for level in (8, 14):
        row = rows["IMP + ET", level]
        assert float(row["delta_accuracy"]) == pytest.approx(-level / 8 + level / 10, abs=1e-4)
        assert float(row["speed_gain"]) == pytest.approx(1.5, rel=1e-5)
        assert float(row["timestep_epochs_gain"]) == pytest.approx(5 / 3, rel=1e-5)
        assert rows["IMP", level]["delta_accuracy"] == ""
    text = (out / "tables.md").read_text()
    assert "×1.50 ± 0.00 (n=3)" in text  # noqa: RUF001
    assert "−0.35 ± 0.00 (n=3)" in text  # noqa: RUF001


def test_change_of_early_time_is_of_the_rounds_that_both_have(tmp_path):
    root = tmp_path / "runs"
    base = {1: (90.0, 100.0), 2: (91.0, 120.0), 3: (80.0, 900.0)}  # accuracy, seconds
    early = {1: (89.0, 80.0), 2: (91.5, 60.0), 4: (20.0, 1.0)}
    for name, method, values in (("a", "earlybird", base), ("b", "earlyT_earlybird", early)):
        for round, (accuracy, seconds) in values.items():
            write_run(root, name, method, round, [result(8, accuracy, seconds)], sparsity_round=8)
    row = numbers(tmp_path)["EB + ET", 8]
    deltas, speeds = np.array([-1.0, 0.5]), np.array([100 / 80, 120 / 60])
    assert float(row["delta_accuracy"]) == pytest.approx(deltas.mean())
    assert float(row["delta_accuracy_std"]) == pytest.approx(deltas.std(ddof=1), rel=1e-5)
    assert float(row["speed_gain"]) == pytest.approx(speeds.mean())
    assert float(row["speed_gain_std"]) == pytest.approx(speeds.std(ddof=1), rel=1e-5)
    (section,) = sections_of(read_runs(root)[0])
    text = markdown(table_1(section, paper_table()))
    assert "−0.25 ± 1.06 (n=2)" in text  # noqa: RUF001
    assert "×1.62 ± 0.53 (n=2)" in text  # noqa: RUF001


def test_change_of_early_time_without_common_rounds_is_of_the_means(tmp_path):
    for name, method, rounds in (("a", "earlybird", (1, 2)), ("b", "earlyT_earlybird", (3,))):
        for round in rounds:
            rows = [result(8, 90.0 + round, 100.0 * round)]
            write_run(tmp_path / "runs", name, method, round, rows, sparsity_round=8)
    row = numbers(tmp_path)["EB + ET", 8]
    assert (row["delta_accuracy"], row["delta_accuracy_std"]) == ("1.5", "")
    assert (row["speed_gain"], row["speed_gain_std"], row["base_n"]) == ("0.5", "", "2")
    (section,) = sections_of(read_runs(tmp_path / "runs")[0])
    assert "+1.50 (n=1, base n=2)" in markdown(table_1(section, paper_table()))


def test_early_time_is_compared_with_the_same_settings_only(tmp_path):
    write_run(tmp_path / "runs", "a", "earlybird", 1, [result(8, 90.0)], sparsity_round=8, weight_decay=0.1)
    write_run(tmp_path / "runs", "b", "earlyT_earlybird", 1, [result(8, 89.0, timesteps=3)], sparsity_round=8)
    rows = numbers(tmp_path)
    assert rows["EB + ET", 8]["delta_accuracy"] == ""
    write_run(tmp_path / "runs", "c", "earlybird", 1, [result(8, 91.0)], sparsity_round=8)
    rows = numbers(tmp_path)
    assert float(rows["EB + ET", 8]["delta_accuracy"]) == -2
    assert ("EB, weight decay 0.1", 8) in rows


def test_times_of_different_machines_make_no_ratio(tmp_path):
    write_run(tmp_path / "runs", "a", "earlybird", 1, [result(8, 90.0)], sparsity_round=8, device_name="NVIDIA A")
    write_run(tmp_path / "runs", "b", "earlyT_earlybird", 1, [result(8, 89.0, timesteps=3)], sparsity_round=8)
    rows = numbers(tmp_path)
    assert rows["EB + ET", 8]["speed_gain"] == ""
    assert float(rows["EB + ET", 8]["timestep_epochs_gain"]) == pytest.approx(5 / 3, rel=1e-5)


def test_the_paper_stands_beside_it_where_it_has_a_value(tmp_path):
    write_pair(tmp_path / "runs")
    write_run(tmp_path / "runs", "local", "laterewindlth", 1, [result(8, 80.0)], pruning_scope="local")
    out, rows = report(tmp_path)
    for level, (accuracy, hours) in PAPER.items():
        assert (rows["IMP", level]["paper_accuracy"], rows["IMP", level]["paper_hours"]) == (accuracy, hours)
        assert f"paper {accuracy}" in (out / "tables.md").read_text()
        assert f"paper {accuracy}" in (out / "report.html").read_text()
    assert rows["IMP + ET", 14]["paper_delta_accuracy"] == "-0.71"
    assert rows["IMP, local", 8]["paper_accuracy"] == ""
    assert rows["IMP", 0]["paper_accuracy"] == ""
    assert "Not the paper's size" not in (out / "tables.md").read_text()


def test_where_the_paper_contradicts_itself_it_is_said(tmp_path):
    for method in ("earlybird", "earlyT_earlybird"):
        more = {"arch": "resnet19", "sparsity_round": 14}
        write_run(tmp_path / "runs", method, method, 1, [result(14, 85.0)], **more)
    runs, _ = read_runs(tmp_path / "runs")
    (section,) = sections_of(runs)
    text = markdown(table_1(section, paper_table()))
    assert "paper −1.09" in text  # noqa: RUF001
    assert "Paper, EB + ET at 98.13 %: printed delta contradicts the accuracies (+0.23)" in text


def test_other_sizes_are_tables_of_their_own_and_say_so(tmp_path):
    write_pair(tmp_path / "runs", width=0.25, train_samples=5000, end_iter=8)
    write_run(tmp_path / "runs", "full", "laterewindlth", 1, [result(8, 92.0)])
    out, _ = report(tmp_path)
    text = (out / "tables.md").read_text()
    assert "## cifar10, vgg16, width 0.25, 5000 training images, 8 epochs" in text
    assert "## cifar10, vgg16, 300 epochs" in text
    assert "width 0.25 (paper: 1.0)" in text
    assert "training images 5000 (paper: all)" in text
    assert "epochs 8 (paper: 300)" in text
    assert "synthetic" not in text


def test_repetitions_differ_in_their_round_and_circumstances_alone(tmp_path):
    root = tmp_path / "runs"
    write_run(root, "a", "earlybird", 1, [result(8, 90.0)], sparsity_round=8)
    # elsewhere, on another machine, with a flag that EB does not look at, and another sparsity beside it
    more = {"device": "cuda", "device_name": "NVIDIA B", "threads": 8, "rewinding_epoch": 3, "evaluate_levels": [8]}
    write_run(root, "b", "earlybird", 2, [result(8, 91.0)], sparsity_round=8, **more)
    write_run(root, "c", "earlybird", 1, [result(4, 92.0)], sparsity_round=4)
    found = labels(tmp_path)
    assert list(found) == ["EB"]
    assert [(cell.level, cell.rounds) for cell in found["EB"].cells] == [(4, [1]), (8, [1, 2])]
    write_run(root, "d", "earlybird", 1, [result(8, 89.0)], sparsity_round=8, precision="bf16")
    assert set(labels(tmp_path)) == {"EB", "EB, bf16"}


def test_the_same_round_counts_once(tmp_path):
    write_run(tmp_path / "runs", "a", "earlybird", 1, [result(8, 90.0)], sparsity_round=8)
    write_run(tmp_path / "runs", "b", "earlybird", 1, [result(8, 80.0)], sparsity_round=8)
    out, rows = report(tmp_path)
    assert rows["EB", 8]["n"] == "1"
    assert rows["EB", 8]["accuracy_std"] == ""
    assert float(rows["EB", 8]["accuracy_mean"]) == 90
    assert "b/cifar10-vgg16-round1 repeats a round of EB" in (out / "report.html").read_text()


def test_labels_name_what_tells_experiments_apart(tmp_path):
    root = tmp_path / "runs"
    write_pair(root)
    write_run(root, "local", "laterewindlth", 1, [result(8, 90.0)], pruning_scope="local")
    write_run(root, "early", "laterewindlth", 1, [result(8, 90.0)], rewinding_epoch=0)
    write_run(root, "new", "laterewindlth", 1, [result(8, 90.0)], flag_of_tomorrow="yes")
    write_run(root, "ann", "laterewindlth", 1, [result(8, 90.0)], neuron="relu", timestep=1)
    write_run(root, "eb", "earlybird", 1, [result(8, 90.0)], sparsity_round=8)
    for kind in ("random", "snip"):
        write_run(root, kind, f"oneshot-{kind}", 1, [result(8, 70.0)], sparsity_round=8, ticket=kind, control="none")
    for pre in (3, 5):
        more = {"ticket": "magnitude", "search_timestep": pre, "sparsity_round": 8}
        write_run(root, f"magnitude-{pre}", "oneshot-magnitude", 1, [result(8, 88.0)], **more)
    place = "cifar10-vgg16-round1/tickets/level_08.safetensors"
    write_run(root, "s", "oneshot-transfer-shuffle", 1, [result(8, 80.0)], ticket=f"runs/eb/{place}", control="shuffle")
    write_run(root, "t", "oneshot-transfer", 1, [result(8, 80.0)], ticket=f"/x/runs/ann/{place}", control="none")
    assert list(labels(tmp_path)) == [
        "IMP", "IMP, ANN", "IMP, flag of tomorrow yes", "IMP, local", "IMP, rewind epoch 0", "IMP + ET", "EB",
        "magnitude", "magnitude, T_pre 3", "SNIP", "random", "EB shuffle", "IMP (ANN) transfer",
    ]  # fmt: skip


def test_unfinished_runs_are_listed_and_used_as_far_as_they_are(tmp_path):
    write_run(tmp_path / "runs", "a", "laterewindlth", 1, [result(0, 93.0), result(1, 92.0)], epochs("search", 0, 5))
    write_run(tmp_path / "runs", "b", "earlybird", 1, None, epochs("search", 0, 3), sparsity_round=8)
    (tmp_path / "runs" / "b" / "cifar10-vgg16-round1" / "metrics.jsonl").unlink()
    out, rows = report(tmp_path)
    assert float(rows["IMP", 1]["accuracy_mean"]) == 92
    page = (out / "report.html").read_text()
    assert "0 of 2 runs are finished" in page
    assert "<code>a/cifar10-vgg16-round1</code>: 5 epochs of 4220, 2 of 15 tickets" in page
    assert "<code>b/cifar10-vgg16-round1</code>: 0 epochs of at most 600, 0 of 1 tickets" in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.json", "{"),
        ("args.json", "[]"),
        ("args.json", json.dumps(sealed({"method": "earlybird"}))),
        ("args.json", json.dumps(sealed(FLAGS | {"method": "earlybird", "round": 1, "rewinding_epoch": "20"}))),
        ("args.json", json.dumps(sealed(FLAGS | {"method": "earlybird", "round": 1}) | {"round": 2})),
        ("args.json", b"\xff\xfe"),
        ("metrics.jsonl", [{"phase": "search"}]),
        ("metrics.jsonl", '{"phase": "sea'),
        ("metrics.jsonl", [epochs("search", 0, 1)[0] | {"divergences": ["x"]}]),
        ("results.json", "[{}]"),
        ("results.json", json.dumps([sealed(result(8, 90.0))])),
        ("results.json", '"text"'),
        ("results.json", [result(8, float("nan"))]),
        ("results.json", [result(8, 90.0, layers=[1])]),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content):
    write_run(tmp_path / "runs", "good", "earlybird", 1, [result(8, 90.0)], sparsity_round=8)
    folder = write_run(tmp_path / "runs", "bad", "earlybird", 2, [result(8, 10.0)], sparsity_round=8)
    if name == "args.json":  # what is sealed with it is not looked at
        (folder / "results.json").unlink()
    if isinstance(content, list):  # whole, but wrong
        write = write_rows if name == "metrics.jsonl" else write_results
        write(folder / name, content, identity(read_args(folder / "args.json", "")))
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found, damaged = read_runs(tmp_path / "runs")
    assert [run.folder for run in found] == ["good/cifar10-vgg16-round1"]
    assert list(damaged) == ["bad/cifar10-vgg16-round2"]
    (line,) = damaged.values()
    assert f"{folder / name} is damaged" in line
    assert "\n" not in line


def test_a_damaged_run_is_named_and_the_rest_reported(tmp_path, capsys):
    write_run(tmp_path / "runs", "good", "earlybird", 1, [result(8, 90.0)], sparsity_round=8)
    folder = write_run(tmp_path / "runs", "bad", "earlybird", 2, [result(8, 10.0)], sparsity_round=8)
    (folder / "results.json").write_text("[{}]")
    out, rows = report(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(folder / "results.json") in lines[0]
    assert float(rows["EB", 8]["accuracy_mean"]) == 90
    assert "bad/cifar10-vgg16-round2" in (out / "report.html").read_text()
    assert "bad/cifar10-vgg16-round2" in (out / "tables.md").read_text().replace("\\", "")


@pytest.mark.parametrize("kind", ["missing", "empty", "damaged"])
def test_nothing_to_report_is_one_line(tmp_path, capsys, kind):
    runs = tmp_path / "runs"
    if kind != "missing":
        runs.mkdir()
    if kind == "damaged":
        (runs / "args.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        main([str(runs), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last
    assert str(runs) in last
    assert not (tmp_path / "out").exists()


def write_everything(root):
    """Runs that hold data for every figure."""
    write_pair(root)
    rates = {"spikes_per_image": 1.5e5, "firing_rates": {"a": 0.2, "b": 0.1}, "energy_uj_per_image": 12.5}
    for level in (4, 8):
        for name, method in (("eb", "earlybird"), ("ebet", "earlyT_earlybird")):
            row = result(level, 90.0, search=20 - level, settled=True, **rates)
            write_run(root, f"{name}-{level}", method, 1, [row], epochs("train", level, 3), sparsity_round=level)
        for kind in ("random", "snip"):
            for neuron, timestep in (("lif", 5), ("relu", 1)):
                more = {"sparsity_round": level, "ticket": kind, "neuron": neuron, "timestep": timestep}
                row = result(level, 85.0 - level, search=0, spikes_per_image=None, firing_rates=None)
                write_run(root, f"{kind}-{neuron}-{level}", f"oneshot-{kind}", 1, [row], **more)
    for pre in (2, 3, 5):
        more = {"ticket": "magnitude", "search_timestep": pre, "sparsity_round": 8}
        write_run(root, f"magnitude-{pre}", "oneshot-magnitude", 1, [result(8, 85.0 + pre, timesteps=pre)], **more)
    imp = [result(level, 92.0 - level) for level in range(15)]
    write_run(root, "local", "laterewindlth", 1, imp, pruning_scope="local")
    write_run(root, "rewind", "laterewindlth", 1, imp, rewinding_epoch=0)
    place = "cifar10-vgg16-round1/tickets/level_08.safetensors"
    write_run(root, "t", "oneshot-transfer", 1, [result(8, 80.0)], ticket=f"runs/local/{place}", control="none")
    more = {"ticket": f"runs/eb-8/{place}", "control": "shuffle"}
    write_run(root, "s", "oneshot-transfer-shuffle", 1, [result(8, 70.0)], **more)


FIGURES = {
    "accuracy-sparsity", "search-sparsity", "accuracy-rewind", "global-local", "layer-sparsity", "settling",
    "divergence", "accuracy-early-time", "accuracy-t-pre", "transfer", "controls", "snip-random", "spikes-sparsity",
    "firing-rates", "learning-curves",
}  # fmt: skip


def test_every_figure_is_drawn_where_there_is_data(tmp_path):
    write_everything(tmp_path / "runs")
    out, _ = report(tmp_path)
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert names == {f"cifar10-vgg16-end_iter300-{name}" for name in FIGURES} | {"early-time-threshold"}
    assert names == {path.stem for path in (out / "figures").glob("*.svg")}
    for path in (out / "figures").glob("*.png"):
        image = Image.open(path)
        assert image.width == pytest.approx(3.3 * 300, abs=3)
        grey = np.asarray(image.convert("L"))
        assert (grey > 250).mean() > 0.5, path  # paper
        assert (grey < 120).mean() > 0.005, path  # lines and text, in grey print too
        frame = np.concatenate([grey[:2].ravel(), grey[-2:].ravel(), grey[:, -2:].ravel(), grey[:, :2].ravel()])
        assert frame.min() > 200, path  # nothing runs out of the picture
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == len(names)
    for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page):
        assert b"<svg" in base64.b64decode(data)


def test_only_figures_with_data(tmp_path):
    write_run(tmp_path / "runs", "eb", "earlybird", 1, [result(8, 90.0, layers={})], sparsity_round=8)
    out, _ = report(tmp_path)
    names = {path.stem.removeprefix("cifar10-vgg16-end_iter300-") for path in (out / "figures").glob("*.png")}
    assert names == {"accuracy-sparsity", "search-sparsity", "settling"}


def test_the_page_stands_alone(tmp_path):
    write_everything(tmp_path / "runs")
    out, _ = report(tmp_path)
    page = (out / "report.html").read_text()
    for kind, target in re.findall(r"\b(src|href|action|srcset)=\"([^\"]*)", page):
        assert target.startswith("data:" if kind == "src" else "#"), target
    assert not re.search(r"@import|url\(|<script|<link|<iframe|https?://", page)
    ids = set(re.findall(r' id="([^"]+)"', page))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= ids
    assert all(re.search(r' alt="[^"]{20,}"', image) for image in re.findall(r"<img[^>]*>", page))
    assert "prefers-color-scheme: dark" in page
    for path in (tmp_path / "runs").rglob("args.json"):
        assert f"<code>{path.parent.relative_to(tmp_path / 'runs').as_posix()}</code>" in page
    table = page[page.index("<h3>Table 1</h3>") : page.index("</table>", page.index("<h3>Table 1</h3>"))]
    cells = [cell for cell in re.findall(r"<td>([^<]+)", table) if cell != "see its source"]
    assert len(cells) > 20
    assert all(re.search(r"\(n=\d+(, base n=\d+)?\)$", cell) for cell in cells)  # no number without its n


def test_what_a_ticket_costs_to_run(tmp_path):
    for round, spikes in ((1, 150000.0), (2, 170000.0)):
        row = result(8, 90.0, spikes_per_image=spikes, ticket_bytes=1234, dense_macs_per_image=313201664)
        write_run(tmp_path / "runs", "eb", "earlybird", round, [row], sparsity_round=8)
    out, rows = report(tmp_path)
    assert float(rows["EB", 8]["spikes_per_image_mean"]) == 160000
    page = (out / "report.html").read_text()
    assert "What a ticket costs to run" in page
    deviation = statistics.stdev([150, 170])
    assert f"160 ± {deviation:.1f} k (n=2)" in page
    assert "1234 (n=2)" in page
    assert "energy per image" not in page


def test_text_from_disk_is_escaped(tmp_path):
    evil = '<script>alert("1")</script> & $x_{'
    write_run(tmp_path / "runs", "a", "earlybird", 1, [result(8, 90.0)], sparsity_round=8, note=evil)
    write_run(tmp_path / "runs", "<b>&", "earlybird", 1, [result(8, 91.0)], sparsity_round=8)
    folder = write_run(tmp_path / "runs", "<i>", "earlybird", 1, None, sparsity_round=8)
    (folder / "args.json").write_text("{")
    out, _ = report(tmp_path)
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;/cifar10-vgg16-round1" in page
    assert "&lt;i&gt;/cifar10-vgg16-round1" in page
    assert "<i>" not in page
    assert "<script" not in (out / "tables.md").read_text().replace("\\<", "")


def test_running_twice_gives_the_same_bytes(tmp_path):
    write_pair(tmp_path / "runs")
    contents = []
    for _ in range(2):
        out, _ = report(tmp_path)
        contents.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]
    assert len(contents[0]) > 10


def test_two_levels_of_one_sparsity_are_not_mixed(tmp_path):
    root = tmp_path / "runs"
    write_run(root, "a", "earlybird", 1, [result(8, 90.0)], sparsity_round=8)
    write_run(root, "b", "earlybird", 2, [result(8, 70.0) | {"sparsity": 99.0}], sparsity_round=8, prune_percent=44.0)
    (cells,) = [experiment.cells for experiment in labels(tmp_path).values()]
    assert [(cell.column, cell.rounds) for cell in cells] == [(89.99, [1]), (99.0, [2])]


def test_timesteps_that_a_threshold_chooses():
    divergences = [1.0, 0.4, 0.2]
    assert [chosen_timesteps(divergences, threshold) for threshold in (0, 0.2, 0.3, 0.6, 1.0, 1.1)] == [
        5,
        5,
        4,
        3,
        3,
        2,
    ]


def test_a_round_decides_once_on_each_threshold(tmp_path):
    root = tmp_path / "runs"

    def write(name, round, divergences, **flags):
        rows = epochs("search", 0, 2, divergences=[1.0, 0.9, 0.9])
        rows[1] |= {"early_time": 3, "divergences": divergences}
        write_run(root, name, "earlyT_earlybird", round, [result(8, 90.0)], rows, sparsity_round=8, **flags)

    write("a-js", 1, [1.0, 0.1, 0.1], divergence="js")
    write("b-decay", 1, [1.0, 0.9, 0.1], weight_decay=0.1)
    write("c", 1, [1.0, 0.5, 0.1])
    write("c", 2, [1.0, 0.8, 0.1])
    write("d-js", 3, [1.0, 0.1, 0.1], divergence="js")
    (section,) = sections_of(read_runs(root)[0])
    points = dict(early_time_by_threshold(section))
    assert {value.n for value in points.values()} == {2}
    assert points[0.6].mean == statistics.mean([3, 4])  # of [1, 0.5, 0.1] and [1, 0.8, 0.1]
    assert points[0.3].mean == 4
    assert "n = 2;" in early_time_and_threshold([section]).caption


def test_a_round_counts_once_at_each_number_of_timesteps(tmp_path):
    root = tmp_path / "runs"
    for round, accuracy in ACCURACY.items():
        write_run(root, "eb", "earlybird", round, [result(8, accuracy)], sparsity_round=8)
        # two thresholds choose 3 timesteps, and one keeps all 5
        for threshold, timesteps, less in ((0.5, 3, 9), (0.6, 3, 1), (0, 5, 7), (1.01, 2, 5)):
            rows = [result(8, accuracy - less, timesteps=timesteps)]
            more = {"sparsity_round": 8, "early_time_threshold": threshold}
            write_run(root, f"ebet-{threshold}", "earlyT_earlybird", round, rows, **more)
    (section,) = sections_of(read_runs(root)[0])
    group = [experiment for experiment in section.experiments if experiment.method == "earlyT_earlybird"]
    found = {}
    for timesteps, cell in accuracy_by_early_time(section, group):
        found.setdefault(timesteps, []).append(cell.rows[0]["test_accuracy"])
    values = list(ACCURACY.values())
    assert found == {5: values, 3: [value - 1 for value in values], 2: [value - 5 for value in values]}
    assert "n = 3;" in accuracy_and_early_time(section).caption


def test_divergences_are_of_a_network_trained_at_t(tmp_path):
    root = tmp_path / "runs"
    for round in (1, 2):
        rows = epochs("search", 0, 6, divergences=[1.0, {1: 0.3, 2: 0.4}[round]])
        for row in rows[2:]:
            row["timesteps"] = 3  # chosen in the second epoch
        write_run(root, "et", "earlyT_laterewindlth", round, [result(8, 90.0)], rows)
    rows = epochs("search", 0, 6, divergences=[1.0, 0.9])
    write_run(root, "js", "earlyT_laterewindlth", 3, [result(8, 90.0)], rows, divergence="js")
    (section,) = sections_of(read_runs(root)[0])
    experiment, values = divergences_at_t(section)
    assert experiment.label == "IMP + ET"
    assert values == {(t, e): {1: v, 2: w} for t, v, w in ((2, 1.0, 1.0), (3, 0.3, 0.4)) for e in (0, 1)}
    assert "After the deciding epoch the network was trained at T_early" in divergence_over_epochs(section).caption
    rows = epochs("search", 0, 2, divergences=[1.0, 0.7])
    write_run(root, "et-0", "earlyT_laterewindlth", 1, [result(8, 90.0)], rows, early_time_threshold=0)
    (section,) = sections_of(read_runs(root)[0])
    experiment, values = divergences_at_t(section)
    assert experiment.label == "IMP + ET, λ 0"
    assert values[3, 1] == {1: 0.7}
    assert "T_early" not in divergence_over_epochs(section).caption


def test_accuracies_of_silent_networks_are_marked(tmp_path):
    root = tmp_path / "runs"
    for round, rates in ((1, {"a": 0.1, "b": 0.0}), (2, {"a": 0.1, "b": 0.2})):
        write_run(root, "eb", "earlybird", round, [result(8, 10.0, firing_rates=rates)], sparsity_round=8)
    rows = [result(8, 85.0, firing_rates={"a": 1e-9, "b": 0.2})]
    write_run(root, "ebet", "earlyT_earlybird", 1, rows, sparsity_round=8)
    (section,) = sections_of(read_runs(root)[0])
    for table in (table_1(section, paper_table()), every_ticket(section)):
        text = " ".join(line for row in table.rows for cell in row for line in cell)
        assert "10.00 ± 0.00†" in text
        assert text.count("†") == 1
        (note,) = [note for note in table.notes if "†" in note]
        assert "(here: b)" in note
    (line,) = [line for line in remarks(section) if line.startswith("Silent")]
    assert line == "Silent on all test images: EB at 89.99 % (b in 1 of 2 rounds)."


def test_early_bird_that_settles_by_arithmetic_is_named(tmp_path):
    root = tmp_path / "runs"
    for level, sparsity in ((4, 95.0), (8, 97.6), (9, 99.0)):  # masks differ in 10, 4.8 and 2 % at most
        for method in ("earlybird", "earlyT_earlybird", "laterewindlth"):
            more = {"sparsity_round": level, "eb_tolerance": 0.05, "eb_window": 3}
            rows = [result(level, 90.0, sparsity=sparsity)]
            write_run(root, f"{method}-{level}", method, 1, rows, **more)
            if method == "earlybird":
                write_run(root, f"j-{level}", method, 1, rows, eb_distance="jaccard", **more)
                write_run(root, f"t-{level}", method, 1, rows, **more | {"eb_tolerance": 0.02})
    (section,) = sections_of(read_runs(root)[0])
    (line,) = [line for line in remarks(section) if "2 (1 - s)" in line]
    assert line.endswith(": EB, tolerance 0.05 at 97.60 %, 99.00 %; EB + ET, tolerance 0.05 at 97.60 %, 99.00 %.")


def test_dense_is_of_the_same_neuron(tmp_path):
    root = tmp_path / "runs"
    write_run(root, "imp", "laterewindlth", 1, [result(0, 93.0), result(8, 92.0)])
    ann = {"neuron": "relu", "timestep": 1}
    write_run(root, "snip-ann", "oneshot-snip", 1, [result(8, 94.0)], ticket="snip", sparsity_round=8, **ann)

    def overview():
        out, _ = report(tmp_path)
        page = (out / "report.html").read_text()
        table = page[page.index("against dense") : page.index("</table>")]
        return {row[0]: row[3] for row in (re.findall(r"<t[hd][^>]*>([^<]*)", r) for r in table.split("<tr>")[1:])}

    assert overview() == {"IMP": "−1.00", "SNIP, ANN": ""}  # noqa: RUF001
    write_run(root, "imp-ann", "laterewindlth", 1, [result(0, 96.0), result(8, 95.0)], **ann)
    assert overview() == {"IMP": "−1.00", "IMP, ANN": "−1.00", "SNIP, ANN": "−2.00"}  # noqa: RUF001


def test_table_1_holds_the_plain_experiment_of_each_method(tmp_path):
    write_everything(tmp_path / "runs")
    (section,) = sections_of(read_runs(tmp_path / "runs")[0])
    names = [row[0][0] for row in table_1(section, paper_table()).rows]
    assert [name for name in names if not name.startswith("Δ")] == [
        "IMP", "IMP + ET", "EB", "EB + ET", "magnitude", "SNIP", "random",
    ]  # fmt: skip
    notes = " ".join(table_1(section, paper_table()).notes)
    listed = {row[0][0] for row in every_ticket(section).rows}
    assert f"{len(listed) - 7} more experiments" in notes
    assert {"IMP, local", "IMP, rewind epoch 0", "SNIP, ANN", "IMP, local transfer"} < listed


def test_a_method_without_a_plain_experiment_is_in_table_1_too(tmp_path):
    root = tmp_path / "runs"
    write_run(root, "imp", "laterewindlth", 1, [result(8, 90.0)])
    write_run(root, "eb", "earlybird", 1, [result(8, 90.0)], sparsity_round=8, weight_decay=0.1)
    ann = {"neuron": "relu", "timestep": 1, "ticket": "snip", "sparsity_round": 8}
    write_run(root, "snip", "oneshot-snip", 1, [result(8, 90.0)], **ann)  # an ANN alone is not
    (section,) = sections_of(read_runs(root)[0])
    assert [row[0][0] for row in table_1(section, paper_table()).rows] == ["IMP", "EB, weight decay 0.1"]


def test_controls_stand_beside_the_tickets_that_they_control(tmp_path):
    root = tmp_path / "runs"
    ann = {"neuron": "relu", "timestep": 1}
    write_run(root, "imp", "laterewindlth", 1, [result(8, 90.0)])
    write_run(root, "imp-ann", "laterewindlth", 1, [result(8, 90.0)], **ann)
    write_run(root, "local", "laterewindlth", 1, [result(8, 90.0)], pruning_scope="local")
    write_run(root, "eb", "earlybird", 1, [result(8, 90.0)], sparsity_round=8)
    (section,) = sections_of(read_runs(root)[0])
    assert controls(section) is None
    place = "cifar10-vgg16-round1/tickets/level_08.safetensors"
    for name in ("local", "imp-ann"):
        more = {"ticket": f"runs/{name}/{place}", "control": "shuffle"}
        write_run(root, f"s-{name}", "oneshot-transfer-shuffle", 1, [result(8, 80.0)], **more)
    more = {"ticket": f"runs/imp-ann/{place}", "control": "none"}
    write_run(root, "t", "oneshot-transfer", 1, [result(8, 80.0)], **more)
    for name, more in (("random", {}), ("random-reinit", {"control": "reinit"})):
        write_run(root, name, f"oneshot-{name}", 1, [result(8, 60.0)], ticket="random", sparsity_round=8, **more)
    (section,) = sections_of(read_runs(root)[0])

    axes = {"test accuracy (%)", "sparsity (% of the prunable weights)"}

    def legend(plot):
        return set(re.findall(r"<!-- ([A-Za-z][^>]*) -->", plot.svg)) - axes

    assert legend(controls(section)) == {
        "IMP, local", "IMP, local shuffle", "IMP, ANN", "IMP (ANN) shuffle", "random", "random reinit",
    }  # fmt: skip
    assert legend(transfer(section)) == {"IMP", "IMP, ANN", "IMP (ANN) transfer"}


def test_few_sparsities_stand_for_many():
    quarter = [100 * (1 - 0.75**level) for level in range(15)]
    assert shown_columns(quarter) == [quarter[level] for level in (4, 8, 11, 13, 14)]  # the paper's, and the sparsest
    half = [100 * (1 - 0.5**level) for level in range(11)]
    assert shown_columns(half) == half[2::2]  # even
    assert shown_columns([0.0, 50.0, 75.0]) == [50.0, 75.0]
    assert shown_columns([75.0, *half, 75.0, half[4], half[4]], most=2) == [75.0, half[4]]  # with the most results


def test_table_1_shows_the_sparsities_that_most_experiments_have(tmp_path):
    root = tmp_path / "runs"
    half = [100 * (1 - 0.5**level) for level in range(7)]
    imp = [result(level, 90.0, sparsity=half[level]) for level in range(7)]
    write_run(root, "imp", "laterewindlth", 1, imp, prune_percent=50.0)
    for level in (2, 4, 6):
        rows = [result(level, 80.0, sparsity=half[level])]
        write_run(root, f"eb-{level}", "earlybird", 1, rows, sparsity_round=level, prune_percent=50.0)
    write_run(root, "m", "oneshot-magnitude", 1, [result(4, 70.0, sparsity=half[4])], ticket="magnitude")
    write_run(root, "s", "oneshot-snip", 1, [result(1, 60.0, sparsity=half[1])], ticket="snip")
    (section,) = sections_of(read_runs(root)[0])
    table = table_1(section, paper_table())
    assert table.head[1:6] == ["50.00 %", "75.00 %", "93.75 %", "96.88 %", "98.44 %"]
    assert [row[0] for row in table.rows] == [["IMP"], ["EB"], ["magnitude"], ["SNIP"]]
    write_run(root, "r", "oneshot-random", 1, [result(3, 50.0, sparsity=99.5)], ticket="random")
    write_run(root, "e", "earlybird", 2, [result(5, 80.0, sparsity=half[5])], sparsity_round=5, prune_percent=50.0)
    (section,) = sections_of(read_runs(root)[0])
    assert ["random"] not in [row[0] for row in table_1(section, paper_table()).rows]  # it has none of those shown


def test_readme_names_what_is_written(tmp_path):
    write_pair(tmp_path / "runs")
    out, _ = report(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in text for path in out.iterdir() if path.is_file())
