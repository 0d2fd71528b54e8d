import itertools
import math
import time

import pytest
import torch
from conftest import kernels, lively, needs_a_compiler
from torch.nn import functional as F

from models import build_model
from models.layers import NormAndFire, compile_blocks
from utils.data import load_data
from utils.errors import DivergedError
from utils.masks import dense_mask, magnitude_mask, prunable, rewind
from utils.runs import Run
from utils.training import evaluate, fit, forward, learning_rate, loss_over_time, make_optimizer, predict


@pytest.fixture
def stage(tiny_args):
    """A tiny model with its data, flags and run."""

    def make(*flags):
        args = tiny_args("laterewindlth", *flags)
        data, run = load_data(args), Run(args)
        run.begin(data)
        torch.manual_seed(0)
        return build_model(args.arch, data.channels, data.classes, width=args.width), data, args, run

    return make


@pytest.mark.parametrize("epochs", [1, 2, 7, 300])
def test_learning_rates_are_torchs_schedulers(tiny_args, epochs):
    for name, make in (
        ("cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)),
        (
            "step",
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [math.ceil(epochs / 2), math.ceil(epochs * 3 / 4)], 0.1),
        ),
    ):
        args = tiny_args(
            "laterewindlth",
            "--scheduler",
            name,
            "--end_iter",
            str(epochs),
            "--learning_rate",
            "0.3",
            "--rewinding_epoch",
            "0",
        )
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
        scheduler = make(optimizer)
        for epoch in range(epochs):
            assert learning_rate(args, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            scheduler.step()


def test_the_cosine_ends_at_0_once_at_the_end(tiny_args):
    args = tiny_args("laterewindlth", "--end_iter", "300", "--learning_rate", "0.3")
    rates = [learning_rate(args, epoch) for epoch in range(301)]
    assert rates[0] == 0.3
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[300] == pytest.approx(0, abs=1e-15)
    assert rates[150] == pytest.approx(0.15)


def test_loss_is_the_mean_over_the_timesteps_that_were_run():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4, 3), torch.tensor([0, 1, 2, 1])
    expected = sum(F.cross_entropy(step, labels) for step in logits) / 5
    torch.testing.assert_close(loss_over_time(logits, labels), expected)
    same = logits[:1].expand(5, 4, 3)
    torch.testing.assert_close(loss_over_time(same[:3], labels), loss_over_time(same, labels))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_pruned_weights_are_0_and_all_survivors_move(stage, optimizer):
    model, data, args, run = stage("--optimizer", optimizer, "--learning_rate", "0.01")
    lively(model, torch.randn(8, 3, 32, 32))
    mask = magnitude_mask(model, 0.8, "local")
    weights = prunable(model)
    rewind(model, model.state_dict(), mask)
    kept = mask["classifier.weight"].nonzero()[0]
    with torch.no_grad():  # a live weight may be 0: it is not pruned and must still learn
        weights["classifier.weight"][tuple(kept)] = 0.0
    before = {n: w.detach().clone() for n, w in weights.items()}
    fit(model, data, args, make_optimizer(model, args), mask, range(0, 2), 3, run)
    for n, w in prunable(model).items():
        assert (w[~mask[n]] == 0).all(), n
    assert weights["classifier.weight"][tuple(kept)] != 0
    moved = torch.cat([(w != before[n])[mask[n]] for n, w in weights.items()])
    assert moved.float().mean() > 0.99


def test_weight_decay_counts_with_both_optimizers(stage):
    model, _, args, _ = stage("--weight_decay", "0.25")
    assert make_optimizer(model, args).param_groups[0]["weight_decay"] == 0.25
    args.optimizer = "adam"
    assert make_optimizer(model, args).param_groups[0]["weight_decay"] == 0.25


def test_masked_training_equals_masked_gradients(stage):
    """The plain way: gradients of pruned weights set to 0, no weight decay on them."""
    model, data, args, run = stage()
    mask = magnitude_mask(model, 0.6)
    rewind(model, model.state_dict(), mask)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, data, args, make_optimizer(model, args), mask, range(1), 2, run)

    plain = build_model(args.arch, 3, 10, width=args.width)
    plain.load_state_dict(start)
    optimizer = torch.optim.SGD(plain.parameters(), learning_rate(args, 0), 0.9, weight_decay=5e-4)
    for images, labels in data.train.augmented_batches(args.batch_size, run.generator(0, 0)):
        optimizer.zero_grad()
        logits = plain.train()(images, 2)
        (sum(F.cross_entropy(step, labels) for step in logits) / 2).backward()
        for name, weight in prunable(plain).items():
            weight.grad[~mask[name]] = 0
        optimizer.step()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_logged_accuracies_are_of_the_trained_network(stage):
    model, data, args, run = stage("--valid_freq", "3")
    fit(model, data, args, make_optimizer(model, args), dense_mask(model), range(4), 3, run)
    assert [row["test_accuracy"] is None for row in run.rows] == [True, True, False, False]
    assert run.rows[-1]["test_accuracy"] == evaluate(model, data.test, 3)
    assert [row["lr"] for row in run.rows] == [learning_rate(args, epoch) for epoch in range(4)]


def test_what_is_observed_after_an_epoch_stands_in_its_row_and_its_time_does_not(stage, monkeypatch):
    model, data, args, run = stage()
    seen, real = [], time.perf_counter
    monkeypatch.setattr("time.perf_counter", lambda: real() + 1000 * len(seen))

    def observe():
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"observed": len(seen)}

    fit(model, data, args, make_optimizer(model, args), dense_mask(model), range(2), 2, run, observe=observe)
    assert [row["observed"] for row in run.rows] == [1, 2]
    assert all(0 < row["seconds"] < 1000 for row in run.rows)
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(seen[0]["stem.weight"], seen[1]["stem.weight"])


def test_logged_loss_is_the_mean_over_images(stage):
    model, data, args, run = stage("--learning_rate", "1e-30", "--weight_decay", "0", "--train_samples", "40")
    fit(model, data, args, make_optimizer(model, args), dense_mask(model), range(1), 2, run)
    total = 0.0
    with torch.no_grad():
        for images, labels in data.train.augmented_batches(args.batch_size, run.generator(0, 0)):
            total += loss_over_time(model.train()(images, 2), labels).item() * len(labels)
    assert run.rows[0]["loss"] == pytest.approx(total / 40, rel=1e-5)


def test_predict_changes_nothing_and_keeps_the_order(stage):
    model, data, _, _ = stage()
    lively(model, torch.randn(8, 3, 32, 32))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    logits = predict(model, data.test, 3)
    assert model.training
    assert logits.shape == (3, 20, 10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    hits = (logits.mean(0).argmax(1) == data.test.labels).sum().item()
    assert evaluate(model, data.test, 3) == pytest.approx(100 * hits / 20)


def test_randomness_of_an_epoch_depends_on_seed_round_level_and_epoch(tiny_args):
    runs = [Run(tiny_args("laterewindlth", *flags)) for flags in ([], ["--seed", "5"], ["--round", "2"])]
    draws = [run.generator(level, epoch).initial_seed() for run in runs for level in (0, 1) for epoch in (0, 1)]
    assert len(set(draws)) == 12
    again = Run(tiny_args("earlybird"))
    assert again.generator(1, 1).initial_seed() == runs[0].generator(1, 1).initial_seed()


def test_seed_and_round_do_not_collide(tiny_args):
    seeds = {Run(tiny_args("laterewindlth", "--seed", s, "--round", r)).seed for s in "123" for r in "123"}
    assert len(seeds) == 9


def test_loss_that_is_not_finite_stops_with_the_last_checkpoint_kept(stage):
    model, data, args, run = stage()
    checkpoint, optimizer, mask = run.checkpoint("dense"), make_optimizer(model, args), dense_mask(model)
    fit(model, data, args, optimizer, mask, range(1), 2, run, checkpoint=checkpoint)
    good = checkpoint.read_bytes()
    with torch.no_grad():
        model.classifier.weight.fill_(math.inf)
    checkpoint_path = run.checkpoint("other")
    with pytest.raises(DivergedError, match=r"epoch 2/4 T=2, step 0, learning rate 0\.08"):
        fit(model, data, args, optimizer, mask, range(1, 3), 2, run, checkpoint=checkpoint_path)
    assert checkpoint.read_bytes() == good
    assert len(run.rows) == 1
    assert not checkpoint_path.exists()


def test_weights_that_the_last_step_ruins_do_not_become_a_checkpoint(stage):
    model, data, args, run = stage("--batch_size", "40", "--learning_rate", "1e39")
    with pytest.raises(DivergedError, match="the weights are not finite after search level 0 epoch 1/4"):
        fit(
            model, data, args, make_optimizer(model, args), dense_mask(model), range(1), 2, run,
            checkpoint=run.checkpoint("dense"),
        )  # fmt: skip
    assert not run.checkpoint("dense").exists()
    assert not run.rows


def test_bf16_trains_with_fp32_weights(stage):
    model, data, args, run = stage("--precision", "bf16")
    fit(model, data, args, make_optimizer(model, args), dense_mask(model), range(1), 2, run)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert math.isfinite(run.rows[0]["loss"])


@needs_a_compiler
def test_only_full_batches_are_compiled_for():
    class OneBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fire = NormAndFire(3, "lif")

        def forward(self, images, timesteps):
            return self.fire(images.unsqueeze(0), timesteps=timesteps)

    model = OneBlock()
    compile_blocks(model)
    torch._dynamo.reset()
    before = kernels()
    forward(model, torch.randn(3, 3, 5, 5), 2, "fp32", 4)
    assert kernels() == before
    forward(model, torch.randn(4, 3, 5, 5), 2, "fp32", 4)
    assert kernels() == before + 1
