"""The report on all methods: rows with names of their own, Table 2, accuracy against search cost."""

import json
import statistics
from dataclasses import replace

import pytest
from test_report import epochs, numbers, paper_table, result, sections, write

from reporting.comparison import shared_columns, table_2
from reporting.curves import learning_curves
from reporting.drawing import styles_of
from reporting.figures import draw_all
from reporting.search_cost import XLABEL, accuracy_and_cost
from reporting.settings import METHODS
from reporting.tables import every_ticket, plain_experiments

pytestmark = [pytest.mark.xdist_group("report"), pytest.mark.usefixtures("no_pictures")]
DENSE = {1: 92.0, 2: 94.0, 3: 91.0}
LEVELS = (8, 14)
COSTS = {"earlybird": 60, "oneshot-snip": 0, "oneshot-erk": 0, "oneshot-random": 0, "rigl": 1500, "gradrewiring": 2000}
LABELS = {"oneshot-erk": "ERK", "rigl": "RigL", "gradrewiring": "Grad R", "shortcycle": "short cycles"}
REACHED = {8: (89.0, 89.6), 14: (98.0, 98.1)}  # sparsities in % of Grad R, by round


def write_methods(root):
    """IMP in three rounds, the others in two; short cycles of three lengths; gradual pruning with its two rows."""
    for round, accuracy in DENSE.items():
        rows = [
            result(0, accuracy),
            *(result(level, accuracy - level / 10, search_epochs=280 * level) for level in LEVELS),
        ]
        write(root, "imp", "laterewindlth", round, rows)
    for round in (1, 2):
        for level in LEVELS:
            for method, cost in COSTS.items():
                own = {"train_seconds": 0.0} if method in ("rigl", "gradrewiring") else {}
                own |= {"sparsity": REACHED[level][round - 1]} if method == "gradrewiring" else {}
                row = result(level, 80.0 + round + len(method) / 10, search_timestep_epochs=cost, **own)
                row |= {"level": None} if method == "gradrewiring" else {}
                label = {"label": LABELS[method]} if method in LABELS else {}
                write(root, f"{method}-{level}", method, round, [row], **label)
            write_gradual(root, round, level)
        for cycle in (5.0, 10.0, 20.0):
            rows = [result(level, 80 + cycle / 4, search_timestep_epochs=5 * cycle * level) for level in LEVELS]
            flags = {"cycle_epochs": cycle, "rewinding_epoch": 20, "early_time": False, "prune_percent": 25.0}
            write(root, f"cycles-{cycle:g}", "shortcycle", round, rows, label="short cycles", **flags)


def write_gradual(root, round, level, early=False, accuracy=85.0, **flags):
    method, more = ("earlyT_gradual", " + ET") if early else ("gradual", "")
    names = {
        "method": f"{method}-in_place",
        "label": f"gradual in place{more}",
        "ticket": f"level_{level:02d}_in_place",
    }
    rows = [
        result(level, accuracy - 1, search_timestep_epochs=1500, train_seconds=0.0) | names,
        result(level, accuracy, search_timestep_epochs=900, method=method, label=f"gradual{more}"),
    ]
    log = epochs("search", level, 3, loss=3.0) + epochs("in_place", level, 2, loss=2.0) + epochs("train", level, 4)
    flags = {"early_time": early, "early_time_threshold": 0.6, "divergence": "kl"} | flags
    return write(root, f"{method}-{level}", method, round, rows, log, label=f"gradual{more}", **flags)


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    write_methods(root)
    (found,) = sections(root)
    return found


@pytest.fixture(scope="module")
def drawn(section):
    """The axes of the figure, from the lower sparsity to the higher."""
    return accuracy_and_cost(section, styles_of([e.label for e in section.experiments], METHODS))


def points(axis):
    """What is drawn in a pair of axes, by label: costs, accuracies, colour of the filling."""
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    return {name: (list(line.get_xdata()), list(line.get_ydata()), line.get_mfc()) for name, line in lines.items()}


# --- names ---


def test_a_row_is_reported_under_its_own_name_with_its_own_epochs(section):
    by_label = {e.label: e for e in section.experiments}
    assert {"gradual", "gradual in place"} <= by_label.keys()
    curves = learning_curves(replace(section, experiments=[by_label["gradual"], by_label["gradual in place"]]), METHODS)
    drawn = {line.get_label(): list(line.get_ydata()) for line in curves.figure.axes[0].lines}
    assert drawn["gradual, 98.22 %"] == [1.0] * 4
    assert len(by_label["gradual in place"].cells[-1].rows["epochs"].iloc[0]) == 3 + 2
    own = {(row["method"], row["ticket"]): row["own training"] for row in every_ticket(section).rows}
    assert "in place" in own["gradual in place", "level_08_in_place"]
    assert "s" in own["gradual", "level_08"]
    assert "in place" not in own["gradual", "level_08"]


def test_a_gradual_run_is_reported_as_far_as_it_is(tmp_path):
    folder = write_gradual(tmp_path, 1, 8)
    (folder / "results.json").write_text(json.dumps(json.loads((folder / "results.json").read_text())[:1]))
    (section,) = sections(tmp_path)
    assert {e.label: len(e.cells) for e in section.experiments} == {"gradual": 0, "gradual in place": 1}


def test_early_time_is_compared_in_place_with_in_place(tmp_path):
    write_gradual(tmp_path, 1, 8)
    write_gradual(tmp_path, 1, 8, early=True, accuracy=83.0, early_time_threshold=0.3)
    rows = numbers(tmp_path)
    for label, ticket in (("gradual + ET", "level_08"), ("gradual in place + ET", "level_08_in_place")):
        assert float(rows[label, ticket]["delta_accuracy_mean"]) == pytest.approx(-2), label
    assert rows["gradual", "level_08"]["delta_accuracy_mean"] == ""


def test_what_makes_a_label_is_not_named_again(tmp_path):
    flags = {"l1": 1e-5, "pruning_scope": "global"}
    for round in (1, 2):
        write(
            tmp_path,
            "a",
            "deeprewiring",
            round,
            [result(8, 90.0)],
            label="Deep R",
            noise=1e-5,
            from_dense=False,
            **flags,
        )
        dense = flags | {"from_dense": True, "noise": 0.0, "pruning_scope": "local"}
        write(tmp_path, "b", "deeprewiring-dense", round, [result(8, 90.0)], label="Deep R from dense", **dense)
        for name, label, grow in (("rigl", "RigL", "gradient"), ("rigl-random", "SET", "random")):
            write(tmp_path, name, name, round, [result(8, 90.0)], label=label, grow=grow)
        for penalty in (None, 0.5):
            write(tmp_path, f"g{penalty}", "gradrewiring", round, [result(8, 90.0)], label="Grad R", penalty=penalty)
    assert {label for label, _ in numbers(tmp_path)} == {
        *("Deep R", "Deep R from dense", "RigL", "SET", "Grad R", "Grad R, penalty 0.5")
    }


def test_held_out_images_make_another_section_unless_their_number_is_given(tmp_path):
    row = result(8, 90.0, valid_accuracy=88.0)
    write(tmp_path, "a", "earlybird", 1, [result(8, 90.0)])
    write(tmp_path, "b", "earlybird", 1, [row], valid_samples=0)
    write(tmp_path, "c", "earlybird", 2, [row], valid_samples=5000)
    write(tmp_path, "d", "earlybird", 1, [row | {"valid_accuracy": None}], valid_samples=100, train_samples=1000)
    write(tmp_path, "e", "earlybird", 2, [row], train_samples=1000)
    found = sections(tmp_path)
    assert [[run.args["exp_name"] for e in s.experiments for run in e.runs] for s in found] == [
        *(["a", "b"], ["c"], ["d", "e"])
    ]
    assert "5000" in found[1].title
    values = [s.experiments[0].cells[0].spread("valid_accuracy") for s in found]
    assert values[0] is None  # the first of a round counts
    assert [value.n for value in values[1:]] == [1, 1]
    columns = [[row.get("held out (%)") for row in every_ticket(s).rows] for s in found]
    assert columns == [[None], ["88.00 (n=1)"], ["88.00 (n=1)"]]


# --- Table 2 ---


def test_table_2_is_the_mean_of_differences_to_the_dense_network_of_the_same_round(section):
    table = table_2(section, paper_table("table2"))
    ours = table.rows[[row["method"] for row in table.rows].index("These runs") + 1 :]
    cells = {(row["method"], row["sparsity"]): row for row in ours if isinstance(row["method"], str)}
    accuracies = [80.0 + round + len("earlybird") / 10 for round in (1, 2)]
    deltas = [accuracy - DENSE[round] for round, accuracy in zip((1, 2), accuracies, strict=True)]
    shown = f"{statistics.mean(deltas):.2f} ± {statistics.stdev(deltas):.2f} (n=2)".replace("-", "−")  # noqa: RUF001
    assert cells["EB", "89.99 %"]["Δ accuracy"] == shown
    assert cells["EB", "89.99 %"]["baseline accuracy (%)"].startswith("93.00")  # of the two rounds that EB has
    assert cells["IMP", "98.22 %"]["Δ accuracy"].replace("−", "-").startswith("-1.40 ± 0.00 (n=3)")  # noqa: RUF001
    papers = [row for row in table.rows[: table.rows.index(ours[0])] if row["architecture"]]
    assert len(papers) == sum(row["dataset"] == "cifar10" for row in paper_table("table2"))
    assert {row["architecture"] for row in ours} == {"vgg16"}


def test_what_was_only_reached_is_listed_there_with_all_rounds(section):
    table = table_2(section, [])
    reached = [row for row in table.rows if "Grad R" in row["method"]]
    assert [row["sparsity"] for row in reached] == [f"{statistics.mean(REACHED[level]):.2f} %" for level in LEVELS]
    assert all("(n=2)" in row["Δ accuracy"] and "place" in row["method"][1] for row in reached)
    assert any("reached" in note and "Grad R" in note for note in table.notes)
    columns = shared_columns(plain_experiments(section), most=4)
    assert columns == pytest.approx([100 * (1 - 0.75**level) for level in LEVELS], abs=0.01)


def test_no_table_2_without_a_dense_network(tmp_path):
    write(tmp_path, "eb", "earlybird", 1, [result(8, 90.0)])
    (section,) = sections(tmp_path)
    assert table_2(section, paper_table("table2")).rows == []
    assert numbers(tmp_path)["EB", "level_08"]["against_dense_n"] == ""
    write(tmp_path, "imp", "laterewindlth", 1, [result(0, 93.0)])
    row = numbers(tmp_path)["EB", "level_08"]
    assert [float(row[f"against_dense_{what}"]) for what in ("mean", "n")] == [-3, 1]


def test_table_2_of_the_paper_names_its_methods():
    assert {row["method"]: row["name"] for row in paper_table("table2") if "repeated" not in row["method"]} == {
        "Deng et al.": "ADMM",
        "Bellec et al.": "Deep R",
        "Chen et al.": "Grad R",
        "IMP": "IMP",
    }
    assert {row["name"] for row in paper_table("table2")} <= METHODS.keys()


# --- accuracy against search cost ---


def test_methods_lie_at_what_their_search_costs(section, drawn):
    assert len(drawn.figure.axes) == len(LEVELS)
    for axis, level in zip(drawn.figure.axes, LEVELS, strict=True):
        found = points(axis)
        expected = {
            "EB": 60,
            "SNIP": 0,
            "ERK": 0,
            "RigL": 1500,
            "Grad R": 2000,
            "gradual": 900,
            "gradual in place": 1500,
        }
        assert {name: found[name][0] for name in expected} == {name: [cost] for name, cost in expected.items()}
        assert found["EB"][1] == pytest.approx([81.5 + 0.9])
        (cycles,) = [name for name in found if name.startswith("short cycles")]
        assert found[cycles][:2] == ([5 * cycle * level for cycle in (5, 10, 20)], [80 + c / 4 for c in (5, 10, 20)])
        assert "random" not in found
    assert drawn.figure.axes[-1].get_xlabel() == XLABEL


def test_what_trains_in_place_is_hollow_and_what_costs_nothing_is_beside_the_scale(drawn):
    for axis in drawn.figure.axes:
        hollow = {name for name, (*_, face) in points(axis).items() if face == "white"}
        assert hollow == {"RigL", "Grad R", "gradual in place"}
        low, high = axis.get_xlim()
        assert low < 0 < 60 < 2000 < high
        assert 0 in axis.get_xticks()
        place = axis.transData.transform
        assert place((0, 85))[0] < place((60, 85))[0] < place((1500, 85))[0]
    assert all(word in drawn.caption for word in ("Hollow", "Grad R", "n = 2"))


@pytest.mark.parametrize(("sparsity", "shown"), [(97.5, True), (95.0, False)])
def test_what_missed_its_sparsity_by_far_is_not_drawn(tmp_path, sparsity, shown):
    write(tmp_path, "imp", "laterewindlth", 1, [result(level, 90.0) for level in (0, *LEVELS)])
    write(tmp_path, "eb", "earlybird", 1, [result(level, 80.0) for level in LEVELS])
    for level, reached in zip(LEVELS, (89.9, sparsity), strict=True):
        own = {"sparsity": reached, "train_seconds": 0.0}
        write(tmp_path, f"grad-r-{level}", "gradrewiring", 1, [result(level, 85.0, **own)], label="Grad R")
    (section,) = sections(tmp_path)
    figure = accuracy_and_cost(section, styles_of([e.label for e in section.experiments], METHODS)).figure
    assert ["Grad R" in points(axis) for axis in figure.axes] == [True, shown]


def test_runs_that_stay_dense_are_not_among_snip_and_random_tickets(tmp_path):
    for kind, label in (("snip", "SNIP"), ("random", "random")):
        write(tmp_path, kind, f"oneshot-{kind}", 1, [result(8, 80.0), result(14, 70.0)], label=label)
    write(tmp_path, "bf16", "oneshot-random", 1, [result(0, 90.0)], label="random", precision="bf16")
    (section,) = sections(tmp_path)
    (figure,) = [plot.figure for plot in draw_all([section])[section.slug] if plot.name.endswith("snip-random")]
    assert points(figure.axes[0]).keys() == {"SNIP", "random"}


def test_dense_and_random_are_labelled_lines(drawn):
    for axis in drawn.figure.axes:
        low, high = axis.get_ylim()
        texts = {text.get_text().split()[0]: text.xy[1] for text in axis.texts}
        random = statistics.mean(80.0 + round + len("oneshot-random") / 10 for round in (1, 2))
        assert texts == pytest.approx({"dense": statistics.mean(DENSE.values()), "random": random})
        assert all(low < accuracy < high for accuracy in texts.values())


@pytest.mark.parametrize("accuracies", [(10.0, 97.0), (100.0, 100.0), (0.0, 100.0), (90.0, 90.5)])
def test_any_accuracy_is_inside_the_axes(tmp_path, accuracies):
    for name, method, accuracy in zip("ab", ("earlybird", "rigl"), accuracies, strict=True):
        write(tmp_path, name, method, 1, [result(8, accuracy)])
    (section,) = sections(tmp_path)
    (axis,) = accuracy_and_cost(section, styles_of(["EB", "rigl"], METHODS)).figure.axes
    low, high = axis.get_ylim()
    assert all(low <= y <= high for _, ys, _ in points(axis).values() for y in ys)
