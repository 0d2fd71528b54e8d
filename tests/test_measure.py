"""measure_ticket.py on runs, single files, and what it refuses."""

import json
import shutil

import pytest

import measure_ticket
from utils.energy import energies

DERIVED = ("layer_costs", "neuron_costs", "neurobench", "spikes_per_image", "synops_per_image", "macs_per_image")


def measured(tmp_path, *argv):
    """What the tool writes."""
    measure_ticket.main([*map(str, argv), "--json", str(tmp_path / "costs.json")])
    return json.loads((tmp_path / "costs.json").read_text())


@pytest.fixture
def refused(refused):
    """The one line that the tool ends with."""
    return lambda *words: refused(measure_ticket.main, *words)


def test_a_runs_network_has_the_costs_and_the_accuracy_that_the_run_wrote_down(finished, tmp_path, capsys):
    run = finished("rigl")
    (row,) = run.results
    found = measured(tmp_path, run.folder)
    assert {name: found[name] for name in DERIVED} == {name: row[name] for name in DERIVED}
    assert found["test_accuracy"] == pytest.approx(row["test_accuracy"])
    assert found["energy_uj"] == energies(row)
    printed = capsys.readouterr().out
    for name, layer in (row["layer_costs"] | row["neuron_costs"]).items():
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [name]]
        assert f"{layer.get('weights_left', layer.get('neurons')):,}" in line
    assert all(name in printed for name in row["neurobench"])


def test_a_file_on_its_own_with_other_timesteps(finished, tmp_path):
    run = finished("rigl")
    file = tmp_path / "mailed" / "network.safetensors"
    file.parent.mkdir()
    shutil.copy(run.folder / "networks" / f"{run.results[0]['ticket']}.safetensors", file)
    few, many = (measured(tmp_path, file, "--timestep", t, "--test_samples", 10) for t in (1, 8))
    assert (few["timesteps"], many["timesteps"]) == (1, 8)
    assert few["macs_per_image"] == many["macs_per_image"]  # the image is convolved once
    assert 0 < few["synops_per_image"] < many["synops_per_image"]


def test_bad_input_is_one_line(finished, tmp_path, refused):
    run = finished("rigl")
    shutil.copy(run.folder / "networks" / f"{run.results[0]['ticket']}.safetensors", tmp_path / "network.safetensors")
    assert "--timestep" in refused(tmp_path / "network.safetensors")
    for folder in ("typo", "network.safetensors"):  # none, and a file
        assert folder in refused(run.folder, "--json", tmp_path / folder / "costs.json")
    assert "no/run" in refused("no/run")
    assert "--dataset" in refused(run.folder, "--dataset", "digits")
    line = refused(run.folder, "--dataset", "cifar11")
    assert "cifar11" in line
    assert "cifar100" in line


def test_ctrl_c_speaks_of_resuming_only_where_something_was_begun(finished, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure_ticket, "measure", interrupted)
    with pytest.raises(SystemExit) as stop:
        measure_ticket.main([str(finished("rigl").folder)])
    assert stop.value.code == 130
    assert "resume" not in capsys.readouterr().err
