import hashlib
import os
import sys
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import utils.trees
from utils.augment import Recipe, augment, draw, normalise
from utils.data import Data, Split, balanced_part, enlarged, load_data
from utils.datasets import DATASETS, Spec, load_arrays
from utils.files import InputError

PIXELS = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def load(dataset, data_dir="nowhere", train_samples=None, test_samples=None):
    return load_data(
        Namespace(
            dataset=dataset,
            data_dir=str(data_dir),
            train_samples=train_samples,
            test_samples=test_samples,
            valid_samples=0,
            device=torch.device("cpu"),
        )
    )


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_tree(root, splits=("train", "test"), classes=("ant", "bee"), count=3, size=32, mode="RGB"):
    """A tree of image files, as a user would lay it out."""
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / split / name / f"{i}.png")


# --- what is fixed for a data set ------------------------------------------------------------------------------------


def test_statistics_recipes_and_epochs_are_those_of_the_papers_code():
    half, cifar100_mean = (0.5, 0.5, 0.5), (0.5071, 0.4867, 0.4408)
    expected = {
        "cifar10": Spec((0.4913, 0.4821, 0.4465), (0.2023, 0.1994, 0.2010), Recipe(4, True, 16), 300, 10),
        "cifar100": Spec(cifar100_mean, (0.2673, 0.2564, 0.2762), Recipe(4, True, 16), 300, 100),
        "svhn": Spec(half, half, Recipe(4, False, 0), 150, 10),
        "fmnist": Spec((0.5,), (0.5,), Recipe(4, True, 0), 150, 10),
        "tinyimagenet": Spec((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), Recipe(8, True, 0), 300, 200),
        "digits": Spec((0.5,), (0.5,), Recipe(4, False, 0), 60, 10),
        "synthetic": Spec(half, half, Recipe(4, False, 0), 60, 10),
    }
    assert expected == DATASETS
    assert [spec.channels for spec in DATASETS.values()] == [3, 3, 3, 1, 3, 1, 3]


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(500, (32, 32), 500), (500, (64, 64), 125), (2, (64, 64), 1), (5000, (32, 32), 600)]
)
def test_a_batch_of_larger_images_has_as_many_pixels(count, size, expected):
    images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(600, 3, *size)
    assert Split(images, torch.arange(600), DATASETS["cifar10"]).batch(count) == expected


def test_batches_are_normalised_channel_by_channel_in_order():
    spec = DATASETS["cifar10"]
    split = Split(PIXELS, torch.arange(64), spec)
    expected = (PIXELS.numpy().transpose(0, 2, 3, 1) / 255 - np.array(spec.mean)) / np.array(spec.std)
    expected = torch.from_numpy(expected.transpose(0, 3, 1, 2)).float()
    batches = list(split.batches(24))
    assert [len(labels) for _, labels in batches] == [24, 24, 16]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(64))
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected, atol=1e-5, rtol=0)
    plain = Split(PIXELS, torch.arange(64), replace(spec, recipe=Recipe()))
    for images, labels in plain.augmented_batches(24, seeded(0), seeded(1)):
        torch.testing.assert_close(images, expected[labels], atol=1e-5, rtol=0)


# --- augmentation and order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(4), Recipe(8, flip=True), Recipe(4, flip=True, cutout=16)])
def test_augmentation_is_torchvisions_sample_by_sample(recipe):
    from torchvision.transforms import functional as TF

    draws = draw(recipe, len(PIXELS), (32, 32), seeded(1))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    batch = normalise(augment(PIXELS, recipe, draws), mean, std)
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
    draws = draw(Recipe(4, flip=True, cutout=16), 20_000, (32, 48), seeded(0))
    assert draws.corner.unique().tolist() == list(range(9))
    assert draws.hole[:, 0].unique().tolist() == list(range(32))
    assert draws.hole[:, 1].unique().tolist() == list(range(48))
    assert 0.48 < draws.mirror.float().mean() < 0.52
    assert abs(np.corrcoef(draws.corner.T.numpy())[0, 1]) < 0.03
    assert not draw(Recipe(4), 1000, (32, 32), seeded(0)).mirror.any()


def test_an_epoch_depends_on_its_two_generators_alone():
    split = Split(PIXELS, torch.arange(64), DATASETS["cifar10"])

    def epoch(batch_size, shuffle, augment, share=slice):
        return list(split.augmented_batches(batch_size, seeded(shuffle), seeded(augment), share))

    batches = epoch(24, 0, 0)
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    assert [len(labels) for _, labels in batches] == [24, 24, 16]
    assert labels.sort().values.tolist() == list(range(64))
    ((whole_images, whole_labels),) = epoch(64, 0, 0)
    assert torch.equal(whole_images, images)
    assert torch.equal(whole_labels, labels)
    ((other_images, same_labels),) = epoch(64, 0, 1)
    assert torch.equal(same_labels, labels)
    assert not torch.equal(other_images, images)
    ((_, other_labels),) = epoch(64, 1, 0)
    assert not torch.equal(other_labels, labels)

    thirds = [epoch(24, 0, 0, lambda n, k=k: slice(n * k // 3, n * (k + 1) // 3)) for k in range(3)]
    for batch, *parts in zip(batches, *thirds, strict=True):
        assert max(len(labels) for _, labels in parts) <= 8
        for tensor, shares in zip(batch, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(shares), tensor)
    assert [len(labels) for _, labels in epoch(24, 0, 0, lambda n: slice(n, n))] == [0, 0, 0]


# --- parts, sizes and checksums --------------------------------------------------------------------------------------


def test_parts_are_fixed_balanced_and_nested():
    labels = torch.tensor([0] * 30 + [1] * 50 + [2] * 5)
    split = Split(torch.arange(85, dtype=torch.uint8).view(85, 1, 1, 1), labels, DATASETS["digits"])
    for count, of_each in ((9, [3, 3, 3]), (15, [5, 5, 5]), (35, [15, 15, 5])):
        part = balanced_part(split, count)
        assert part.labels.bincount().tolist() == of_each
        assert torch.equal(labels[part.images.flatten().long()], part.labels)
        assert torch.equal(balanced_part(split, count).images, part.images)
        assert set(part.images.flatten().tolist()) <= set(balanced_part(split, count + 20).images.flatten().tolist())
    assert balanced_part(split, 10).labels.bincount().tolist() in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert balanced_part(split, 85) is balanced_part(split, None) is split


def test_samples_out_of_range_name_the_flag():
    data = load("digits", train_samples=105, test_samples=20)
    assert data.train.labels.bincount().tolist() == [11] * 5 + [10] * 5
    assert data.test.labels.bincount().tolist() == [2] * 10
    with pytest.raises(InputError, match=r"--train_samples.*1437"):
        load("digits", train_samples=2000)
    with pytest.raises(InputError, match=r"--test_samples.*360"):
        load("digits", test_samples=0)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (20, 40), (32, 48)])
def test_small_images_are_enlarged_bilinearly_to_the_pixel(height, width):
    images = torch.randint(0, 256, (5, 2, height, width), dtype=torch.uint8, generator=seeded(0))
    expected = images.numpy().astype(float)
    for axis, length in ((2, height), (3, width)):
        side = max(length, 32)
        centres = (np.arange(side) + 0.5) * length / side - 0.5  # of the new pixels, among the centres of the old ones
        expected = np.apply_along_axis(lambda row: np.interp(centres, np.arange(len(row)), row), axis, expected)  # noqa: B023
    assert torch.equal(enlarged(images, 32), torch.from_numpy(np.rint(expected).astype(np.uint8)))


def test_checksum_covers_all_images_and_labels():
    train = Split(PIXELS[:40], torch.arange(40), DATASETS["cifar10"])
    test = Split(PIXELS[40:], torch.arange(24), DATASETS["cifar10"])
    seen = {Data(train, test, 40).checksum()}
    assert Data(train, test, 40).checksum() in seen
    for index in range(4):
        tensors = [tensor.clone() for tensor in (train.images, train.labels, test.images, test.labels)]
        tensors[index].view(-1)[-1] += 1
        seen.add(Data(Split(*tensors[:2], train.spec), Split(*tensors[2:], test.spec), 40).checksum())
    assert len(seen) == 5


# --- data sets that need no download ---------------------------------------------------------------------------------


def pixels_of(split):
    return {image.numpy().tobytes() for image in split.images}


def test_digits_are_all_of_scikit_learns_split_by_class():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    (images, labels), (test_images, test_labels), _ = load_arrays("digits", None)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert (images.shape, test_images.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (labels.bincount() - 4 * test_labels.bincount()).abs().max() <= 3
    ours = [*zip(images, labels, strict=True), *zip(test_images, test_labels, strict=True)]
    theirs = zip(np.rint(bunch.images * 255 / 16).astype(np.uint8), bunch.target, strict=True)
    assert sorted((i.numpy().tobytes(), int(y)) for i, y in ours) == sorted((i.tobytes(), int(y)) for i, y in theirs)
    data = load("digits")
    assert (data.train.images.shape, data.test.images.shape) == ((1437, 1, 32, 32), (360, 1, 32, 32))
    assert (data.classes, data.channels, data.train.images.max()) == (10, 1, 255)
    assert len(pixels_of(data.train) | pixels_of(data.test)) == 1797


def test_synthetic_images_are_the_same_everywhere_and_tell_the_classes_apart():
    data = load("synthetic")
    assert (data.train.images.shape, data.test.images.shape) == ((1000, 3, 32, 32), (200, 3, 32, 32))
    assert data.train.labels.bincount().tolist() == [100] * 10
    assert len(pixels_of(data.train) | pixels_of(data.test)) == 1200
    digest = hashlib.sha256(data.train.images.numpy().tobytes() + data.test.images.numpy().tobytes())
    assert digest.hexdigest()[:16] == "511f6c83de941bcd"
    means = torch.stack([data.train.images[data.train.labels == c].double().mean(0) for c in range(10)])
    nearest = (data.test.images.double()[:, None] - means).flatten(2).norm(dim=-1).argmin(1)
    assert (nearest == data.test.labels).double().mean() > 0.95


# --- torchvision's data sets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "kind", "shape"),
    [
        ("cifar10", "CIFAR10", (32, 32, 3)),
        ("cifar100", "CIFAR100", (32, 32, 3)),
        ("svhn", "SVHN", (3, 32, 32)),
        ("fmnist", "FashionMNIST", (28, 28)),
    ],
)
def test_torchvisions_splits_come_out_channels_first(tmp_path, monkeypatch, dataset, kind, shape):
    arrays = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    splits = {"train": (arrays[:4], [0, 1, 2, 1]), "test": (arrays[4:], [2, 0])}
    calls = []

    class Svhn:
        def __init__(self, root, split="train", transform=None, target_transform=None, download=False):
            calls.append((root, download))
            if calls == [(tmp_path / dataset, False)]:
                raise RuntimeError("Dataset not found")
            self.data, self.labels = splits[split]

    class Other(Svhn):
        def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
            super().__init__(root, "train" if train else "test", download=download)
            self.targets = self.labels
            del self.labels

    monkeypatch.setattr(f"torchvision.datasets.{kind}", Svhn if dataset == "svhn" else Other)
    *loaded, spec = load_arrays(dataset, tmp_path)
    assert spec == DATASETS[dataset]
    assert calls == [(tmp_path / dataset, download) for download in (False, True, False)]
    for (images, labels), (pixels, classes) in zip(loaded, splits.values(), strict=True):
        if shape[-1] == 3:
            pixels = pixels.transpose(0, 3, 1, 2)
        elif dataset == "fmnist":
            pixels = pixels[:, None]
        assert np.array_equal(images.numpy(), pixels)
        assert (labels.tolist(), labels.dtype, images.is_contiguous()) == (classes, torch.int64, True)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn", "fmnist", "tinyimagenet"])
def test_missing_data_without_network_names_the_place(tmp_path, monkeypatch, dataset):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(InputError, match=f"{tmp_path / dataset}/train/<class>"):
        load(dataset, tmp_path)


def test_torchvision_that_does_not_fit_torch_is_named(tmp_path, monkeypatch):
    make_tree(tmp_path / "cifar10")
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    with pytest.raises(InputError, match="torchvision"):
        load("cifar10", tmp_path)
    assert len(load("digits").train) == 1437


# --- trees of image files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_tree_is_read_as_torchvision_reads_it(tmp_path, held_out):
    from torchvision.datasets import ImageFolder

    make_tree(tmp_path / "bugs", ("train", held_out))
    data = load("bugs", tmp_path)
    assert data.classes == 2
    for split, name in ((data.train, "train"), (data.test, held_out)):
        reference = ImageFolder(tmp_path / "bugs" / name)
        assert split.labels.tolist() == [label for _, label in reference.samples]
        for image, (expected, _) in zip(split.images, reference, strict=True):
            assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.array(expected)))


def test_cache_is_used_until_the_tree_changes(tmp_path, monkeypatch):
    make_tree(tmp_path / "bugs")
    first = load("bugs", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(utils.trees, "_decode", lambda *_: pytest.fail("decoded again"))
        again = load("bugs", tmp_path)
    assert again.checksum() == first.checksum()
    changed = tmp_path / "bugs" / "train" / "bee" / "1.png"
    Image.new("RGB", (32, 32), "red").save(changed)
    red = (load("bugs", tmp_path).train.images == torch.tensor([255, 0, 0]).view(3, 1, 1)).all((1, 2, 3))
    assert red.tolist() == [False] * 4 + [True, False]
    changed.unlink()
    assert len(load("bugs", tmp_path).train) == 5
    cache = tmp_path / "bugs" / "train.cache.safetensors"
    cache.write_bytes(cache.read_bytes()[:-100])
    assert len(load("bugs", tmp_path).train) == 5


def test_tree_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    make_tree(tmp_path / "bugs")
    real = utils.trees._decode

    def decode(samples, channels):
        Image.new("RGB", (32, 32), "red").save(samples[-1][0])
        return real(samples, channels)

    with monkeypatch.context() as patch:
        patch.setattr(utils.trees, "_decode", decode)
        with pytest.raises(InputError, match="bugs/train"):
            load("bugs", tmp_path)
    assert len(load("bugs", tmp_path).train) == 6


def test_grey_tree_keeps_one_channel(tmp_path):
    make_tree(tmp_path / "bugs", size=28, mode="L")
    assert load("bugs", tmp_path).train.images.shape == (6, 1, 32, 32)
    make_tree(tmp_path / "fmnist", classes=[f"{i}" for i in range(10)], size=28)
    assert load("fmnist", tmp_path).train.images.shape == (30, 1, 32, 32), "as the set that it is named after"


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_tree_of_ones_own_is_normalised_by_its_training_images(tmp_path, mode):
    make_tree(tmp_path / "bugs", mode=mode)
    for _ in range(2):  # decoded, and from the cache
        data = load("bugs", tmp_path)
        spec, pixels = data.train.spec, data.train.images.numpy() / 255
        np.testing.assert_allclose(spec.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(spec.std, pixels.std((0, 2, 3)), rtol=1e-12)
        assert data.test.spec is spec
        assert (spec.recipe, data.channels) == (Recipe(4, flip=True), len(mode))
    Image.new(mode, (32, 32)).save(tmp_path / "bugs" / "test" / "ant" / "0.png")
    assert load("bugs", tmp_path).train.spec == spec, "test images have no say"


def test_tree_with_other_classes_than_its_name_says_is_refused(tmp_path):
    make_tree(tmp_path / "cifar10", classes="abcdefg")
    with pytest.raises(InputError, match=r"cifar10/train .*7.* 10"):
        load("cifar10", tmp_path)


def test_folder_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path / 'typo'}"):
        load("cifar10", tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_official_tiny_imagenet_layout(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    classes = [f"n{i:03d}" for i in range(200)]
    make_tree(root, ("train",), classes, count=1, size=64)
    for folder in ("val", "test"):
        (root / folder / "images").mkdir(parents=True)
        for i in range(200):
            Image.new("RGB", (64, 64), (i, i, i)).save(root / folder / "images" / f"{i}.png")
    rows = [f"{i}.png\t{name}\t0\t0\t9\t9\n" for i, name in enumerate(reversed(classes))]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    data = load("tinyimagenet", tmp_path)
    assert data.train.images.shape == (200, 3, 64, 64)
    assert data.test.labels.tolist() == list(range(199, -1, -1))
    assert data.test.images.amax((1, 2, 3)).tolist() == list(range(200))


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda root: (root / "train/ant/0.png").write_bytes(b"not an image"), "train/ant/0.png"),
        (lambda root: os.truncate(root / "test/bee/2.png", 200), "test/bee/2.png"),
        (lambda root: Image.new("RGB", (40, 40)).save(root / "train/bee/1.png"), "train/bee/1.png is 40x40"),
        (lambda root: Image.new("I;16", (32, 32)).save(root / "train/bee/1.png"), "train/bee/1.png .*8 bits"),
        (lambda root: (root / "train/ant/3.png").symlink_to("nowhere"), "train/ant/3.png"),
        (lambda root: (root / "test").rename(root / "tset"), r"bugs .*no test \(or val\)"),
        (lambda root: (root / "train").rename(root / "trian"), "bugs .*no train"),
        (lambda root: (root / "test").rename(root / "val").joinpath("val_annotations.txt").write_text("x"), "val_anno"),
        (lambda root: (root / "test/bee").rename(root / "test/cat"), "bee, cat"),
        (lambda root: [path.unlink() for path in (root / "test/bee").iterdir()], "bugs/test"),
    ],
)
def test_broken_trees_name_the_file(tmp_path, break_it, named):
    make_tree(tmp_path / "bugs")
    break_it(tmp_path / "bugs")
    with pytest.raises(InputError, match=named):
        load("bugs", tmp_path)
