"""What two ranks do. ``torchrun --nproc_per_node 2 tests/on_two_ranks.py FOLDER`` runs every
``check_`` below on both, up to the first that fails, and writes what came of it into FOLDER/rank<N>.json."""

import copy
import json
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import TINY, Finished, lively, script
from torch.nn import functional as F

from models import build_model
from models.layers import BatchNorm, NormAndFire, compile_blocks, synchronise_batch_norms
from utils import activity, distributed, training
from utils.data import Split, load_data
from utils.flags import get_args
from utils.masks import dense_mask, magnitude_mask, rewind
from utils.snip import snip_scores
from utils.training import MaskedUpdate, loss_over_time, predict

EXACT = {"rtol": 0, "atol": 1e-12}


def alone():
    """Within, this process is the only one."""
    return mock.patch.object(distributed, "ranks", return_value=1)


def mine(*parts):
    """This rank's part of what is divided so."""
    first = sum(parts[: distributed.rank()])
    return slice(first, first + parts[distributed.rank()])


def check_batch_norm_over_the_images_of_both_ranks(folder):
    for statistics in ("per_timestep", "over_time"):
        for parts in ((2, 3), (0, 5)):
            torch.manual_seed(0)
            scale = torch.tensor([1.0, 2, 3]).view(3, 1, 1, 1, 1)
            x = (torch.randn(3, 5, 4, 6, 6) * scale + 3 * torch.randn(4, 1, 1)).double()
            gradient = torch.randn_like(x)
            whole = BatchNorm(4, statistics).double()
            torch.nn.init.normal_(whole.weight)
            torch.nn.init.normal_(whole.bias)
            part = copy.deepcopy(whole)
            synchronise_batch_norms(part)
            x_whole, x_part = x.clone().requires_grad_(), x[:, mine(*parts)].clone().requires_grad_()
            for _ in range(2):
                y, y_part = whole(x_whole), part(x_part)
            y.backward(gradient)
            y_part.backward(gradient[:, mine(*parts)])
            torch.testing.assert_close(y_part, y[:, mine(*parts)], **EXACT)
            torch.testing.assert_close(x_part.grad, x_whole.grad[:, mine(*parts)], **EXACT)
            for own, expected in zip(part.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(*distributed.sums(own.grad), expected.grad, rtol=1e-12, atol=1e-12)
            for own, expected in zip(part.buffers(), whole.buffers(), strict=True):
                torch.testing.assert_close(own, expected, **EXACT)
            torch.testing.assert_close(part.eval()(x), whole.eval()(x), **EXACT)


def check_compiled_block_across_ranks_is_the_block(folder):
    torch.manual_seed(0)
    eager = NormAndFire(3, "lif").double()
    synchronise_batch_norms(eager)
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled)
    outcomes = []
    for block in (eager, compiled):
        x = torch.linspace(-3, 3, 3 * 4 * 3 * 4 * 4).sin().view(3, 4, 3, 4, 4).double()[:, mine(1, 3)].requires_grad_()
        spikes = block(x, shortcut=x.flip(0))
        (spikes * x.detach()).sum().backward()
        outcomes.append([spikes, x.grad, *(p.grad for p in block.parameters()), *block.state_dict().values()])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def check_training_steps_are_those_of_one_process(folder):
    """In fp64, with a last batch of one image: one rank has none."""
    for arch, batch_norm in (("vgg16", "over_time"), ("resnet19", "per_timestep")):
        torch.manual_seed(0)
        images, labels = torch.randn(11, 3, 32, 32).double(), torch.randint(10, (11,))
        whole = lively(build_model(arch, 3, 10, width=0.125, batch_norm=batch_norm).double(), images).train()
        ticket = magnitude_mask(whole, 0.2)
        rewind(whole, copy.deepcopy(whole.state_dict()), ticket)
        part = copy.deepcopy(whole)
        synchronise_batch_norms(part)
        network = distributed.parallel(part)
        updates = []
        for model in (whole, part):
            optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
            updates.append(MaskedUpdate(optimizer, model, ticket))
        for batch in torch.arange(11).split(5):
            inputs, targets = images[batch], labels[batch]
            logits = whole(inputs, 3)
            assert logits.std() > 0
            own = distributed.part_of(len(batch))
            # loss_over_time is of fp32
            with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
                updates[0](loss_over_time(logits, targets))
                own_loss = loss_over_time(network(inputs[own], 3), targets[own])
                updates[1](distributed.weighted(own_loss, own.stop - own.start, len(batch)))
            expected = F.cross_entropy(logits.flatten(0, 1), targets.repeat(3))
            share = own_loss.detach() * ((own.stop - own.start) / len(batch))
            torch.testing.assert_close(*distributed.sums(share), expected.detach(), **EXACT)
        for (name, own), expected in zip(part.state_dict().items(), whole.state_dict().values(), strict=True):
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-10, msg=name)


def check_parts_of_batches_are_the_batches(folder):
    data = load_data(get_args("earlybird", None, [*TINY, "--train_samples", "21"]))

    def batches(batch_size):
        generator = torch.Generator().manual_seed(1)
        return list(data.train.augmented_batches(batch_size, generator, first=1))

    for batch_size, sizes in ((4, [4, 4, 4, 4, 1]), (5, [5, 5, 5, 1])):
        with alone():
            whole = batches(batch_size)
        assert [len(labels) for _, labels in whole] == sizes
        for (images, labels), (all_images, all_labels) in zip(batches(batch_size), whole, strict=True):
            own = distributed.part_of(len(all_labels))
            assert torch.equal(images, all_images[own])
            assert torch.equal(labels, all_labels[own])
            counts = distributed.gather(torch.ones(1, len(labels)), own, len(all_labels))
            assert torch.equal(counts, torch.ones(1, len(all_labels)))


def check_evaluation_is_that_of_one_process(folder):
    torch.manual_seed(0)
    model = lively(build_model("vgg16", 3, 10, width=0.125), torch.randn(8, 3, 32, 32))
    synchronise_batch_norms(model)
    data = load_data(get_args("earlybird", None, TINY))
    for count in (3, 20):  # with 3 images there is one batch, and a rank without
        split = Split(data.test.images[:count], data.test.labels[:count], data.test.spec)
        with (
            mock.patch.object(training, "EVALUATION_BATCH", {"cpu": 7}),
            mock.patch.object(activity, "BATCH", 7),
            mock.patch.object(training, "forward", wraps=training.forward) as forward,
        ):
            logits, counted = predict(model, split, 3), activity.measure(model, dense_mask(model), split, 3)
            seen = sum(len(call.args[1]) for call in forward.call_args_list)
            with alone():
                expected = predict(model, split, 3), activity.measure(model, dense_mask(model), split, 3)
        assert seen == {3: (0, 3), 20: (7, 13)}[count][distributed.rank()]
        assert torch.equal(logits, expected[0])
        assert logits.std() > 0
        assert counted == expected[1]
        assert counted["spikes_per_image"] > 0


def check_snip_scores_are_those_of_rank_0(folder):
    data = load_data(get_args("earlybird", None, TINY))
    torch.manual_seed(distributed.rank())
    model = build_model("vgg16", 3, 10, width=0.0625)
    scores = snip_scores(model, data.train, 2)
    torch.manual_seed(0)
    with alone():
        expected = snip_scores(build_model("vgg16", 3, 10, width=0.0625), data.train, 2)
    assert all(torch.equal(scores[name], score) for name, score in expected.items())


def check_largest_numbers(folder):
    waits = [distributed.begin_maxima(lambda k=k: [distributed.rank(), -k * distributed.rank()]) for k in range(3)]
    assert [wait() for wait in waits] == [[1, 0]] * 3


def check_turns(folder):
    path = folder / "turns"
    with distributed.in_turn():
        path.write_text((path.read_text() if path.exists() else "") + str(distributed.rank()))
    assert path.read_text() == "01"
    for failing in (0, 1):  # the other one leaves, too
        fails = distributed.rank() == failing
        with pytest.raises(ZeroDivisionError if fails else SystemExit), distributed.in_turn():
            1 / (not fails)


def check_what_differs_is_named_on_both_ranks(folder):
    distributed.check_same("here", lambda: {"a": 1, "b": [0.1]})
    with pytest.raises(distributed.RanksDifferError, match=r"at here \(rank 0: b 0; rank 1: b 1\)"):
        distributed.check_same("here", lambda: {"a": 1, "b": distributed.rank()})
    with pytest.raises(distributed.RanksDifferError, match="rank 0: 0; rank 1: 1"):
        distributed.check_same(str(distributed.rank()), lambda: {})
    with pytest.raises(distributed.RanksDifferError, match="differ at here"):
        distributed.check_same("here", lambda: {"long": 5000 * "a" + str(distributed.rank())})


def train(method, folder, *more):
    """A tiny run of a script on both ranks, as far as the error line."""
    script(method).__wrapped__([*TINY, "--output_dir", str(folder / "two"), *more])


METHODS = ("earlyT_laterewindlth", "earlyT_earlybird", "oneshot")


def check_scripts_end_like_one_process(folder):
    for method in METHODS:
        train(method, folder)


def check_scripts_with_local_batch_norm(folder):
    train("oneshot", folder, "--no_sync_batch_norm", "--exp_name", "local")
    row = Finished(folder / "two" / "local" / "synthetic-vgg16-round1").rows[-1]
    distributed.check_same("the end", lambda: row)


FIVE_STEPS = (  # an epoch is a step
    "--batch_norm over_time --width 0.125 --timestep 5 --train_samples 32 --batch_size 32 --end_iter 6 "
    "--rewinding_epoch 5 --prune_iterations 1 --valid_freq 9 --learning_rate 0.3 --exp_name steps"
).split()


def check_five_steps(folder):
    train("laterewindlth", folder, *FIVE_STEPS)


def check_a_run_that_one_process_began_goes_on(folder):
    train("laterewindlth", folder, "--exp_name", "begun")


def check_another_mask_on_a_rank_is_refused(folder):
    for method, differing in (("earlyT_laterewindlth", "prune_by_magnitude"), ("earlyT_earlybird", "magnitude_mask")):
        module = sys.modules[f"train_snn_{method}"]
        right = getattr(module, differing)

        def wrong(*args, right=right):
            mask = right(*args)
            if distributed.rank() == 1:
                mask["stem.weight"][0] ^= True
            return mask

        with mock.patch.object(module, differing, wrong), pytest.raises(distributed.RanksDifferError) as error:
            train(method, folder, "--exp_name", f"masks-{method}")
        assert ("a ticket" if "laterewind" in method else "a checkpoint") in str(error.value)


def check_other_timesteps_on_a_rank_are_refused(folder):
    for method in ("earlyT_laterewindlth", "earlyT_earlybird"):
        with (
            mock.patch(f"train_snn_{method}.early_time", return_value=2 + distributed.rank()),
            pytest.raises(distributed.RanksDifferError, match="rank 0: early_time 2; rank 1: early_time 3"),
        ):
            train(method, folder, "--exp_name", f"timesteps-{method}")


def check_other_weights_on_a_rank_are_refused(folder):
    right = build_model

    def wrong(*args):
        model = right(*args)
        model.classifier.bias.data += distributed.rank()
        return model

    script("oneshot")
    with (
        mock.patch("train_snn_oneshot.build_model", wrong),
        pytest.raises(distributed.RanksDifferError, match=r"a ticket .rank 0: weights"),
    ):
        train("oneshot", folder, "--exp_name", "weights")


def check_finite_losses_are_looked_at_together(folder):
    """A loss that one rank has alone, at the last step, where no gradient carries it to the other."""
    right, steps = loss_over_time, []

    def ruined(logits, labels):
        steps.append(1)
        last = len(steps) == 3 and distributed.rank() == 1
        return right(logits, labels) + (right(logits, labels).detach() * torch.nan if last else 0)

    with (
        mock.patch.object(training, "loss_over_time", ruined),
        pytest.raises(training.DivergedError, match="the loss is not finite"),
    ):
        train("oneshot", folder, "--exp_name", "diverged")


CHECKS = [name for name in list(globals()) if name.startswith("check_")]

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    outcomes = {}
    with distributed.group():
        for name in CHECKS:
            try:
                globals()[name](folder)
                outcomes[name] = "passed"
            except BaseException:
                outcomes[name] = traceback.format_exc()
            (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(outcomes))
            if outcomes[name] != "passed":
                raise SystemExit(1)  # the ranks may be at different places
