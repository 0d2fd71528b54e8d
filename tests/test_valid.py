"""Training images that are held out (--valid_samples), so that settings need not be chosen on test images."""

import pytest
import torch
from conftest import TINY, script

from utils.data import load_data
from utils.flags import get_args
from utils.tickets import load_ticket_network

SMALL = "--end_iter 2 --valid_freq 2".split()


def data_of(*more, flags="--dataset synthetic --device cpu"):
    return load_data(get_args("train_snn_none.py", "none", None, [*flags.split(), *more]))


def pixels(split):
    return [(image.numpy().tobytes(), label) for image, label in zip(split.images, split.labels.tolist(), strict=True)]


@pytest.mark.parametrize("count", [1, 37, 200, 999])
def test_held_out_images_are_no_training_images_and_balanced(count):
    everything, data = pixels(data_of().train), data_of("--valid_samples", str(count))
    valid, train = pixels(data.valid), pixels(data.train)
    assert (len(valid), len(train)) == (count, 1000 - count)
    assert not set(valid) & set(train)
    assert set(valid) | set(train) == set(everything)
    assert train == [one for one in everything if one in set(train)], "they keep their order"
    of_each = data.valid.labels.bincount(minlength=10)
    assert of_each.max() - of_each.min() <= 1
    assert pixels(data.test) == pixels(data_of().test)


def test_they_depend_on_the_seed_alone():
    held, again, number, batch, part, seed = (
        pixels(data_of("--valid_samples", "50", *line.split()).valid)
        for line in ("", "", "--round 2", "--batch_size 7", "--train_samples 100", "--seed 5")
    )
    assert held == again == number == batch == part
    assert len(set(held) & set(seed)) < 25


def test_a_part_of_the_training_images_is_taken_from_the_others():
    data = data_of("--valid_samples", "900", "--train_samples", "60")
    assert len(data.train) == 60
    assert data.train.labels.bincount().tolist() == [6] * 10
    assert not set(pixels(data.train)) & set(pixels(data.valid))
    assert len(data_of("--valid_samples", "900", "--train_samples", "100").train) == 100


def test_none_are_held_out_by_default():
    default, none = data_of(), data_of("--valid_samples", "0")
    assert default.valid is none.valid is None
    assert default.checksum() == none.checksum()
    assert pixels(default.train) == pixels(none.train)
    assert data_of("--valid_samples", "1").checksum() != none.checksum()


def test_their_accuracy_is_logged_and_in_the_results(run):
    held = run("oneshot", *SMALL, "--valid_samples", "30")
    plain = run("oneshot", *SMALL, "--exp_name", "plain")
    assert [row["valid_accuracy"] is None for row in held.rows] == [True, False]
    assert not any("valid_accuracy" in row for row in plain.rows + plain.results)
    (row,) = held.results
    assert row["valid_accuracy"] == held.rows[-1]["valid_accuracy"]
    data = load_data(get_args("train_snn_none.py", "none", None, [*TINY.split(), *SMALL, "--valid_samples", "30"]))
    network, _, _ = load_ticket_network(held.folder / "networks" / "level_02.safetensors")
    with torch.no_grad():
        ((images, labels),) = data.valid.batches(30)
        right = network.eval()(images, 4).mean(0).argmax(1) == labels
    assert row["valid_accuracy"] == pytest.approx(100 * right.double().mean().item())


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--valid_samples 1000", "--valid_samples 999"),
        ("--valid_samples 900 --train_samples 101", "--train_samples 100"),
        ("--valid_samples -1", "--valid_samples"),
    ],
)
def test_too_many_are_refused_in_one_line(refused, tmp_path, more, named):
    line = refused(script("oneshot"), *f"{TINY} --sparsity_round 2 {more} --output_dir".split(), tmp_path)
    assert all(word in line for word in named.split()), line
    assert not list(tmp_path.rglob("args.json"))
