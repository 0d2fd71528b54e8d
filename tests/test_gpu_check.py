"""The run for a GPU, as far as it goes without one: processes, limits, the report, and faults that its checks see."""

import copy
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_part
from benchmarks.gpu_checks import Failed, Skipped
from models import build_model
from models.lif import LIF
from utils.files import read_json, write_json

# what a part does, in a few lines that import nothing slow
WRITES = "import json, os, sys; write = lambda **found: open(sys.argv[1], 'w').write(json.dumps(found)); "


def part(code):
    return [sys.executable, "-c", WRITES + code]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("write(outcome='FAIL', why='2 spikes'); print('a trace')", "2 spikes"),
        ("print('a trace', file=sys.stderr); os.abort()", "a trace"),
        ("write(rows=[1]); print('a trace'); sys.exit(3)", "3"),
    ],
)
def test_a_part_that_ends_badly_has_failed(code, why):
    found = gpu.run_part(part(code), 60)
    assert found["outcome"] == "FAIL"
    assert why in found["why"]
    assert "a trace" in found["output"]


def test_a_part_that_hangs_is_ended_with_what_it_started():
    """What it had found counts."""
    code = (
        "import subprocess; child = subprocess.Popen(['sleep', '99']); write(rows=[1], child=child.pid); child.wait()"
    )
    found = gpu.run_part(part(code), 1.5)
    assert (found["outcome"], found["rows"]) == ("FAIL", [1])
    assert "1.5 s" in found["why"]
    assert found["seconds"] < 60
    status = Path(f"/proc/{found['child']}/stat")
    deadline = time.monotonic() + 20
    while status.exists() and status.read_text().split()[2] != "Z":  # the kernel takes it away in its own time
        assert time.monotonic() < deadline, "the child is alive"
        time.sleep(0.02)


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys(gpu.LIMITS, 60) | {"neuron": 0.5})
    return {
        "environment": part("write(outcome='PASS', why='', name='Card')"),
        "neuron": part("import time; time.sleep(99)"),
        "network": part("write(outcome='SKIP', why='too old')"),
        "captured": part("write(outcome='PASS', why='', rows=[{'ms': 2.0}])"),
    }


def test_one_part_that_hangs_does_not_stop_the_others(parts, tmp_path, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(gpu, "write_json", lambda path, report: written.append(list(report["parts"])))
    report = {"parts": {}}
    gpu.run_parts(parts, report, tmp_path / "report.json")
    assert {name: found["outcome"] for name, found in report["parts"].items()} == {
        "environment": "PASS",
        "neuron": "FAIL",
        "network": "SKIP",
        "captured": "PASS",
    }
    assert written == [list(parts)[: i + 1] for i in range(4)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[report["parts"][name]["outcome"], name] for name in parts]


def test_without_an_environment_nothing_else_is_begun(parts, tmp_path):
    parts["environment"] = part("write(outcome='FAIL', why='no compiler')")
    report = {"parts": {}}
    gpu.run_parts(parts, report, tmp_path / "report.json")
    assert [found["outcome"] for found in report["parts"].values()] == ["FAIL", "SKIP", "SKIP", "SKIP"]
    assert read_json(tmp_path / "report.json") == report


@pytest.mark.parametrize(("outcome", "code"), [("PASS", None), ("SKIP", None), ("FAIL", 1)])
def test_the_exit_code_says_whether_a_part_failed(monkeypatch, tmp_path, outcome, code):
    def run_parts(commands, report, out):
        assert list(commands) == ["network", "speed"]  # in the order of the plan
        report["parts"] = {"network": {"outcome": "PASS"}, "speed": {"outcome": outcome}}

    monkeypatch.setattr(gpu, "run_parts", run_parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    argv = ["--parts", "speed", "network", "--out", str(tmp_path / "report.json")]
    if code is None:
        gpu.main(argv)
    else:
        with pytest.raises(SystemExit) as stop:
            gpu.main(argv)
        assert stop.value.code == code


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], torch.__version__),
        (["--parts", "abacus"], "abacus"),
        (["--tables", "nowhere.json"], "nowhere.json"),
        (["--tables", __file__], "test_gpu_check.py"),
    ],
)
def test_what_cannot_be_done_is_one_line(refused, monkeypatch, argv, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named in refused(gpu.main, *argv)


def test_every_part_has_a_limit_and_they_are_12_minutes():
    assert list(gpu.LIMITS) == list(gpu_part.PARTS)
    assert sum(gpu.LIMITS.values()) <= 12 * 60


@pytest.mark.parametrize(
    ("error", "outcome", "why"),
    [(None, "PASS", "well"), (Failed("2 spikes"), "FAIL", "2 spikes"), (Skipped("too old"), "SKIP", "too old"),
     (RuntimeError("out of\nluck"), "FAIL", "RuntimeError: out of")],
)  # fmt: skip
def test_a_part_is_written_as_it_goes_on(tmp_path, monkeypatch, error, outcome, why):
    path = tmp_path / "found.json"

    def work():
        yield {"rows": [1]}
        assert read_json(path)["rows"] == [1]
        yield {"rows": [1, 2], "why": "well"}
        if error is not None:
            raise error

    monkeypatch.setitem(gpu_part.PARTS, "neuron", work)
    gpu_part.main("neuron", path)
    assert read_json(path) == {"rows": [1, 2], "outcome": outcome, "why": why}


def test_tables_of_a_report(tmp_path, capsys):
    rows = [{"flags": "a|b", "ms": 1234.5678, "n": 3}, {"flags": "c", "GB": None, "n": 4000}]
    parts = {
        "environment": {"outcome": "PASS", "why": "fine", "seconds": 1.5, "name": "Card", "driver": "600.1"},
        "speed": {"outcome": "FAIL", "why": "not done", "seconds": 200, "rows": rows, "output": "a trace"},
    }
    report = {"began": "2026-01-02", "git_commit": "abc", "versions": {"torch": "2.14"}, "parts": parts}
    write_json(tmp_path / "report.json", report)
    gpu.main(["--tables", str(tmp_path / "report.json")])
    text = capsys.readouterr().out
    tables = [[line for line in block.splitlines() if line] for block in text.split("\n\n") if block.startswith("|")]
    assert tables[0][2:] == ["| environment | PASS | 1.5 | fine |", "| speed | FAIL | 200 | not done |"]
    assert tables[1] == [
        "| flags | ms | n | GB |",
        "| --- | --- | --- | --- |",
        r"| a\|b | 1.23e+03 | 3 |  |",
        "| c |  | 4000 |  |",
    ]
    assert all(word in text for word in ("# Card", "600.1", "abc", "torch 2.14"))
    assert "a trace" not in text


class OneSpikeMore(LIF):
    """Its last timestep has a spike more or less, so all else is as it should be."""

    def forward(self, current):
        spikes = super().forward(current)
        turned = torch.zeros_like(spikes)
        turned[-1, 0, 0, 0, 0] = 1 - 2 * spikes[-1, 0, 0, 0, 0].detach()
        return spikes + turned


def test_the_neuron_of_the_cpu_passes_and_another_does_not(monkeypatch):
    monkeypatch.setattr(gpu_checks, "DEVICE", "cpu")
    *_, found = gpu_checks.neuron()
    assert found["why"]
    for wrong in (partial(LIF, surrogate_alpha=2.1), OneSpikeMore):
        monkeypatch.setattr(gpu_checks, "LIF", wrong)
        with pytest.raises(Failed):
            list(gpu_checks.neuron())


@pytest.mark.slow
def test_the_networks_of_the_cpu_pass_and_others_do_not(monkeypatch):
    monkeypatch.setattr(gpu_checks, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_checks, "ARCHITECTURES", ["alexnet"])
    *_, found = gpu_checks.network()
    assert found["why"]
    monkeypatch.setattr(gpu_checks, "loss_over_time", lambda logits, labels: logits[0, 0, 0] * next(loss))
    loss = iter((1.0, 1.001))
    with pytest.raises(Failed):
        list(gpu_checks.network())


def test_a_layer_that_is_wrong_is_seen(monkeypatch):
    monkeypatch.setattr(gpu_checks, "DEVICE", "cpu")
    torch.manual_seed(0)
    images, cpu = torch.randn(2, 3, 32, 32), build_model("resnet19", 3, 10, width=0.0625).train()
    limits = [gpu_checks.NUMERICS[name] for name in ("outputs of a layer", "its spikes", "its gradients")]

    def seen(change):
        card = copy.deepcopy(cpu)
        change(card)
        apart = gpu_checks.layers_apart(cpu, card, images)
        return [value >= limit for value, limit in zip(apart, limits, strict=True)]

    assert not any(seen(lambda card: None))
    assert seen(lambda card: card.blocks[3].conv2.weight.data.mul_(1.001))[0]  # as TF32 rounds
    assert seen(lambda card: card.blocks[3].shortcut[1].weight.data.add_(0.001))[0]
    assert seen(lambda card: setattr(card.blocks[1].fire2.neuron, "v_threshold", 1.01))[1]
    assert seen(lambda card: setattr(card.hidden_neuron, "tau", 1.5))[2]
