import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import FLAGS, Started, script

from utils import experiment, flags
from utils.goal import prunings_of
from utils.machine import has_bf16_units
from utils.masks import dense_mask, sparsity
from utils.scores import prune_by_magnitude

METHODS = tuple(FLAGS)
OWN_DEFAULTS = {
    "rigl": {"distribution": "erk", "update_every": 100, "update_until": 0.75, "drop_fraction": 0.3},
    "deeprewiring": {"l1": 1e-5, "noise": 1e-5, "from_dense": False},
    "gradrewiring": {"penalty": None, "trials": 5, "trial_epochs": 30},
    "admm": {"rho": 1e-2, "admm_epochs": 60},
    "gradual": {"dense_epochs": 20, "prune_until": 180, "regrow": 0, "early_time": False},
    "shortcycle": {"rewinding_epoch": 20, "cycle_epochs": 20, "evaluate_levels": [14], "early_time": False},
}


@pytest.fixture
def parsed(started):
    """The flags that a script begins a run with, from its command line."""
    return lambda method, line="": started(f"train_snn_{method}", line.split())[0]


@pytest.fixture
def refused(refused, tmp_path, monkeypatch):
    """The one line that a script ends with, where its command line is wrong; it has written nothing."""
    monkeypatch.chdir(tmp_path)

    def refuse(method, line):
        before = sorted(tmp_path.rglob("*"))
        message = refused(script(method), *line.split())
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return refuse


@pytest.mark.parametrize(
    ("method", "line", "named"),
    [
        # choices
        ("laterewindlth", "--dataset mnist", "cifar10 cifar100 svhn fmnist tinyimagenet digits synthetic"),
        ("laterewindlth", "--arch vgg11", "vgg16 resnet19 resnet34 alexnet"),
        ("laterewindlth", "--neuron plif", "lif relu"),
        ("laterewindlth", "--batch_norm no", "per_timestep over_time"),
        ("laterewindlth", "--optimizer rmsprop", "sgd adam"),
        ("laterewindlth", "--scheduler linear", "cosine step"),
        ("laterewindlth", "--precision fp16", "fp32 bf16"),
        ("laterewindlth", "--pruning_scope layer", "global local"),
        ("laterewindlth", "--rewind rate", "weights lr none"),
        ("laterewindlth", "--device tpu", "auto cpu cuda"),
        ("laterewindlth", "--device cuda:x", "auto cpu cuda"),
        ("laterewindlth", "--device cuda:99", "99"),
        ("earlybird", "--eb_distance cosine", "hamming jaccard"),
        ("earlyT_earlybird", "--divergence tv", "kl js"),
        ("oneshot", "--ticket sniip", "random snip magnitude"),
        ("oneshot", "--ticket nowhere/level_04.safetensors", "nowhere/level_04.safetensors"),
        ("oneshot", "--control swap", "none reinit shuffle"),
        ("oneshot", "--random_scope local", "global layer"),
        # ranges
        ("laterewindlth", "--batch_size 0", "1"),
        ("laterewindlth", "--train_samples 0", "1"),
        ("laterewindlth", "--end_iter 0", "1"),
        ("laterewindlth", "--valid_freq 0", "1"),
        ("laterewindlth", "--round 0", "1"),
        ("laterewindlth", "--seed -1", "0"),
        ("laterewindlth", "--width -1", "0 100"),
        ("laterewindlth", "--width 1e300", "0 100"),
        ("laterewindlth", "--tau 0.5", "1"),
        ("laterewindlth", "--v_threshold 0", "number"),
        ("laterewindlth", "--surrogate_alpha 0", "number"),
        ("laterewindlth", "--timestep 1.5", "whole number"),
        ("laterewindlth", "--timestep many", "whole number"),
        ("laterewindlth", "--learning_rate nan", "0"),
        ("laterewindlth", "--learning_rate inf", "0"),
        ("laterewindlth", "--momentum 1", "0 1"),
        ("laterewindlth", "--weight_decay -1", "0"),
        ("laterewindlth", "--checkpoint_minutes -1", "0"),
        ("laterewindlth", "--prune_percent 100", "0 100"),
        ("laterewindlth", "--prune_percent 0", "0 100"),
        ("laterewindlth", "--sparsity 100", "0 100"),
        ("laterewindlth", "--prune_iterations 9999999999", "1 1000"),
        ("earlybird", "--eb_window 1000000000000000000000", "1 1000"),
        ("earlybird", "--eb_tolerance 1.5", "0 1"),
        ("earlyT_earlybird", "--early_time_threshold -1", "0"),
        ("oneshot", "--snip_samples 0 --ticket snip", "1"),
        ("laterewindlth", "--exp_name ../elsewhere", "../elsewhere"),
        ("laterewindlth", "--exp_name .", "."),
        # flags that do not go together
        ("laterewindlth", "--rewinding_epoch 300", "--end_iter 300"),
        ("laterewindlth", "--rewinding_epoch 4 --end_iter 4", "--end_iter 4"),
        ("earlyT_earlybird", "--early_time_epoch 4 --end_iter 4", "--end_iter 4"),
        ("earlyT_earlybird", "--timestep 3", "4 3"),
        ("earlyT_laterewindlth", "--timestep 3", "4 3"),
        ("earlyT_laterewindlth", "--neuron relu", "relu"),
        ("laterewindlth", "--sparsity_round 15", "0 14 15"),
        ("earlybird", "--sparsity_round 3 --prune_iterations 3", "0 2 3"),
        ("laterewindlth", "--sparsity 90 --sparsity_round 3", "--sparsity_round"),
        ("earlybird", "--sparsity 90 --sparsity_round 3", "--sparsity_round"),
        ("earlybird", "--prune_percent 50 --sparsity 90", "--sparsity"),
        ("laterewindlth", "--prune_iterations 3 --sparsity 90", "--sparsity"),
        ("rigl", "--prune_iterations 3 --sparsity 90", "--sparsity"),
        ("laterewindlth", "--neuron relu --timestep 2", "1 2"),
        ("earlyT_laterewindlth", "--evaluate_levels 1 15", "0 14 15"),
        ("earlyT_laterewindlth", "--evaluate_levels 4 --sparsity 50", "0 3 4"),
        ("laterewindlth", "--momentum 0.5 --optimizer adam", "--optimizer sgd"),
        ("laterewindlth", "--cuda_graph --device cpu", "GPU cpu"),
        ("laterewindlth", "--fused --device cpu", "--device cuda"),
        ("laterewindlth", "--fused --device cpu --neuron relu --timestep 1", "cuda lif"),
        ("laterewindlth", "--fused --device cpu --timestep 17", "16"),
        ("oneshot", "--snip_samples 100", "--ticket snip"),
        ("oneshot", "--snip_samples=100", "--ticket snip"),
        ("oneshot", "--search_timestep 2 --ticket snip", "--ticket magnitude"),
        ("oneshot", "--random_scope layer --ticket snip", "--ticket random"),
        # methods beyond the paper's
        ("deeprewiring", "--noise 0.1 --from_dense", "--from_dense"),
        ("deeprewiring", "--pruning_scope local --from_dense", "--from_dense"),
        ("deeprewiring", "--l1 -1", "0"),
        ("gradrewiring", "--trials 3 --penalty 0.1", "--penalty"),
        ("gradrewiring", "--trial_epochs 3 --penalty 0.1", "--penalty"),
        ("gradrewiring", "--penalty 0", "0"),
        ("gradrewiring", "--pruning_scope local", ""),
        ("admm", "--admm_epochs 5 --end_iter 4", "4 5"),
        ("admm", "--rho 0", "0"),
        ("gradual", "--prune_until 4 --end_iter 4", "--end_iter 4"),
        ("gradual", "--dense_epochs 3 --prune_until 3 --end_iter 4", "--prune_until 3"),
        ("gradual", "--dense_epochs 200", "--prune_until 180"),
        ("gradual", "--regrow 1.5", "0 1"),
        ("gradual", "--early_time_epoch 3", "--early_time"),
        ("gradual", "--divergence js", "--early_time"),
        ("gradual", "--early_time_epoch 4 --early_time --end_iter 4", "--end_iter 4"),
        ("gradual", "--early_time_epoch 3 --early_time --prune_until 3 --end_iter 5", "--prune_until 3"),
        ("gradual", "--timestep 3 --early_time", "4 3"),
        ("shortcycle", "--early_time_threshold 0.5", "--early_time"),
        ("shortcycle", "--early_time_samples=5", "--early_time"),
        ("shortcycle", "--rewinding_epoch 4 --end_iter 4", "--end_iter 4"),
        ("shortcycle", "--cycle_epochs 0", "0"),
        ("shortcycle", "--early_time --early_time_epoch 27 --cycle_epochs 0.5", "27"),
        ("shortcycle", "--evaluate_levels 15", "0 14 15"),
        ("oneshot", "--pruning_scope local --ticket erk", "--ticket erk"),
        ("oneshot", "--pruning_scope local --ticket random", "--ticket random"),
        ("oneshot", "--random_scope layer --ticket erk", "--ticket random"),
        # unknown flags
        ("laterewindlth", "--learning-rate 0.1", "--learning_rate"),
        ("laterewindlth", "--learningrate=0.1", "--learning_rate"),
        ("laterewindlth", "--timesteps 5", "--timestep"),
        ("laterewindlth", "--learning 0.1", ""),
        ("laterewindlth", "--eb_window 3", ""),
        ("earlybird", "--rewind none", ""),
        ("earlybird", "extra", ""),
    ],
)
def test_bad_flags_are_named_in_one_line(refused, method, line, named):
    message = refused(method, line)
    flag = line.split()[0].split("=")[0]
    assert all(word in message.replace(flag, "", 1) for word in named.split()), message
    assert flag in message


def test_blocks_are_fused_on_a_gpu_when_asked_for(parsed, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(flags.machine, "has_bf16_units", lambda device: True)
    monkeypatch.setattr(flags, "find_spec", lambda name: name)
    assert not parsed("laterewindlth").fused
    assert parsed("laterewindlth", "--fused").fused
    assert "--channels_last" in refused("laterewindlth", "--fused --no-channels_last")
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    assert "triton" in refused("laterewindlth", "--fused")


def test_a_run_with_fused_blocks_has_them(run, monkeypatch):
    def fuse_blocks(model):
        raise Started(model)

    monkeypatch.setattr(flags, "_check_fused", lambda parser, flags: None)  # it refuses the CPU
    monkeypatch.setattr(experiment, "fuse_blocks", fuse_blocks)
    with pytest.raises(Started):
        run("oneshot", "--ticket", "random", "--fused")


@pytest.mark.parametrize("flag", ["--sparsity 90", "--sparsity_round 3", "--prune_percent 20", "--pruning_scope local"])
def test_a_saved_ticket_has_its_own_sparsity(refused, tmp_path, flag):
    (tmp_path / "level_04.safetensors").write_bytes(b"")
    assert flag.split()[0] in refused("oneshot", f"--ticket level_04.safetensors {flag}")


def test_the_authors_four_commands(parsed):
    """Word for word, as their README has them; the shell takes the quotes."""
    network = "--dataset cifar10 --arch vgg16 --optimizer sgd"
    imp = f"{network}  --batch_size 128 --learning_rate 3e-1"
    bird = f"{network} --sparsity_round 4  --batch_size 128 --learning_rate 3e-1  --round 1"
    lines = {"laterewindlth": imp, "earlybird": bird, "earlyT_laterewindlth": imp, "earlyT_earlybird": bird}
    for method, line in lines.items():
        args = vars(parsed(method, line))
        assert args == vars(parsed(method)), "they say what is the default"
        assert args["sparsity_round"] == (4 if line is bird else 14)
        assert args["method"] == args["exp_name"] == method


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_the_papers(parsed, method):
    expected = {"dataset": "cifar10", "arch": "vgg16", "neuron": "lif", "tau": 4 / 3, "v_threshold": 1, "timestep": 5}
    expected |= {"learning_rate": 0.3, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128, "scheduler": "cosine"}
    expected |= {"prune_percent": 25, "prune_iterations": 15, "round": 1, "end_iter": 300, "valid_samples": 0}
    if method not in ("rigl", "gradrewiring"):
        expected |= {"pruning_scope": "global"}
    if method.endswith("laterewindlth"):
        expected |= {"rewinding_epoch": 20, "rewind": "weights", "sparsity_round": 14}
    if method.endswith("earlybird"):
        expected |= {"eb_window": 5, "eb_tolerance": 0.02, "eb_distance": "hamming", "sparsity_round": 4}
    if method.startswith("earlyT"):
        expected |= {"early_time_epoch": 2, "early_time_threshold": 0.6, "divergence": "kl"}
    expected |= OWN_DEFAULTS.get(method, {})
    args = vars(parsed(method))
    assert {name: args[name] for name in expected} == expected
    gpu = torch.cuda.is_available()
    assert args["precision"] == ("bf16" if gpu and has_bf16_units("cuda") else "fp32")
    assert (args["compile"], args["channels_last"], args["cuda_graph"]) == (False, None, gpu)


def test_defaults_that_depend_on_other_flags(parsed):
    for dataset, epochs in (("cifar100", 300), ("svhn", 150), ("fmnist", 150), ("tinyimagenet", 300)):
        assert parsed("earlybird", f"--dataset {dataset}").end_iter == epochs
    assert parsed("earlybird", "--dataset svhn --end_iter 7").end_iter == 7
    assert parsed("earlybird", "--eb_distance jaccard").eb_tolerance == 0.5
    assert parsed("earlybird", "--eb_distance jaccard --eb_tolerance 0.1").eb_tolerance == 0.1
    assert parsed("earlybird", "--neuron relu").timestep == 1
    assert parsed("earlybird", "--prune_iterations 3").sparsity_round == 2
    assert parsed("laterewindlth", "--prune_iterations 3").sparsity_round == 2
    assert parsed("laterewindlth", "--sparsity 90").sparsity_round is None
    assert parsed("earlyT_laterewindlth").evaluate_levels == [14]
    assert parsed("earlyT_laterewindlth", "--sparsity_round 3").evaluate_levels == [3]
    assert parsed("earlyT_laterewindlth", "--sparsity 50").evaluate_levels == [3]
    assert parsed("earlyT_laterewindlth", "--evaluate_levels 4 0 4").evaluate_levels == [0, 4]
    assert parsed("oneshot", "--ticket magnitude --timestep 3").search_timestep == 3
    assert parsed("earlybird", "--weight-decay 0.1").weight_decay == 0.1


@pytest.mark.parametrize(
    "line", ["gradual --end_iter 2 --prune_until 1", "shortcycle --end_iter 2 --rewinding_epoch 1"]
)
def test_what_early_time_needs_is_not_asked_for_without_it(parsed, line):
    method, *flags = line.split()
    args = parsed(method, " ".join([*flags, "--timestep 2"]))
    assert args.early_time_epoch >= args.end_iter
    early = parsed(method, f"--early_time --end_iter 5 {flags[2]} 3")
    assert early.method == f"earlyT_{method}"
    assert early.label.endswith(" + ET")


@pytest.mark.parametrize(
    ("script", "line", "method", "label"),
    [
        ("oneshot", "", "oneshot-random", "random"),
        ("oneshot", "--ticket erk --control shuffle", "oneshot-erk-shuffle", "ERK shuffle"),
        ("oneshot", "--ticket snip --control reinit", "oneshot-snip-reinit", "SNIP reinit"),
        ("oneshot", "--ticket magnitude --control shuffle", "oneshot-magnitude-shuffle", "magnitude shuffle"),
        ("rigl", "", "rigl", "RigL"),
        ("rigl", "--grow random", "rigl-random", "SET"),
        ("deeprewiring", "--from_dense", "deeprewiring-dense", "Deep R from dense"),
    ],
)
def test_a_run_is_named_after_what_it_does(parsed, script, line, method, label):
    args = parsed(script, line)
    assert (args.method, args.exp_name, args.label) == (method, method, label)


@pytest.mark.parametrize("wanted", [10, 25, 43.74, 43.75, 43.76, 68.359375, 90, 98.13, 99.9])
def test_imp_ends_at_the_wanted_sparsity(wanted):
    """Below, at and above a level; every pruning is rounded to a whole weight."""
    torch.manual_seed(0)
    model = torch.nn.Linear(70, 90)
    mask = dense_mask(model)
    prunings = prunings_of(SimpleNamespace(sparsity=wanted, prune_percent=25.0, sparsity_round=None))
    for fraction in prunings:
        mask = prune_by_magnitude(model, mask, fraction)
    assert sparsity(mask) == pytest.approx(wanted / 100, abs=2 / 6300)
    assert prunings[:-1] == [0.25] * (len(prunings) - 1)
    assert 0 < prunings[-1] <= 0.25
    assert len(prunings) == math.ceil(math.log(1 - wanted / 100) / math.log(0.75) - 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_help_gives_every_default(method, capsys):
    with pytest.raises(SystemExit) as stop:
        script(method)(["--help"])
    assert stop.value.code == 0
    _, *options = re.split(r"\n  (?=--)", capsys.readouterr().out)
    assert len(options) > 30
    assert all("(default:" in option for option in options)
