"""What two ranks do. ``torchrun --nproc_per_node 2 tests/on_two_ranks.py FOLDER`` runs every ``check_`` below on both,
up to the first that fails, and writes what came of it into FOLDER/rank<N>.json."""

import copy
import json
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from networks import lively
from torch.nn import functional as F

from models import build_model
from utils import activity, distributed, training
from utils.augment import Recipe
from utils.data import Split
from utils.datasets import Spec
from utils.masks import dense_mask
from utils.scores import magnitude_mask
from utils.training import loss_over_time, predict

SPEC = Spec((0.5,) * 3, (0.5,) * 3, Recipe(), 1)


@contextmanager
def alone():
    """Within, this process is the only one."""
    with mock.patch.object(distributed, "ranks", return_value=1):
        yield


def network():
    """A tiny network that fires in every layer, in fp64, its batch norms in eval mode: those train on a rank's own
    images, so that ranks agree with one process where they do not train."""
    torch.manual_seed(0)
    model = build_model("alexnet", 3, 10, width=0.1, v_threshold=0.5).double()
    return lively(model, torch.randn(16, 3, 32, 32).double()).eval()


def check_training_steps_are_those_of_one_process(folder):
    """Also where the ranks' parts are uneven, and where a rank has none."""
    whole = network()
    mask, part = magnitude_mask(whole, 0.2), copy.deepcopy(whole)
    parallel = distributed.parallel(part)
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4) for model in (whole, part)]
    images, labels = torch.randn(14, 3, 32, 32).double(), torch.randint(10, (14,))
    for batch in torch.arange(14).split([4, 4, 5, 1]):
        inputs, targets = images[batch], labels[batch]
        own = distributed.part_of(len(batch))
        shown = training._share(len(batch))  # a rank without images borrows one
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # the loss is of fp32
            expected = F.cross_entropy(whole(inputs, 3).flatten(0, 1), targets.repeat(3))
            loss = loss_over_time(parallel(inputs[shown], 3), targets[shown])
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected.backward()
        distributed.weighted(loss, own.stop - own.start, len(batch)).backward()
        (total,) = distributed.sums(loss.detach() * (own.stop - own.start) / len(batch))
        torch.testing.assert_close(total, expected.detach(), rtol=0, atol=1e-12)
        for a, b in zip(part.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
        assert any(p.grad.abs().max() > 1e-4 for p in part.parameters())
        for model, optimizer in zip((whole, part), optimizers, strict=True):
            optimizer.step()
            for name, kept in mask.items():
                model.get_parameter(name).data.mul_(kept)
    for name, value in part.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=0, atol=1e-11)
    assert not torch.equal(part.stem.weight, network().stem.weight)


def check_parts_of_a_batch_are_the_batch(folder):
    images = torch.arange(21 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(21, 3, 32, 32)
    split = Split(images, torch.arange(21), SPEC)
    draws = [torch.Generator().manual_seed(1) for _ in range(4)]
    whole = split.augmented_batches(5, *draws[:2])
    for (inputs, labels), (x, y) in zip(split.augmented_batches(5, *draws[2:], training._share), whole, strict=True):
        own = distributed.part_of(len(y))
        shown = labels if own.stop > own.start else labels[:0]
        everyone = torch.zeros(len(y), dtype=torch.int64)
        everyone[own] = shown
        assert torch.equal(*distributed.sums(everyone), y)
        assert torch.equal(inputs[: len(shown)], x[own])


def check_evaluation_is_that_of_one_process(folder):
    """Each rank runs whole batches; with 3 images there is one batch, and a rank without any."""
    model = network().float()
    for count in (3, 20):
        images = torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        split = Split(images, torch.arange(count) % 10, SPEC)
        with (
            mock.patch.object(training, "EVALUATION_BATCH", {"cpu": 7}),
            mock.patch.object(activity, "BATCH", 7),
            mock.patch.object(training, "forward", wraps=training.forward) as forward,
        ):
            logits, counted = predict(model, split, 3), activity.measure(model, dense_mask(model), split, 3)
            seen = sum(len(call.args[1]) for call in forward.call_args_list)
            with alone():
                expected = predict(model, split, 3), activity.measure(model, dense_mask(model), split, 3)
        assert distributed.sums(torch.tensor(seen))[0] == count
        assert seen < count or count == 3
        assert torch.equal(logits, expected[0])
        assert logits.std() > 0
        assert counted == expected[1]
        assert counted["spikes_per_image"] > 0


def check_numbers_and_tensors_of_all_ranks(folder):
    rank = distributed.rank()
    assert distributed.largest(-rank) == 0
    assert distributed.largest(10 + rank) == 11
    own = torch.full((2,), float(rank))
    assert distributed.sums(own)[0].tolist() == [1, 1]
    assert own.tolist() == [rank, rank]
    distributed.from_rank_0([own])
    assert own.tolist() == [0, 0]
    gathered = distributed.gather(torch.full((1, 2 - rank), float(rank)), (slice(0, 2), slice(2, 3))[rank], 3)
    assert gathered.tolist() == [[0, 0, 1]]


CHECKS = [name for name in list(globals()) if name.startswith("check_")]

if __name__ == "__main__":
    place, outcomes = Path(sys.argv[1]), {}
    with distributed.group():
        for check in CHECKS:
            try:
                globals()[check](place)
                outcomes[check] = "passed"
            except BaseException:
                outcomes[check] = traceback.format_exc()
            (place / f"rank{distributed.rank()}.json").write_text(json.dumps(outcomes))
            if outcomes[check] != "passed":
                raise SystemExit(1)  # the ranks may be at different places
