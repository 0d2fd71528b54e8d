"""The report against numbers computed here, on run folders written by hand; the paper's Table 1 as data."""

import csv
import json
import re
import statistics
from html import unescape

import pytest
from matplotlib.figure import Figure

from report import main
from reporting.curves import chosen_timesteps, divergences_at_t, early_time_by_threshold
from reporting.drawing import MARKERS, styles_of
from reporting.experiments import sections_of
from reporting.figures import draw_all
from reporting.remarks import remarks
from reporting.runs import read_runs
from reporting.settings import METHODS
from reporting.tables import every_ticket, overview, paper_table, shown_columns, table_1, tables_csv

pytestmark = pytest.mark.xdist_group("report")  # its figures are drawn once
FLAGS = {
    "dataset": "cifar10",
    "arch": "vgg16",
    "width": 1.0,
    "train_samples": None,
    "test_samples": None,
    "neuron": "lif",
    "tau": 4 / 3,
    "v_threshold": 1.0,
    "surrogate_alpha": 2.0,
    "timestep": 5,
    "batch_norm": "per_timestep",
    "learning_rate": 0.3,
    "weight_decay": 5e-4,
    "end_iter": 300,
    "precision": "fp32",
    "compile": False,
    "channels_last": False,
    "cuda_graph": False,
    "checkpoint_minutes": 1.0,
    "data_checksum": "00",
}
SPARSE = {"prune_percent": 25.0, "pruning_scope": "global", "sparsity_round": 14}
IMP = {**SPARSE, "rewinding_epoch": 20, "rewind": "weights"}
EB = {**SPARSE, "eb_window": 5, "eb_tolerance": 0.02, "eb_distance": "hamming"}
ET = {"early_time_epoch": 2, "early_time_threshold": 0.6, "divergence": "kl"}
KINDS = {
    "laterewindlth": ("IMP", IMP),
    "earlyT_laterewindlth": ("IMP + ET", IMP | ET),
    "earlybird": ("EB", EB),
    "earlyT_earlybird": ("EB + ET", EB | ET),
    "oneshot-random": ("random", {"ticket": "random", "sparsity_round": 8}),
    "oneshot-snip": ("SNIP", {"ticket": "snip", "sparsity_round": 8}),
    "oneshot-magnitude": ("magnitude", {"ticket": "magnitude", "search_timestep": None, "pruning_scope": "global"}),
    "oneshot-random-shuffle": ("random shuffle", {"ticket": "random", "control": "shuffle"}),
    "oneshot-transfer": ("transfer", {"control": "none"}),
    "oneshot-transfer-shuffle": ("transfer shuffle", {"control": "shuffle"}),
}
ANN = {"neuron": "relu", "timestep": 1}
EVIL = '<script>"& $x_{'
ACCURACY = {1: 92.1, 2: 91.7, 3: 92.6}  # by round


def result(level, accuracy, seconds=100.0, timesteps=5, **more):
    row = {
        "ticket": f"level_{level:02d}",
        "level": level,
        "sparsity": 100 * (1 - 0.75**level),
        "sparsity_all_parameters": 99.9 * (1 - 0.75**level),
        "timesteps": 5,
        "search_timesteps": timesteps,
        "test_accuracy": accuracy,
        "best_test_accuracy": accuracy + 0.5,
        "search_seconds": seconds,
        "search_epochs": 50 if level else 0,
        "search_timestep_epochs": 50 * timesteps if level else 0,
        "train_seconds": 60.0,
        "layers": {"z.weight": 10.0 * level**0.5, "a.weight": 90.0},
    }
    return row | more


def epochs(phase, level, count, **more):
    row = {"phase": phase, "level": level, "timesteps": 5, "loss": 1.0, "seconds": 10.0, "test_accuracy": 80.0}
    return [row | {"epoch": epoch} | more for epoch in range(count)]


def write(root, name, method, round, results, rows=(), device="CPU", source="a", **flags):
    label, own = KINDS.get(method, (method, {}))
    circumstances = {"device_name": device, "threads": 1, "ranks": 1, "versions": {"torch": "2"}, "source": source}
    args = {**FLAGS, **own, "exp_name": name, "label": label, "method": method, "round": round}
    args |= {"circumstances": circumstances, "effective_seed": round, "output_dir": str(root)} | flags
    folder = root / name / f"{args['dataset']}-{args['arch']}-round{round}"
    folder.mkdir(parents=True)
    log = "".join(json.dumps(row) + "\n" for row in rows)
    files = {"args.json": json.dumps(args), "metrics.jsonl": log, "results.json": json.dumps(results)}
    for file, content in (files | {"summary.txt": "the table"}).items():
        (folder / file).write_text(content)
    return folder


def write_all(root, *runs):
    """Runs of one ticket: folder, method, round, row of results.json, flags."""
    for name, method, round, row, flags in runs:
        write(root, name, method, round, [row], **flags)


def origin(label, checksum, **network):
    """The flags of a run that trains a saved ticket."""
    where = {
        "label": label,
        "dataset": "cifar10",
        "sparsity": 90.0,
        "network": {"arch": "vgg16", "neuron": "lif"} | network,
    }
    return {"ticket": "x.safetensors", "ticket_checksum": checksum, "ticket_origin": where}


def sections(root):
    return sections_of(read_runs(root)[0])


def by_ticket(text):
    """The lines of tables.csv by experiment and ticket."""
    return {(row["experiment"], row["ticket"]): row for row in csv.DictReader(text.splitlines())}


def numbers(root):
    """What tables.csv would hold of runs."""
    return by_ticket(tables_csv(sections(root), paper_table()))


def text_of(table):
    cells = [[cell] if isinstance(cell, str) else cell for row in table.rows for cell in row.values()]
    return "\n".join([*(line for cell in cells for line in cell), *table.notes])


def write_everything(root):
    """Runs that hold data for every figure, in several sections and with text that has to be escaped."""
    for round, accuracy in ACCURACY.items():
        imp = [result(level, accuracy - level / 10, 3600.0 * level + round) for level in (0, 8, 14)]
        write(root, "imp", "laterewindlth", round, imp, epochs("dense", 0, 4) + epochs("search", 14, 4))
        rows = epochs("dense", 0, 4, divergences=[1.0, 0.35, 0.2]) + epochs("train", 14, 4)
        rows[2]["early_time"] = 3
        early = [result(level, accuracy - level / 8, 2400.0 * level, 3) for level in (8, 14)]
        write(root, "et", "earlyT_laterewindlth", round, early, rows, evaluate_levels=[8, 14])
        write(root, "rewind", "laterewindlth", round, imp, rewinding_epoch=0)
        write(root, "local", "laterewindlth", round, imp, pruning_scope="local")
    rates = {"spikes_per_image": 1.5e5, "firing_rates": {"z": 0.2, "a": 0.0}, "ticket_bytes": 1234567}
    for level in (4, 8):
        for method in ("earlybird", "earlyT_earlybird"):
            row = result(level, 90.0, settled=level == 4, **rates)
            write(root, f"{method}-{level}", method, 1, [row], epochs("train", level, 3), sparsity_round=level)
    untrained = result(8, 100.0, 0.0, 0)
    write_all(
        root,
        ("random", "oneshot-random", 1, untrained, {}),
        ("snip", "oneshot-snip", 1, untrained, {}),
        ("snip-14", "oneshot-snip", 1, result(14, 100.0, 0.0, 0), {}),
        ("snip-ann", "oneshot-snip", 1, untrained, ANN),
        ("magnitude-2", "oneshot-magnitude", 1, result(8, 82.0, timesteps=2), {"search_timestep": 2}),
        ("magnitude-5", "oneshot-magnitude", 1, result(8, 85.0), {"search_timestep": 5}),
        ("transfer", "oneshot-transfer", 1, result(8, 80.0), origin("IMP", "1", **ANN)),
        ("shuffle", "oneshot-transfer-shuffle", 1, result(8, 70.0), origin("EB", "2")),
        ("<b>&", "<i>new", 1, result(8, 75.0) | {"ticket": "sparsity_90", "level": None}, {"sprout": EVIL}),
    )
    unfinished = write(root, "small", "earlybird", 1, [], epochs("search", None, 3), width=0.25, end_iter=8)
    (unfinished / "summary.txt").unlink()
    (write(root, "gone", "earlybird", 5, [result(8, 1.0)]) / "args.json").unlink()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Run folders, the report on them, and its figures by section. All are drawn as SVG, and one as PNG too."""
    root = tmp_path_factory.mktemp("report")
    write_everything(root / "runs")
    drawn, pngs, save = {}, [], Figure.savefig

    def first_png(figure, file, **options):
        if options["format"] == "png" and pngs:
            file.write(b"\x89PNG")
        else:
            pngs.extend([figure] if options["format"] == "png" else [])
            save(figure, file, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reporting.page.draw_all", lambda found: drawn.update(draw_all(found)) or drawn)
        patch.setattr(Figure, "savefig", first_png)
        main([str(root / "runs"), "--out", str(root / "out")])
    return root / "runs", root / "out", drawn


# --- experiments ---


def test_numbers_are_means_and_sample_deviations(everything):
    rows = by_ticket((everything[1] / "tables.csv").read_text())
    for level in (8, 14):
        row, values = rows["IMP", f"level_{level:02d}"], [accuracy - level / 10 for accuracy in ACCURACY.values()]
        assert (row["n"], row["rounds"], row["level"]) == ("3", "1 2 3", str(level))
        assert float(row["test_accuracy_mean"]) == pytest.approx(statistics.mean(values), rel=1e-5)
        assert float(row["test_accuracy_std"]) == pytest.approx(statistics.stdev(values), rel=1e-4)
        assert float(row["search_seconds_mean"]) == pytest.approx(3600 * level + 2, rel=1e-5)
        shown = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} (n=3)"
        assert all(shown in (everything[1] / name).read_text() for name in ("tables.md", "report.html"))
    # a method, a flag and a ticket's name that the report has never heard of
    assert float(rows["<i>new", "sparsity_90"]["test_accuracy_mean"]) == 75


def test_labels_name_what_tells_experiments_apart(tmp_path):
    row, method = result(8, 90.0), "laterewindlth"
    write_all(
        tmp_path,
        ("plain", method, 1, row, {}),
        ("local", method, 1, row, {"pruning_scope": "local"}),
        ("early", method, 1, row, {"rewinding_epoch": 0}),
        ("norm", method, 1, row, {"batch_norm": "over_time"}),
        ("ann", method, 1, row, ANN),
        ("new", method, 1, row, {"flag_of_tomorrow": "yes"}),
        ("percent", method, 1, row, {"prune_percent": 50.0}),
        # only how sparse
        ("sparse", method, 1, row, {"sparsity": 98.0, "prune_iterations": 3, "evaluate_levels": [3]}),
        ("place", method, 1, row, {"output_dir": "x", "device": "cuda", "checkpoint_minutes": 9.0}),
        ("how", method, 1, row, {"channels_last": True, "cuda_graph": True, "fused": True}),
        ("eb", "earlybird", 1, row, {}),
        # without rewinding only how sparse
        ("eb-50", "earlybird", 1, result(9, 90.0), {"prune_percent": 50.0}),
    )
    imp = ["IMP", "IMP, ANN", "IMP, flag of tomorrow yes", "IMP, local", "IMP, pruned by % 50.0", "IMP, rewind epoch 0"]
    assert {label for label, _ in numbers(tmp_path)} == {*imp, "IMP, batch norm over_time", "EB"}


def test_the_same_round_counts_once(tmp_path):
    for name, accuracy, loss in (("a", 90.0, 1.0), ("b", 80.0, 5.0)):
        write(tmp_path, name, "earlybird", 1, [result(8, accuracy)], epochs("train", 8, 3, loss=loss))
    row = numbers(tmp_path)["EB", "level_08"]
    assert (row["n"], float(row["test_accuracy_mean"]), row["test_accuracy_std"]) == ("1", 90.0, "")
    (section,) = sections(tmp_path)
    repeated = "\n".join(remarks(section))
    assert "b/cifar10-vgg16-round1" in repeated
    assert "a/cifar10-vgg16-round1" not in repeated
    (curves,) = [plot for plot in draw_all([section])[section.slug] if plot.name.endswith("learning-curves")]
    assert list(curves.figure.axes[0].lines[0].get_ydata()) == [1.0] * 3


def test_sections_by_size_and_sparsities_of_whole_weights(tmp_path):
    write_all(
        tmp_path,
        ("a", "earlybird", 1, result(8, 90.0), {}),
        ("b", "earlybird", 2, result(8, 70.0, sparsity=89.99), {}),
        ("c", "earlybird", 3, result(8, 70.0, sparsity=99.0), {}),
        ("d", "earlybird", 1, result(8, 90.0), {"width": 0.25, "decay_kernels_only": True}),
    )
    large, small = sections(tmp_path)
    cells = [(cell.column, list(cell.rows["round"])) for cell in large.experiments[0].cells]
    assert cells == [(89.99, [1, 2]), (99.0, [3])]
    assert all(text in "\n".join(remarks(small)) for text in ("width 0.25 (paper: 1.0)", "decay kernels only"))
    assert not any(text in "\n".join(remarks(large)) for text in ("width", "decay kernels only"))


def test_transferred_tickets_are_named_by_their_origin_and_not_pooled(tmp_path):
    row, elsewhere = result(8, 80.0), origin("EB", "c", arch="resnet19", **ANN)
    write_all(
        tmp_path,
        *((name, "oneshot-transfer", round, row, origin("IMP", f"{name}{round}")) for name in "ab" for round in (1, 2)),
        ("c", "oneshot-transfer", 1, row, elsewhere),
        ("d", "oneshot-transfer-shuffle", 1, row, origin("EB", "d")),
    )
    rows = numbers(tmp_path)
    assert {label: row["n"] for (label, _), row in rows.items()} == {
        "IMP transfer": "2",
        "IMP transfer, other ticket 1": "2",
        "EB (ANN) of cifar10-resnet19 transfer": "1",
        "EB shuffle": "1",
    }
    assert all(row["search_seconds_mean"] == "" for row in rows.values())  # they stand with the run that found them


def test_dense_is_of_the_same_neuron_and_plain_first(tmp_path):
    write(tmp_path, "a-local", "laterewindlth", 1, [result(0, 80.0), result(8, 79.0)], pruning_scope="local")
    write(tmp_path, "et", "earlyT_laterewindlth", 1, [result(0, 70.0)], **ANN)  # trained at T_early
    write(tmp_path, "imp", "laterewindlth", 1, [result(0, 93.0), result(8, 92.0)])
    (section,) = sections(tmp_path)
    assert section.dense(ann=True) is None
    against = {row["method"]: row["against dense"] for row in overview(section).rows}
    signed = {label: text.replace("−", "-").partition(" ")[0] for label, text in against.items()}  # noqa: RUF001
    assert signed == {"IMP": "-1.00", "IMP, local": "-14.00", "IMP + ET, ANN": ""}


# --- Early-Time ---


def test_gain_is_of_the_rounds_that_both_have_on_equal_machines(tmp_path):
    base = {1: (90.0, 100.0), 2: (91.0, 120.0), 3: (80.0, 900.0), 5: (90.0, 100.0), 6: (90.0, 100.0)}
    early = {1: (89.0, 80.0), 2: (91.5, 60.0), 4: (20.0, 1.0), 5: (88.0, 10.0), 6: (88.0, 5.0)}
    for method, values in (("earlybird", base), ("earlyT_earlybird", early)):
        for round, (accuracy, seconds) in values.items():
            unfair = {5: {"device": f"GPU {method}"}, 6: {"cuda_graph": method == "earlybird"}}.get(round, {})
            write(tmp_path, method, method, round, [result(8, accuracy, seconds)], **unfair)
    row = numbers(tmp_path)["EB + ET", "level_08"]
    for name, expected in {"delta_accuracy": [-1.0, 0.5, -2.0, -2.0], "speed_gain": [100 / 80, 120 / 60]}.items():
        found = [float(row[f"{name}_{what}"]) for what in ("mean", "std", "n")]
        assert found == pytest.approx([statistics.mean(expected), statistics.stdev(expected), len(expected)], rel=1e-5)
    (section,) = sections(tmp_path)
    assert "×1.62 ± 0.53 (n=2)" in text_of(table_1(section, paper_table()))  # noqa: RUF001


def test_times_of_different_machines_have_no_mean(tmp_path):
    row = result(8, 90.0, 100.0)
    write_all(
        tmp_path,
        ("eb", "earlybird", 1, row, {"device": "A"}),
        ("eb", "earlybird", 2, row, {"device": "B"}),
        *(("one", "earlybird", round, row, {"weight_decay": 0.1}) for round in (1, 2)),
    )
    rows = numbers(tmp_path)
    assert rows["EB", "level_08"]["search_seconds_mean"] == rows["EB", "level_08"]["train_seconds_mean"] == ""
    assert float(rows["EB, weight decay 0.1", "level_08"]["search_seconds_mean"]) == 100
    (section,) = sections(tmp_path)
    tables = (table_1(section, paper_table()), every_ticket(section), overview(section))
    assert all(sum(note.startswith("‡") for note in table.notes) == 1 for table in tables)
    assert {line for line in remarks(section) if line.startswith("On ")} == {
        "On A: EB.",
        "On B: EB.",
        "On CPU: EB, weight decay 0.1.",
    }


def test_early_time_is_compared_with_the_same_settings_only(tmp_path):
    write_all(
        tmp_path,
        ("a", "earlybird", 1, result(8, 90.0), {"weight_decay": 0.1}),
        ("b", "earlyT_earlybird", 1, result(8, 89.0, timesteps=3), {}),
        ("d", "laterewindlth", 1, result(8, 99.0), {}),
    )
    assert numbers(tmp_path)["EB + ET", "level_08"]["delta_accuracy_mean"] == ""
    write(tmp_path, "c", "earlybird", 1, [result(8, 91.0)])
    row = numbers(tmp_path)["EB + ET", "level_08"]
    assert [float(row[f"{name}_mean"]) for name in ("delta_accuracy", "cost_gain")] == pytest.approx(
        [-2, 5 / 3], rel=1e-5
    )


def test_a_round_decides_once_on_each_threshold(tmp_path):
    for name, round, divergences, flags in (
        ("a-js", 1, [1.0, 0.1, 0.1], {"divergence": "js"}),
        ("b-decay", 1, [1.0, 0.9, 0.1], {"weight_decay": 0.1}),
        ("c", 1, [1.0, 0.5, 0.1], {}),
        ("c", 2, [1.0, 0.8, 0.1], {}),
        ("d", 2, [1.0, 0.9, 0.9], {}),
    ):
        rows = epochs("search", None, 2, divergences=[1.0, 0.9, 0.9])
        rows[1] |= {"early_time": 3, "divergences": divergences}
        write(tmp_path, name, "earlyT_earlybird", round, [result(8, 90.0)], rows, **flags)
    (section,) = sections(tmp_path)
    points = early_time_by_threshold(section)
    assert tuple(points.loc[0.6]) == pytest.approx((statistics.mean([3, 4]), statistics.stdev([3, 4]), 2))
    assert [chosen_timesteps([1.0, 0.4, 0.2], x) for x in (0, 0.2, 0.3, 0.6, 1.0, 1.1)] == [5, 5, 4, 3, 3, 2]


def test_divergences_are_of_a_dense_network_trained_at_t(tmp_path):
    rows = epochs("dense", 0, 2, divergences=[1.0, 0.3]) + epochs("dense", 0, 6, timesteps=3, divergences=[1.0, 9.0])
    rows += epochs("search", 1, 6, divergences=[1.0, 9.0])
    for name, round in (("a", 1), ("a", 2), ("b", 2)):
        write(tmp_path, name, "earlyT_laterewindlth", round, [result(8, 90.0)], rows)
    (section,) = sections(tmp_path)
    frame = divergences_at_t(section.experiments[0])
    assert len(frame) == 2 * 2 * 2  # timesteps, epochs, rounds
    assert set(frame["divergence"][frame["t"] == 3]) == {0.3}


# --- tables, remarks, paper ---


def test_table_1_holds_the_plain_snn_of_each_method_and_the_papers_values(everything, tmp_path):
    section, *_ = sections(everything[0])
    table = table_1(section, paper_table())
    names = [row["method"][0] for row in table.rows if not row["method"][0].startswith("Δ")]
    assert names == ["IMP", "IMP + ET", "EB", "EB + ET", "magnitude", "SNIP", "random", "<i>new"]
    assert [table.rows[0][f"{what}: 98.22 %"][-1] for what in ("accuracy (%)", "search")] == [
        "paper 91.81",
        "paper 51.99 h",
    ]
    rows = by_ticket((everything[1] / "tables.csv").read_text())
    assert rows["IMP + ET", "level_14"]["paper_delta_accuracy"] == "-0.71"
    assert rows["IMP, rewind epoch 0", "level_08"]["paper_accuracy"] == rows["IMP", "level_00"]["paper_accuracy"] == ""
    for method in ("earlybird", "earlyT_earlybird"):
        write(tmp_path, method, method, 1, [result(14, 85.0)], arch="resnet19")
    (section,) = sections(tmp_path)
    text = text_of(table_1(section, paper_table()))
    assert all(part in text for part in ("paper −1.09", "printed delta contradicts the accuracies (+0.23)"))  # noqa: RUF001


def test_few_sparsities_stand_for_many():
    quarter = [100 * (1 - 0.75**level) for level in range(15)]
    assert shown_columns(quarter) == [quarter[level] for level in (4, 8, 11, 13, 14)]  # the paper's, and the sparsest
    half = [100 * (1 - 0.5**level) for level in range(11)]
    assert shown_columns(half) == half[2::2]  # even
    assert shown_columns([75.0, *half, 75.0, half[4], half[4]], most=2) == [75.0, half[4]]  # with the most results


def test_remarks_name_silent_layers_sources_and_arithmetic(tmp_path):
    silent, firing, slow = ({"a": 0.1, "b": rate} for rate in (0.0, 0.2, 1e-9))
    write_all(
        tmp_path,
        ("eb", "earlybird", 1, result(8, 10.0, firing_rates=silent, sparsity=99.5), {"source": "s1"}),
        ("eb", "earlybird", 2, result(8, 10.0, firing_rates=firing, sparsity=99.5), {"source": "s2"}),
        ("et", "earlyT_earlybird", 1, result(8, 85.0, firing_rates=slow), {}),
        ("j", "earlybird", 1, result(8, 85.0, sparsity=99.5), {"eb_distance": "jaccard"}),
    )
    (section,) = sections(tmp_path)
    lines = remarks(section)
    assert [line for line in lines if "Silent" in line] == [
        "Silent on all test images: EB at 99.50 % (b in 1 of 2 rounds)."
    ]
    assert any("EB" in line for line in lines if "source" in line)
    assert [line.split(": ")[-1] for line in lines if "2 (1 - s)" in line] == ["EB at 99.50 %."]
    assert text_of(every_ticket(section)).count("10.00 ± 0.00†") == 1


def test_table_1_of_the_paper_contradicts_itself_only_where_it_says_so():
    table = {(row["dataset"], row["arch"], row["method"], int(row["prunings"])): row for row in paper_table("table1")}
    assert len(table) == len(paper_table("table1")) == 4 * 2 * 4 * 4
    deltas, gains = {}, set()
    for (*where, method, prunings), row in table.items():
        # of all parameters; batch norm and biases, which stay, are under 0.1 % of them
        assert float(row["sparsity"]) == pytest.approx(100 * (1 - 0.75**prunings), abs=0.1)
        assert bool(row["delta_accuracy"]) == bool(row["speed_gain"]) == method.startswith("earlyT_")
        base = table[(*where, method.removeprefix("earlyT_"), prunings)]
        difference = round(float(row["accuracy"]) - float(base["accuracy"]), 2)
        if difference != float(row["delta_accuracy"] or 0):
            deltas[(*where, method, prunings)] = difference
        # gains that two durations printed with two digits can stand for; some are cut off, not rounded
        low = (float(base["hours"]) - 0.005) / (float(row["hours"]) + 0.005) - 0.01
        high = (float(base["hours"]) + 0.005) / (float(row["hours"]) - 0.005) + 0.005
        gains |= set() if low < float(row["speed_gain"] or 1) < high else {(*where, method, prunings)}
    cifar10 = ("cifar10", "resnet19", "earlyT_earlybird")
    assert deltas == {(*cifar10, 11): -0.25, (*cifar10, 14): 0.23, ("cifar100", *cifar10[1:], 8): -0.11}
    repeated = {"svhn resnet19": (4, 8, 11, 14), "cifar10 vgg16": (11, 14), "cifar10 resnet19": (11,)}
    assert gains == {(*at.split(), "earlyT_earlybird", n) for at, prunings in repeated.items() for n in prunings}
    assert all(word in table[key]["note"] for word, keys in (("delta", deltas), ("hours", gains)) for key in keys)
    assert sum(bool(row["note"]) for row in table.values()) == 9


def test_other_tables_of_the_paper():
    baselines = {float(row["baseline_accuracy"]) for row in paper_table("table2") if row["method"] == "IMP"}
    assert baselines == {93.22, 71.34}
    seconds = [(row["arch"] == "resnet19", float(row["seconds"])) for row in paper_table("supplement_table1")]
    assert seconds == sorted(seconds)
    assert all((float(row["mean"]) == 1) == (row["timesteps"] == "2") for row in paper_table("supplement_table2"))


# --- figures and page ---

FIGURES = {
    *("accuracy-sparsity", "search-sparsity", "accuracy-rewind", "global-local", "layer-sparsity", "settling"),
    *("divergence", "accuracy-early-time", "accuracy-t-pre", "transfer", "controls", "snip-random", "spikes-sparsity"),
    *("firing-rates", "learning-curves", "accuracy-search-cost"),
}


def test_every_figure_is_drawn_where_there_is_data(everything):
    large, small = sections(everything[0])
    expected = {f"{large.slug}-{name}" for name in FIGURES} | {f"{small.slug}-learning-curves", "early-time-threshold"}
    figures = {path.name: path.read_bytes()[:4] for path in (everything[1] / "figures").iterdir()}
    starts = {"png": b"\x89PNG", "svg": b"<?xm"}
    assert figures == {f"{name}.{ending}": start for name in expected for ending, start in starts.items()}


def test_axes_and_the_same_bytes_each_time(everything):
    plots = [plot for of_section in everything[2].values() for plot in of_section]
    (again,) = draw_all(sections(everything[0])[1:])[sections(everything[0])[1].slug]
    assert again.svg in [plot.svg for plot in plots]
    axes = [(plot.name, axis) for plot in plots for axis in plot.figure.axes]
    lines = [(name, axis, line) for name, axis in axes for line in axis.lines if line.get_marker() in MARKERS]
    assert all(axis.get_ylim()[1] <= 100 for _, axis in axes if "accuracy" in axis.get_ylabel())
    assert not any(line.get_clip_on() for *_, line in lines)
    assert all(axis.get_ylim()[0] <= y <= axis.get_ylim()[1] for _, axis, line in lines for y in line.get_ydata())
    assert all(min(line.get_xdata()) > 0 for name, _, line in lines if name.endswith("search-sparsity"))
    styles = styles_of([label for label, _ in by_ticket((everything[1] / "tables.csv").read_text())], METHODS)
    assert len(set(styles.values())) == len(styles) > len(METHODS)
    assert METHODS.items() <= styles.items()
    looks = {label: style[:2] for label, style in styles.items()}
    assert not {look for label, look in looks.items() if label not in METHODS} & {looks[label] for label in METHODS}
    (layers,) = [
        line.get_ydata() for name, _, line in lines if (name[-14:], line.get_label()) == ("layer-sparsity", "98.22 %")
    ]
    assert list(layers) == pytest.approx([10 * 14**0.5, 90])  # in the network's order, not the alphabet's


def test_the_page_stands_alone_is_escaped_and_names_every_run(everything):
    text = (everything[1] / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe|i)\b|@import|url\(|https?://", text)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(re.findall(r' id="([^"]+)"', text))
    images = re.findall(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="[^"]{20,}">', text)
    assert len(images) == text.count("<img") == text.count("src=") == len(FIGURES) + 2
    shown = unescape(text)
    assert f"sprout</th><td><code>{EVIL}" in shown.replace("\n", "")
    for path in everything[0].rglob("metrics.jsonl"):
        assert f"<code>{path.parent.relative_to(everything[0]).as_posix()}</code>" in shown
    assert "<script" not in (everything[1] / "tables.md").read_text().replace("\\<", "")
    assert re.findall(r"<code>([^<]*)</code>: 3 epochs, 0 [^<]*", text) == ["small/cifar10-vgg16-round1"]


# --- runs that cannot be read ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.json", None),
        ("args.json", "{"),
        ("args.json", "[]"),
        ("args.json", "\xff"),
        ("args.json", {"round": None}),
        ("args.json", {"rewinding_epoch": "20"}),
        ("args.json", {"circumstances": None}),
        ("args.json", {"ticket_origin": {"label": "IMP"}}),
        ("metrics.jsonl", '{"phase": "sea'),
        ("metrics.jsonl", {"level": "8"}),
        ("metrics.jsonl", {"divergences": ["x"]}),
        ("results.json", '"text"'),
        ("results.json", "[{}]"),
        ("results.json", {"test_accuracy": float("nan")}),
        ("results.json", {"layers": [1]}),
        ("results.json", {"search_epochs": True}),
        ("results.json", {"layer_costs": {"conv": {"weights": 3}}}),
        ("results.json", {"neuron_costs": {"conv": {"weights": 3}}}),
        ("results.json", {"neurobench": {"footprint": "x"}}),
    ],
)
def test_a_run_that_cannot_be_read_is_named_in_one_line(tmp_path, name, content):
    write(tmp_path, "good", "earlybird", 1, [result(8, 90.0)])
    path = write(tmp_path, "bad", "earlybird", 2, [result(8, 10.0)], epochs("train", 8, 1)) / name
    if isinstance(content, dict):
        whole = json.loads(path.read_text())
        content = json.dumps([whole[0] | content] if isinstance(whole, list) else whole | content)
    path.unlink() if content is None else path.write_text(content, encoding="latin-1")
    runs, left_out = read_runs(tmp_path)
    assert [run.folder for run in runs] == ["good/cifar10-vgg16-round1"]
    assert list(left_out) == ["bad/cifar10-vgg16-round2"]
    assert str(path) in left_out["bad/cifar10-vgg16-round2"].splitlines()[-1]


@pytest.mark.parametrize("files", [None, ["damaged"], ["damaged", "too"]])
def test_nothing_to_report_is_one_line(tmp_path, capsys, files):
    for name in files or ():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "args.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    *others, last = capsys.readouterr().err.splitlines()
    assert (stop.value.code, len(others)) == (2, len(files or ()))
    assert (str(tmp_path / "runs") in last, (tmp_path / "out").exists()) == (True, False)
