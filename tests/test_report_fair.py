"""What the report compares and what it does not: times, dense networks, saved tickets, other source, runs left out."""

import pytest
from test_report import (
    epochs,
    main,
    numbers,
    origin,
    paper_table,
    remarks,
    result,
    sections,
    text_of,
    write,
    write_all,
)

from reporting.comparison import table_2
from reporting.curves import learning_curves
from reporting.drawing import styles_of
from reporting.figures import draw_all
from reporting.runs import TIMING, read_runs
from reporting.settings import METHODS
from reporting.tables import every_ticket, overview, table_1

pytestmark = [pytest.mark.xdist_group("report"), pytest.mark.usefixtures("no_pictures")]
HERE = {"device_name": "CPU", "threads": 1, "ranks": 1, "versions": {"torch": "2"}, "source": "a"}
OTHER = {"device_name": "GPU", "threads": 2, "ranks": 2, "versions": {"torch": "3"}, "precision": "bf16"}
OTHER |= {"compile": True, "channels_last": True, "cuda_graph": True, "fused": True}


def remarks_of(root):
    return [line for section in sections(root) for line in remarks(section)]


def saved(checksum, round=1, experiment="imp", root="runs", **more):
    """The flags of a run that trains a ticket which a run of some round has saved."""
    flags = origin("IMP", checksum)
    flags["ticket"] = f"{root}/{experiment}/cifar10-vgg16-round{round}/tickets/level_08.safetensors"
    flags["ticket_origin"] |= {"round": round, "seed": 1234, "ticket": "level_08", "level": 8, "end_iter": 300} | more
    return flags


# --- times ---


@pytest.mark.parametrize("field", TIMING)
def test_a_time_is_compared_only_where_all_that_it_depends_on_agrees(tmp_path, field):
    assert OTHER.keys() == set(TIMING)
    flag = {field: OTHER[field]} if field not in HERE else {"circumstances": HERE | {field: OTHER[field]}}
    for method, seconds, rounds in (("earlybird", 100.0, {1: {}, 2: {}}), ("earlyT_earlybird", 50.0, {1: {}, 2: flag})):
        for round, flags in rounds.items():
            write(tmp_path, method, method, round, [result(8, 90.0, seconds)], **flags)
    rows = numbers(tmp_path)
    if field in ("precision", "compile"):  # they make another experiment
        assert [rows[label, "level_08"]["speed_gain_n"] for label, _ in rows if "ET" in label].count("1") == 1
    else:
        row = rows["EB + ET", "level_08"]
        assert [row[name] for name in ("speed_gain_n", "speed_gain_mean", "search_seconds_mean")] == ["1", "2", ""]
        assert row["cost_gain_n"] == "2"


@pytest.mark.parametrize(
    ("change", "rounds", "seconds"), [({"device_name": "another"}, (1, 2), ""), ({"git_commit": "b"}, (2,), "100")]
)
def test_a_run_that_was_resumed_elsewhere_has_no_time(tmp_path, change, rounds, seconds):
    for round in (1, 2):
        moved = {"resumed_with": [HERE | change]} if round in rounds else {}
        write(tmp_path, "eb", "earlybird", round, [result(8, 90.0, 100.0)], **moved)
        write(tmp_path, "et", "earlyT_earlybird", round, [result(8, 90.0, 100.0)], **moved)
    rows = numbers(tmp_path)
    assert [rows[label, "level_08"]["search_seconds_mean"] for label in ("EB", "EB + ET")] == [seconds] * 2
    assert rows["EB + ET", "level_08"]["speed_gain_n"] == ("2" if seconds else "")
    named = [line for line in remarks_of(tmp_path) if "another" in line]
    assert named == ([] if seconds else ["On another: EB; EB + ET."])


# --- the dense network ---


def test_a_variants_dense_network_is_named_wherever_it_is_used(tmp_path):
    for round in (1, 2):
        write(tmp_path, "imp", "laterewindlth", round, [result(8, 90.0), result(14, 80.0)])
        rows = [result(level, 91.0 - level, firing_rates={"a": 0.5, "b": 0.1}) for level in (0, 8, 14)]
        log = epochs("dense", 0, 3) + epochs("search", 8, 3) + epochs("search", 14, 3)
        write(tmp_path, "local", "laterewindlth", round, rows, log, pruning_scope="local")
        write(tmp_path, "eb", "earlybird", round, [result(8, 85.0)], epochs("train", 8, 3))
    (section,) = sections(tmp_path)
    tables = [table_1(section, paper_table()), table_2(section, paper_table("table2")), overview(section)]
    assert all("IMP, local" in "\n".join(table.notes) for table in tables)
    figures = {plot.name.removeprefix(f"{section.slug}-"): plot.figure for plot in draw_all([section])[section.slug]}
    for name in ("accuracy-sparsity", "learning-curves"):
        labels = [line.get_label() for line in figures[name].axes[0].lines if "dense" in line.get_label()]
        assert labels == ["dense, local"], name
    texts = [text.get_text() for axis in figures["accuracy-search-cost"].axes for text in axis.texts]
    assert texts
    assert all(text.replace("\n", " ").startswith("dense, local") for text in texts)
    assert numbers(tmp_path)["EB", "level_08"]["dense"] == "IMP, local"
    for round in (1, 2):
        write(tmp_path, "plain", "laterewindlth", round, [result(0, 92.0)])
    row = numbers(tmp_path)["EB", "level_08"]
    assert (row["dense"], float(row["against_dense_mean"])) == ("IMP", -7)


def test_the_dense_network_is_one_that_was_trained_alike(tmp_path):
    write(tmp_path, "imp", "laterewindlth", 1, [result(0, 90.0), result(8, 89.0)])
    write(tmp_path, "imp-0", "laterewindlth", 1, [result(0, 91.0), result(8, 80.0)], rewinding_epoch=0)
    write(tmp_path, "eb", "earlybird", 1, [result(8, 85.0)])
    write(tmp_path, "eb-adam", "earlybird", 1, [result(8, 70.0)], optimizer="adam")
    kernels = {"decay_kernels_only": True}
    write(tmp_path, "imp-kd", "laterewindlth", 1, [result(0, 95.0), result(8, 94.0)], **kernels)
    write(tmp_path, "eb-kd", "earlybird", 1, [result(8, 92.0)], **kernels)
    found = numbers(tmp_path)
    rows = {label: found[label, "level_08"] for label, ticket in found if ticket == "level_08"}
    assert {label: (row["dense"], float(row["against_dense_mean"])) for label, row in rows.items()} == {
        "IMP": ("IMP", -1),
        "IMP, rewind epoch 0": ("IMP", -10),
        "IMP, decay kernels only": ("IMP, decay kernels only", -1),
        "EB": ("IMP", -5),
        "EB, adam": ("IMP", -20),
        "EB, decay kernels only": ("IMP, decay kernels only", -3),
    }


# --- rounds ---


def test_of_values_as_common_the_largest_number_goes_without_saying(tmp_path):
    for length in (0.5, 3.0, 10.0):
        write(tmp_path, f"short-{length}", "shortcycle", 1, [result(8, 90.0, 1.0)], cycle_epochs=length)
    labels = {label for label, _ in numbers(tmp_path)}
    assert len(labels) == 3
    named = {length for length in ("0.5", "3.0", "10.0") for label in labels if f" {length}" in label}
    assert named == {"0.5", "3.0"}


def test_a_curve_counts_a_round_once(tmp_path):
    """Also where stages of one run overlap: the rewind point lies before the epoch that Early-Time decides at."""
    log = epochs("dense", 0, 4, loss=9.0) + epochs("search", 0, 4, loss=1.0)
    for name, round in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path, name, "laterewindlth", round, [result(0, 90.0)], log)
        write(tmp_path, f"{name}-eb", "earlybird", round, [], epochs("search", 0, 4, loss=1.0))
    (section,) = sections(tmp_path)
    curves = learning_curves(section, styles_of([e.label for e in section.experiments], METHODS))
    assert "n = 2;" in curves.caption
    assert len(curves.figure.axes[0].lines) == 2  # that of the dense network is not drawn again as IMP's
    assert all(list(line.get_ydata()) == [1.0] * 4 for line in curves.figure.axes[0].lines)


def test_tickets_of_two_sources_are_no_two_rounds(tmp_path):
    row = result(8, 80.0)
    runs = {
        # a search in two rounds, wherever it lies
        "a1": (1, saved("a1", 1)),
        "a2": (2, saved("a2", 2, root="elsewhere")),
        # the same names below another folder: round 1 again
        "b": (3, saved("b", 1, root="other")),
        # another experiment, other flags
        "c": (4, saved("c", 3, experiment="imp-2")),
        "d": (5, saved("d", 4, end_iter=150)),
    }
    write_all(tmp_path, *((name, "oneshot-transfer", round, row, flags) for name, (round, flags) in runs.items()))
    (section,) = sections(tmp_path)
    found = [sorted(run.args["exp_name"] for run in e.runs) for e in section.experiments]
    assert sorted(found) == [["a1", "a2"], ["b"], ["c"], ["d"]]
    assert len({e.label for e in section.experiments}) == 4


def test_tickets_of_searches_for_one_sparsity_each_are_one_experiment(tmp_path):
    for level in (8, 14):
        for name in ("eb", "eb-et"):
            flags = saved(f"{name}{level}", experiment=f"{name}-{level}", level=level, ticket=f"level_{level:02d}")
            write(tmp_path, f"{name}-shuffle-{level}", "oneshot-transfer-shuffle", 1, [result(level, 80.0)], **flags)
    (section,) = sections(tmp_path)
    found = [sorted(run.args["exp_name"] for run in e.runs) for e in section.experiments]
    assert sorted(found) == [[f"{name}-shuffle-{level}" for level in (14, 8)] for name in ("eb-et", "eb")]


def test_rounds_of_two_sources_are_not_mixed(tmp_path):
    row, of_source = result(8, 80.0), {}
    for round, names in ((1, "ab"), (2, "ba"), (3, "ab")):
        for place, source in enumerate(names):
            flags = saved(f"{source}{round}", round, experiment=source)
            folder = write(tmp_path, f"{place}", "oneshot-transfer", round, [row], **flags)
            of_source.setdefault(source, set()).add(folder.relative_to(tmp_path).as_posix())
    (section,) = sections(tmp_path)
    assert sorted(sorted(run.folder for run in e.runs) for e in section.experiments) == sorted(
        map(sorted, of_source.values())
    )


def test_rounds_that_train_one_ticket_are_marked(tmp_path):
    for round, accuracy in ((1, 80.0), (2, 82.0)):
        write(tmp_path, "one", "oneshot-transfer", round, [result(8, accuracy)], **saved("x"))
        write(tmp_path, "two", "oneshot-transfer-shuffle", round, [result(8, accuracy)], **saved(f"y{round}", round))
        write(tmp_path, "eb", "earlybird", round, [result(8, accuracy)])
    rows = numbers(tmp_path)
    counts = {label: (row["n"], row["tickets"]) for (label, _), row in rows.items()}
    assert counts == {"IMP transfer": ("2", "1"), "IMP shuffle": ("2", "2"), "EB": ("2", "2")}
    (section,) = sections(tmp_path)
    assert [("IMP transfer" in line, "IMP shuffle" in line) for line in remarks(section) if "saved" in line] == [
        (True, False)
    ]
    for table in (overview(section), every_ticket(section)):
        assert text_of(table).count("§") == 2  # at its number, and the note
        (marked,) = [row["method"] for row in table.rows if any("§" in cell for cell in row.values())]
        assert marked == "IMP transfer"


# --- source ---


def test_other_source_is_named_within_a_script_only(tmp_path):
    row = result(8, 80.0)
    imp, bird = ({"script": f"train_snn_{name}.py"} for name in ("laterewindlth", "earlybird"))
    later = {"resumed_with": [HERE | {"source": "z"}]}
    write_all(
        tmp_path,
        ("eb", "earlybird", 1, row, {"source": "b1", **bird}),
        ("eb", "earlybird", 2, row, {"source": "b2", **bird}),
        ("imp", "laterewindlth", 1, row, {"source": "i1", **imp}),
        ("imp", "laterewindlth", 2, row, {"source": "i1", **imp}),
    )
    about = [line for line in remarks_of(tmp_path) if "source" in line]
    assert len(about) == 1
    assert "EB" in about[0]
    assert "IMP" not in about[0]
    write(tmp_path, "local", "laterewindlth", 1, [row], source="i2", pruning_scope="local", **imp)
    write(tmp_path, "imp", "laterewindlth", 3, [row], source="i1", **imp, **later)
    about = [line for line in remarks_of(tmp_path) if "source" in line and "EB" not in line]
    (changed,) = [line for line in about if "imp/cifar10-vgg16-round3" in line]
    assert "imp/cifar10-vgg16-round1" not in changed
    (script,) = [line for line in about if "train_snn_laterewindlth.py" in line]
    assert "IMP, local" in script
    assert len(about) == 2


# --- left out ---


def test_what_is_left_out_is_on_the_page_with_the_reason(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    write(runs, "good", "earlybird", 1, [result(8, 90.0)])
    (write(runs, "gone", "earlybird", 1, []) / "args.json").unlink()
    (write(runs, "torn", "earlybird", 1, []) / "results.json").write_text("[")
    (write(runs, "short", "earlybird", 1, [], epochs("search", 0, 3)) / "summary.txt").unlink()
    (runs / "only-a-ticket" / "run" / "tickets").mkdir(parents=True)
    (runs / "good" / ".cifar10-vgg16-round2.deleted" / "tickets").mkdir(parents=True)  # a restart was interrupted
    main([str(runs), "--out", str(out)])
    assert set(read_runs(runs)[1]) == {f"{name}/cifar10-vgg16-round1" for name in ("gone", "torn")} | {
        "only-a-ticket/run"
    }
    for file in ("report.html", "tables.md"):
        lines = (out / file).read_text().replace("\\", "").splitlines()
        for folder, reason in {
            "gone/cifar10-vgg16-round1": "args.json",
            "only-a-ticket/run": "args.json",
            "torn/cifar10-vgg16-round1": "results.json",
            "short/cifar10-vgg16-round1": "3 epochs",
        }.items():
            assert any(folder in line and reason in line for line in lines), (file, folder)
