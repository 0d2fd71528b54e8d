"""Tickets that are made once, saved tickets, and their controls."""

import pytest
import torch
from conftest import Finished, same, script

from models import build_model
from utils.masks import distance, layer_sparsity, sparsity, sparsity_after
from utils.scores import erk_densities, magnitude_mask
from utils.tickets import load_ticket, write_ticket

TARGET = sparsity_after(2, 0.25)
LEVEL = "tickets/level_02.safetensors"


def initial_weights(run):
    torch.manual_seed(run.args["effective_seed"])
    return build_model("alexnet", 3, 10, width=0.05).state_dict()


def masks(run, *lines):
    """The masks of runs that differ in flags and in their experiment's name."""
    return [
        run("oneshot", *line.split(), "--end_iter", "1", "--exp_name", f"run{number}").ticket("level_02")[0]
        for number, line in enumerate(lines)
    ]


def test_random_ticket(run):
    shot = run("oneshot")
    mask, weights, origin = shot.ticket("level_02")
    initial = initial_weights(shot)
    assert sparsity(mask) == pytest.approx(TARGET, abs=1e-4)
    pruned = {name: weight * mask[name] if name in mask else weight for name, weight in initial.items()}
    assert same(weights, pruned)
    means = [torch.cat([initial[n].abs()[m ^ flip] for n, m in mask.items()]).mean() for flip in (False, True)]
    assert means[0] / means[1] == pytest.approx(1, abs=0.1), "magnitude must not matter"
    assert (origin["method"], origin["label"], origin["level"], origin["epoch"]) == ("oneshot-random", "random", 2, 0)
    (row,) = shot.results
    assert (row["search_epochs"], row["search_seconds"], row["search_timestep_epochs"]) == (0, 0, 0)
    assert [row["epoch"] for row in shot.stage("train", 2)] == [0, 1, 2, 3]


def test_random_masks_depend_on_seed_and_round_alone(run):
    one, again, seed, number, layer = masks(
        run, "", "--learning_rate 0.2", "--seed 5", "--round 2", "--random_scope layer"
    )
    assert same(one, again)
    assert distance(one, seed) > 0.3
    assert distance(one, number) > 0.3
    assert all(abs(value - TARGET) <= 1 / layer[name].numel() for name, value in layer_sparsity(layer).items())
    assert any(abs(value - TARGET) > 2 / one[name].numel() for name, value in layer_sparsity(one).items())


def test_erk_gives_each_layer_its_density(run):
    mask, other, again = masks(
        run, "--ticket erk --sparsity_round 2", "--ticket erk --seed 5", "--ticket erk --valid_freq 1"
    )
    densities = erk_densities({name: m.shape for name, m in mask.items()}, 1 - TARGET)
    assert max(densities.values()) == 1 > min(densities.values())
    for name, m in mask.items():
        assert int(m.sum()) == pytest.approx(densities[name] * m.numel(), abs=2), name
    assert sparsity(mask) == pytest.approx(TARGET, abs=1e-4)
    assert same(mask, again)
    assert distance(mask, other) > 0.3


def test_snip_looks_at_the_samples_it_is_told_to(run):
    ten, default, scope = masks(
        run, "--ticket snip --snip_samples 10", "--ticket snip", "--ticket snip --pruning_scope local"
    )
    for mask in (ten, default, scope):
        assert sparsity(mask) == pytest.approx(TARGET, abs=1e-4)
    assert 0 < distance(ten, default) < 0.45  # two random masks would be 0.49 apart
    assert distance(default, scope) > 0
    assert all(abs(value - TARGET) <= 1 / scope[name].numel() for name, value in layer_sparsity(scope).items())


@pytest.mark.parametrize("scope", ["global", "local"])
def test_magnitude_ticket_is_of_the_network_trained_at_t_pre(run, monkeypatch, scope):
    """The mask is that of the trained weights, which are on their way here; the ticket's are the initial ones."""
    seen = []
    monkeypatch.setattr(
        "train_snn_oneshot.magnitude_mask",
        lambda model, *more: (
            seen.append((model, {n: w.clone() for n, w in model.state_dict().items()})) or magnitude_mask(model, *more)
        ),
    )
    shot = run("oneshot", "--ticket", "magnitude", "--search_timestep", "2", "--pruning_scope", scope)
    assert [row["timesteps"] for row in shot.rows] == [2] * 4 + [4] * 4
    assert [row["phase"] for row in shot.rows] == ["search"] * 4 + ["train"] * 4
    mask, weights, _ = shot.ticket("level_02")
    ((model, trained),) = seen
    model.load_state_dict(trained)
    assert same(mask, magnitude_mask(model, TARGET, scope))
    initial = initial_weights(shot)
    assert not same(trained, initial)
    assert all(torch.equal(weights[name], initial[name] * mask[name]) for name in mask)
    (row,) = shot.results
    assert (row["search_timesteps"], row["search_epochs"], row["search_timestep_epochs"]) == (2, 4, 8)


# --- saved tickets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "more", "name"),
    [
        ("earlybird", [], "level_02"),
        ("laterewindlth", [], "level_02"),
        ("laterewindlth", ["--rewind", "none"], "level_01"),
    ],
    ids=["EB", "IMP", "fine-tuned"],
)
def test_training_a_saved_ticket_is_the_training_of_its_run(finished, run, method, more, name):
    found = finished(method, *more)
    path = found.folder / "tickets" / f"{name}.safetensors"
    shot = run("oneshot", "--ticket", str(path))
    assert same(shot.ticket(name)[0], found.ticket(name)[0])
    assert same(shot.network(name)[1], found.network(name)[1])
    phase = "train" if method == "earlybird" else "search"
    level = int(name[-2:])
    clean = [{k: v for k, v in row.items() if k not in ("seconds", "phase")} for row in found.stage(phase, level)]
    assert [{k: v for k, v in row.items() if k not in ("seconds", "phase")} for row in shot.rows] == clean
    assert (shot.args["method"], shot.args["label"]) == ("oneshot-transfer", "transfer")
    assert {field: shot.args["ticket_origin"][field] for field in ("method", "ticket", "level")} == {
        **{"method": method, "ticket": name, "level": level}
    }
    assert shot.results[0]["sparsity"] == pytest.approx(
        next(r for r in found.results if r["ticket"] == name)["sparsity"]
    )


def test_ticket_of_an_ann_is_trained_as_an_snn(run):
    ann = run("laterewindlth", "--neuron", "relu", "--timestep", "1")
    shot = run("oneshot", "--ticket", str(ann.folder / LEVEL))
    assert shot.args["ticket_origin"]["network"]["neuron"] == "relu"
    assert [row["epoch"] for row in shot.rows] == [2, 3]
    assert same(shot.ticket("level_02")[1], ann.ticket("level_02")[1])
    assert (shot.results[0]["timesteps"], shot.args["neuron"]) == (4, "lif")
    assert shot.results[0]["spikes_per_image"] > 0


def test_reinit_keeps_the_mask_and_draws_other_weights(finished, run):
    imp = finished("laterewindlth", "--rewind", "none")
    shot = run("oneshot", "--ticket", str(imp.folder / LEVEL), "--control", "reinit")
    mask, weights, _ = shot.ticket("level_02")
    assert same(mask, imp.ticket("level_02")[0])
    initial = initial_weights(shot)
    assert all(not torch.equal(weights[name], initial[name] * kept) for name, kept in mask.items())
    ticket = imp.ticket("level_02")[1]
    assert all(not torch.equal(weights[name], ticket[name]) for name in mask)
    assert [row["epoch"] for row in shot.rows] == [0, 1, 2, 3]  # trained, not fine-tuned
    assert len({row["lr"] for row in shot.rows}) == 4
    assert (shot.args["method"], shot.args["label"]) == ("oneshot-transfer-reinit", "transfer reinit")


def test_shuffle_keeps_layers_and_dense_weights(finished, run):
    bird = finished("earlybird")
    flags = ["--ticket", str(bird.folder / LEVEL), "--control", "shuffle", "--end_iter", "1"]
    mask, weights, _ = run("oneshot", *flags).ticket("level_02")
    before = bird.ticket("level_02")[0]
    assert layer_sparsity(mask) == layer_sparsity(before)
    assert all(distance({name: mask[name]}, {name: kept}) > 0 for name, kept in before.items())
    initial = bird.ticket("initial")[1]
    assert all(torch.equal(weights[name], initial[name] * kept) for name, kept in mask.items())


@pytest.fixture
def refused(refused, tmp_path):
    """The one line that a command for a small network ends with."""
    network = "--dataset synthetic --device cpu --arch alexnet --width 0.05".split()
    return lambda *flags: refused(script("oneshot"), *network, *flags, "--output_dir", tmp_path)


def test_tickets_that_cannot_be_used_are_refused_by_name(finished, tmp_path, refused):
    imp = finished("laterewindlth", "--rewind", "none")
    path = str(imp.folder / LEVEL)
    line = refused("--ticket", path, "--width", "0.1")
    assert path in line
    assert "stem.weight" in line
    line = refused("--ticket", path, "--control", "shuffle")  # no dense weights are kept
    assert path in line
    (tmp_path / "text").write_text("text")
    assert "text" in refused("--ticket", tmp_path / "text")
    assert "--ticket" in refused("--ticket", tmp_path / "nothing")
    assert not list(tmp_path.rglob("args.json"))


def test_ticket_with_no_epoch_left_and_trained_network_are_refused(finished, refused):
    folder = finished("laterewindlth").folder
    line = refused("--ticket", folder / LEVEL, "--end_iter", "2")
    assert all(text in line for text in ("--end_iter", str(folder / LEVEL)))
    for epochs in ("4", "5"):
        assert "tickets/" in refused("--ticket", folder / "networks" / "level_02.safetensors", "--end_iter", epochs)


def test_another_ticket_in_the_place_of_the_first_is_refused(finished, run, tmp_path, capsys):
    path = tmp_path / "ticket.safetensors"
    path.write_bytes((finished("earlybird").folder / LEVEL).read_bytes())
    flags = ["--ticket", str(path), "--end_iter", "1"]
    folder = run("oneshot", *flags).folder
    other = finished("laterewindlth").folder / LEVEL
    assert load_ticket(other)[2]["sparsity"] == load_ticket(path)[2]["sparsity"]
    path.write_bytes(other.read_bytes())
    with pytest.raises(SystemExit) as end:
        run("oneshot", *flags)
    assert end.value.code == 2
    assert "ticket" in capsys.readouterr().err
    assert Finished(folder).results


def test_the_initial_weights_of_another_run_are_a_ticket_like_any_other(finished, run):
    """A run has a file of that name of its own, with weights that it must not take for the ticket's."""
    source = finished("oneshot")
    ticket = str(source.folder / "tickets" / "initial.safetensors")
    trained = run("oneshot", "--ticket", ticket, "--end_iter", "1", "--seed", "5")
    (name,) = [row["ticket"] for row in trained.results]
    assert all(torch.equal(w, source.ticket("initial")[1][n]) for n, w in trained.ticket(name)[1].items())
    assert any(not torch.equal(w, source.ticket("initial")[1][n]) for n, w in trained.ticket("initial")[1].items())


@pytest.mark.parametrize("origin", [{"dense": "../x.safetensors"}, {"epoch": "2"}, {"level": -1}, {"network": None}])
def test_a_strangers_ticket_is_checked(finished, tmp_path, refused, origin):
    mask, weights, known = finished("earlybird").ticket("level_02")
    path = tmp_path / "stranger.safetensors"
    write_ticket(path, mask, weights, known | origin)
    assert path.name in refused("--ticket", path)
