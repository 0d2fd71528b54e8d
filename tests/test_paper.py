"""The paper's tables as data: complete, and consistent except where ``note`` says they are not."""

import csv

import pytest
from conftest import ROOT

BASES = ("laterewindlth", "earlybird")
PAPER = ROOT / "benchmarks" / "paper"


def rows_of(name):
    with (PAPER / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


TABLE_1 = {(row["dataset"], row["arch"], row["method"], int(row["prunings"])): row for row in rows_of("table1.csv")}
WITH_ET = [key for key in TABLE_1 if key[2].startswith("earlyT_")]


def pair(key):
    """Base row and ET row of one sparsity."""
    dataset, arch, method, prunings = key
    return TABLE_1[dataset, arch, method.removeprefix("earlyT_"), prunings], TABLE_1[key]


def ratio_range(base, early):
    """Speed gains that two durations printed with two digits can stand for."""
    low, high = (float(base["hours"]) + half for half in (-0.005, 0.005))
    return low / (float(early["hours"]) + 0.005), high / (float(early["hours"]) - 0.005)


def test_table_1_is_complete():
    assert set(TABLE_1) == {
        (dataset, arch, method, prunings)
        for dataset in ("svhn", "fmnist", "cifar10", "cifar100")
        for arch in ("vgg16", "resnet19")
        for method in (*BASES, *(f"earlyT_{base}" for base in BASES))
        for prunings in (4, 8, 11, 14)
    }
    assert len(rows_of("table1.csv")) == len(TABLE_1)
    for key, row in TABLE_1.items():
        assert 50 < float(row["accuracy"]) < 100
        assert 0 < float(row["hours"]) < 100
        assert bool(row["delta_accuracy"]) == bool(row["speed_gain"]) == (key in WITH_ET)


def test_sparsities_are_prunings_of_a_quarter():
    for (*_, prunings), row in TABLE_1.items():
        # of all parameters; batch norm and biases, which stay, are under 0.1 % of them
        assert float(row["sparsity"]) == pytest.approx(100 * (1 - 0.75**prunings), abs=0.1)


def test_delta_is_the_difference_of_the_accuracies_but_in_two_rows():
    off = {}
    for key in WITH_ET:
        base, early = pair(key)
        difference = round(float(early["accuracy"]) - float(base["accuracy"]), 2)
        if difference != float(early["delta_accuracy"]):
            off[key] = (float(early["delta_accuracy"]), difference)
    assert off == {
        ("cifar10", "resnet19", "earlyT_earlybird", 11): (-0.50, -0.25),
        ("cifar10", "resnet19", "earlyT_earlybird", 14): (-1.09, 0.23),
        ("cifar100", "resnet19", "earlyT_earlybird", 8): (-0.12, -0.11),  # a rounding
    }
    assert all("delta" in TABLE_1[key]["note"] for key in off)


def test_speed_gain_is_the_ratio_of_the_hours():
    contradicts = set()
    for key in WITH_ET:
        base, early = pair(key)
        low, high = ratio_range(base, early)
        if not low - 0.01 < float(early["speed_gain"]) < high + 0.005:  # some are cut off, not rounded
            contradicts.add(key)
    svhn = {("svhn", "resnet19", "earlyT_earlybird", prunings) for prunings in (4, 8, 11, 14)}
    cifar10 = {("cifar10", "vgg16", "earlyT_earlybird", prunings) for prunings in (11, 14)}
    assert contradicts == svhn | cifar10 | {("cifar10", "resnet19", "earlyT_earlybird", 11)}
    assert all("hours" in TABLE_1[key]["note"] for key in contradicts)


def test_notes_stand_only_where_something_is_wrong():
    assert sum(bool(row["note"]) for row in TABLE_1.values()) == 9


def test_other_tables():
    table_2 = rows_of("table2.csv")
    assert len(table_2) == 21
    assert {float(row["baseline_accuracy"]) for row in table_2 if row["method"] == "IMP"} == {93.22, 71.34}
    seconds = rows_of("supplement_table1.csv")
    for arch in ("vgg16", "resnet19"):
        of_arch = [float(row["seconds"]) for row in seconds if row["arch"] == arch]
        assert len(of_arch) == 5
        assert of_arch == sorted(of_arch)
    for row in rows_of("supplement_table2.csv"):
        assert (float(row["mean"]) == 1) == (row["timesteps"] == "2")
