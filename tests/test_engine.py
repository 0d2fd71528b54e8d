"""Huge pages, layouts, and the captured step on a stand-in for a GPU."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, lively
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from models import build_model
from models.layers import BatchNorm
from utils import engine, training
from utils.data import load_data
from utils.engine import WARM_UP, Graphed
from utils.masks import magnitude_mask, prunable, rewind
from utils.runs import Run
from utils.training import MaskedUpdate, fit, make_optimizer, place

FAULTS = """
import resource, torch
from utils.engine import use_huge_pages
use_huge_pages()
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)  # 64 MiB, 16,384 small pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="the kernel gives huge pages or not"
)
@pytest.mark.parametrize(("setting", "huge"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_large_tensors_have_huge_pages_unless_the_environment_says_otherwise(setting, huge):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"PYTHONPATH": str(ROOT)} | setting
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, check=True, capture_output=True, text=True)
    assert (int(done.stdout) < 8192) == huge


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
            fresh = [returned.alias_info is None for returned in function._schema.returns]
            if any(fresh):  # views, and what is written in place, are where they were
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
    monkeypatch.setattr(engine.torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(engine.torch.cuda, "graph", capture)
    monkeypatch.setattr(engine.torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(engine.torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(engine.torch.cuda, "stream", lambda stream: nullcontext())
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
    with pytest.raises(AssertionError, match="nonzero waits for the device"):
        graphed(torch.ones(2))


@pytest.fixture
def train(tiny_args, monkeypatch):
    """Trains a sparse network for a few epochs: its state, the optimizer's, and the log."""
    # rates that change from epoch to epoch, and that fp32 can hold
    monkeypatch.setattr(training, "learning_rate", lambda args, epoch, level=0: 2.0 ** -(4 + epoch))

    def go(cuda_graph, *flags, arch="vgg16", epochs=3):
        args = tiny_args("laterewindlth", "--train_samples", "88", "--arch", arch, *flags)
        args.cuda_graph = cuda_graph  # which is refused on a CPU
        args.exp_name = f"run-{cuda_graph}"
        data, run = load_data(args), Run(args)
        run.begin(data)
        torch.manual_seed(0)
        model = place(build_model(arch, 3, 10, width=0.0625, compile=args.compile), args)
        lively(model, torch.randn(8, 3, 32, 32, device=args.device))
        mask = magnitude_mask(model, 0.6)
        rewind(model, copy.deepcopy(model.state_dict()), mask)
        optimizer = make_optimizer(model, args)
        fit(model, data, args, optimizer, mask, range(epochs), 3, run)
        assert all((weight[~mask[name]] == 0).all() for name, weight in prunable(model).items())
        state = dict(model.state_dict())
        for index, own in optimizer.state_dict()["state"].items():
            state |= {f"{index}.{key}": value for key, value in own.items()}
        return state, [{name: value for name, value in row.items() if name != "seconds"} for row in run.rows]

    return go


def same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())


@pytest.mark.parametrize(
    ("arch", "flags"),
    [("vgg16", ()), ("resnet19", ()), ("vgg16", ("--optimizer", "adam")), ("vgg16", ("--precision", "bf16"))],
)
def test_captured_steps_train_as_others_do(card, train, arch, flags):
    """5 full batches and one that is not, in 3 epochs: the graph of the first epoch serves all."""
    graphed, plain = train(True, *flags, arch=arch), train(False, *flags, arch=arch)
    assert len(card) == 1
    same(graphed, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [(), ("--compile", "--channels_last"), ("--optimizer", "adam")])
def test_captured_steps_train_as_others_do_on_a_gpu(train, flags):
    flags = ("--device", "cuda", "--precision", "fp32", *flags)
    (_, graphed), (_, plain) = train(True, *flags), train(False, *flags)
    for own, expected in zip(graphed, plain, strict=True):  # spikes flip with the order of sums
        assert own["loss"] == pytest.approx(expected["loss"], abs=0.05)


def test_a_step_is_captured_anew_when_the_optimizer_was_read_back(card, train, monkeypatch):
    resume_epoch = Run.resume_epoch

    def read_back(self, phase, level, epoch, model, optimizer, steps):
        progress = resume_epoch(self, phase, level, epoch, model, optimizer, steps)
        if epoch == 1:  # as if it had been stopped after a step
            progress.step = 1
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return progress

    monkeypatch.setattr(Run, "resume_epoch", read_back)
    graphed, plain = train(True), train(False)
    assert len(card) == 2
    same(graphed, plain)


def test_a_graph_and_its_memory_go_with_the_training_that_made_it(card, train, monkeypatch):
    made = []

    def make(function):
        graphed = Graphed(function)
        made.append(weakref.ref(graphed))
        return graphed

    monkeypatch.setattr(training, "Graphed", make)
    gc.disable()
    try:
        train(True)
        assert [graphed() for graphed in made] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("arch", ["vgg16", "resnet19"])
def test_channels_last_is_the_same_network(arch, tiny_args):
    torch.manual_seed(0)
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.randint(10, (6,))
    plain = lively(build_model(arch, 3, 10, width=0.125).double(), images).train()
    laid_out = place(copy.deepcopy(plain), tiny_args("laterewindlth", "--channels_last"))
    mask = magnitude_mask(plain, 0.5)
    updates = [MaskedUpdate(torch.optim.SGD(m.parameters(), 0.01, 0.9, fused=True), m, mask) for m in (plain, laid_out)]
    for _ in range(2):
        for update, model in zip(updates, (plain, laid_out), strict=True):
            update(F.cross_entropy(model(images, 3).flatten(0, 1), labels.repeat(3)))
    for (name, own), expected in zip(laid_out.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-10, msg=name)
    kernels = [weight for weight in prunable(laid_out).values() if weight.dim() == 4 and weight.shape[2] > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


def test_activations_follow_the_layout_through_batch_norm():
    images = torch.randn(2, 3, 4, 5, 6).movedim(-1, 2)  # [T,B,C,H,W] with C innermost
    out = BatchNorm(6).train()(images)
    assert out[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, BatchNorm(6).train()(images.contiguous()))
