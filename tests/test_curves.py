"""What TensorBoard's own reader finds is what stands in metrics.jsonl."""

import sys

import pytest
from conftest import Finished, folder_of, script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import Killed, kill_at


def read(folder):
    """(stage, tag) -> [(epoch, value)], every point that is in the files."""
    found = {}
    for stage in sorted((folder / "tensorboard").iterdir()):
        events = EventAccumulator(str(stage), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
        for tag in events.Tags()["scalars"]:
            found[stage.name, tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def logged(folder):
    found = {}
    for row in Finished(folder).rows:
        stage = f"{row['phase']}_level_{row['level']:02d}"
        numbers = {name: row[name] for name in row.keys() - {"phase", "level", "epoch", "divergences"}}
        numbers |= {f"divergences/{t}_timesteps": d for t, d in enumerate(row.get("divergences", []), start=2)}
        for tag, value in numbers.items():
            if value is not None:
                found.setdefault((stage, tag), []).append((row["epoch"], pytest.approx(value, rel=1e-6)))
    return found


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("earlyT_earlybird", {"search_level_00", "train_level_02"}),
        ("earlyT_laterewindlth", {"dense_level_00", "search_level_00", "search_level_01", "train_level_02"}),
    ],
)
@pytest.mark.parametrize("renamed", [False, True])
def test_curves_are_the_log_also_after_kills(tmp_path, tiny, monkeypatch, method, stages, renamed):
    flags, folder = [*tiny, "--timestep", "4", "--tensorboard"], folder_of(tmp_path, method)
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            kill_at(patch, 1 + kills % 6, renamed)
            try:
                script(method)(flags)
                break
            except Killed:
                kills += 1
    assert kills >= 4
    curves = read(folder)
    assert curves == logged(folder)
    assert {stage for stage, _ in curves} == stages
    tags = {tag for _, tag in curves}
    assert tags >= {"loss", "lr", "test_accuracy", "divergences/2_timesteps", "divergences/3_timesteps", "early_time"}


def test_the_flag_may_come_later_and_go(tmp_path, tiny, monkeypatch, capsys):
    method, folder = "laterewindlth", folder_of(tmp_path, "laterewindlth")
    with monkeypatch.context() as patch:
        kill_at(patch, 12, True)
        with pytest.raises(Killed):
            script(method)(tiny)
    script(method)([*tiny, "--tensorboard"])
    assert read(folder) == logged(folder)
    assert {stage for stage, _ in read(folder)} == {"dense_level_00", *(f"search_level_{n:02d}" for n in range(3))}
    script(method)([*tiny, "--restart"])
    assert not (folder / "tensorboard").exists()
    script(method)([*tiny, "--tensorboard"])  # finished
    assert "finished" in capsys.readouterr().out
    assert read(folder) == logged(folder)
    (folder / "results.json").unlink()
    (folder / "checkpoints" / "level_00.safetensors").unlink()  # a stage in the middle of the log runs again
    script(method)([*tiny, "--tensorboard"])
    assert read(folder) == logged(folder)


def test_without_the_package_it_is_one_line(tmp_path, tiny, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SystemExit) as stop:
        script("earlybird")([*tiny, "--tensorboard"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--tensorboard needs the package tensorboard" in line
    assert not (tmp_path / "runs").exists()
