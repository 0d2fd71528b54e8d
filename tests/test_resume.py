"""A run that is killed anywhere and started again ends as one that was never stopped, bit for bit."""

import copy
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY, folder_of, make_tree, needs_a_compiler, script

from models import build_model
from utils import runs, training
from utils.data import _synthetic as synthetic
from utils.data import load_data
from utils.files import TEMPORARY, checksum, read_tensors, unsealed, write_tensors
from utils.flags import METHODS
from utils.records import identity, read_args, write_results, write_rows
from utils.runs import COPY, PREVIOUS, Run, load_network
from utils.signals import stop_deferred, stopping
from utils.training import MaskedUpdate, evaluate

TIMES = {"seconds", "search_seconds", "train_seconds", "checksum"}


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(folder):
    """All that a run wrote, but for the clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors" and path.stem != PREVIOUS:
            tensors, metadata = read_tensors(path, "")
            found[name] = tensors, without_times(metadata)
        elif path.name == "metrics.jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "results.json":
            found[name] = without_times(json.loads(path.read_text()))
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, tuple):
            (tensors, metadata), (others, other_metadata) = value, b[name]
            assert metadata == other_metadata, name
            assert tensors.keys() == others.keys(), name
            for key, tensor in tensors.items():
                assert torch.equal(tensor, others[key]), f"{name} {key}"
        else:
            assert value == b[name], name


class Killed(BaseException):
    """Nothing in the program catches it, like SIGKILL."""


def kill_at(monkeypatch, nth, renamed):
    """Die at the nth file, with the file written but not yet in place, or just after it came to its place."""
    real, count = os.replace, 0

    def replace(source, target):
        nonlocal count
        count += 1
        if count == nth and not renamed:
            if str(source).endswith(TEMPORARY):  # not the checkpoint that makes room
                os.truncate(source, os.path.getsize(source) // 2)
            raise Killed
        real(source, target)
        if count == nth:
            raise Killed

    monkeypatch.setattr("os.replace", replace)


def killed_early_bird(tmp_path, tiny, monkeypatch, nth):
    """The script, and what it left when it died at its nth file."""
    main = script("earlybird")
    with monkeypatch.context() as patch:
        kill_at(patch, nth, True)
        with pytest.raises(Killed):
            main(tiny)
    return main, contents(folder_of(tmp_path, "earlybird"))


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_any_file_and_resumed(tmp_path, tiny, monkeypatch, method, renamed):
    kill_and_resume(tmp_path, tiny, monkeypatch, method, renamed)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("earlyT_laterewindlth", "--precision bf16"),
        ("earlyT_earlybird", "--channels_last"),
        ("earlyT_laterewindlth", "--batch_norm over_time --optimizer adam"),
        ("earlyT_laterewindlth", "--neuron relu"),
        ("earlyT_laterewindlth", "--rewind lr --divergence js"),
        ("earlyT_laterewindlth", "--rewind none --evaluate_levels 1 2"),
        ("laterewindlth", "--rewind lr --rewinding_epoch 0"),
        ("laterewindlth", "--rewind none"),
    ],
)
def test_killed_and_resumed_with_other_options(tmp_path, tiny, monkeypatch, method, options):
    # given after the others, but for the folder, which is last
    kill_and_resume(tmp_path, [*tiny[:-2], *options.split(), *tiny[-2:]], monkeypatch, method, False)


def kill_and_resume(tmp_path, tiny, monkeypatch, method, renamed):
    main = script(method)
    main(tiny)
    whole = contents(folder_of(tmp_path, method))
    # the resumed run is itself killed a few files later: a chain of kills through the whole run
    flags = [*tiny[:-1], str(tmp_path / "killed" / "runs")]
    for kills in range(200):
        with monkeypatch.context() as patch:
            kill_at(patch, 1 + kills % 6, renamed)
            try:
                main(flags)
                break
            except Killed:
                pass
    assert kills >= 4
    resumed = folder_of(tmp_path / "killed", method)
    assert_same(whole, contents(resumed))
    assert not list(resumed.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("method", "rows", "options"),
    [
        ("earlyT_earlybird", 1, []),
        ("earlyT_laterewindlth", 6, []),
        pytest.param("oneshot", 1, ["--compile", "--precision", "bf16"], marks=needs_a_compiler),
    ],
)
def test_kill_9_of_the_process(tmp_path, tiny, method, rows, options):
    tiny = [*options, *tiny]
    script(method)(tiny)
    flags = [*tiny[:-1], str(tmp_path / "killed" / "runs")]
    folder = folder_of(tmp_path / "killed", method)
    command = [sys.executable, ROOT / f"train_snn_{method}.py", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = folder / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= rows):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = contents(folder)
    assert "results.json" not in done, "the process was to be killed before its end"
    script(method)(flags)
    assert_same(contents(folder_of(tmp_path, method)), contents(folder))


def test_files_are_readable_as_the_umask_allows(tmp_path, tiny):
    script("earlybird")(tiny)
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    files = [path for path in folder_of(tmp_path, "earlybird").rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {mode}


def test_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, tiny, monkeypatch, capsys):
    main, before = killed_early_bird(tmp_path, tiny, monkeypatch, 8)

    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")  # as a write has it, without the file's name

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(SystemExit) as stop:
            main(tiny)
    assert stop.value.code == 2
    assert re.search(r"No space left on device: '.*safetensors'", capsys.readouterr().err.strip().splitlines()[-1])
    after = contents(folder_of(tmp_path, "earlybird"))
    assert all(after[name][1] == value[1] for name, value in before.items() if name.endswith("safetensors"))
    main(tiny)
    assert json.loads((folder_of(tmp_path, "earlybird") / "results.json").read_text())


def test_training_goes_on_while_its_checkpoint_is_written(tmp_path, tiny, monkeypatch):
    """The write of epoch 0 waits until a step of epoch 1 is done."""
    script("laterewindlth")([*tiny, "--exp_name", "never-stopped"])
    stepped, steps, write, step = threading.Event(), [], runs.write_tensors, MaskedUpdate.__call__

    def slow(path, *rest, **options):
        if path.stem == "dense":
            assert stepped.wait(60)
        write(path, *rest, **options)

    def counted(self, loss):
        step(self, loss)
        steps.append(loss)
        if len(steps) == 4:  # 3 batches are an epoch
            stepped.set()

    monkeypatch.setattr(runs, "write_tensors", slow)
    monkeypatch.setattr(MaskedUpdate, "__call__", counted)
    script("laterewindlth")(tiny)
    assert_same(contents(folder_of(tmp_path, "laterewindlth")), contents(folder_of(tmp_path, "never-stopped")))


def test_checkpoint_is_of_the_moment_at_which_it_was_asked_for(tiny_args, monkeypatch):
    run = Run(tiny_args("laterewindlth"))
    run.begin(load_data(run.args))
    model, checkpoint = build_model("vgg16", 3, 10, width=0.0625), run.checkpoint("dense")
    run.resume(checkpoint, "dense", 0, range(4), model, None)
    asked, changed, write = copy.deepcopy(model), threading.Event(), runs.write_tensors

    def slow(*rest, **options):
        assert changed.wait(60)
        write(*rest, **options)

    monkeypatch.setattr(runs, "write_tensors", slow)
    run.save_checkpoint(checkpoint, 1, model, None)
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    changed.set()
    run.wait_for_checkpoint()
    load_network(checkpoint, model)
    assert checksum(model.state_dict()) == checksum(asked.state_dict())


def test_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_one(tmp_path, tiny, monkeypatch, capsys):
    write, steps, step = runs.write_tensors, [], MaskedUpdate.__call__

    def full(path, *rest, **options):
        if path.stem == "level_00":
            raise OSError(28, "No space left on device", str(path))
        write(path, *rest, **options)

    def counted(self, loss):
        step(self, loss)
        steps.append(loss)

    monkeypatch.setattr(runs, "write_tensors", full)
    monkeypatch.setattr(MaskedUpdate, "__call__", counted)
    with pytest.raises(SystemExit) as stop:
        script("laterewindlth")(tiny)
    assert stop.value.code == 2
    assert len(steps) <= 4 * 3  # the epoch that the checkpoint was of, and at most one more
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device" in line
    assert "level_00.safetensors" in line
    monkeypatch.undo()
    script("laterewindlth")(tiny)
    script("laterewindlth")([*tiny, "--exp_name", "never-stopped"])
    assert_same(contents(folder_of(tmp_path, "laterewindlth")), contents(folder_of(tmp_path, "never-stopped")))


def test_same_command_gives_the_same_weights_and_another_round_others(tmp_path, tiny):
    method = "laterewindlth"
    main = script(method)
    main(tiny)
    main([*tiny[:-1], str(tmp_path / "again" / "runs")])
    assert_same(contents(folder_of(tmp_path, method)), contents(folder_of(tmp_path / "again", method)))
    main([*tiny, "--round", "2"])
    first, second = (contents(folder_of(tmp_path, method, n))["checkpoints/level_02.safetensors"][0] for n in (1, 2))
    assert not torch.equal(first["model.stem.weight"], second["model.stem.weight"])


def test_finished_run_says_so_and_prints_its_table_without_training(tmp_path, tiny, monkeypatch, capsys):
    main = script("earlybird")
    main(tiny)
    table = capsys.readouterr().out.split("earlybird on")[1]
    monkeypatch.setattr("train_snn_earlybird.load_data", lambda args: pytest.fail("data were loaded"))
    before = contents(folder_of(tmp_path, "earlybird"))
    main(tiny)
    out = capsys.readouterr().out
    assert "finished" in out
    assert out.split("earlybird on")[1] == table
    assert_same(before, contents(folder_of(tmp_path, "earlybird")))


def test_other_flags_are_refused_by_name_and_restart_starts_over(tmp_path, tiny, capsys):
    main = script("earlybird")
    main(tiny)
    folder = folder_of(tmp_path, "earlybird")
    before = contents(folder)
    with pytest.raises(SystemExit) as stop:
        main([*tiny, "--learning_rate", "0.2", "--end_iter", "5"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--learning_rate was 0.1, now 0.2" in error
    assert "--end_iter was 4, now 5" in error
    assert "--restart" in error
    assert "--width" not in error
    assert_same(before, contents(folder))
    main([*tiny, "--learning_rate", "0.2", "--restart"])
    assert json.loads((folder / "args.json").read_text())["learning_rate"] == 0.2
    main([*tiny, "--restart"])
    assert_same(before, contents(folder))


def test_restart_with_bad_data_leaves_the_earlier_run_alone(tmp_path, tiny, capsys):
    main = script("earlybird")
    main(tiny)
    before = contents(folder_of(tmp_path, "earlybird"))
    with pytest.raises(SystemExit):
        main([*tiny, "--train_samples", "5000", "--restart"])
    assert_same(before, contents(folder_of(tmp_path, "earlybird")))
    assert "--train_samples must be from 1 to 1000" in capsys.readouterr().err


def test_run_in_another_place_goes_on_there(tmp_path, tiny, monkeypatch):
    main = script("laterewindlth")
    with monkeypatch.context() as patch:
        kill_at(patch, 12, True)
        with pytest.raises(Killed):
            main(tiny)
    moved = tmp_path / "elsewhere"
    (tmp_path / "runs").rename(moved)
    main([*tiny[:-1], str(moved)])
    assert not (tmp_path / "runs").exists()
    assert len(json.loads((moved / "laterewindlth/synthetic-vgg16-round1/results.json").read_text())) == 3


def damage_middle(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def pickle_instead(path):
    torch.save({"epoch": 3}, path)


def another_digit(path):
    text = path.read_text()
    place = next(i for i in reversed(range(len(text))) if text[i].isdigit() and text[i - 1] in ". ")
    path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])


def without_a_line(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))


def without_the_last_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def with_a_line_twice(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[1:]))


def deep(path):
    path.write_bytes(b"[" * 100_000)


DAMAGE = [truncate, empty, pickle_instead]
CHECKPOINTS = ("checkpoints/level_00.safetensors", "checkpoints/level_01.safetensors", "tickets/level_01.safetensors")
TEXTS = ("metrics.jsonl", "results.json", "args.json")
DAMAGED = [(name, damage) for name in CHECKPOINTS for damage in [*DAMAGE, damage_middle]]
DAMAGED += [(name, damage) for name in TEXTS for damage in [*DAMAGE, another_digit, deep]]
DAMAGED += [("metrics.jsonl", damage) for damage in (without_a_line, without_the_last_line, with_a_line_twice)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with runs, of which one was killed, and what the run ends with if it is not."""
    folder = tmp_path_factory.mktemp("killed")
    flags = [*TINY, "--output_dir", str(folder / "runs")]
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 22, True)
        with pytest.raises(Killed):
            script("laterewindlth")(flags)
    shutil.copytree(folder / "runs", folder / "whole" / "runs")
    script("laterewindlth")([*TINY, "--output_dir", str(folder / "whole" / "runs")])
    return folder / "runs", contents(folder_of(folder / "whole", "laterewindlth"))


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_damaged_file_is_named_and_nothing_is_lost(tmp_path, tiny, killed, capsys, name, damage):
    shutil.copytree(killed[0], tmp_path / "runs")
    folder = folder_of(tmp_path, "laterewindlth")
    damage(folder / name)
    script("laterewindlth")(tiny)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert warning.startswith(f"warning: {folder / name} is damaged (")
    assert_same(killed[1], contents(folder))


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    path, numbers = tmp_path / "numbers.safetensors", torch.arange(100_000)
    write_tensors(path, {"numbers": numbers}, {})
    tensors, _ = read_tensors(path, "")
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 8)
    assert torch.equal(tensors["numbers"], numbers)


def test_newest_checkpoint_falls_back_to_the_one_before(tmp_path, tiny, killed, monkeypatch):
    shutil.copytree(killed[0], tmp_path / "runs")
    folder = folder_of(tmp_path, "laterewindlth")
    newest, before = folder / "checkpoints/level_01.safetensors", folder / "checkpoints/previous.safetensors"
    assert (read_tensors(newest, "")[1]["epoch"], read_tensors(before, "")[1]["epoch"]) == (4, 3)
    damage_middle(newest)
    steps = Calls(MaskedUpdate.__call__)
    monkeypatch.setattr(MaskedUpdate, "__call__", steps)
    script("laterewindlth")(tiny)
    assert steps.count == 3 * (1 + 2), "one epoch of level 1 and the two of level 2"
    assert (folder / "checkpoints/level_01.damaged").exists()


def test_flags_that_are_damaged_in_both_places_are_refused(tmp_path, tiny, killed, capsys):
    shutil.copytree(killed[0], tmp_path / "runs")
    folder = folder_of(tmp_path, "laterewindlth")
    for name in ("args.json", COPY):
        another_digit(folder / name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        script("laterewindlth")(tiny)
    assert stop.value.code == 2
    assert f"{folder / COPY} is damaged (a checksum does not match)" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_earlier_version_is_refused_by_name(tmp_path, tiny, killed, capsys):
    shutil.copytree(killed[0], tmp_path / "runs")
    folder = folder_of(tmp_path, "laterewindlth")
    checkpoint = folder / "checkpoints/level_01.safetensors"
    tensors, metadata = read_tensors(checkpoint, "")
    header = {"metadata": json.dumps(metadata | {"format": 2}), "checksum": checksum(tensors)}
    whole = checkpoint.read_bytes()
    for write in (
        lambda: safetensors.torch.save_file(tensors, checkpoint, header),
        lambda: write_tensors(checkpoint, tensors, metadata | {"format": 2}),
    ):
        write()
        with pytest.raises(SystemExit) as stop:
            script("laterewindlth")(tiny)
        assert stop.value.code == 2
        assert re.search(rf"{checkpoint} .*(earlier version|format 2, this program reads 3)", capsys.readouterr().err)
    checkpoint.write_bytes(whole)
    (folder / "args.json").write_text(json.dumps(unsealed(json.loads((folder / "args.json").read_text()))))
    (folder / COPY).unlink()
    with pytest.raises(SystemExit) as stop:
        script("laterewindlth")(tiny)
    assert stop.value.code == 2
    assert f"{folder / 'args.json'} was written by an earlier version" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_any_file_removed_as_told_comes_back_the_same(tmp_path, tiny, method):
    flags = [*tiny, "--evaluate_levels", "0", "2"]
    main = script(method)
    main(flags)
    folder = folder_of(tmp_path, method)
    whole = contents(folder)
    for path in [*folder.glob("checkpoints/*"), *folder.glob("tickets/*")]:
        (folder / "results.json").unlink()
        path.unlink()
        main(flags)
        assert_same(whole, contents(folder))


def test_printed_lines_are_of_the_epoch_that_was_run(tmp_path, tiny, capsys):
    main = script("laterewindlth")
    main(tiny)
    folder = folder_of(tmp_path, "laterewindlth")
    (folder / "results.json").unlink()
    (folder / "checkpoints" / "level_00.safetensors").unlink()
    capsys.readouterr()
    main(tiny)
    rows = [row for row in contents(folder)["metrics.jsonl"] if (row["phase"], row["level"]) == ("search", 0)]
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    assert len(lines) == len(rows) == 2
    for line, row in zip(lines, rows, strict=True):
        assert f"epoch {row['epoch'] + 1}/4" in line
        assert f"loss {row['loss']:.4f}" in line


@pytest.mark.parametrize("method", METHODS)
def test_ticket_missing_from_a_finished_run_is_written_again(tmp_path, tiny, method):
    main = script(method)
    main(tiny)
    folder = folder_of(tmp_path, method)
    whole = contents(folder)
    (folder / "tickets" / "level_02.safetensors").unlink()
    main(tiny)
    assert_same(whole, contents(folder))


@pytest.mark.parametrize("method", METHODS)
def test_finished_run_with_the_dense_level_can_be_run_again(tiny, capsys, method):
    for _ in range(2):
        script(method)([*tiny, "--evaluate_levels", "0", "2"])
    out = capsys.readouterr().out
    assert "finished" in out
    for line in out.splitlines():
        if line.startswith("ticket: "):
            assert os.path.exists(line.removeprefix("ticket: "))


def test_checkpoint_of_another_stage_is_refused(tmp_path, tiny, capsys):
    main = script("laterewindlth")
    main(tiny)
    folder = folder_of(tmp_path, "laterewindlth")
    (folder / "results.json").unlink()
    (folder / "checkpoints/level_02.safetensors").write_bytes(
        (folder / "checkpoints/level_00.safetensors").read_bytes()
    )
    with pytest.raises(SystemExit) as stop:
        main(tiny)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "level_02.safetensors does not fit this run (it is of stage level_00" in error


def test_other_images_are_refused(tmp_path, tiny, capsys, monkeypatch):
    main, before = killed_early_bird(tmp_path, tiny, monkeypatch, 6)
    monkeypatch.setattr("utils.data._synthetic", lambda: synthetic(classes=9))
    with pytest.raises(SystemExit) as stop:
        main(tiny)
    assert stop.value.code == 2
    assert "begun with other images" in capsys.readouterr().err
    assert_same(before, contents(folder_of(tmp_path, "earlybird")))


HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_run_that_another_process_is_at_is_left_alone_until_that_is_dead(tmp_path, tiny, killed, capsys):
    shutil.copytree(killed[0], tmp_path / "runs")
    folder = folder_of(tmp_path, "laterewindlth")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder / "lock"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        (folder / "lock.holder").write_text("process 12 on some machine")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for more in ([], ["--restart"]):
            with pytest.raises(SystemExit) as stop:
                script("laterewindlth")([*tiny, *more])
            assert stop.value.code == 75
            assert f"{folder} is in use by process 12 on some machine" in capsys.readouterr().err
            assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    finally:
        holder.kill()
        holder.communicate()
    script("laterewindlth")(tiny)
    assert_same(killed[1], contents(folder))


def test_data_that_vanish_or_change_cost_nothing(tmp_path, tiny, monkeypatch, capsys):
    tree = tmp_path / "data" / "cifar10"
    make_tree(tree, count=8)
    flags = [
        *tiny,
        "--dataset",
        "cifar10",
        "--data_dir",
        str(tree.parent),
        "--train_samples",
        "16",
        "--test_samples",
        "8",
    ]
    folder = tmp_path / "runs" / "earlybird" / "cifar10-vgg16-round1"
    script("earlybird")([*flags, "--output_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        kill_at(patch, 14, True)
        with pytest.raises(Killed):
            script("earlybird")(flags)
    before = contents(folder)
    shutil.copytree(tree, tmp_path / "kept")

    def vanish():
        shutil.rmtree(tree)

    def change():
        os.truncate(tree / "train" / "ant" / "0.png", 200)

    def swap():
        image, other = (tree / "train" / name / "0.png" for name in ("ant", "bee"))
        image.write_bytes(other.read_bytes())

    for spoil, message in ((vanish, "is not in"), (change, "ant/0.png cannot be decoded"), (swap, "other images")):
        spoil()
        with pytest.raises(SystemExit) as stop:
            script("earlybird")(flags)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
        assert_same(before, contents(folder))
        shutil.copytree(tmp_path / "kept", tree, dirs_exist_ok=True)
    script("earlybird")(flags)
    assert_same(contents(tmp_path / "whole/earlybird/cifar10-vgg16-round1"), contents(folder))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("results.json", [{"level": 2}]),
        ("metrics.jsonl", [{"phase": "search", "level": "0", "epoch": 0, "timesteps": 3, "seconds": 1}]),
    ],
)
def test_wrong_types_are_damage_whatever_their_checksum(tmp_path, tiny, capsys, name, rows):
    main = script("earlybird")
    main(tiny)
    folder = folder_of(tmp_path, "earlybird")
    whole = contents(folder)
    write = write_rows if name == "metrics.jsonl" else write_results
    write(folder / name, rows, identity(read_args(folder / "args.json", "")))
    main(tiny)
    assert f"{folder / name} is damaged (" in capsys.readouterr().err
    assert_same(whole, contents(folder))


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "tickets/level_02.safetensors"])
def test_files_of_another_run_are_not_taken_for_its_own(tmp_path, tiny, capsys, name):
    main = script("laterewindlth")
    main(tiny)
    main([*tiny, "--seed", "2", "--exp_name", "other"])
    folder, other = folder_of(tmp_path, "laterewindlth"), tmp_path / "runs" / "other" / "synthetic-vgg16-round1"
    whole = contents(folder)
    shutil.copy(other / name, folder / name)
    capsys.readouterr()
    if name.startswith("tickets"):
        with pytest.raises(SystemExit) as stop:
            main(tiny)
        assert stop.value.code == 2
        assert f"{folder / name} is another ticket" in capsys.readouterr().err
    else:
        main(tiny)
        assert f"{folder / name} is damaged (" in capsys.readouterr().err
        assert_same(whole, contents(folder))


def test_checkpoint_of_a_run_with_other_flags_is_refused(tmp_path, tiny, killed, capsys):
    flags = [*tiny, "--learning_rate", "0.2"]
    script("laterewindlth")(flags)
    folder = folder_of(tmp_path, "laterewindlth")
    (folder / "results.json").unlink()
    shutil.copy(folder_of(killed[0].parent, "laterewindlth") / "checkpoints/dense.safetensors", folder / "checkpoints")
    with pytest.raises(SystemExit) as stop:
        script("laterewindlth")(flags)
    assert stop.value.code == 2
    assert "dense.safetensors does not fit this run" in capsys.readouterr().err


def test_runs_without_git(tmp_path, tiny, monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr("subprocess.run", missing)
    script("earlybird")(tiny)
    assert json.loads((folder_of(tmp_path, "earlybird") / "args.json").read_text())["git_commit"] is None


def test_checkpoint_of_another_network_is_refused(tmp_path, tiny, capsys):
    main = script("earlybird")
    main(tiny)
    main([*tiny, "--arch", "resnet19"])
    folder = folder_of(tmp_path, "earlybird")
    (folder / "results.json").unlink()
    other = folder_of(tmp_path, "earlybird", arch="resnet19") / "checkpoints" / "search.safetensors"
    (folder / "checkpoints" / "search.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(SystemExit) as stop:
        main(tiny)
    assert stop.value.code == 2
    assert "search.safetensors does not fit this run" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tiny, monkeypatch, capsys):
    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("train_snn_earlybird.load_data", interrupt)
    with pytest.raises(SystemExit) as stop:
        script("earlybird")(tiny)
    assert stop.value.code == 130
    assert "the same command, without --restart, goes on" in capsys.readouterr().err


class Calls:
    """Stands in for a function; at the chosen calls it sends this process a signal, before or after its work."""

    def __init__(self, function, number=signal.SIGTERM, before=False):
        self.function, self.number, self.before = function, number, before
        self.count, self.signal_at = 0, set()

    def __call__(self, *args, **kwargs):
        self.count += 1
        hit = self.count in self.signal_at
        if hit and self.before:
            os.kill(os.getpid(), self.number)
        result = self.function(*args, **kwargs)
        if hit and not self.before:
            os.kill(os.getpid(), self.number)
        return result

    def __get__(self, instance, owner):
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


def stopped_again_and_again(main, flags, calls):
    """Run the script, stopped at every third call, until it ends; how often it was stopped."""
    for stops in range(100):
        calls.signal_at = {calls.count + 3}
        code = 0
        try:
            main(flags)
        except SystemExit as stop:
            code = stop.code
        if code == 0:
            return stops
        assert code == 128 + calls.number
    return pytest.fail("it does not come to an end")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_signal_in_an_epoch_loses_no_step(tmp_path, tiny, monkeypatch, capsys, method, before):
    main = script(method)
    steps = Calls(MaskedUpdate.__call__, before=before)
    monkeypatch.setattr(MaskedUpdate, "__call__", steps)
    main(tiny)
    trained, steps.count = steps.count, 0
    capsys.readouterr()
    flags = [*tiny[:-1], str(tmp_path / "stopped" / "runs")]
    assert stopped_again_and_again(main, flags, steps) >= 4
    assert steps.count == trained, "a step was lost, and trained again"
    assert_same(contents(folder_of(tmp_path, method)), contents(folder_of(tmp_path / "stopped", method)))
    shown = capsys.readouterr()
    assert "stopped and saved after step 3 of 3" in shown.err
    assert "the same command, without --restart, goes on" in shown.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(("module", "name"), [(training, "forward"), (os, "replace")])
def test_signal_anywhere_else_loses_no_epoch(tmp_path, tiny, monkeypatch, module, name, number):
    method = "earlyT_laterewindlth"
    main = script(method)
    main(tiny)
    calls = Calls(getattr(module, name), number)
    monkeypatch.setattr(module, name, calls)
    flags = [*tiny[:-1], str(tmp_path / "stopped" / "runs")]
    assert stopped_again_and_again(main, flags, calls) >= 4
    assert_same(contents(folder_of(tmp_path, method)), contents(folder_of(tmp_path / "stopped", method)))


def test_second_sigterm_does_not_keep_the_epoch_from_being_saved(tmp_path, tiny, monkeypatch):
    real, writes = training.Run.save_epoch, []

    def save_epoch(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        writes.append(args)
        real(*args)

    steps = Calls(MaskedUpdate.__call__)
    steps.signal_at = {2}
    monkeypatch.setattr(MaskedUpdate, "__call__", steps)
    monkeypatch.setattr(training.Run, "save_epoch", save_epoch)
    with pytest.raises(SystemExit) as stop:
        script("earlybird")(tiny)
    assert stop.value.code == 143
    assert writes
    assert (folder_of(tmp_path, "earlybird") / "checkpoints" / "interrupted.safetensors").exists()


def test_folder_that_is_moved_during_the_run_is_not_begun_again(tmp_path, tiny, monkeypatch, capsys):
    script("earlybird")([*tiny, "--output_dir", str(tmp_path / "whole" / "runs")])

    def moving(*args):
        if (tmp_path / "runs").exists():
            (tmp_path / "runs").rename(tmp_path / "elsewhere")
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", moving)
        with pytest.raises(SystemExit) as stop:
            script("earlybird")(tiny)
    assert stop.value.code == 2
    assert str(folder_of(tmp_path, "earlybird") / "metrics.jsonl") in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    script("earlybird")([*tiny[:-1], str(tmp_path / "elsewhere")])
    moved = tmp_path / "elsewhere" / "earlybird" / "synthetic-vgg16-round1"
    assert_same(contents(folder_of(tmp_path / "whole", "earlybird")), contents(moved))


def test_second_ctrl_c_interrupts_the_step_and_saves_nothing_of_it(tmp_path, tiny, monkeypatch):
    main, folder = script("laterewindlth"), folder_of(tmp_path, "laterewindlth")

    def signalled(*args):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        reached.append("three signals were held back")
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("a second Ctrl-C was held back")

    reached = []
    with monkeypatch.context() as patch:
        patch.setattr(MaskedUpdate, "__call__", signalled)
        with pytest.raises(SystemExit):
            main(tiny)
    assert reached
    assert not list(folder.rglob("*.safetensors"))


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_closed_terminal_loses_no_step(tmp_path, tiny):
    """A script in a terminal that is closed amid an epoch; its progress bar can print no more."""
    flags = [*tiny, "--train_samples", "400", "--batch_size", "4", "--end_iter", "2", "--sparsity_round", "1"]
    folder = folder_of(tmp_path, "oneshot")
    terminal, inside = os.openpty()
    termios.tcsetwinsize(inside, (24, 120))

    def take_terminal():
        os.setsid()
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

    command = [sys.executable, ROOT / "train_snn_oneshot.py", *flags]
    process = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, preexec_fn=take_terminal,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(inside)
    said = b""
    while not re.search(rb"epoch 2/2.*\b[1-9]\d\d/400", said):
        said += os.read(terminal, 1024)
    os.close(terminal)
    assert process.wait() == 128 + signal.SIGHUP
    _, metadata = read_tensors(folder / "checkpoints" / "interrupted.safetensors", "")
    assert metadata["epoch"] == 1
    assert metadata["step"] >= 100 / 4
    script("oneshot")(flags)
    script("oneshot")([*flags, "--exp_name", "never-stopped"])
    assert_same(contents(folder), contents(tmp_path / "runs" / "never-stopped" / "synthetic-vgg16-round1"))


def test_signals_that_are_ignored_stay_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping(), stop_deferred() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not asked
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_may_go_on_with_its_steps_launched_in_another_way(tiny_args):
    args = tiny_args("laterewindlth")
    Run(args).begin(load_data(args))
    args.cuda_graph = True
    assert Run(args).identity
