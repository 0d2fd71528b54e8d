import os
import sys

import numpy as np
import pytest
import torch
from conftest import make_tree
from PIL import Image

import utils.data
from utils.augment import Recipe, augment, draw, normalise
from utils.data import DATASETS, load_data
from utils.errors import InputError
from utils.flags import get_args

PIXELS = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(4), Recipe(8, flip=True), Recipe(4, flip=True, cutout=16)])
def test_augmentation_is_torchvisions_sample_by_sample(recipe):
    from torchvision.transforms import functional as TF

    draws = draw(recipe, len(PIXELS), (32, 32), torch.Generator().manual_seed(1))
    augmented = augment(PIXELS, recipe, draws)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    batch = normalise(augmented, mean, std)
    for i, image in enumerate(PIXELS):
        expected = TF.crop(TF.pad(image, recipe.padding), *draws.corner[i].tolist(), 32, 32)
        if draws.mirror[i]:
            expected = TF.hflip(expected)
        expected = expected.float() / 255  # ToTensor
        if recipe.cutout:
            top, left = (draws.hole[i] - recipe.cutout // 2).tolist()
            height, width = (min(32, edge + recipe.cutout) - max(0, edge) for edge in (top, left))
            expected = TF.erase(expected, max(0, top), max(0, left), height, width, torch.zeros(()))
        torch.testing.assert_close(batch[i], TF.normalize(expected, mean, std), atol=1e-5, rtol=1e-5)


def test_draws_cover_all_positions_and_differ_by_sample():
    draws = draw(Recipe(4, flip=True, cutout=16), 20_000, (32, 48), torch.Generator().manual_seed(0))
    assert draws.corner.unique().tolist() == list(range(9))
    assert draws.hole[:, 0].unique().tolist() == list(range(32))
    assert draws.hole[:, 1].unique().tolist() == list(range(48))
    assert 0.48 < draws.mirror.float().mean() < 0.52
    assert abs(np.corrcoef(draws.corner.T.numpy())[0, 1]) < 0.03
    assert not draw(Recipe(4), 1000, (32, 32), torch.Generator()).mirror.any()


def test_recipes_are_the_papers_but_for_flipped_digits():
    recipes = {name: (spec.recipe.padding, spec.recipe.flip, spec.recipe.cutout) for name, spec in DATASETS.items()}
    assert recipes["cifar10"] == recipes["cifar100"] == (4, True, 16)
    assert recipes["tinyimagenet"] == (8, True, 0)
    assert recipes["fmnist"] == (4, True, 0)
    assert recipes["svhn"] == recipes["digits"] == (4, False, 0)
    assert {name: DATASETS[name].epochs for name in ("cifar10", "cifar100", "svhn", "fmnist")} == {
        "cifar10": 300, "cifar100": 300, "svhn": 150, "fmnist": 150,
    }  # fmt: skip


def load(*flags):
    return load_data(get_args("laterewindlth", None, ["--device", "cpu", *map(str, flags)]))


def test_digits_are_a_fixed_stratified_split():
    data = load("--dataset", "digits")
    assert data.train.images.shape == (1437, 1, 32, 32)
    assert data.test.images.shape == (360, 1, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert (data.classes, data.channels, len(data.probe)) == (10, 1, 1000)
    assert data.test.labels.bincount().min() >= 34
    assert torch.equal(load("--dataset", "digits").train.images, data.train.images)
    everything = {image.numpy().tobytes() for image in data.train.images}
    assert len(everything | {image.numpy().tobytes() for image in data.test.images}) == 1797


def test_synthetic_data_are_the_same_every_time_and_learnable():
    data, again = load("--dataset", "synthetic"), load("--dataset", "synthetic")
    assert torch.equal(data.train.images, again.train.images)
    means = torch.stack([data.train.images[data.train.labels == c].float().mean(0) for c in range(10)])
    nearest = (data.test.images.float()[:, None] - means).flatten(2).norm(dim=-1).argmin(1)
    assert (nearest == data.test.labels).float().mean() > 0.95


def test_parts_are_fixed_balanced_and_nested():
    big, small = (load("--dataset", "digits", "--train_samples", n, "--test_samples", 20).train for n in (105, 50))
    assert big.labels.bincount().tolist() == [11] * 5 + [10] * 5
    assert small.labels.bincount().tolist() == [5] * 10
    inside = {image.numpy().tobytes() for image in big.images}
    assert all(image.numpy().tobytes() in inside for image in small.images)
    assert len(load("--dataset", "digits", "--test_samples", 20).test) == 20


def test_epoch_order_depends_on_the_generator_alone():
    split = load("--dataset", "synthetic", "--train_samples", 50).train
    a, b, c = (
        list(split.augmented_batches(n, torch.Generator().manual_seed(s))) for n, s in ((16, 0), (50, 0), (16, 1))
    )
    assert [len(labels) for _, labels in a] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([images for images, _ in a]), b[0][0])
    assert not torch.equal(a[0][1], c[0][1])
    assert torch.cat([labels for _, labels in a]).bincount().tolist() == [5] * 10


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_image_folder_is_read_as_torchvision_reads_it(tmp_path, held_out):
    from torchvision.datasets import ImageFolder

    make_tree(tmp_path / "cifar10", ("train", held_out))
    data = load("--data_dir", tmp_path, "--dataset", "cifar10")
    reference = ImageFolder(tmp_path / "cifar10" / "train")
    assert data.classes == 2
    assert data.train.labels.tolist() == [label for _, label in reference.samples]
    for image, (expected, _) in zip(data.train.images, reference, strict=True):
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.array(expected)))


def test_cache_is_used_until_the_tree_changes(tmp_path, monkeypatch):
    make_tree(tmp_path / "cifar10")
    flags = ("--data_dir", tmp_path, "--dataset", "cifar10")
    first = load(*flags)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", lambda path: pytest.fail("decoded again"))
        assert torch.equal(load(*flags).train.images, first.train.images)
    changed = tmp_path / "cifar10" / "train" / "bee" / "1.png"
    Image.new("RGB", (32, 32), "red").save(changed)
    assert (load(*flags).train.images == torch.tensor([255, 0, 0]).view(3, 1, 1)).all((1, 2, 3)).sum() == 1
    changed.unlink()
    assert len(load(*flags).train) == 5
    cache = tmp_path / "cifar10" / "train.cache.safetensors"
    cache.write_bytes(cache.read_bytes()[:-100])
    assert len(load(*flags).train) == 5


def test_tree_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    make_tree(tmp_path / "cifar10")
    real = utils.data._decode

    def decode(samples, channels):
        Image.new("RGB", (32, 32), "red").save(samples[-1][0])
        return real(samples, channels)

    with monkeypatch.context() as patch:
        patch.setattr(utils.data, "_decode", decode)
        with pytest.raises(InputError, match="cifar10/train changed while they were read"):
            load("--data_dir", tmp_path, "--dataset", "cifar10")
    assert len(load("--data_dir", tmp_path, "--dataset", "cifar10").train) == 6


def test_grey_trees_and_small_images(tmp_path):
    make_tree(tmp_path / "fmnist", size=28, mode="L")
    data = load("--data_dir", tmp_path, "--dataset", "fmnist")
    assert data.train.images.shape == (6, 1, 32, 32)


def test_official_tiny_imagenet_layout(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    make_tree(root, ("train",), ("n02", "n01"), size=64)
    for folder in ("val", "test"):
        (root / folder / "images").mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), (i, i, i)).save(root / folder / "images" / f"{i}.JPEG")
    (root / "val" / "val_annotations.txt").write_text("0.JPEG\tn02\t0\t0\t9\t9\n1.JPEG\tn01\t0\t0\t9\t9\n")
    data = load("--data_dir", tmp_path, "--dataset", "tinyimagenet")
    assert data.train.images.shape == (6, 3, 64, 64)
    assert data.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "train/ant/0.png").write_bytes(b"not an image"), "train/ant/0.png cannot be decoded"),
        (lambda root: os.truncate(root / "test/bee/2.png", 200), "test/bee/2.png cannot be decoded"),
        (lambda root: Image.new("RGB", (40, 40)).save(root / "train/bee/1.png"), "train/bee/1.png is 40x40"),
        (lambda root: (root / "train/ant/3.png").symlink_to("nowhere"), "train/ant/3.png cannot be read"),
        (lambda root: (root / "test").rename(root / "tset"), r"no test \(or val\) folder beside train"),
        (lambda root: (root / "train").rename(root / "trian"), "no train folder beside test"),
        (lambda root: (root / "test").rename(root / "val").joinpath("val_annotations.txt").write_text("x"), "val_anno"),
        (lambda root: (root / "test/bee").rename(root / "test/cat"), "bee, cat"),
        (lambda root: [path.unlink() for path in (root / "test/bee").iterdir()], "folder of images for each class"),
    ],
)
def test_broken_trees_name_the_file(tmp_path, break_it, message):
    make_tree(tmp_path / "cifar10")
    break_it(tmp_path / "cifar10")
    with pytest.raises(InputError, match=message):
        load("--data_dir", tmp_path, "--dataset", "cifar10")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn", "fmnist", "tinyimagenet"])
def test_missing_data_without_network_says_what_to_put_where(tmp_path, monkeypatch, dataset):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(InputError, match=f"put the images into {tmp_path / dataset}/train/<class>"):
        load("--data_dir", tmp_path, "--dataset", dataset)


@pytest.mark.parametrize(
    ("dataset", "kind", "images", "labels"),
    [
        ("cifar10", "CIFAR10", np.arange(4 * 32 * 32 * 3, dtype=np.uint32).reshape(4, 32, 32, 3), "targets"),
        ("svhn", "SVHN", np.arange(4 * 32 * 32 * 3, dtype=np.uint32).reshape(4, 3, 32, 32), "labels"),
        ("fmnist", "FashionMNIST", np.arange(4 * 28 * 28, dtype=np.uint32).reshape(4, 28, 28), "targets"),
    ],
)
def test_torchvisions_arrays_come_out_channels_first(tmp_path, monkeypatch, dataset, kind, images, labels):
    calls = []

    class Fake:
        def __init__(self, root, download, **split):
            calls.append((root, download, split))
            if not download and len(calls) == 1:
                raise RuntimeError("Dataset not found")
            self.data = images.astype(np.uint8)
            setattr(self, labels, [0, 1, 2, 1])

    monkeypatch.setattr(f"torchvision.datasets.{kind}", Fake)
    data = load("--data_dir", tmp_path, "--dataset", dataset)
    assert calls[0][:2] == (tmp_path / dataset, False)
    assert calls[1][:2] == (tmp_path / dataset, True)
    channels = 1 if dataset == "fmnist" else 3
    assert data.train.images.shape == (4, channels, 32, 32)
    assert data.train.labels.tolist() == [0, 1, 2, 1]
    pixels = torch.from_numpy(images.astype(np.uint8))
    if dataset == "cifar10":
        assert torch.equal(data.train.images.permute(0, 2, 3, 1), pixels)
    elif dataset == "svhn":
        assert torch.equal(data.train.images, pixels)


def test_torchvision_that_does_not_fit_torch_is_one_clear_line(tmp_path, monkeypatch):
    make_tree(tmp_path / "cifar10")
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    with pytest.raises(InputError, match="install both together"):
        load("--data_dir", tmp_path, "--dataset", "cifar10")
    assert len(load("--dataset", "digits").train) == 1437


def test_too_many_samples_name_the_range():
    with pytest.raises(InputError, match="--train_samples must be from 1 to 1437, got 2000"):
        load("--dataset", "digits", "--train_samples", 2000)
