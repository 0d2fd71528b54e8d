"""A run in miniature, killed at every write: resumed, it ends with the files of a run that nobody stopped."""

import json
import os
from argparse import Namespace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from utils import files, stages
from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.data import Split
from utils.datasets import DATASETS
from utils.files import DamagedError, read_tensors
from utils.masks import dense_mask, rewind
from utils.runs import Run
from utils.stages import Stopped

NEVER = 1e9  # minutes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, images, timesteps):
        return self.last(self.norm(self.first(images.flatten(1)))[None].expand(timesteps, -1, -1))


class Patience:
    """An object with a state: it has seen enough after so many losses."""

    def __init__(self):
        self.losses, self.mask = [], {}

    def observe(self, loss, mask):
        self.losses, self.mask = [*self.losses, loss], mask
        return {"settled": self.enough}

    @property
    def enough(self):
        return len(self.losses) == 2

    def state_dict(self):
        return {"losses": self.losses, "mask": self.mask}

    def load_state_dict(self, state):
        self.losses, self.mask = list(state["losses"]), state["mask"]


def flags(folder, minutes, **more):
    shown = {"dataset": "synthetic", "arch": "net", "round": 1, "seed": 1, "method": "mini", "label": "mini"}
    training = {"timestep": 1, "precision": "fp32", "device": "cpu", "end_iter": 3, "tensorboard": False}
    run = {"output_dir": str(folder), "exp_name": "mini", "restart": False, "checkpoint_minutes": minutes}
    return Namespace(**(shown | training | run | more))


def train(model, optimizer, mask, purpose, epoch, trained):
    """A step on random images; the row of its epoch."""
    trained.append((purpose, epoch))
    draw = torch.Generator().manual_seed(1000 * purpose + epoch)
    images, labels = torch.randn(6, 12, generator=draw), torch.randint(2, (6,), generator=draw)
    optimizer.zero_grad()
    loss = F.cross_entropy(model.train()(images, 1)[0], labels)
    loss.backward()
    optimizer.step()
    for name, kept in mask.items():
        model.get_parameter(name).data.mul_(kept)
    row = {"timesteps": 1, "lr": 0.1, "loss": loss.item(), "train_accuracy": 0.0}
    return row | {"test_accuracy": loss.item(), "seconds": 0.5}


def mini(args, signal_in=None):
    """Three stages: one with a rewind point made on the way, one that ends early, one whose mask is live. Returns the
    epochs that were trained."""
    run, trained = Run(args), []
    if run.finished:
        return trained
    torch.manual_seed(0)
    model = Net()
    run.begin(model, {}, "images", {"source": "this"})

    point = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    dense = run.stage("dense", model=model, optimizer=optimizer, point=point)
    for epoch in dense.epochs(range(2)):
        row = train(model, optimizer, {}, 1, epoch, trained)
        if epoch == 0:
            for name, value in model.state_dict().items():
                point[name].copy_(value)
        dense.commit(epoch, row)
    whole, point = run.ticket("level_00", dense_mask(model), point, 0, epoch=1)

    rewind(model, point, whole)
    optimizer, patience = torch.optim.Adam(model.parameters(), 0.01), Patience()
    search = run.stage("search", model=model, optimizer=optimizer, patience=patience)
    for epoch in search.epochs(range(5)):
        row = train(model, optimizer, whole, 2, epoch, trained)
        kept = {name: weight.detach().abs() > 0.1 for name, weight in model.named_parameters() if weight.ndim > 1}
        row |= patience.observe(row["loss"], kept)
        if signal_in == epoch:
            run.stop = 15
        search.commit(epoch, row, last=patience.enough)
    mask, weights = run.ticket("level_01", patience.mask, point, 1, epoch=0)

    rewind(model, weights, mask)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    stage = run.stage("train", 1, model=model, optimizer=optimizer, mask=mask)
    grown = mask["first.weight"].view(-1)  # what holds the mask by reference, as a captured step does
    for epoch in stage.epochs(range(1, 3)):
        row = train(model, optimizer, mask, 3, epoch, trained)
        grown[epoch::3] ^= True
        stage.commit(epoch, row)
    images = torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2)
    test = Split(images, torch.zeros(4, dtype=torch.int64), DATASETS["synthetic"])
    run.save_result("level_01", 1, mask, model, test, [dense, search], stage)
    run.finish()
    return trained


class Killed(BaseException):
    pass


class Killer:
    """Kills the process before its n-th write, and leaves half of what was to be written."""

    def __init__(self, patch):
        self.left = None
        self.writes = 0
        replace, log = files._replace, Run.log

        def dying_replace(path, write):
            if self.due():
                write(path.with_name(f"{path.name}.half{files.TEMPORARY}"))
                raise Killed
            replace(path, write)

        def dying_log(run, row):
            if self.due():
                with (run.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(row)[:20])
                raise Killed
            log(run, row)

        patch.setattr(files, "_replace", dying_replace)
        patch.setattr(Run, "log", dying_log)
        patch.setattr(os, "fsync", lambda file: None)

    def due(self):
        self.writes += 1
        return self.left is not None and self.writes > self.left

    def run(self, args, before=None):
        """Run it up to a write, or to its end. Returns whether it came to its end, and the epochs trained."""
        self.writes, self.left = 0, before
        try:
            return True, mini(args)
        except Killed:
            return False, []
        finally:
            self.left = None


@pytest.fixture
def killer(monkeypatch, capsys):
    return Killer(monkeypatch)


def contents(folder):
    """All files of a run, but for those that a kill has left half written."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != files.TEMPORARY)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if not path.name.endswith(".lock")}


def without_folder(contents):
    """The summary and ``args.json`` name the folder."""
    return {
        name: content for name, content in contents.items() if name.split("/")[-1] not in ("summary.txt", "args.json")
    }


@pytest.fixture
def expected(tmp_path, killer):
    """Files and number of writes of a run that nobody stops."""
    _, trained = killer.run(flags(tmp_path / "whole", 0))
    assert [epoch for _, epoch in trained] == [0, 1, 0, 1, 1, 2]
    return contents(tmp_path / "whole"), killer.writes


def check(killer, folder, minutes, kills, expected):
    for kill in kills:
        ended, _ = killer.run(flags(folder, minutes), kill)
        if ended:
            return False
    ended, trained = killer.run(flags(folder, minutes))
    assert ended
    now = contents(folder)
    assert now.keys() == expected.keys(), kills
    differ = [name for name, content in without_folder(now).items() if content != expected[name]]
    assert not differ, (kills, differ)
    assert mini(flags(folder, minutes)) == []  # it is finished
    return len(trained)


@pytest.mark.parametrize("minutes", [0, NEVER])
def test_killed_at_any_write(tmp_path, killer, expected, minutes):
    files, writes = expected
    killer.run(flags(tmp_path / "counted", minutes))
    counted = killer.writes
    left = [check(killer, tmp_path / str(kill), minutes, [kill], files) for kill in range(counted)]
    assert left[0] == 6
    assert left[-1] == 0
    assert left == sorted(left, reverse=True)
    assert set(left) == (set(range(7)) if minutes == 0 else {6, 4, 2, 0})  # what is saved is not trained again
    assert (counted == writes) == (minutes == 0)


@pytest.mark.parametrize("minutes", [0, pytest.param(NEVER, marks=pytest.mark.slow)])
def test_killed_twice(tmp_path, killer, expected, minutes):
    files, writes = expected
    step = 2 if minutes == NEVER else 4
    pairs = [(one, two) for one in range(0, writes, step) for two in range(0, writes, step)]
    checked = [check(killer, tmp_path / f"{one}-{two}", minutes, [one, two], files) for one, two in pairs]
    assert len(set(checked)) > 3


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_signal_saves_at_the_end_of_the_epoch(tmp_path, expected, epoch):
    """Whatever the minutes between checkpoints, and also in the epoch that ends the stage."""
    with pytest.raises(Stopped) as stopped:
        mini(flags(tmp_path / "runs", NEVER), signal_in=epoch)
    assert stopped.value.number == 15
    assert len(mini(flags(tmp_path / "runs", NEVER))) == 3 - epoch
    now = without_folder(contents(tmp_path / "runs"))
    assert now == {name: expected[0][name] for name in now}


def test_checkpoint_of_another_stage_is_refused(tmp_path, killer):
    args = flags(tmp_path, 0)
    killer.run(args, 12)
    run = Run(args)
    run.begin(Net(), {}, "images", {"source": "this"})
    with pytest.raises(DamagedError, match="newest"):
        next(run.stage("other").epochs(range(3)))


def test_time_between_checkpoints(tmp_path, monkeypatch, capsys):
    """With a checkpoint every 3 minutes and epochs of 2, every second epoch of a long stage is saved, and the last."""
    now, saved = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    run = Run(flags(tmp_path, 3))
    run.begin(Net(), {}, "images", {"source": "this"})
    save = stages.save_checkpoint
    monkeypatch.setattr(stages, "save_checkpoint", lambda *given: (saved.append(given[2]["epoch"]), save(*given)))
    stage = run.stage("dense", point={"a": torch.zeros(1)})
    row = {"timesteps": 1, "lr": 1.0, "loss": 1.0, "train_accuracy": 1.0, "test_accuracy": None, "seconds": 120.0}
    for epoch in stage.epochs(range(7)):
        now[0] += 120
        stage.commit(epoch, row)
    assert saved == [2, 4, 6, 7]
    assert [row["stop"] for row in stage.rows] == [7] * 7
    assert "dense_00 epoch 1/3" in capsys.readouterr().out


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [partial(torch.optim.SGD, momentum=0.9, fused=True), partial(torch.optim.Adam, fused=True)]
)
def test_optimizer_continues_on_weights_with_channels_innermost(tmp_path, make):
    """A fused step pairs what lies at the same place in memory."""

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()

    models = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    (whole, first), (resumed, second) = ((model, make(model.parameters(), 1e-3)) for model in models)
    step(whole, first)
    save_checkpoint(tmp_path / "c", {"model": whole, "optimizer": first}, {})
    load_checkpoint(tmp_path / "c", {"model": resumed, "optimizer": second}, "cpu")
    assert resumed.weight.is_contiguous(memory_format=torch.channels_last)
    step(whole, first)
    step(resumed, second)
    assert torch.equal(resumed.weight, whole.weight)


class Holder:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_nested_state_and_numbers_as_keys(tmp_path):
    state = {
        3: [torch.arange(2), {"x": torch.tensor(1.5), -1: None}],
        "a": {"b": torch.zeros(1)},
        "a.b": torch.ones(1),
        "3": {0: {"": torch.tensor([True, False])}, "empty": {}, "none": []},
        "text": "a",
        "number": 0.1 + 0.2,
        "large": 2**80,
        "flag": True,
        "bf16": torch.ones(2, dtype=torch.bfloat16),
    }
    save_checkpoint(tmp_path / "c", {"holder": Holder(state)}, {"epoch": 3})
    read = Holder(None)
    load_checkpoint(tmp_path / "c", {"holder": read}, "cpu")
    assert read_tensors(tmp_path / "c")[1]["metadata"] == {"epoch": 3}
    assert repr(read.state) == repr(state)


SAVED = {"holder": Holder({"a": 1}), "mask": {"a": torch.ones(2)}, "model": nn.Linear(3, 2)}


@pytest.mark.parametrize(
    "other",
    [
        {"holder": SAVED["holder"], "mask": SAVED["mask"]},
        SAVED | {"more": {"a": torch.ones(2)}},
        SAVED | {"mask": {"b": torch.ones(2)}},
        SAVED | {"mask": {"a": torch.ones(2), "b": torch.ones(2)}},
        SAVED | {"mask": {"a": torch.ones(3)}},
        SAVED | {"mask": {"a": torch.ones(4, 2)}},
        SAVED | {"mask": 3},
        SAVED | {"model": nn.Linear(4, 2)},
        SAVED | {"model": torch.optim.SGD(nn.Linear(3, 2).parameters(), 0.1)},
    ],
    ids=["fewer", "more", "renamed", "larger", "longer", "broadcast", "number", "network", "optimizer"],
)
def test_checkpoint_of_other_objects_is_refused(tmp_path, other):
    save_checkpoint(tmp_path / "here", SAVED, {})
    load_checkpoint(tmp_path / "here", SAVED, "cpu")
    with pytest.raises(DamagedError, match="here"):
        load_checkpoint(tmp_path / "here", other, "cpu")
