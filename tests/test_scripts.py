import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Finished, folder_of, lively, script

from models import build_model
from utils.data import load_data
from utils.early_time import divergences, early_time
from utils.flags import METHODS, get_args, make_parser
from utils.masks import dense_mask, distance, magnitude_mask, sparsity, sparsity_after
from utils.runs import Run, load_network
from utils.tickets import load_ticket
from utils.training import evaluate, fit, learning_rate, make_optimizer, predict

RESULT = {
    "method", "dataset", "arch", "round", "level", "sparsity", "sparsity_all_parameters", "timesteps",
    "search_timesteps", "test_accuracy", "best_test_accuracy", "search_seconds", "search_epochs",
    "search_timestep_epochs", "train_seconds", "layers", "ticket_bytes", "spikes_per_image", "firing_rates",
    "synops_per_image", "macs_per_image", "dense_macs_per_image", "energy_uj_per_image", "ann_energy_uj_per_image",
}  # fmt: skip
EPOCH = {"phase", "level", "epoch", "timesteps", "lr", "loss", "train_accuracy", "test_accuracy", "seconds"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["vgg16", "resnet19"])
def test_script_as_a_subprocess(tmp_path, tiny, method, arch):
    command = [sys.executable, ROOT / f"train_snn_{method}.py", *tiny, "--arch", arch, "--valid_freq", "3"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    result = Finished(folder_of(tmp_path, method, arch=arch))
    assert {
        "seed",
        "round",
        "effective_seed",
        "versions",
        "device",
        "git_commit",
        "learning_rate",
    } <= result.args.keys()
    assert all(row.keys() >= EPOCH for row in result.rows)
    assert all(row.keys() >= RESULT for row in result.results)
    # no terminal: one line an epoch, and the ticket and the folder at the end
    lines = [line for line in done.stdout.splitlines() if "images/s" in line]
    assert len(lines) == len(result.rows)
    assert all("loss" in line and "left" in line for line in lines)
    assert "\r" not in done.stdout
    for row in result.results:
        assert row["method"] == ("oneshot-random" if method == "oneshot" else method)
        path = result.folder / "tickets" / f"level_{row['level']:02d}.safetensors"
        assert str(path.relative_to(tmp_path)) in done.stdout
        mask, weights, origin = load_ticket(path)
        assert row["sparsity"] == pytest.approx(100 * sparsity(mask)) == pytest.approx(origin["sparsity"])
        assert row["layers"].keys() == mask.keys() <= weights.keys()
    assert str(result.folder.relative_to(tmp_path)) in done.stdout


@pytest.mark.parametrize("base", ["laterewindlth", "earlybird"])
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--rewinding_epoch", "0"),
        ("--rewinding_epoch", "1", "--early_time_epoch", "3"),
        ("--rewinding_epoch", "1", "--early_time_epoch", "3", "--rewind", "lr"),
        ("--rewinding_epoch", "0", "--rewind", "none"),
    ],
)
def test_early_time_with_threshold_0_is_its_base_script(run, base, more):
    plain = run(base, *more)
    early = run(f"earlyT_{base}", "--early_time_threshold", "0", *more)
    last = "level_02" if base == "laterewindlth" else "train"
    before, after = plain.network(last), early.network("train_02" if base == "laterewindlth" else "train")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert plain.results[-1]["test_accuracy"] == early.results[-1]["test_accuracy"]
    assert plain.results[-1]["search_timestep_epochs"] <= early.results[-1]["search_timestep_epochs"]
    assert all(torch.equal(m, early.ticket(2)[0][name]) for name, m in plain.ticket(2)[0].items())


def test_imp_levels_are_nested_rewound_and_on_one_schedule(run):
    imp = run("laterewindlth")
    args = get_args("laterewindlth", None, ["--end_iter", "4", "--learning_rate", "0.1", "--rewinding_epoch", "2"])
    rewind_point = imp.network("dense")  # after exactly two epochs
    previous = None
    for level in range(3):
        mask, weights, origin = imp.ticket(level)
        assert sparsity(mask) == pytest.approx(sparsity_after(level, 0.25), abs=1e-4)
        assert all(torch.equal(tensor, rewind_point[name]) for name, tensor in weights.items())
        assert (origin["level"], origin["epoch"]) == (level, 2)
        network = imp.network(f"level_{level:02d}")
        assert all((network[name][~m] == 0).all() for name, m in mask.items())
        if previous is not None:
            assert all((m <= previous[name]).all() for name, m in mask.items())
        previous = mask
        epochs = [row["epoch"] for row in imp.stage("search", level)]
        assert epochs == [2, 3]
        assert [row["lr"] for row in imp.stage("search", level)] == [learning_rate(args, e) for e in epochs]
    assert [row["epoch"] for row in imp.stage("dense", 0)] == [0, 1]
    # the survivors of a level are the largest weights that its training ended with
    trained, mask, pruned = imp.network("level_00"), imp.ticket(0)[0], imp.ticket(1)[0]
    lost = torch.cat([trained[name][mask[name] & ~pruned[name]].abs() for name in mask])
    left = torch.cat([trained[name][pruned[name]].abs() for name in mask])
    assert lost.max() <= left.min()


def test_imp_results_are_of_the_last_epoch_and_count_the_search(run, tiny):
    imp = run("laterewindlth", "--valid_freq", "1")
    data = load_data(get_args("laterewindlth", None, tiny))
    for level, row in enumerate(imp.results):
        own = [r for r in imp.rows if r["level"] == level]
        assert row["level"] == level
        assert row["test_accuracy"] == own[-1]["test_accuracy"]
        assert row["best_test_accuracy"] == max(r["test_accuracy"] for r in own)
        path = imp.folder / "checkpoints" / f"level_{level:02d}.safetensors"
        model = load_network(path, build_model("vgg16", 3, 10, width=0.0625))
        assert row["test_accuracy"] == evaluate(model, data.test, 3)
        before = [r for r in imp.rows if r["level"] < level]
        assert row["search_epochs"] == len(before) == (2 + 2 * level if level else 0)
        assert row["search_timestep_epochs"] == 3 * len(before)
        assert row["search_seconds"] == pytest.approx(sum(r["seconds"] for r in before))
        assert row["train_seconds"] == pytest.approx(sum(r["seconds"] for r in own))


def test_imp_rewinds_to_the_initial_weights_at_epoch_0(run):
    imp = run("laterewindlth", "--rewinding_epoch", "0")
    torch.manual_seed(imp.args["effective_seed"])
    initial = build_model("vgg16", 3, 10, width=0.0625).state_dict()
    for level in range(3):
        assert all(torch.equal(tensor, initial[name]) for name, tensor in imp.ticket(level)[1].items())


@pytest.mark.parametrize("kind", ["lr", "none"])
@pytest.mark.parametrize("epoch", ["0", "2"])
def test_imp_without_weight_rewinding_goes_on_from_the_trained_weights(run, kind, epoch):
    imp = run("laterewindlth", "--rewind", kind, "--rewinding_epoch", epoch)
    plain = run("laterewindlth", "--rewinding_epoch", epoch, "--exp_name", "plain", "--sparsity_round", "0")
    args = get_args("laterewindlth", None, ["--end_iter", "4", "--learning_rate", "0.1", "--rewinding_epoch", "0"])
    for level in range(3):
        epochs = [row["epoch"] for row in imp.stage("search", level)]
        assert epochs == list(range(int(epoch), 4))
        rates = [learning_rate(args, 3 if kind == "none" and level else e) for e in epochs]
        assert [row["lr"] for row in imp.stage("search", level)] == rates
        mask, weights, origin = imp.ticket(level)
        assert (origin["rewind"], origin["epoch"]) == (kind, int(epoch))
        if level == 0:  # the dense network is trained as ever
            network, expected = imp.network("level_00"), plain.network("level_00")
            assert all(torch.equal(tensor, network[name]) for name, tensor in expected.items())
        else:
            trained = imp.network(f"level_{level - 1:02d}")
            assert all(torch.equal(tensor, trained[name]) for name, tensor in weights.items())
        network = imp.network(f"level_{level:02d}")
        assert all((network[name][~m] == 0).all() for name, m in mask.items())
        assert any(not torch.equal(weights[name], network[name]) for name in mask)


@pytest.mark.parametrize("kind", ["lr", "none"])
def test_imp_with_early_time_trains_at_t_from_the_weights_found_at_t_early(run, kind):
    imp = run("earlyT_laterewindlth", "--rewind", kind, "--evaluate_levels", "0", "1", "2")
    for level in (1, 2):
        _, weights, _ = imp.ticket(level)
        trained = imp.network(f"level_{level - 1:02d}")
        assert all(torch.equal(tensor, trained[name]) for name, tensor in weights.items())
        assert {row["timesteps"] for row in imp.stage("search", level - 1)} == {2}
        # the ticket alone is enough to train it again, at T
        shot = run("oneshot", "--ticket", str(imp.folder / "tickets" / f"level_{level:02d}.safetensors"), "--restart")
        before, after = imp.network(f"train_{level:02d}"), shot.network("train")
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("arch", ["resnet34", "alexnet"])
def test_networks_of_the_supplement_go_through_a_search(run, arch):
    bird = run("earlyT_earlybird", "--train_samples", "20", "--width", "0.03", arch=arch)
    assert bird.results[0]["arch"] == arch
    assert bird.results[0]["sparsity"] == pytest.approx(100 * sparsity_after(2, 0.25), abs=0.1)


def test_imp_stops_at_the_sparsity_round(run):
    assert [row["level"] for row in run("laterewindlth", "--sparsity_round", "1").results] == [0, 1]


def test_local_scope_prunes_every_layer_alike(run):
    layers = run("laterewindlth", "--pruning_scope", "local").results[-1]["layers"]
    assert max(layers.values()) - min(layers.values()) < 1


def test_imp_with_early_time_searches_short_and_evaluates_long(run, tiny):
    imp = run("earlyT_laterewindlth", "--evaluate_levels", "0", "1", "2")
    timesteps = imp.results[0]["search_timesteps"]
    assert timesteps == 2
    noted = [row for row in imp.rows if "early_time" in row]
    assert [(row["phase"], row["epoch"], row["early_time"]) for row in noted] == [("dense", 0, 2)]
    assert [row["timesteps"] for row in imp.stage("dense", 0)] == [3, 2]
    for level in range(2):
        assert {row["timesteps"] for row in imp.stage("search", level)} == {timesteps}
    assert not imp.stage("search", 2)
    for level, row in enumerate(imp.results):  # every level that was asked for is measured at T
        assert {r["timesteps"] for r in imp.stage("train", level)} == {3}
        assert row["timesteps"] == 3
        assert row["search_epochs"] == (2 + 2 * level if level else 0)
        assert row["search_timestep_epochs"] == (3 + 2 + 4 * level if level else 0)
    _, weights, _ = imp.ticket(2)
    rewind_point = imp.network("dense_2")
    assert all(torch.equal(tensor, rewind_point[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("kind", ["kl", "js"])
@pytest.mark.parametrize(("method", "stage"), [("earlyT_laterewindlth", "dense_1"), ("earlyT_earlybird", "search")])
def test_early_time_is_chosen_from_the_network_after_its_epochs(run, tiny, monkeypatch, method, stage, kind):
    """In eval mode, on the un-augmented training images, at T, after exactly one epoch."""
    started = build_model("vgg16", 3, 10, width=0.0625)

    def lively_model(*args):  # an untrained tiny network is silent; this one is not
        torch.manual_seed(1)
        model = lively(build_model(*args), torch.randn(8, 3, 32, 32))
        model.classifier.weight.data.mul_(30)
        return model

    monkeypatch.setattr(f"train_snn_{method}.build_model", lively_model)
    flags = ["--timestep", "5", "--early_time_threshold", "0.6", "--learning_rate", "1e-4", "--end_iter", "2"]
    flags += ["--rewinding_epoch", "1", "--eb_tolerance", "0", "--early_time_samples", "30", "--divergence", kind]
    early = run(method, *flags)
    (row,) = [row for row in early.rows if "early_time" in row]
    assert row["epoch"] == 0
    args = get_args(method, None, [*tiny, *flags])
    data = load_data(args)
    assert len(data.probe) == 30
    if method == "earlyT_laterewindlth":
        network = early.network(stage)
    else:  # the search went on: train its first epoch again
        model = lively_model("vgg16", 3, 10, "lif", 0.0625, "per_timestep")
        args.output_dir += "-again"
        again = Run(args)
        again.begin(data)
        fit(model, data, args, make_optimizer(model, args), dense_mask(model), range(1), 5, again)
        network = model.state_dict()
    started.load_state_dict(network)
    logits = predict(started, data.probe, 5)
    assert row["divergences"] == divergences(logits, kind)
    assert 0 < row["divergences"][1] != 1
    assert row["early_time"] == early_time(logits, 0.6, kind) == early.results[0]["search_timesteps"]
    # every epoch of the search is observed, at T though it trains with fewer timesteps; the ticket's own is not
    last = "level_00" if method == "earlyT_laterewindlth" else "search"
    started.load_state_dict(early.network(last))
    searched = early.stage("search", 0)[-1]
    assert searched["timesteps"] < 5
    assert searched["divergences"] == divergences(predict(started, data.probe, 5), kind) != row["divergences"]
    assert all(("divergences" in row) == (row["phase"] != "train") for row in early.rows)


@pytest.mark.parametrize("method", ["earlybird", "earlyT_earlybird"])
def test_early_bird_ticket_is_a_settled_mask_on_the_initial_weights(run, method):
    bird = run(method, "--eb_tolerance", "0.3", "--end_iter", "6")
    args = get_args(method, None, ["--end_iter", "6", "--learning_rate", "0.1"])
    search, train = bird.stage("search", 0), bird.stage("train", 2)
    (result,) = bird.results
    assert result["settled"]
    assert len(search) == result["search_epochs"] < 6
    assert search[-1]["hamming"] < 0.3
    assert all(row["hamming"] >= 0.3 for row in search[1:-1])
    assert all(0 <= row["hamming"] <= row["jaccard"] <= 1 for row in search)
    mask, weights, origin = bird.ticket(2)
    assert origin["epoch"] == 0
    model = build_model("vgg16", 3, 10, width=0.0625)
    model.load_state_dict(bird.network("search"))
    assert distance(mask, magnitude_mask(model, sparsity_after(2, 0.25))) == 0
    torch.manual_seed(bird.args["effective_seed"])
    initial = build_model("vgg16", 3, 10, width=0.0625).state_dict()
    assert all(torch.equal(tensor, initial[name]) for name, tensor in weights.items())
    # both phases run the paper's learning rate from its start, one step of the schedule an epoch
    assert [row["lr"] for row in search] == [learning_rate(args, epoch) for epoch in range(len(search))]
    assert [row["lr"] for row in train] == [learning_rate(args, epoch) for epoch in range(6)]
    assert {row["timesteps"] for row in train} == {3}
    expected = [3, *[2] * 5] if method == "earlyT_earlybird" else [3] * 6
    assert [row["timesteps"] for row in search] == expected[: len(search)]


def test_early_bird_does_not_count_the_untrained_mask(run):
    # with tolerance 1 the first full window settles: q = 1 needs two trained masks
    assert run("earlybird", "--eb_tolerance", "1").results[0]["search_epochs"] == 2


def test_early_bird_that_never_settles_says_so(run, capsys):
    bird = run("earlybird", "--eb_tolerance", "0")
    assert bird.results[0]["settled"] is False
    assert bird.results[0]["search_epochs"] == 4
    assert "no mask settled within 4 epochs; the ticket is the last mask" in capsys.readouterr().out


def test_silent_layer_is_named_in_a_warning(run, capsys):
    done = run("oneshot", "--sparsity_round", "2", "--prune_percent", "90")
    silent = [name for name, rate in done.results[0]["firing_rates"].items() if rate == 0]
    assert silent
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "fires on any test image" in line]
    assert ", ".join(silent) in warning


def test_emptied_layer_is_named_in_a_warning(run, capsys):
    run("earlybird", "--prune_percent", "99")
    assert "no weight is left in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("laterewindlth", "--dataset mnist", "choose from cifar10, cifar100, svhn"),
        ("laterewindlth", "--arch vgg11", "choose from vgg16, resnet19"),
        ("laterewindlth", "--pruning_scope layer", "choose from global, local"),
        ("laterewindlth", "--rewind rate", "choose from weights, lr, none"),
        ("oneshot", "--ticket sniip", "choose from random, snip, magnitude, or name a ticket"),
        ("earlybird", "--eb_distance cosine", "choose from hamming, jaccard"),
        ("earlyT_earlybird", "--divergence tv", "choose from kl, js"),
        ("earlybird", "--sparsity_round 0", "must be from 1 to 2"),
        ("earlybird", "--sparsity_round 3", "must be from 1 to 2"),
        ("laterewindlth", "--sparsity_round 3", "must be from 0 to 2"),
        ("earlyT_laterewindlth", "--evaluate_levels 1 5", "must be from 0 to 2"),
        ("earlyT_earlybird", "--timestep 2", "at least 3 timesteps"),
        ("earlyT_laterewindlth", "--timestep 2", "at least 3 timesteps"),
        ("laterewindlth", "--rewinding_epoch 4", "must be from 0 to 3"),
        ("earlyT_earlybird", "--early_time_epoch 4", "must be from 1 to 3"),
        ("laterewindlth", "--batch_size 0", "--batch_size: must be a whole number at least 1"),
        ("laterewindlth", "--width -1", "--width: must be a number more than 0"),
        ("laterewindlth", "--width 1e300", "--width: must be a number more than 0 and at most 100"),
        ("laterewindlth", "--prune_iterations 9999999999", "at least 1 and at most 1000"),
        ("earlybird", "--eb_window 1000000000000000000000", "at least 1 and at most 1000"),
        ("laterewindlth", "--timestep 1.5", "--timestep: must be a whole number at least 1"),
        ("laterewindlth", "--learning_rate nan", "--learning_rate: must be a number more than 0"),
        ("laterewindlth", "--prune_percent 100", "--prune_percent: must be a number more than 0 and less than 100"),
        ("laterewindlth", "--train_samples 0", "--train_samples: must be a whole number at least 1"),
        ("laterewindlth", "--device tpu", "choose from auto, cpu, cuda"),
        ("laterewindlth", "--exp_name ../elsewhere", "name without a path"),
        ("laterewindlth", "--learning 0.1", "unrecognized arguments: --learning"),
        ("laterewindlth", "--dataset cifar10 --data_dir nowhere", "put the images into nowhere/cifar10/train"),
        ("laterewindlth", "--cuda_graph", "--cuda_graph: is for a single GPU, got cpu with 1 rank"),
        ("laterewindlth", "--test_samples 9999", "--test_samples must be from 1 to 200"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, tiny, capsys, monkeypatch, method, flags, message):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script(method)([*tiny, *flags.split()])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0].replace("'", "")  # Python 3.11 quotes the choices
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_cuda_without_a_gpu(tiny, capsys):
    with pytest.raises(SystemExit) as stop:
        script("earlybird")([*tiny, "--device", "cuda"])
    assert stop.value.code == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", ["", "--compile", "--cuda_graph", "--compile --channels_last --cuda_graph"])
@pytest.mark.parametrize("method", METHODS)
def test_script_on_a_gpu(run, method, options):
    options = ["--device", "cuda", "--train_samples", "88", *options.split()]  # an epoch is long enough for a graph
    done = run(method, *options)
    assert done.args["precision"] == "bf16"
    assert done.results[-1]["level"] == 2
    (done.folder / "results.json").unlink()
    assert run(method, *options).results == done.results


def test_folder_that_cannot_be_written(tmp_path, tiny, capsys):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(SystemExit) as stop:
        script("earlybird")(tiny)
    assert stop.value.code == 2
    assert "runs" in capsys.readouterr().err


def test_flag_of_another_method_is_pointed_out(tiny, capsys):
    get_args("laterewindlth", None, [*tiny, "--eb_window", "3", "--divergence", "js"])
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--eb_window", "--divergence", "without effect"))
    get_args("earlybird", None, ["--optimizer", "adam", "--momentum", "0.5"])
    assert "--momentum without effect" in capsys.readouterr().out
    for method in ("earlybird", "earlyT_earlybird", "oneshot"):
        assert get_args(method, None, ["--rewind", "none"]).rewind == "weights"
        assert "--rewind without effect" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_the_papers(method):
    args = get_args(method, None, [])
    assert (args.learning_rate, args.momentum, args.weight_decay, args.batch_size) == (0.3, 0.9, 5e-4, 128)
    assert (args.timestep, args.scheduler, args.optimizer, args.end_iter) == (5, "cosine", "sgd", 300)
    assert (args.prune_percent, args.prune_iterations, args.rewinding_epoch) == (25, 15, 20)
    assert (args.eb_window, args.eb_tolerance, args.early_time_epoch, args.early_time_threshold) == (5, 0.02, 2, 0.6)
    assert args.precision == ("bf16" if torch.cuda.is_available() else "fp32")
    assert (args.arch, args.dataset, args.pruning_scope) == ("vgg16", "cifar10", "global")
    for dataset, epochs in (("cifar100", 300), ("svhn", 150), ("fmnist", 150)):
        assert get_args(method, None, ["--dataset", dataset]).end_iter == epochs
    assert get_args(method, None, ["--eb_distance", "jaccard"]).eb_tolerance == 0.5


def test_help_gives_every_default():
    alone = {"--help", "--restart", "--no_compile", "--no_sync_batch_norm"}
    actions = [action for action in make_parser("oneshot")._actions if not alone & set(action.option_strings)]
    assert len(actions) == 47
    assert all("(default: " in action.help for action in actions)
