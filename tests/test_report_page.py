"""The page of a single run, figures that show more than a number, and what tables.csv holds."""

import copy
import statistics

import pandas as pd
import pytest
from test_report import epochs, main, numbers, result, sections, text_of, write, write_all

from reporting.costs import energy_table
from reporting.figures import draw_all, early_time_tickets
from reporting.page import tables_of
from reporting.runs import COSTS
from reporting.settings import METHODS
from reporting.text import Spread, Table, significant
from utils.energy import energies

pytestmark = [pytest.mark.xdist_group("report"), pytest.mark.usefixtures("no_pictures")]
RATES = {"stem.neuron": 0.4, "conv.neuron": 0.1}
LAYERS = {"stem.weight": 10.0, "conv.weight": 90.0}


def drawn(root):
    """Figures by the part of their name behind the section's."""
    (section,) = sections(root)
    return {plot.name.removeprefix(f"{section.slug}-"): plot for plot in draw_all([section])[section.slug]}


def write_one(root, **more):
    row = result(8, 90.0, settled=True, layers=LAYERS, firing_rates=RATES, spikes_per_image=5147.0, **more)
    return write(root, "eb", "earlybird", 1, [row], epochs("search", 0, 3) + epochs("train", 8, 3))


def test_what_has_one_point_is_no_figure(tmp_path):
    write_one(tmp_path)
    assert set(drawn(tmp_path)) == {"learning-curves", "layer-sparsity", "firing-rates"}
    write(tmp_path, "rigl", "rigl", 1, [result(8, 91.0)])  # two methods at one sparsity can be compared by their cost
    assert set(drawn(tmp_path)) == {"learning-curves", "layer-sparsity", "firing-rates", "accuracy-search-cost"}
    write(tmp_path, "eb-14", "earlybird", 1, [result(14, 80.0, spikes_per_image=100.0)])
    figures = drawn(tmp_path)
    assert {"accuracy-sparsity", "search-sparsity", "spikes-sparsity"} < set(figures)
    for plot in figures.values():
        for axis in plot.figure.axes:
            marked = [line for line in axis.lines if line.get_marker() not in ("None", None)]
            assert "search-cost" in plot.name or max(len(set(line.get_xdata())) for line in marked) > 1


def test_a_single_run_has_its_facts_its_costs_and_its_layers(tmp_path):
    write_one(tmp_path)
    (section,) = sections(tmp_path)
    tables = tables_of(section, [], [])
    shown = "\n".join(text_of(table) + "\n" + "\n".join(table.rows[0]) for table in tables).splitlines()
    assert {"EB", "89.99 %", "level_08", "90.00 (n=1)", "5.15 k", "cifar10"} <= set(shown)
    assert any("CPU" in line for line in shown)
    assert all(len(table.rows) > 1 for table in tables)  # upright
    layers, rates = tables[-2:]
    assert [row["layer"] for row in layers.rows] == list(LAYERS)  # in the network's order
    assert [row["neurons"] for row in rates.rows] == list(RATES)
    write(tmp_path, "eb", "earlybird", 2, [result(8, 91.0)])
    (section,) = sections(tmp_path)
    assert not any("layer" in row for table in tables_of(section, [], []) for row in table.rows)


def test_a_run_without_a_ticket_has_a_page_too(tmp_path):
    folder = write(tmp_path / "runs", "eb", "earlybird", 1, [], epochs("search", 0, 3))
    (folder / "summary.txt").unlink()
    main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert "<svg" not in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "figures").is_dir()


def test_the_csv_holds_costs_with_spreads_rates_timesteps_and_sizes(tmp_path):
    for round in (1, 2):
        rates = {"firing_rates": {"a": 0.1 * round, "b": 0.3}}
        row = result(8, 90.0, **rates, **dict.fromkeys(COSTS, 1000.0 * round))
        write(tmp_path, "eb", "earlybird", round, [row], timestep=4)
    row = numbers(tmp_path)["EB", "level_08"]
    for name in ("macs_per_image", "ticket_bytes", "energy_uj_per_image"):
        assert float(row[f"{name}_mean"]) == 1500
        assert float(row[f"{name}_std"]) == pytest.approx(statistics.stdev([1000, 2000]), rel=1e-5)
    assert float(row["firing_rate_mean"]) == pytest.approx(statistics.mean([0.2, 0.25]))
    assert float(row["firing_rate_std"]) == pytest.approx(statistics.stdev([0.2, 0.25]), rel=1e-5)
    assert row["timestep"] == "4"


def test_a_round_counts_once_at_each_number_of_timesteps(tmp_path):
    write_all(
        tmp_path,
        ("eb", "earlybird", 1, result(8, 90.0), {}),
        ("half", "earlyT_earlybird", 1, result(8, 81.0, timesteps=3), {"early_time_threshold": 0.5}),
        ("paper", "earlyT_earlybird", 1, result(8, 83.0, timesteps=3), {}),
        ("zero", "earlyT_earlybird", 1, result(8, 82.0), {"early_time_threshold": 0.0}),
    )
    (section,) = sections(tmp_path)
    tickets = pd.concat(early_time_tickets(section, [e for e in section.experiments if e.name == "EB + ET"]))
    assert list(tickets["x"]) == [5, 3, 5, 3]  # of the base, then of the plain experiment
    (line,) = [
        line for line in drawn(tmp_path)["accuracy-early-time"].figure.axes[0].lines if line.get_label() == "89.99 %"
    ]
    assert list(line.get_ydata()) == [83.0, 90.0]


def test_a_line_per_sparsity_has_no_methods_colour_and_any_accuracy_is_between_0_and_100(tmp_path):
    for round, low in ((1, 0.0), (2, 14.0)):
        rows = [result(level, accuracy) for level, accuracy in ((0, 100.0), (8, low), (14, 100.0))]
        log = epochs("search", 14, 3, test_accuracy=100.0)
        write(tmp_path, "imp", "laterewindlth", round, rows, log)
        write(tmp_path, "zero", "laterewindlth", round, rows, log, rewinding_epoch=0)
    figures = drawn(tmp_path)
    colours = {colour for colour, *_ in METHODS.values()}
    for name in ("accuracy-rewind", "layer-sparsity"):
        lines = [line for line in figures[name].figure.axes[0].lines if line.get_label().endswith("%")]
        assert len(lines) > 1
        assert not {line.get_color().upper() for line in lines} & {colour.upper() for colour in colours}
        assert len({line.get_marker() for line in lines}) == len(lines)
    for name in ("accuracy-sparsity", "accuracy-rewind", "learning-curves"):
        axis = figures[name].figure.axes[-1]
        assert 0 <= axis.get_ylim()[0] < axis.get_ylim()[1] <= 100


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (0.0, 0.0, "0"),
        (0.6694, 0.0041, "0.669 ± 0.004"),
        (5147.0, 243.0, "5.15 ± 0.24 k"),
        (637900.0, 0.0, "638 k"),
        (1.5e6, float("nan"), "1.50 M"),
        (3e17, 0.0, "300000 T"),
    ],
)
def test_a_number_and_its_deviation_have_one_unit(mean, std, text):
    assert significant(Spread(mean, std, 2), 2) == text
    assert significant(Spread(mean, std, 2), 3) == f"{text} (n=2)"


def test_a_table_of_one_row_stands_upright():
    table = Table("costs", [{"method": ["EB", "in place"], "per image: spikes": "1", "n": "2"}], ["note"])
    turned = table.upright()
    assert [list(row.values()) for row in turned.rows] == [["per image, spikes", "1"], ["n", "2"]]
    assert list(turned.rows[0]) == ["method", "EB, in place"]
    assert turned.notes == table.notes
    both = Table("", table.rows * 2, [])
    assert both.upright() is both


COSTS_OF_LAYERS = {
    "layer_costs": {
        "conv": {"weights": 900, "weights_left": 90, "connections": 9000, "connections_left": 800, "fan_in": 9}
        | {"inputs": 100, "outputs": 1000, "calls": 5, "synops": 700.0, "macs": 20.0, "dense_macs": 10_000},
    },
    "neuron_costs": {"conv.neuron": {"neurons": 1000, "silent": 7, "spikes": 250.5}},
    "neurobench": {"footprint": 4000, "connection_sparsity": 0.9, "activation_sparsity": None, "Dense": 45_000},
}


def test_energies_stand_beside_those_of_the_anns_and_in_the_csv(tmp_path):
    for round in (1, 2):
        costs = copy.deepcopy(COSTS_OF_LAYERS)
        costs["layer_costs"]["conv"]["synops"] *= round
        write(tmp_path, "eb", "earlybird", round, [result(8, 90.0, **costs)])
    write(tmp_path, "rigl", "rigl", 1, [result(8, 91.0)])  # of an older version
    (section,) = sections(tmp_path)
    rows = {row["network"]: row for row in energy_table(section).rows}
    assert list(rows) == ["this network", "pruned ANN", "dense ANN"]
    expected = [energies(COSTS_OF_LAYERS | {"timesteps": 5})]
    expected.append(energies({"timesteps": 5, **costs}))
    row = numbers(tmp_path)["EB", "level_08"]
    for name, kinds in expected[0].items():
        for kind, value in kinds.items():
            mean = statistics.mean([value, expected[1][name][kind]])
            field = f"{name} {kind} uj".replace(" with", "").replace(" ", "_")
            assert float(row[f"{field}_mean"]) == pytest.approx(mean, rel=1e-5)
            (title,) = [t for t in rows[name] if kind.split()[0] in t and ("with memory" in t) == ("memory" in kind)]
            assert float(rows[name][title].split(" ")[0]) == pytest.approx(mean, rel=1e-2)
    assert (float(row["neurobench_footprint_mean"]), row["neurobench_activation_sparsity_n"]) == (4000, "")


def test_the_page_of_a_single_run_lists_what_each_layer_costs(tmp_path):
    write_one(tmp_path, **COSTS_OF_LAYERS)
    (section,) = sections(tmp_path)
    layers, neurons = tables_of(section, [], [])[-2:]
    assert {"90 of 900", "800 of 9,000", "700", "20"} <= set(text_of(layers).splitlines())
    assert {"250.5", "7 of 1,000"} <= set(text_of(neurons).splitlines())
