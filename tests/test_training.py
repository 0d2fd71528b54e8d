import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from networks import lively
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from models import build_model
from models.layers import NormAndFire
from utils import training
from utils.data import load_data
from utils.flags import get_args
from utils.masks import prunable, rewind
from utils.scores import magnitude_mask
from utils.training import DivergedError, Trainer, forward, generator, learning_rate, loss_over_time, make_optimizer


def flags(*more):
    return get_args("train_snn_mine.py", "mine", None, [*TINY.split(), *more])


@pytest.fixture
def trainer():
    """A trainer of a small network that fires, with 5 steps an epoch, the last of them of 4 images."""

    def make(*more, double=False):
        args = flags("--train_samples", "36", "--test_samples", "20", *more)
        data = load_data(args)
        torch.manual_seed(0)
        model = build_model(
            args.arch, data.channels, data.classes, args.neuron, args.width, v_threshold=args.v_threshold
        )
        if args.neuron == "lif":
            lively(model, next(data.train.batches(36))[0])
        if double:
            model.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
        return Trainer(model, data, args)

    return make


def train(trainer, mask=None, epochs=(0,), optimizer=None, **more):
    optimizer = optimizer or make_optimizer(trainer.model, trainer.args)
    return [trainer.epoch(optimizer, mask, epoch, 3, **more) for epoch in epochs]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def batches_of(trainer, epoch, level=0):
    """The batches of an epoch as they are documented: order and augmentation have a generator each."""
    draws = (generator(trainer.args, purpose, level, epoch) for purpose in ("shuffle", "augment"))
    return trainer.data.train.augmented_batches(trainer.args.batch_size, *draws)


# --- schedule, loss, generators --------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2, 7, 300])
@pytest.mark.parametrize("scheduler", ["cosine", "step"])
def test_learning_rates_are_torchs_schedulers(epochs, scheduler):
    args = flags("--scheduler", scheduler, "--end_iter", str(epochs), "--learning_rate", "0.3")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
    tenths = [math.ceil(epochs / 2), math.ceil(epochs * 3 / 4)]
    theirs = {
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        "step": torch.optim.lr_scheduler.MultiStepLR(optimizer, tenths, 0.1),
    }[scheduler]
    optimizer.param_groups[0]["lr"] = 0.3
    for epoch in range(epochs):
        assert learning_rate(args, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_loss_is_the_mean_over_the_timesteps_that_were_run():
    logits, labels = torch.randn(5, 4, 3), torch.tensor([0, 1, 2, 1])
    torch.testing.assert_close(loss_over_time(logits, labels), sum(F.cross_entropy(o, labels) for o in logits) / 5)
    assert loss_over_time(logits.bfloat16(), labels).dtype == torch.float32


def test_generators_differ_by_purpose_level_epoch_seed_and_round():
    settings = [flags("--seed", seed, "--round", round) for seed in "123" for round in "123"]
    places = list(itertools.product(settings, ("shuffle", "augment"), (0, 1, 2), (0, 1, 2)))
    draws = {tuple(torch.rand(2, generator=generator(*place)).tolist()) for place in places}
    assert len(draws) == len(places)
    torch.manual_seed(5)
    assert {tuple(torch.rand(2, generator=generator(*place)).tolist()) for place in places} == draws


# --- one epoch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_masked_training_equals_masked_gradients(trainer, optimizer):
    """The plain way, in fp64 and without spikes, which would turn a rounding into another network: gradients of pruned
    weights are set to 0. What a method is called with has the gradient before that."""
    more = ["--momentum", "0.6"] if optimizer == "sgd" else ["--optimizer", "adam", "--learning_rate", "0.001"]
    ours = trainer("--neuron", "relu", "--timestep", "1", "--weight_decay", "0.05", *more, double=True)
    for parameter in ours.model.parameters():
        parameter.data.add_(0.01)  # Adam would make a step of the rounding of a bias that is 0
    model, mask = ours.model, magnitude_mask(ours.model, 0.6)
    rewind(model, state_of(model), mask)
    plain, seen, expected = copy.deepcopy(model), [], []

    def look(step, generator):
        seen.append({name: weight.grad.clone() for name, weight in prunable(model).items()})

    train(ours, mask, (1, 2), level=3, after_step=look)
    if optimizer == "sgd":
        theirs = torch.optim.SGD(plain.parameters(), 1, momentum=0.6, weight_decay=0.05)
    else:
        theirs = torch.optim.Adam(plain.parameters(), weight_decay=0.05)
    for epoch in (1, 2):
        theirs.param_groups[0]["lr"] = learning_rate(ours.args, epoch)
        for images, labels in batches_of(ours, epoch, level=3):
            theirs.zero_grad()
            loss_over_time(plain.train()(images, 3), labels).backward()
            expected.append({name: weight.grad.clone() for name, weight in prunable(plain).items()})
            for name, weight in prunable(plain).items():
                weight.grad[~mask[name]] = 0
            theirs.step()
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)
    for gradients, dense in zip(seen, expected, strict=True):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, dense[name], rtol=1e-6, atol=1e-8, msg=name)
    assert all((gradient[~mask[name]] != 0).any() for name, gradient in seen[-1].items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_pruned_weights_are_0_and_survivors_learn_also_those_that_are_0(trainer, optimizer):
    ours = trainer("--optimizer", optimizer, "--learning_rate", "0.01")
    mask = magnitude_mask(ours.model, 0.8, "local")
    rewind(ours.model, state_of(ours.model), mask)
    weights = prunable(ours.model)
    live = tuple(mask["classifier.weight"].nonzero()[0])
    weights["classifier.weight"].data[live] = 0
    before = state_of(ours.model)
    train(ours, mask, (0, 1))
    assert all((weight[~mask[name]] == 0).all() for name, weight in weights.items())
    assert weights["classifier.weight"][live] != 0
    moved = torch.cat([(weight != before[name])[mask[name]] for name, weight in weights.items()])
    assert moved.float().mean() > 0.99


def test_the_mask_is_live(trainer):
    """A layer that is dense when the epoch begins is pruned within it, and later kept again."""
    ours = trainer("--weight_decay", "0.01")
    mask, name, part = magnitude_mask(ours.model, 0.5, "local"), "classifier.weight", slice(0, 4)
    mask[name].fill_(True)
    weight, zeros = prunable(ours.model)[name], []

    def change(step, generator):
        zeros.append(bool((weight[part] == 0).all()))
        if step == 1:
            mask[name][part] = False
        elif step == 3:
            mask[name][part] = True

    train(ours, mask, after_step=change)
    assert zeros == [False, False, True, True, False]


def test_an_epoch_trains_also_a_network_that_was_left_in_eval_mode(trainer):
    mine = trainer()
    mine.model.eval()
    before = state_of(mine.model)["stem_fire.norm.running_mean"]
    train(mine)
    assert not torch.equal(mine.model.state_dict()["stem_fire.norm.running_mean"], before)


# --- what is logged --------------------------------------------------------------------------------------------------


def test_loss_and_training_accuracy_are_means_over_the_images(trainer):
    ours = trainer("--learning_rate", "1e-30", "--weight_decay", "0")
    ours.model.classifier.weight.data.mul_(20)  # predictions that differ from image to image
    before = copy.deepcopy(ours.model)
    (row,) = train(ours)
    loss = correct = 0
    with torch.no_grad():
        for images, labels in batches_of(ours, 0):
            logits = before.train()(images, 3)
            loss += sum(F.cross_entropy(step, labels, reduction="sum") for step in logits).item() / 3
            correct += (logits.mean(0).argmax(1) == labels).sum().item()
    assert 0 < correct < 36
    assert row["train_accuracy"] == pytest.approx(100 * correct / 36)
    assert row["loss"] == pytest.approx(loss / 36, rel=1e-5)
    assert row["timesteps"] == 3


class Close(nn.Module):
    """Always the same bf16 logits, of two classes that a mean in bf16 could not tell apart."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, images, timesteps):
        logits = torch.tensor([[1.0, 1.0], [1.0, 1.0078125]]).unsqueeze(1)  # [T,1,classes]
        return (self.one * logits).expand(timesteps, len(images), 2).bfloat16()


def test_logits_of_bf16_are_averaged_in_fp32():
    args = flags("--precision", "bf16", "--learning_rate", "1e-30", "--timestep", "2")
    data = load_data(args)
    train, test = (replace(split, labels=torch.ones_like(split.labels)) for split in (data.train, data.test))
    model = Close()
    assert model(torch.zeros(1, 1), 2).mean(0).argmax() == 0, "a tie in bf16"
    trainer = Trainer(model, replace(data, train=train, test=test, classes=2), args)
    row = trainer.epoch(make_optimizer(model, args), None, 3, 2)
    assert (row["train_accuracy"], row["test_accuracy"]) == (100, 100)


def test_the_test_accuracy_is_that_of_the_trained_network_and_none_between_tests(trainer, monkeypatch):
    monkeypatch.setitem(training.EVALUATION_BATCH, "cpu", 8)
    ours = trainer("--valid_freq", "3", double=True)
    ours.model.classifier.weight.data.mul_(20)
    rows = train(ours, epochs=range(4))
    assert [row["test_accuracy"] is None for row in rows] == [True, True, False, False]
    ((images, labels),) = ours.data.test.batches(20)
    state = state_of(ours.model)
    logits = ours.predict(ours.data.test, 3)
    assert ours.model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.model.state_dict().items())
    with torch.no_grad():
        expected = ours.model.eval()(images, 3)
    torch.testing.assert_close(logits, expected.float())
    correct = (expected.mean(0).argmax(1) == labels).sum().item()
    assert 0 < correct < 20
    assert rows[-1]["test_accuracy"] == ours.evaluate(ours.data.test, 3) == pytest.approx(100 * correct / 20)


def test_the_seconds_are_those_of_the_training_alone(trainer, monkeypatch):
    ours, passed = trainer("--valid_freq", "1"), [0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: sum(passed))
    monkeypatch.setattr(ours, "evaluate", lambda split, timesteps: passed.append(1000))
    (row,) = train(ours, after_step=lambda step, generator: passed.append(1))
    assert row["seconds"] == 5
    assert 1000 in passed


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_counts_in_training_and_in_evaluation(trainer, precision, dtype):
    ours, seen = trainer("--precision", precision), []
    ours.model.features[1].register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    convolution = next(module for module in ours.model.features.modules() if isinstance(module, nn.Conv2d))
    convolution.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    for act in (
        lambda: train(ours),
        lambda: ours.predict(ours.data.test, 3),
        lambda: ours.evaluate(ours.data.test, 3),
    ):
        seen.clear()
        act()
        assert set(seen) == {dtype}
    assert ours.predict(ours.data.test, 3).dtype == torch.float32
    assert {parameter.dtype for parameter in ours.model.parameters()} == {torch.float32}


# --- what goes wrong, and what is compiled ---------------------------------------------------------------------------


def test_a_loss_or_a_weight_that_is_not_finite_ends_the_training(trainer):
    ours = trainer()
    ours.model.classifier.weight.data.fill_(math.inf)
    with pytest.raises(DivergedError, match="--learning_rate"):
        train(ours)
    ours = trainer("--learning_rate", "1e39", "--batch_size", "36")  # one step, after a loss that is finite
    with pytest.raises(DivergedError, match="--learning_rate"):
        train(ours)


@pytest.mark.slow  # torch.compile traces every block
def test_compiling_is_not_in_the_seconds_and_leaves_no_trace(trainer, monkeypatch):
    now, compiled_at = [0], []

    def backend(graph, inputs):
        compiled_at.append(len(now))
        now.append(1000)
        return graph

    def train_two_epochs(case):
        optimizer, rows = make_optimizer(case.model, case.args), []
        torch.manual_seed(3)
        for epoch, timesteps in enumerate((3, 2)):
            rows.append(case.epoch(optimizer, None, epoch, timesteps, after_step=lambda step, generator: now.append(1)))
        return rows, [*case.model.state_dict().values(), torch.rand(3)]

    monkeypatch.setattr(training.time, "perf_counter", lambda: sum(now))
    torch._dynamo.reset()
    ours, plain = (trainer("--valid_freq", "9", "--end_iter", "9") for _ in range(2))
    ours.args.compile = True
    for module in ours.model.modules():  # as compile_blocks does it, without a C++ compiler
        if isinstance(module, NormAndFire):
            module.compile(backend=backend, dynamic=False)
    rows, left = train_two_epochs(ours)
    assert [row["seconds"] for row in rows] == [ours.steps, ours.steps]
    assert max(compiled_at) > ours.steps > min(compiled_at), "for both numbers of timesteps"
    expected, of_plain = train_two_epochs(plain)
    assert rows == expected
    assert all(torch.equal(own, other) for own, other in zip(left, of_plain, strict=True))


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [4, 8]), (36, [36])])
def test_passes_before_the_clock_starts_have_both_sizes_of_a_batch_and_leave_no_trace(trainer, batch_size, sizes):
    ours, seen = trainer("--batch_size", str(batch_size)), []
    ours.args.compile = True  # which asks for them; no block is compiled
    drops = nn.Dropout()
    drops.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
    ours.model.classifier = nn.Sequential(drops, ours.model.classifier)
    for parameter in ours.model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    ours.model.train()
    before, gradients = state_of(ours.model), [p.grad for p in ours.model.parameters()]
    torch.manual_seed(3)
    for _ in range(2):
        ours._prepare(3)
    drawn = torch.rand(3)
    assert sorted(seen) == sizes
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.model.state_dict().items())
    assert all(p.grad is g and (g == 2).all() for p, g in zip(ours.model.parameters(), gradients, strict=True))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


def test_fp32_is_not_tf32(trainer):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    trainer()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_only_full_batches_are_compiled_for():
    model, counter = nn.Linear(2, 2), CompileCounter()
    inner = model.forward
    model.forward = lambda images, timesteps: inner(images).expand(timesteps, -1, -1)
    model.compile(backend=counter)
    torch._dynamo.reset()
    forward(model, torch.ones(3, 2), 2, "fp32", full=False)
    assert counter.frame_count == 0
    forward(model, torch.ones(4, 2), 2, "fp32")
    assert counter.frame_count == 1
