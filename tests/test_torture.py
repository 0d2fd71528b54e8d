"""What nobody does on purpose: runs killed and stopped at random moments, files damaged at random, hours of epochs.

Short here, long with ``--torture`` (``make torture``), which is what the README's figures are from. The random numbers
are fixed; when a moment comes is up to the machine.
"""

import collections
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from itertools import groupby

import numpy as np
import pytest
from conftest import ROOT, TINY, Finished, folder_of
from forks import TRACEBACK, UNPICKLED, run_script, workers
from PIL import Image
from test_resume import assert_same, contents

from utils.errors import InputError
from utils.files import read_tensors
from utils.runs import PREVIOUS
from utils.tickets import load_ticket

SEED = 2207
STEPS = 3  # of an epoch of TINY: 40 images in batches of 16


@pytest.fixture(scope="module")
def pool():
    with workers() as pool:
        yield pool


def flags_of(folder, *more):
    return [*TINY, "--evaluate_levels", "1", "2", *more, "--output_dir", str(folder / "runs")]


def undisturbed(pool, folder, method, *more):
    """A run that nothing happens to: how it ended, and what it wrote."""
    folder.mkdir()
    ended = pool.submit(run_script, method, flags_of(folder, *more), folder / "log").result()
    assert ended.code == 0, ended.errors
    return ended, contents(folder_of(folder, method))


# --- killed and stopped at random moments ----------------------------------------------------------------------------


def writing(folder):
    return any(folder.rglob("*.tmp"))


def killed_and_resumed(method, folder, moments, in_write, sent):
    """One trial: a run that is sent a signal at some moments, each counted from the last start and put off to the next
    write if wanted, and then left alone.

    Returns:
        How the processes ended, the last one undisturbed, and whether the first signal came inside of a write.
    """
    folder.mkdir()
    flags, ended, first_in_write = flags_of(folder), [], False
    until = partial(writing, folder) if in_write else None
    for moment in moments:
        ended.append(run_script(method, flags, folder / "log", moment, until, sent=sent))
        first_in_write = first_in_write or (len(ended) == 1 and writing(folder))
        if ended[-1].code == 0:  # it was done before the moment came
            return ended, first_in_write
    return [*ended, run_script(method, flags, folder / "log")], first_in_write


def where(rows, steps, in_write):
    """What a run was doing when it was killed after so many steps."""
    if in_write:
        return "inside of a write"
    if steps % STEPS:
        return "inside of an epoch"
    stages = [(row["phase"], row["level"]) for row in rows]
    done = steps // STEPS
    if done == 0:
        return "before the first step"
    between = done == len(stages) or stages[done] != stages[done - 1]
    return "between levels" if between else "between epochs"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM], ids=lambda sent: sent.name)
@pytest.mark.parametrize("method", ["earlyT_laterewindlth", "earlybird"])
def test_signal_at_random_moments(tmp_path, pool, torture, method, sent):
    """Every trial ends as the undisturbed run did, bit for bit; what is trained twice is at most the epoch in hand
    after a kill, and nothing after a SIGTERM."""
    whole, expected = undisturbed(pool, tmp_path / "whole", method)
    wanted = 25 if torture else 2
    draw = random.Random(f"{SEED} {method} {sent}")
    found = collections.Counter()
    slowest = repeated = 0
    trials = 0
    while found.total() < wanted:
        running = []
        for _ in range(wanted - found.total()):
            moments = [draw.uniform(0, whole.seconds) for _ in range(draw.choice([1, 1, 2]))]
            folder = tmp_path / f"trial{trials}"
            trial = pool.submit(killed_and_resumed, method, folder, moments, draw.random() < 0.3, sent)
            running.append((folder, moments, trial))
            trials += 1
        for folder, moments, trial in running:
            ended, in_write = trial.result()
            signalled = ended[:-1]
            context = f"{folder.name}, seed {SEED}, signals after {moments} s: {[(e.code, e.errors) for e in ended]}"
            assert ended[-1].code == 0, context
            assert_same(contents(folder_of(folder, method)), expected)
            assert not list(folder_of(folder, method).rglob("*.tmp")), context
            again = sum(e.steps for e in ended) - whole.steps
            repeated = max(repeated, again)
            for end in signalled:
                assert "Traceback" not in end.errors, context
                if sent == signal.SIGKILL:
                    assert end.code == -signal.SIGKILL, context
                else:
                    assert end.code == 128 + signal.SIGTERM, context
                    assert end.seconds_after_signal < 10, context
                slowest = max(slowest, end.seconds_after_signal)
            assert 0 <= again <= (STEPS * len(signalled) if sent == signal.SIGKILL else 0), context
            if signalled:
                found[where(expected["metrics.jsonl"], signalled[0].steps, in_write)] += 1
            shutil.rmtree(folder)
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.most_common())
    print(
        f"\n{method}, {sent.name}, seed {SEED}: {found.total()} of {found.total()} went on to the same end ({kinds}); "
        f"ended within {slowest:.2f} s of the signal, at most {repeated} steps repeated"
    )
    if torture and sent == signal.SIGKILL:
        assert len(found) >= 4, found


# --- damaged files ---------------------------------------------------------------------------------------------------


def truncated(data, draw):
    lines = [match.end() for match in re.finditer(b"\n", data)][:-1]
    if lines and draw.random() < 0.5:
        return data[: draw.choice(lines)]
    return data[: draw.randrange(1, len(data))]


def flipped(data, draw):
    """One to three bits; half of the time they are in a safetensors file's header."""
    data, end = bytearray(data), len(data)
    if draw.random() < 0.5:
        end = min(end, header_end(data))
    for _ in range(draw.randint(1, 3)):
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(data)


def empty(data, draw):
    return b""


def another_digit(data, draw):
    """One digit of a JSON file, or of a safetensors file's header."""
    places = [match.start() for match in re.finditer(rb"\d", data[: header_end(data)]) if match.start() >= 8]
    if not places:
        return flipped(data, draw)
    place = draw.choice(places)
    others = b"0123456789".replace(data[place : place + 1], b"")
    return data[:place] + bytes([draw.choice(others)]) + data[place + 1 :]


def line_lost(data, draw):
    lines = data.splitlines(keepends=True)
    del lines[draw.randrange(len(lines))]
    return b"".join(lines)


def line_twice(data, draw):
    lines = data.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    return b"".join([*lines[:place], lines[place], *lines[place:]])


def header_end(data):
    """Where a safetensors file's header ends; the end of any other file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return end if end < len(data) else len(data)


class Trap:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return os._exit, (UNPICKLED,)


def nonsense(draw):
    return draw.choice([
        pickle.dumps(Trap()),
        pickle.dumps({"epoch": 3}),
        draw.randbytes(draw.randint(1, 2000)),
        bytes(draw.randint(1, 2000)),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        *(json.dumps(value).encode() for value in ([], {}, None, 3, "text", [[]], [3], [None], {"level": 3})),
        b"NaN",
        b"1" * 5000,
        b'"\\ud800"',
        b"\xff\xfe\x00",
    ])  # fmt: skip


DAMAGES = [truncated, truncated, flipped, flipped, flipped, another_digit, another_digit, empty]
KINDS = {
    "checkpoint": "checkpoints/*.safetensors",
    "ticket": "tickets/*.safetensors",
    "args.json": "args.json",
    "metrics.jsonl": "metrics.jsonl",
    "results.json": "results.json",
}


def damage(path, draw, others):
    """Damage a file; says how."""
    ways = [*DAMAGES, "nonsense", "nonsense", "another file", "a folder"]
    if path.suffix == ".jsonl":
        ways += [line_lost, line_twice]
    way = draw.choice(ways)
    if way == "nonsense":
        content = nonsense(draw)
        path.write_bytes(content)
        return f"{content[:20]}... instead"
    if way == "another file":
        other = draw.choice([other for other in others if other.read_bytes() != path.read_bytes()])
        path.write_bytes(other.read_bytes())
        return f"{'/'.join(other.parts[-5:])} instead"
    if way == "a folder":
        path.unlink()
        path.mkdir()
        return "a folder instead"
    data = path.read_bytes()
    path.write_bytes(way(data, draw))
    return way.__name__


def snapshot(folder):
    """Every file's bytes; but for the lock's, which say who is at the run."""
    files = (path for path in folder.rglob("*") if not path.name.startswith("lock"))
    return {path: path.read_bytes() if path.is_file() else None for path in files}


def detectable(path):
    """Whether whoever reads a checkpoint or ticket that has been left as it was is told that it is none of its name."""
    try:
        if path.parent.name == "tickets":
            load_ticket(path)
            return False
        return read_tensors(path, "")[1].get("stage") != path.stem
    except (InputError, OSError):
        return True


def judge(ended, named, before, folder, damaged, expected):
    """None if a run over a damaged file did what it may: refuse it with one line that names it and change nothing, or
    end as if nothing had been damaged. Else what it did."""
    if ended.code == UNPICKLED:
        return "something was unpickled"
    if "Traceback" in ended.errors or ended.code == TRACEBACK:
        return f"traceback: {ended.errors.strip().splitlines()[-1][:200]}"
    if ended.code == 2:
        lines = [line for line in ended.errors.splitlines() if "error:" in line]
        if len(lines) != 1 or not any(str(name) in lines[0] for name in named):
            return f"refused without the file's name: {ended.errors!r}"
        if snapshot(folder) != before:
            return "refused, but changed something"
        return None
    if ended.code != 0:
        return f"exit code {ended.code}: {ended.errors[-200:]!r}"
    wanted, untouched = dict(expected), damaged in before and snapshot(folder).get(damaged, "gone") == before[damaged]
    if untouched and damaged.suffix == ".safetensors" and detectable(damaged):  # nobody had to read it
        damaged.rmdir() if damaged.is_dir() else damaged.unlink()
        wanted.pop(str(damaged.relative_to(folder)), None)
    try:
        assert_same(wanted, contents(folder))
    except Exception as error:
        return f"silent difference: {type(error).__name__} {str(error)[:200]!r}"
    return None


def resumed_over_damage(victim, kind, seed, folder):
    """One trial, in a process of the pool: damage a file of a run and start the run again.

    Returns:
        What was damaged and how; what ``judge`` says; and the exit code.
    """
    method, source, other, expected = victim
    draw = random.Random(seed)
    shutil.copytree(source, folder)
    run_folder = folder_of(folder, method)
    path = draw.choice(sorted(run_folder.glob(KINDS[kind])))
    undamaged = path.read_bytes()
    others = [
        file for root in (source, other) for file in sorted(root.rglob("*")) if file.suffix.startswith((".s", ".j"))
    ]
    done = damage(path, draw, [file for file in others if file.is_file()])
    before = snapshot(run_folder)
    ended = run_script(method, flags_of(folder), folder / "log")
    if ended.code == 2 and path.stem == PREVIOUS and path.is_dir():  # in the way of the next checkpoint alone
        path.rmdir()
        path.write_bytes(undamaged)
        ended = run_script(method, flags_of(folder), folder / "log")
    names = [path, run_folder] if kind == "args.json" else [path]
    verdict = judge(ended, names, before, run_folder, path, expected)
    shutil.rmtree(folder)
    return f"{source.name} {path.relative_to(run_folder)}, {done} ({seed})", verdict, ended.code


def all_of(trials, title):
    """Wait for trials; print how they ended, fail with the list of those that ended as none may."""
    ends, wrong = collections.Counter(), []
    for trial in trials:
        what, verdict, code = trial.result()
        ends["as if undamaged" if code == 0 else "refused"] += verdict is None
        if verdict is not None:
            wrong.append(f"{what}: {verdict}")
    print(f"\n{title}, seed {SEED}: {len(trials)} damaged, {dict(ends)}, {len(wrong)} wrong", *wrong, sep="\n")
    assert not wrong


VICTIMS = {  # what a run was killed or stopped after, None for a finished one
    "earlyT_laterewindlth": [None, ("train_02.safetensors", 1)],
    "earlybird": [None, ("search.safetensors", 2), ("train.safetensors", 2), ("step", 10)],
}


@pytest.fixture(scope="module")
def victims(pool, tmp_path_factory):
    """Runs that are to be damaged: method, folder, the folder of another run, and what the run is to end as."""
    root, runs = tmp_path_factory.mktemp("victims"), {}

    def begin(method, name, *more, **how):
        folder = root / f"{method}-{name}"
        folder.mkdir()
        runs[folder] = pool.submit(run_script, method, flags_of(folder, *more), folder / "log", **how)
        return folder

    found = []
    for method, events in VICTIMS.items():
        other = begin(method, "other", "--seed", "2")
        for event in events:
            sent = signal.SIGTERM if event and event[0] == "step" else signal.SIGKILL
            found.append((method, begin(method, event[0] if event else "finished", event=event, sent=sent), other))
    codes = {folder.name: run.result().code for folder, run in runs.items()}
    for name, code in codes.items():
        assert code == (0 if name.endswith(("other", "finished")) else 143 if name.endswith("step") else -9), codes
    wholes = {method: contents(folder_of(folder, method)) for method, folder, _ in found if "finished" in folder.name}
    return [(method, folder, other, wholes[method]) for method, folder, other in found]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_file_is_refused_or_makes_no_difference(tmp_path, pool, torture, victims, kind):
    draw, trials = random.Random(f"{SEED} {kind}"), []
    for number in range(200 if torture else 6):
        victim = draw.choice([victim for victim in victims if any(folder_of(victim[1], victim[0]).glob(KINDS[kind]))])
        seed = f"{SEED} {kind} {number}"
        trials.append(pool.submit(resumed_over_damage, victim, kind, seed, tmp_path / str(number)))
    all_of(trials, kind)


def trained_from_damage(ticket, other, seed, folder, expected):
    """One trial: a one-shot run from a damaged ticket."""
    draw = random.Random(seed)
    folder.mkdir()
    copy = folder / "ticket.safetensors"
    shutil.copy(ticket, copy)
    done = damage(copy, draw, other)
    ended = run_script("oneshot", flags_of(folder, "--ticket", str(copy)), folder / "log")
    run_folder = folder / "runs" / "oneshot-transfer" / "synthetic-vgg16-round1"
    verdict = judge(ended, [copy], {}, run_folder, copy, expected)
    shutil.rmtree(folder)
    return f"--ticket, {done} ({seed})", verdict, ended.code


def test_damaged_ticket_is_refused_or_makes_no_difference(tmp_path, pool, torture, victims):
    runs = folder_of(victims[0][1], victims[0][0])
    ticket = runs / "tickets" / "level_02.safetensors"
    others = [runs / "results.json", runs / "checkpoints" / "level_01.safetensors"]
    (tmp_path / "whole").mkdir()
    flags = flags_of(tmp_path / "whole", "--ticket", str(ticket))
    assert pool.submit(run_script, "oneshot", flags, tmp_path / "whole" / "log").result().code == 0
    expected = contents(tmp_path / "whole" / "runs" / "oneshot-transfer" / "synthetic-vgg16-round1")
    trials = [
        pool.submit(trained_from_damage, ticket, others, f"{SEED} --ticket {n}", tmp_path / str(n), expected)
        for n in range(200 if torture else 6)
    ]
    all_of(trials, "--ticket")


# --- damaged images --------------------------------------------------------------------------------------------------

FORMATS = ("png", "jpg", "bmp", "ppm", "tif", "webp")


@pytest.fixture(scope="module")
def tree_run(pool, tmp_path_factory):
    """A run on a tree of images, killed after an epoch, with the caches of the decoded images; and its undisturbed
    end."""
    root = tmp_path_factory.mktemp("tree")
    draw = np.random.default_rng(SEED)
    for number, suffix in enumerate(FORMATS):
        for folder in ("train/a", "train/b", "test/a", "test/b"):
            path = root / "killed" / "data" / "cifar10" / folder / f"{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    shutil.copytree(root / "killed", root / "whole")
    event = ("train.safetensors", 1)
    killed = run_on_tree(pool, root / "killed", event=event)
    assert killed.result().code == -signal.SIGKILL
    whole = run_on_tree(pool, root / "whole").result()
    assert whole.code == 0, whole.errors
    return root / "killed", contents(run_of_tree(root / "whole"))


def flags_of_tree(folder):
    more = f"--dataset cifar10 --data_dir {folder / 'data'} --train_samples 8 --test_samples 8 --end_iter 2"
    return flags_of(folder, *more.split())


def run_on_tree(pool, folder, **how):
    return pool.submit(run_script, "oneshot", flags_of_tree(folder), folder / "log", **how)


def run_of_tree(folder):
    return folder / "runs" / "oneshot-random" / "cifar10-vgg16-round1"


def gone_on_with_damaged_images(source, expected, pattern, seed, folder):
    """One trial: the run goes on with a damaged image, or a damaged cache of the decoded images."""
    draw = random.Random(seed)
    shutil.copytree(source, folder)
    files = sorted(file for file in (folder / "data").rglob("*") if file.is_file())
    path = draw.choice([file for file in files if file.match(pattern)])
    done = damage(path, draw, files)
    run_folder = run_of_tree(folder)
    before = snapshot(run_folder)
    ended = run_script("oneshot", flags_of_tree(folder), folder / "log")
    names = [path]
    if path.suffix != ".safetensors":  # it may be decoded to another image, which a run that has begun does not take
        names.append(f"{run_folder} was begun with other images")
    verdict = judge(ended, names, before, run_folder, path, expected)
    if verdict is None and ended.code == 0 and path.suffix == ".safetensors":
        assert_same(contents(folder / "data"), contents(source / "data"))
    shutil.rmtree(folder)
    return f"{path.relative_to(folder)}, {done} ({seed})", verdict, ended.code


@pytest.mark.parametrize("pattern", ["*.cache.safetensors", "*/[ab]/*.*"], ids=["cache", "image"])
def test_damaged_image_is_refused_and_a_damaged_cache_decoded_again(tmp_path, pool, torture, tree_run, pattern):
    trials = [
        pool.submit(
            gone_on_with_damaged_images, *tree_run, pattern, f"{SEED} {pattern} {number}", tmp_path / str(number)
        )
        for number in range(200 if torture else 6)
    ]
    all_of(trials, pattern)


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import json, os, sys
import train_snn_earlyT_laterewindlth as script
from utils.runs import Run

report, resident = Run.report_epoch, []

def measured(run, *args, **options):
    report(run, *args, **options)
    with open("/proc/self/statm") as statm:
        resident.append(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)

Run.report_epoch = measured
script.main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump(resident, file)
"""
WARM_UP = 20  # epochs


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_memory_is_flat_over_epochs_and_timesteps(tmp_path, torture):
    rewinding, end = (20, 80) if torture else (10, 20)
    flags = (
        "--dataset synthetic --train_samples 32 --test_samples 20 --width 0.0625 --batch_size 32 --timestep 6 "
        f"--rewinding_epoch {rewinding} --end_iter {end} --prune_iterations 3 --valid_freq 1 --learning_rate 0.1 "
        f"--device cpu --early_time_epoch 2 --early_time_threshold 1.5 --early_time_samples 20 --output_dir {tmp_path}"
    ).split()
    # glibc keeps what is freed or gives it back as it likes; with these it gives all but crumbs back at once
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | allocator
    command = [sys.executable, "-c", MEASURED, tmp_path / "resident.json", *flags]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    resident = json.loads((tmp_path / "resident.json").read_text())
    run = Finished(tmp_path / "earlyT_laterewindlth" / "synthetic-vgg16-round1")
    assert [timesteps for timesteps, _ in groupby(row["timesteps"] for row in run.rows)] == [6, 2, 6]
    assert len(resident) == len(run.rows) == (200 if torture else 40)
    start, later = resident[WARM_UP - 1], resident[WARM_UP:]
    weights = sum(tensor.nbytes for tensor in run.network("train_02").values()) / 2**20
    print(
        f"\nresident memory over {len(resident)} epochs: {start:.1f} MiB after epoch {WARM_UP}, then "
        f"{min(later):.1f} to {max(later):.1f}, at the end {later[-1]:.1f} MiB ({later[-1] - start:+.1f} MiB, "
        f"{100 * (later[-1] / start - 1):+.2f} %; a copy of the weights is {weights:.2f} MiB)"
    )
    assert max(later) <= 1.02 * start
    assert min(later) >= 0.98 * start
