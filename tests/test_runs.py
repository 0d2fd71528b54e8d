"""The run folder: its name, what it says, and whom it refuses."""

import shutil
from argparse import Namespace
from importlib.metadata import version

import pytest
import torch
from conftest import FLAGS, Finished, script
from filelock import FileLock
from torch import nn

from models import ARCHITECTURES
from utils import datasets, files, stages
from utils.files import read_json, write_json
from utils.training import effective_seed

SMALL = "--end_iter 2 --checkpoint_minutes 0".split()
FOLDER = "earlybird/synthetic-alexnet-43.75-round1"


class Killed(BaseException):
    pass


def command(root, *more, method="earlybird"):
    return [*FLAGS[method].split(), *SMALL, *more, "--output_dir", str(root)]


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    """A run that was killed in its last epoch."""
    root, save = tmp_path_factory.mktemp("killed"), stages.save_checkpoint

    def kill(path, state, metadata):
        if (metadata["stage"], metadata["epoch"]) == ("train_02", 2):
            raise Killed
        save(path, state, metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "save_checkpoint", kill)
        with pytest.raises(Killed):
            script("earlybird")(command(root))
    return root


@pytest.fixture
def killed(tmp_path, killed_once):
    """The root of a run that can be resumed."""
    return shutil.copytree(killed_once, tmp_path / "runs")


@pytest.fixture
def refused(refused):
    """The one line that a command of Early-Bird ends with."""
    return lambda flags, **code: refused(script("earlybird"), *flags, **code)


def test_folders(finished):
    """The sparsity is in the name where a run has one."""
    names = {method: finished(method).folder.relative_to(finished(method).folder.parents[1]) for method in FLAGS}
    assert {method: str(name) for method, name in names.items()} == {
        "laterewindlth": "laterewindlth/synthetic-alexnet-round1",
        "earlyT_laterewindlth": "earlyT_laterewindlth/synthetic-alexnet-round1",
        "earlybird": FOLDER,
        "earlyT_earlybird": "earlyT_earlybird/synthetic-alexnet-43.75-round1",
        "oneshot": "oneshot-random/synthetic-alexnet-43.75-round1",
        **{name: f"{name}/synthetic-alexnet-43.75-round1" for name in ("rigl", "deeprewiring", "gradrewiring")},
        **{name: f"{name}/synthetic-alexnet-43.75-round1" for name in ("admm", "gradual")},
        "shortcycle": "shortcycle/synthetic-alexnet-round1",
    }
    left = {
        str(path.relative_to(finished("laterewindlth").folder))
        for path in finished("laterewindlth").folder.rglob("*.*")
    }
    levels = [f"{folder}/level_{level:02d}.safetensors" for folder in ("tickets", "networks") for level in range(3)]
    assert left == {
        *("args.json", "metrics.jsonl", "results.json", "summary.txt", "tickets/initial.safetensors"),
        *levels,
    }


def test_runs_of_two_sparsities_and_rounds_do_not_meet(run):
    folders = {
        run("oneshot", *SMALL, *more.split()).folder.name
        for more in ("--sparsity 90", "--sparsity 98.5", "--sparsity 90 --round 2")
    }
    assert folders == {f"synthetic-alexnet-{end}" for end in ("90-round1", "98.5-round1", "90-round2")}


def test_args_say_what_was_used(finished):
    run = finished("earlyT_earlybird")
    args = run.args
    assert (args["method"], args["label"], args["script"]) == (
        "earlyT_earlybird",
        "EB + ET",
        "train_snn_earlyT_earlybird.py",
    )
    assert (args["learning_rate"], args["timestep"], args["eb_distance"]) == (0.1, 4, "hamming")
    assert not {"rewinding_epoch", "restart", "checkpoint_minutes"} & args.keys()
    assert args["effective_seed"] == effective_seed(Namespace(seed=1234, round=1))
    circumstances = args["circumstances"]
    assert (circumstances["ranks"], circumstances["threads"]) == (1, torch.get_num_threads())
    assert circumstances["versions"]["torch"] == version("torch")
    assert circumstances["device_name"]
    assert len(circumstances["source"]) == 16
    assert args["data_checksum"] == finished("earlybird").args["data_checksum"]


def test_other_flags_are_refused_by_name_and_nothing_is_written(killed, refused):
    before = contents(killed)
    line = refused(command(killed, "--learning_rate", "0.2", "--seed", "3"))
    assert FOLDER in line
    assert all(flag in line for flag in ("--learning_rate", "--seed", "0.2"))
    assert "--momentum" not in line
    assert contents(killed) == before


def test_a_flag_that_an_older_version_did_not_know_was_off(killed, refused):
    path = killed / FOLDER / "args.json"
    flags = read_json(path)
    del flags["decay_kernels_only"]
    write_json(path, flags)
    assert "--decay_kernels_only" in refused(command(killed, "--decay_kernels_only"))
    script("earlybird")(command(killed))
    assert (killed / FOLDER / "summary.txt").exists()


def test_other_images_are_refused(killed, refused, monkeypatch):
    before, synthetic = contents(killed), datasets._synthetic

    def brighter():
        (images, labels), test = synthetic()
        images[0, 0, 0, 0] ^= 1
        return (images, labels), test

    monkeypatch.setattr(datasets, "_synthetic", brighter)
    assert FOLDER in refused([*command(killed), "--train_samples", "1000"])
    monkeypatch.setattr(datasets, "_synthetic", lambda: (synthetic()[0], (255 - synthetic()[1][0], synthetic()[1][1])))
    assert FOLDER in refused(command(killed))
    after = contents(killed)
    assert {path: now[0] for path, now in after.items()} == {path: was[0] for path, was in before.items()}


def test_moved_and_shown_in_another_way(killed, tmp_path, capsys):
    """The folder may move, and what is only shown may differ; another layout is noted."""
    moved = killed.rename(tmp_path / "moved")
    script("earlybird")(command(moved, "--no-channels_last", "--data_dir", "elsewhere"))
    assert (moved / FOLDER / "summary.txt").exists()
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "channels_last" in line]
    assert str(moved) in note
    (now,) = read_json(moved / FOLDER / "args.json")["resumed_with"]
    assert now["channels_last"] is False


def test_changed_source_and_machine_are_noted(killed, monkeypatch, capsys):
    monkeypatch.setattr("utils.experiment._source_checksum", lambda script: "another source")
    monkeypatch.setattr("utils.machine.device_name", lambda device: "another CPU")
    before = read_json(killed / FOLDER / "args.json")
    script("earlybird")(command(killed))
    notes = [line for line in capsys.readouterr().out.splitlines() if FOLDER in line and "another" in line]
    assert len(notes) == 2
    args = read_json(killed / FOLDER / "args.json")
    (later,) = args.pop("resumed_with")
    assert args == before
    assert (later["source"], later["device_name"]) == ("another source", "another CPU")


def test_same_circumstances_are_not_noted(killed):
    before = (killed / FOLDER / "args.json").read_bytes()
    script("earlybird")(command(killed))
    assert (killed / FOLDER / "args.json").read_bytes() == before


def test_finished_run_is_shown_again(run, capsys):
    folder = run("oneshot", *SMALL).folder
    before = contents(folder)
    capsys.readouterr()
    script("oneshot")(command(folder.parents[1], method="oneshot"))
    assert (folder / "summary.txt").read_text() in capsys.readouterr().out
    assert contents(folder) == before
    summary = (folder / "summary.txt").read_text()
    assert all(word in summary for word in ("level_02", "43.75", f"{Finished(folder).results[0]['test_accuracy']:.2f}"))


def test_restart_deletes_and_a_restart_that_is_killed_looks_like_no_run(run, monkeypatch):
    folder = run("oneshot", *SMALL).folder
    flags = command(folder.parents[1], "--restart", "--learning_rate", "0.05", method="oneshot")

    def killed(path, ignore_errors=False):
        if path.exists():
            (path / "args.json").unlink()  # half deleted
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            script("oneshot")(flags)
    assert not list(folder.parent.glob("[!.]*/summary.txt"))
    flags.remove("--restart")
    script("oneshot")(flags)
    assert Finished(folder).args["learning_rate"] == 0.05
    script("oneshot")([*flags, "--restart"])
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_run_in_use_is_left_alone(killed, refused):
    folder = killed / FOLDER
    before = contents(folder)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        for more in ([], ["--restart"]):
            assert FOLDER in refused(command(killed, *more), code=75)
    assert contents(folder) == before


DAMAGE = {
    "args.json": ["", "{", "[]", "{}", "3"],
    "metrics.jsonl": ["", "{", "{}\n" * 9, "3\n" * 9],
    "results.json": ["", "{", "3", "[3]", "[{}]", "{}"],
    "checkpoints/newest.safetensors": ["", "half", "[]"],
    "tickets/initial.safetensors": ["", "half"],
    "tickets/level_02.safetensors": ["", "half"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_damaged_file_is_named(killed, refused, name, text):
    path = killed / FOLDER / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if text == "half" else text.encode())
    assert str(path) in refused(command(killed))


def test_folder_without_args(killed, refused):
    (killed / FOLDER / "args.json").unlink()
    line = refused(command(killed))
    assert FOLDER in line
    assert "--restart" in line


@pytest.mark.parametrize("name", ["initial", "level_02"])
def test_missing_ticket_is_named(killed, refused, name):
    """What a run began with is not drawn again: another machine may draw other weights."""
    path = killed / FOLDER / "tickets" / f"{name}.safetensors"
    path.unlink()
    assert str(path) in refused(command(killed))


def test_weights_come_from_the_folder(tmp_path, monkeypatch):
    """A run resumes from the weights in its folder, whatever this machine would draw."""
    with monkeypatch.context() as patch:
        patch.setattr("utils.training.loss_over_time", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            script("earlybird")(command(tmp_path))
    path = tmp_path / FOLDER / "tickets" / "initial.safetensors"
    tensors, metadata = files.read_tensors(path)
    tensors["weights.classifier.bias"] += 1
    files.write_tensors(path, tensors, metadata)
    script("earlybird")(command(tmp_path))
    assert (Finished(tmp_path / FOLDER).ticket("level_02")[1]["classifier.bias"] == 1).all()


def test_tensorboard_has_every_epoch_once(killed):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script("earlybird")(command(killed, "--tensorboard"))
    written = EventAccumulator(str(killed / FOLDER / "tensorboard" / "train_02")).Reload()
    assert [event.step for event in written.Scalars("loss")] == [0, 1]
    rows = Finished(killed / FOLDER).stage("train", 2)
    assert [event.value for event in written.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    assert "test_accuracy" in written.Tags()["scalars"]


class Grouped(nn.Module):
    def __init__(self, channels, classes, neuron, width, batch_norm):
        super().__init__()
        self.odd = nn.Conv2d(3, 3, 1, groups=3)


class Sigmoid(Grouped):
    def __init__(self, *given):
        super().__init__(*given)
        self.odd = nn.Sigmoid()


@pytest.mark.parametrize("network", [Grouped, Sigmoid])
def test_network_whose_cost_cannot_be_counted_is_refused_before_training(tmp_path, monkeypatch, refused, network):
    monkeypatch.setitem(ARCHITECTURES, "alexnet", network)
    assert "odd" in refused(command(tmp_path))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_silent_and_emptied_layers_are_named(run, capsys):
    run("oneshot", *SMALL, "--v_threshold", "1000")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "stem_fire.neuron" in warnings[0]
    assert "hidden.3.neuron" in warnings[0]
    shot = run("oneshot", *SMALL, "--sparsity", "99.9")
    empty = [name for name, kept in shot.ticket("sparsity_99.9")[0].items() if not kept.any()]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line and "fires" not in line]
    assert empty
    assert len(warnings) == 1
    assert all(name in warnings[0] for name in empty)


def test_a_missing_checkpoint_or_network_is_named_and_nothing_is_lost(run, tmp_path, capsys, monkeypatch):
    """Results without what the run resumes from: it must not begin anew over them."""
    from utils import runs

    def stop(self, *args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "finish", stop)
        with pytest.raises(SystemExit):
            run("earlybird")
    (folder,) = (path.parent for path in tmp_path.rglob("args.json"))
    before = (folder / "metrics.jsonl").read_text()
    for name in ("networks/level_02.safetensors", "checkpoints/newest.safetensors"):
        (folder / name).rename(tmp_path / "away")
        with pytest.raises(SystemExit) as end:
            run("earlybird")
        assert end.value.code == 2
        assert name in capsys.readouterr().err
        assert (folder / "metrics.jsonl").read_text() == before
        (tmp_path / "away").rename(folder / name)
    assert run("earlybird").results


def test_a_run_that_another_process_has_finished_meanwhile_is_left_alone(run, monkeypatch):
    from utils import experiment

    load, done = experiment.load_data, []

    def finished_meanwhile(args):
        if not done:
            done.append(None)
            done.append(run("earlybird"))
        return load(args)

    monkeypatch.setattr(experiment, "load_data", finished_meanwhile)
    assert run("earlybird").rows == done[1].rows  # with the seconds of that one
    assert (done[1].folder / "metrics.jsonl").read_text().count("\n") == len(done[1].rows) == 6
