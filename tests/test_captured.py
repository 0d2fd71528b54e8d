"""The captured step on a stand-in for a GPU, and the layout with channels innermost."""

from contextlib import contextmanager, nullcontext
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
    def capture(graph, stream):
        with graph:
            yield
        graph.undo()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
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
    """A sparse network in training: 5 full batches an epoch and one that is not; its mask changes between steps."""

    def __init__(self, cuda_graph, *flags, arch="vgg16"):
        line = f"{TINY} --arch {arch} --width 0.0625 --batch_size 4 --train_samples 22 --test_samples 8"
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
        self.rows = []

    def change(self, step, generator):
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


@pytest.mark.parametrize(
    ("arch", "flags"),
    [("vgg16", ()), ("resnet19", ()), ("vgg16", ("--optimizer", "adam")), ("vgg16", ("--precision", "bf16"))],
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


def test_a_step_is_captured_anew_for_other_timesteps_optimizers_and_masks(card, monkeypatch):
    monkeypatch.setattr(training, "learning_rate", lambda args, epoch: 2.0**-6)
    graphed, plain = Case(True, arch="alexnet"), Case(False, arch="alexnet")

    def train(count, **more):
        for case in (graphed, plain):
            case.train(0, **more)
        assert len(card) == count
        assert_same(graphed, plain)

    train(1)
    train(1)
    train(2, timesteps=3)
    for case in (graphed, plain):
        case.optimizer = make_optimizer(case.model, case.args)
    train(3, timesteps=3)
    for case in (graphed, plain):
        case.mask = {name: m.clone() for name, m in case.mask.items()}
    train(4, timesteps=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [(), ("--compile", "--channels_last"), ("--optimizer", "adam")])
def test_captured_steps_train_as_others_do_on_a_gpu(flags):
    flags = ("--device", "cuda", "--precision", "fp32", *flags)
    graphed, plain = Case(True, *flags), Case(False, *flags)
    for case in (graphed, plain):
        for epoch in range(2):
            case.train(epoch)
    for own, expected in zip(graphed.rows, plain.rows, strict=True):  # spikes flip with the order of sums
        assert own["loss"] == pytest.approx(expected["loss"], abs=0.05)


@pytest.mark.parametrize("arch", ["vgg16", "resnet19"])
def test_channels_last_trains_the_same_network(arch):
    larger = ("--batch_size", "11")  # batch norm of a few values magnifies the rounding
    cases = [Case(False, *flags, arch=arch) for flags in (larger, (*larger, "--channels_last"))]
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
