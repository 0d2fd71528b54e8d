"""Scripts that are killed or stopped, and run again: they end as if nothing had happened, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TIME, Finished, script, words_of

from utils import stages, training
from utils.files import read_metadata, read_tensors


class Killed(BaseException):
    pass


def command(root, method, *more):
    return [*words_of(method, *more), "--checkpoint_minutes", "0", "--output_dir", str(root)]


def without_seconds(rows):
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]


def outcome(root):
    """What the one run below a folder leaves that does not depend on the clock, and on where it is."""
    (folder,) = (path.parent for path in root.rglob("summary.txt"))
    run = Finished(folder)
    tensors = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert {name.split("/")[0] for name in tensors} == {"tickets", "networks"}
    return tensors | {"log": without_seconds(run.rows), "results": without_seconds(run.results)}


def assert_same(ended, expected):
    assert ended.keys() == expected.keys()
    assert not [name for name, value in ended.items() if value != expected[name]]


def exit_code(method, flags):
    """Of a run in this process."""
    try:
        script(method)(flags)
    except SystemExit as end:
        return end.code
    return 0


# where a line is one of test_methods.py, the run that nobody stops is made once for both
RUNS = [
    ("earlyT_laterewindlth", "--optimizer adam"),
    ("earlyT_earlybird", "--eb_window 2 --eb_tolerance 0.5"),
    ("laterewindlth", "--rewind lr --prune_iterations 2"),
    ("oneshot", "--ticket magnitude --search_timestep 2 --control shuffle"),
    ("oneshot", "--ticket snip --snip_samples 10"),
    ("rigl", "--sparsity 80 --update_every 2 --update_until 0.7 --drop_fraction 0.5"),
    ("rigl", "--grow random --update_every 1 --end_iter 3 --distribution global"),
    ("deeprewiring", "--l1 0.1 --noise 0.1 --sparsity 80"),
    pytest.param("deeprewiring", "--from_dense --l1 0.1 --valid_samples 20", marks=pytest.mark.slow),
    ("gradrewiring", "--trials 2 --trial_epochs 2 --sparsity 80 --end_iter 3"),
    ("admm", "--admm_epochs 2 --rho 0.1 --pruning_scope local --end_iter 2"),
    ("gradual", f"--regrow 0.5 --dense_epochs 1 --prune_until 3 --early_time {TIME}"),
    ("shortcycle", f"--cycle_epochs 1.5 --end_iter 3 --early_time {TIME}"),
]


@pytest.mark.parametrize(("method", "more"), RUNS)
def test_killed_in_every_second_epoch(finished, tmp_path, monkeypatch, method, more):
    """Every second epoch is killed once, when it is in the log and not in a checkpoint."""
    flags = command(tmp_path / "killed", method, *more.split())
    expected = outcome(finished(method, *more.split()).folder)

    killed, trained, save = set(), [], stages.save_checkpoint

    def kill(path, state, metadata):
        place = metadata["stage"], metadata["epoch"]
        trained.append(place)
        if metadata["rows"] % 2 == 0 and place not in killed:
            killed.add(place)
            raise Killed
        save(path, state, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "save_checkpoint", kill)
        for _ in range(len(expected["log"])):
            try:
                script(method)(flags)
            except Killed:
                torch.manual_seed(random.getrandbits(30))  # the state of torch's own generator does not matter
    assert_same(outcome(tmp_path / "killed"), expected)
    assert len(killed) == len(expected["log"]) // 2
    assert len(trained) == len(expected["log"]) + len(killed)  # no other epoch was trained again


def test_killed_between_ticket_and_training(finished, tmp_path, monkeypatch):
    """What is drawn before training is in the folder by then, with weights that training has not touched."""
    flags = command(tmp_path / "killed", "oneshot", "--control", "reinit")
    with monkeypatch.context() as patch:
        patch.setattr(training, "loss_over_time", Mock(side_effect=Killed))
        with pytest.raises(Killed):
            script("oneshot")(flags)
    script("oneshot")(flags)
    assert_same(outcome(tmp_path / "killed"), outcome(finished("oneshot", "--control", "reinit").folder))


# --- signals -----------------------------------------------------------------------------------------------------


def send(patch, *sent):
    """Have this process send itself signals, one a training step."""
    sent, loss = list(sent), training.loss_over_time

    def step(logits, labels):
        if sent:
            os.kill(os.getpid(), sent.pop(0))
        return loss(logits, labels)

    patch.setattr(training, "loss_over_time", step)


@pytest.mark.parametrize("sent", [["SIGTERM"], ["SIGINT"], ["SIGINT", "SIGINT"]], ids="-".join)
def test_signal(finished, tmp_path, monkeypatch, capfd, sent):
    """Saved at the end of the epoch, however rare checkpoints are; a second Ctrl-C ends the run at once."""
    flags = [*command(tmp_path / "stopped", "earlybird"), "--checkpoint_minutes", "1000"]
    before = {name: signal.getsignal(getattr(signal, name)) for name in sent}
    with monkeypatch.context() as patch:
        send(patch, *(getattr(signal, name) for name in sent))
        assert exit_code("earlybird", flags) == 128 + getattr(signal, sent[0])
    assert {name: signal.getsignal(getattr(signal, name)) for name in sent} == before
    assert "stopped" in capfd.readouterr().err.splitlines()[-1]
    (folder,) = (path.parent for path in tmp_path.rglob("args.json"))
    assert not (folder / "summary.txt").exists()
    saved = folder / "checkpoints" / "newest.safetensors"
    assert (read_metadata(saved)["metadata"]["rows"] if saved.exists() else 0) == (sent != ["SIGINT", "SIGINT"])
    script("earlybird")(flags)
    assert_same(outcome(tmp_path / "stopped"), outcome(finished("earlybird").folder))


def test_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        send(monkeypatch, signal.SIGINT)
        assert exit_code("oneshot", command(tmp_path, "oneshot")) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def start(method, flags, **options):
    """A script in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, ROOT / f"train_snn_{method}.py", *flags], env=environment, **options)


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT"])
def test_signal_to_a_process(tmp_path, sent):
    flags = [*command(tmp_path / "stopped", "oneshot"), "--checkpoint_minutes", "1000", "--end_iter", "60"]
    process = start("oneshot", flags)
    for line in process.stdout:
        if "epoch 2/60" in line:
            process.send_signal(getattr(signal, sent))
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + getattr(signal, sent)
    assert "Traceback" not in errors
    (saved,) = tmp_path.rglob("newest.safetensors")
    assert 2 <= read_tensors(saved)[1]["metadata"]["epoch"] < 60
    script("oneshot")(flags)
    script("oneshot")([*command(tmp_path / "whole", "oneshot"), "--end_iter", "60"])
    assert_same(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["earlyT_laterewindlth", "earlyT_earlybird"])
def test_killed_by_the_system(tmp_path, method):
    """``kill -9`` twice, each time some moments after a random epoch."""
    more = ["--end_iter", "12", "--eb_window", "9"] if method == "earlyT_earlybird" else ["--end_iter", "12"]
    flags, draw = command(tmp_path / "killed", method, *more), random.Random(f"{method} 2207")
    for _ in range(2):
        process = start(method, flags)
        for _ in range(draw.randint(1, 8)):  # epochs, of more than 20: the run cannot end before it is killed
            process.stdout.readline()
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert exit_code(method, flags) == 0
    script(method)(command(tmp_path / "whole", method, *more))
    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))
    left = [path for path in (tmp_path / "killed").rglob("*") if path.is_file() and ".tmp" in path.suffixes]
    assert not left
