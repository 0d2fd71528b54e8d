"""The captured step on a stand-in for a GPU, and the layout with channels innermost."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from networks import lively
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from models import build_model
from models.layers import BatchNorm
from utils import training
from utils.data import load_data
from utils.engine import WARM_UP, Graphed
from utils.flags import get_args
from utils.masks import apply_mask, prunable
from utils.scores import magnitude_mask
from utils.training import Trainer, make_optimizer, place


class Recorder(TorchDispatchMode):
    """What a capture and its replay do, on the CPU: operations are written down, with the tensors that they read and
    write, and nothing has happened afterwards; played, they happen to these tensors again."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal"), f"{name} waits for the device"
        for tensor in tree_leaves((args, kwargs)):  # schemas do not tell that batch norm writes its statistics
            if torch.is_tensor(tensor):
                memory = tensor.untyped_storage()
                self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        results = function(*args, **kwargs)
        self.calls.append((function, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs, results))))
        return results

    def undo(self):
        for memory, value in self.before.values():
            memory.copy_(value)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, results in self.calls:
            new = function(*args, **kwargs)
            if any(returned.alias_info is None for returned in function._schema.returns):
                # views, and what is written in place, are where they were
                for tensor, value in zip(tree_leaves(results), tree_leaves(new), strict=True):
                    if torch.is_tensor(value):
                        tensor.copy_(value)


@pytest.fixture
def card(monkeypatch):
    """Recorded operations in the place of CUDA graphs; the list of all graphs."""
    graphs = []

    def make():
        graphs.append(Recorder())
        return graphs[-1]

    @contextmanager
    def on(stream):
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def capture(graph, stream):
        before, current[0] = current[0], stream
        try:
            with graph:
                yield
        except RuntimeError as error:  # torch leaves the stream as it is, too
            graph.undo()
            raise RuntimeError("the capture was invalidated") from error
        graph.undo()
        current[0] = before

    def stream():
        return SimpleNamespace(wait_stream=lambda other: None)

    current = [stream()]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return graphs


def test_a_captured_function_is_called_with_the_arguments_of_now(card):
    total, called = torch.zeros(2), []

    def add(x):
        called.append(len(called))
        total.add_(x)
        return x * 2, total.sum()

    graphed = Graphed(add)
    for step in range(1, 8):
        x = torch.full((2,), float(step))
        double, everything = graphed(x)
        assert torch.equal(double, 2 * x)
        assert everything == 2 * sum(range(1, step + 1))
    assert len(called) == WARM_UP + 1
    assert len(card) == 1


def test_the_stand_in_sees_what_waits_for_the_device(card):
    graphed = Graphed(lambda x: (x.nonzero(),))
    for _ in range(WARM_UP):
        graphed(torch.ones(2))
    with pytest.raises(AssertionError, match="nonzero"):
        graphed(torch.ones(2))


class Case:
    """A sparse network in training: 4 full batches an epoch and one that is not; its mask changes between steps."""

    def __init__(self, cuda_graph, *flags, arch="vgg16"):
        line = f"{TINY} --arch {arch} --width 0.0625 --batch_size 4 --train_samples 18 --test_samples 8"
        self.args = get_args("train_snn_mine.py", "mine", None, [*line.split(), *flags])
        self.args.cuda_graph = cuda_graph  # which is refused on a CPU
        data = load_data(self.args)
        torch.manual_seed(0)
        model = build_model(arch, data.channels, data.classes, width=self.args.width, v_threshold=0.5)
        self.model = place(model, self.args)
        lively(self.model, next(data.train.batches(8))[0])
        self.mask = magnitude_mask(self.model, 0.6, "local")
        apply_mask(self.model, self.mask)
        self.trainer, self.optimizer = Trainer(self.model, data, self.args), make_optimizer(self.model, self.args)
        self.rows, self.gradients = [], []

    def change(self, step, generator):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        for m in self.mask.values():  # as many weights are kept as before
            m.copy_(m.flatten()[torch.randperm(m.numel(), generator=generator)].view_as(m))

    def train(self, epoch, timesteps=2):
        row = self.trainer.epoch(self.optimizer, self.mask, epoch, timesteps, after_step=self.change)
        self.rows.append({name: value for name, value in row.items() if name != "seconds"})

    def tensors(self):
        own = self.optimizer.state_dict()["state"]
        momenta = {f"{i}.{name}": value for i, state in own.items() for name, value in state.items()}
        return {**self.model.state_dict(), **{n: torch.as_tensor(value) for n, value in momenta.items()}}


def assert_same(one, other):
    assert one.rows == other.rows
    a, b = one.tensors(), other.tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert all(torch.equal(own, expected) for own, expected in zip(one.gradients, other.gradients, strict=True))


@pytest.mark.parametrize(
    ("arch", "flags"),
    [("vgg16", ()), ("resnet19", ()), ("alexnet", ("--optimizer", "adam")), ("alexnet", ("--precision", "bf16"))],
)
def test_captured_steps_train_as_others_do(card, monkeypatch, arch, flags):
    """In 2 epochs at 2 rates: the graph of the first epoch serves all."""
    # rates that fp32 can hold
    monkeypatch.setattr(training, "learning_rate", lambda args, epoch: 2.0 ** -(6 + epoch))
    graphed, plain = Case(True, *flags, arch=arch), Case(False, *flags, arch=arch)
    for case in (graphed, plain):
        for epoch in range(2):
            case.train(epoch)
    assert len(card) == 1
    assert_same(graphed, plain)


def test_a_step_is_captured_anew_for_other_timesteps_and_optimizers_only(card, monkeypatch):
    """A mask may be another object in every epoch."""
    monkeypatch.setattr(training, "learning_rate", lambda args, epoch: 2.0**-6)
    graphed, plain = Case(True, arch="alexnet"), Case(False, arch="alexnet")

    def train(count, **more):
        for case in (graphed, plain):
            case.train(0, **more)
        assert len(card) == count
        assert_same(graphed, plain)

    train(1)
    train(2, timesteps=1)
    for case in (graphed, plain):
        case.optimizer = make_optimizer(case.model, case.args)
    train(3, timesteps=1)
    for case in (graphed, plain):
        before, values = case.mask, {name: m.clone() for name, m in case.mask.items()}
        case.mask = magnitude_mask(case.model, 0.8, "local")
        case.train(0, timesteps=1)
        assert all(torch.equal(m, values[name]) for name, m in before.items())
    assert len(card) == 3
    assert_same(graphed, plain)


def test_a_capture_that_fails_is_noted_once_and_nothing_is_trained_twice(card, capsys):
    graphed, plain = Case(True, arch="alexnet"), Case(False, arch="alexnet")
    stream = torch.cuda.current_stream()

    def fail(*_):
        if len(card) == 1 and not failed:
            failed.append(torch.cuda.current_stream() is not stream)
            raise RuntimeError("not permitted while a stream is captured\nand more")

    failed = []
    graphed.optimizer.register_step_post_hook(fail)
    for case in (graphed, plain):
        case.train(0)
        case.train(1)
    assert failed == [True]
    assert len(card) == 1
    assert torch.cuda.current_stream() is stream
    assert gc.isenabled()
    (note,) = capsys.readouterr().out.splitlines()
    assert "not permitted" in note
    assert graphed.tensors().keys() == plain.tensors().keys()
    for name, own in graphed.tensors().items():  # its rate is a number of fp32
        torch.testing.assert_close(own, plain.tensors()[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("captured", [True, False])
def test_a_run_with_captured_steps_resumes_without_and_the_other_way_round(card, monkeypatch, captured):
    monkeypatch.setattr(training, "learning_rate", lambda args, epoch: 2.0 ** -(6 + epoch))
    begun, expected = (Case(not captured, "--optimizer", "adam", arch="alexnet") for _ in range(2))
    resumed = Case(captured, "--optimizer", "adam", arch="alexnet")
    for case in (begun, expected):
        case.train(0)
    resumed.model.load_state_dict(begun.model.state_dict())
    resumed.optimizer.load_state_dict(begun.optimizer.state_dict())
    resumed.mask, resumed.rows, resumed.gradients = begun.mask, begun.rows, begun.gradients
    for epoch in (1, 2):
        for case in (resumed, expected):
            case.train(epoch)
    assert len(card) == (1 if captured else 2)
    assert_same(resumed, expected)


def test_the_capture_is_not_in_the_seconds(card, monkeypatch):
    case, now = Case(True, arch="alexnet"), [0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: sum(now))
    monkeypatch.setattr(Recorder, "undo", lambda graph: now.append(1000))
    row = case.trainer.epoch(case.optimizer, None, 0, 2, after_step=lambda step, generator: now.append(1))
    assert row["seconds"] == case.trainer.steps
    assert now.count(1000) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [(), ("--no-channels_last",), ("--optimizer", "adam")])
def test_captured_steps_train_as_others_do_on_a_gpu(flags):
    flags = ("--device", "cuda", "--precision", "fp32", *flags)
    graphed, plain = Case(True, *flags), Case(False, *flags)
    for case in (graphed, plain):
        for epoch in range(2):
            case.train(epoch)
    for own, expected in zip(graphed.rows, plain.rows, strict=True):  # spikes flip with the order of sums
        assert own["loss"] == pytest.approx(expected["loss"], abs=0.05)


@pytest.mark.parametrize("arch", ["vgg16", "resnet19"])
def test_channels_last_trains_the_same_network(monkeypatch, arch):
    monkeypatch.setattr("utils.machine.takes_channels_last", lambda model, device: True)  # in fp64 every network can
    larger = ("--batch_size", "11")  # batch norm of a few values magnifies the rounding
    cases = [Case(False, *larger, flag, arch=arch) for flag in ("--no-channels_last", "--channels_last")]
    cases[1].model.load_state_dict(cases[0].model.state_dict())
    for case in cases:
        case.model.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
        case.optimizer = make_optimizer(case.model, case.args)
        case.train(3)
    plain, laid_out = (case.tensors() for case in cases)
    for name, own in laid_out.items():
        torch.testing.assert_close(own, plain[name], rtol=0, atol=1e-8, msg=name)
    kernels = [weight for weight in prunable(cases[1].model).values() if weight.ndim == 4 and weight.shape[2] > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


def test_activations_follow_the_layout_through_batch_norm():
    images = torch.randn(2, 3, 4, 5, 6).movedim(-1, 2)  # [T,B,C,H,W] with C innermost
    out = BatchNorm(6).train()(images)
    assert out[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, BatchNorm(6).train()(images.contiguous()))
