import pytest
import torch
from conftest import script
from test_resume import Killed, assert_same, contents, kill_at
from torch.nn import functional as F

from models import build_model
from utils.data import balanced_part, load_data
from utils.files import read_tensors, write_tensors
from utils.masks import distance, layer_sparsity, magnitude_mask, prunable, shuffle_layers, sparsity, sparsity_after
from utils.snip import snip_scores


def initial_weights(finished, neuron="lif"):
    torch.manual_seed(finished.args["effective_seed"])
    return build_model("vgg16", 3, 10, neuron, width=0.0625).state_dict()


def test_random_ticket_is_of_the_target_sparsity_on_the_initial_weights(run):
    shot = run("oneshot", "--ticket", "random")
    mask, weights, _ = shot.ticket(2)
    assert sparsity(mask) == pytest.approx(sparsity_after(2, 0.25), abs=1e-4)
    initial = initial_weights(shot)
    assert all(torch.equal(weights[name], initial[name]) for name in initial)
    kept = torch.cat([initial[name].abs()[m] for name, m in mask.items()]).mean()
    lost = torch.cat([initial[name].abs()[~m] for name, m in mask.items()]).mean()
    assert kept / lost == pytest.approx(1, abs=0.05), "magnitude must not matter"
    (result,) = shot.results
    assert (result["method"], result["search_epochs"], result["search_seconds"]) == ("oneshot-random", 0, 0)
    assert [row["epoch"] for row in shot.stage("train", 2)] == [0, 1, 2, 3]


def test_random_scope_layer_prunes_every_layer_alike(run):
    mask, _, _ = run("oneshot", "--random_scope", "layer").ticket(2)
    for name, value in layer_sparsity(mask).items():
        assert value == pytest.approx(sparsity_after(2, 0.25), abs=1 / mask[name].numel())


def test_sparsity_round_0_trains_the_dense_network(run):
    assert run("oneshot", "--sparsity_round", "0").results[0]["sparsity"] == 0


def test_snip_is_the_sensitivity_to_a_factor_on_each_connection(tiny_args):
    """The definition: |dL/dc| at c = 1, where every weight is multiplied by its own c."""
    torch.manual_seed(0)
    model = build_model("vgg16", 3, 10, width=0.0625)
    samples = balanced_part(load_data(tiny_args("oneshot")).train, 20)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = snip_scores(model, samples, 2)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    factors = {name: torch.ones_like(weight).requires_grad_() for name, weight in prunable(model).items()}
    ((images, labels),) = samples.batches(20)
    tensors = {**state, **{name: state[name] * c for name, c in factors.items()}}
    logits = torch.func.functional_call(model.train(), tensors, (images, 2))
    loss = sum(F.cross_entropy(step, labels) for step in logits) / 2
    gradients = torch.autograd.grad(loss, list(factors.values()))
    for (name, score), gradient in zip(scores.items(), gradients, strict=True):
        torch.testing.assert_close(score, gradient.abs(), rtol=1e-4, atol=1e-9, msg=name)
    assert sum(score.sum() for score in scores.values()) > 0


def test_snip_ticket(run):
    shot = run("oneshot", "--ticket", "snip")
    assert sparsity(shot.ticket(2)[0]) == pytest.approx(sparsity_after(2, 0.25), abs=1e-4)
    assert shot.results[0]["method"] == "oneshot-snip"


def test_magnitude_ticket_is_of_the_network_trained_at_t_pre(run):
    shot = run("oneshot", "--ticket", "magnitude", "--search_timestep", "2")
    assert [row["timesteps"] for row in shot.rows] == [2] * 4 + [3] * 4
    trained = build_model("vgg16", 3, 10, width=0.0625)
    trained.load_state_dict(shot.network("search"))
    mask, weights, _ = shot.ticket(2)
    assert distance(mask, magnitude_mask(trained, sparsity_after(2, 0.25))) == 0
    initial = initial_weights(shot)
    assert all(torch.equal(weights[name], initial[name]) for name in initial)
    (result,) = shot.results
    assert (result["search_timesteps"], result["search_epochs"], result["search_timestep_epochs"]) == (2, 4, 8)


def test_saved_ticket_of_an_ann_is_trained_as_an_snn_from_its_epoch(run):
    ann = run("laterewindlth", "--neuron", "relu", "--timestep", "1")
    path = ann.folder / "tickets" / "level_02.safetensors"
    shot = run("oneshot", "--ticket", str(path))
    mask, weights, origin = shot.ticket(2)
    expected, expected_weights, _ = ann.ticket(2)
    assert all(torch.equal(mask[name], expected[name]) for name in expected)
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert [row["epoch"] for row in shot.stage("train", 2)] == [2, 3] == list(range(origin["epoch"], 4))
    assert shot.results[0]["method"] == "oneshot-transfer"
    assert (origin["source"]["method"], origin["source"]["neuron"]) == ("laterewindlth", "relu")
    network = shot.network("train")
    assert all((network[name][~m] == 0).all() for name, m in mask.items())


@pytest.mark.parametrize("kind", ["weights", "lr", "none"])
def test_training_an_imp_ticket_again_gives_its_level(run, kind):
    imp = run("laterewindlth", "--rewind", kind)
    shot = run("oneshot", "--ticket", str(imp.folder / "tickets" / "level_01.safetensors"))
    before, after = imp.network("level_01"), shot.network("train")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert shot.ticket(1)[2]["rewind"] == shot.args["rewind"] == kind


def test_fresh_weights_are_trained_not_fine_tuned(run):
    path = run("laterewindlth", "--rewind", "none").folder / "tickets" / "level_01.safetensors"
    for control, name in (("reinit", "oneshot-transfer-reinit"), ("shuffle", "oneshot-transfer-shuffle")):
        shot = run("oneshot", "--ticket", str(path), "--control", control)
        assert shot.folder.parent.name == name
        rates = [row["lr"] for row in shot.stage("train", 1)]
        assert (len(rates), len(set(rates))) == ((4, 4) if control == "reinit" else (2, 1))


@pytest.mark.parametrize("control", ["shuffle", "reinit"])
def test_controls_change_one_thing(run, control):
    bird = run("earlybird", "--eb_tolerance", "1")
    shot = run("oneshot", "--ticket", str(bird.folder / "tickets" / "level_02.safetensors"), "--control", control)
    mask, weights, _ = bird.ticket(2)
    other_mask, other_weights, origin = shot.ticket(2)
    same_mask = distance(mask, other_mask) == 0
    same_weights = all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert (same_mask, same_weights) == ((True, False) if control == "reinit" else (False, True))
    assert layer_sparsity(mask) == layer_sparsity(other_mask)
    assert origin["epoch"] == 0
    assert shot.results[0]["method"] == f"oneshot-transfer-{control}"


def test_shuffling_keeps_the_counts_of_each_layer():
    torch.manual_seed(0)
    mask = {"a": torch.arange(10000).view(100, 100) < 3000, "b": torch.arange(8) < 1}
    shuffled = shuffle_layers(mask)
    assert {name: int(m.sum()) for name, m in shuffled.items()} == {"a": 3000, "b": 1}
    assert 700 < int((shuffled["a"] & mask["a"]).sum()) < 1100


def test_ticket_that_does_not_fit_names_the_first_parameter(run, tiny, capsys):
    path = run("earlybird").folder / "tickets" / "level_02.safetensors"
    for more, message in (
        (("--width", "0.125"), r"stem.weight is (4, 3, 3, 3) in the ticket, (8, 3, 3, 3) in the network"),
        (("--arch", "resnet19"), "blocks.0.conv1.weight is not there in the ticket"),
    ):
        with pytest.raises(SystemExit) as stop:
            script("oneshot")([*tiny, "--ticket", str(path), *more])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_ticket_that_is_trained_to_the_end_already(run, tiny, capsys):
    path = run("laterewindlth").folder / "tickets" / "level_02.safetensors"
    with pytest.raises(SystemExit) as stop:
        script("oneshot")([*tiny, "--ticket", str(path), "--end_iter", "2"])
    assert stop.value.code == 2
    assert "--end_iter: must be more than 2, the epoch that the ticket starts with, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("magnitude", "shuffle"), ("snip", "reinit")])
def test_killed_and_resumed_the_same_ticket_comes_out(run, tmp_path, tiny, monkeypatch, flags):
    """What is random is drawn again on the way to where the run stopped."""
    more = ["--ticket", flags[0], "--control", flags[1]]
    whole = run("oneshot", *more)
    elsewhere = [*tiny[:-1], str(tmp_path / "killed"), *more]
    with monkeypatch.context() as patch:
        kill_at(patch, 7, True)
        with pytest.raises(Killed):
            script("oneshot")(elsewhere)
    script("oneshot")(elsewhere)
    folder = tmp_path / "killed" / whole.folder.parent.name / whole.folder.name
    assert_same(contents(whole.folder), contents(folder))


def refused(capsys, flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script("oneshot")(flags)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_ticket_that_changed_is_refused_and_one_that_moved_is_not(run, tiny, tmp_path, capsys):
    tickets = run("laterewindlth").folder / "tickets"
    path = tmp_path / "ticket.safetensors"
    path.write_bytes((tickets / "level_01.safetensors").read_bytes())
    run("oneshot", "--ticket", str(path))
    moved = tmp_path / "moved.safetensors"
    path.rename(moved)
    script("oneshot")([*tiny, "--ticket", str(moved)])
    assert "finished" in capsys.readouterr().out
    moved.write_bytes((tickets / "level_02.safetensors").read_bytes())
    assert "--ticket_checksum was crc32" in refused(capsys, [*tiny, "--ticket", str(moved)])


def test_ticket_of_the_runs_own_folder_is_refused(run, tiny, capsys):
    path = run("laterewindlth").folder / "tickets" / "level_01.safetensors"
    flags = [*tiny, "--ticket", str(path), "--exp_name", "laterewindlth", "--restart"]
    assert "own folder" in refused(capsys, flags)
    assert path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, origin: tensors.pop("mask.classifier.weight"), "classifier.weight is not there in the ticket"),
        (lambda tensors, origin: origin.update(level=-1), "does not say its level and epoch"),
        (lambda tensors, origin: origin.update(epoch=True), "does not say its level and epoch"),
        (lambda tensors, origin: origin.update(rewind="never"), "--rewind 'never', not weights, lr, none"),
        (lambda tensors, origin: tensors.update({"mask.classifier.weight": torch.ones(1, dtype=torch.bool)}), "no"),
        (lambda tensors, origin: tensors.update({"mask.classifier.bias": torch.ones(10, dtype=torch.bool)}), "no"),
        (lambda tensors, origin: tensors["weights.classifier.bias"].fill_(torch.nan), "finite weights"),
    ],
)
def test_tickets_made_by_hand_are_checked(run, tiny, tmp_path, capsys, change, message):
    path = run("earlybird").folder / "tickets" / "level_02.safetensors"
    tensors, origin = read_tensors(path, "")
    change(tensors, origin)
    write_tensors(tmp_path / "odd.safetensors", tensors, origin)
    line = refused(capsys, [*tiny, "--ticket", str(tmp_path / "odd.safetensors")])
    assert message in line
    assert "odd.safetensors" in line


def test_file_that_is_no_ticket_is_not_to_be_removed(run, tiny, capsys):
    path = run("earlybird").folder / "checkpoints" / "train.safetensors"
    line = refused(capsys, [*tiny, "--ticket", str(path)])
    assert "is not a ticket" in line
    assert "name a file of a run's tickets folder" in line
    assert "remove" not in line
