"""Data sets as uint8 tensors on the device, and the batches drawn from them."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from . import distributed
from .augment import Recipe, augment, draw, normalise
from .errors import InputError
from .files import checksum, read_tensors, write_tensors

SMALLEST = 32  # side in pixels; the networks halve an image up to five times


@dataclass(frozen=True)
class Spec:
    """What the paper's code fixes for a data set: statistics per channel, augmentation, and the number of epochs."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    recipe: Recipe
    epochs: int

    @property
    def channels(self) -> int:
        return len(self.mean)


_CIFAR = Recipe(padding=4, flip=True, cutout=16)
_HALF = ((0.5,) * 3, (0.5,) * 3)
DATASETS = {
    "cifar10": Spec((0.4913, 0.4821, 0.4465), (0.2023, 0.1994, 0.2010), _CIFAR, 300),
    "cifar100": Spec((0.5071, 0.4867, 0.4408), (0.2673, 0.2564, 0.2762), _CIFAR, 300),
    "svhn": Spec(*_HALF, Recipe(padding=4), 150),
    "fmnist": Spec((0.5,), (0.5,), Recipe(padding=4, flip=True), 150),
    "tinyimagenet": Spec((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), Recipe(padding=8, flip=True), 300),
    "digits": Spec((0.5,), (0.5,), Recipe(padding=4), 60),
    "synthetic": Spec(*_HALF, Recipe(padding=4), 60),
}


@dataclass(frozen=True)
class Split:
    """Images uint8 [N,C,H,W] and labels int64 [N] on one device, with how to normalise and augment them."""

    images: Tensor
    labels: Tensor
    spec: Spec

    def __len__(self) -> int:
        return len(self.images)

    def part(self, indices: Tensor | slice) -> "Split":
        return Split(self.images[indices], self.labels[indices], self.spec)

    def to(self, device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device), self.spec)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images fp32 [B,C,H,W] and labels [B], in order, as they are."""
        mean, std = self._statistics()
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield normalise(images, mean, std), labels

    def augmented_batches(
        self, batch_size: int, generator: torch.Generator, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, from batch ``first`` on: normalised augmented images fp32 [B,C,H,W], labels [B].

        All that is random comes from the CPU ``generator`` before the first batch. On several ranks each has its part
        of every batch, which may be empty in the last one.
        """
        device = self.images.device
        mean, std = self._statistics()
        order = torch.randperm(len(self), generator=generator).to(device)
        draws = draw(self.spec.recipe, len(self), tuple(self.images.shape[-2:]), generator).to(device)
        for start in range(first * batch_size, len(self), batch_size):
            own = distributed.part_of(min(batch_size, len(self) - start))
            part = slice(start + own.start, start + own.stop)
            images = augment(self.images[order[part]], self.spec.recipe, draws[part])
            yield normalise(images, mean, std), self.labels[order[part]]

    def _statistics(self) -> tuple[Tensor, Tensor]:
        device = self.images.device
        return torch.tensor(self.spec.mean, device=device), torch.tensor(self.spec.std, device=device)


@dataclass(frozen=True)
class Data:
    """A data set: training and test split, and the training images that Early-Time probes with."""

    train: Split
    test: Split
    probe: Split
    classes: int

    @property
    def channels(self) -> int:
        return self.train.spec.channels

    def checksum(self) -> str:
        """Checksum of all images and labels that the run will see."""
        splits = {"train": self.train, "test": self.test, "probe": self.probe}
        tensors = {f"{name}.images": split.images for name, split in splits.items()}
        return checksum(tensors | {f"{name}.labels": split.labels for name, split in splits.items()})


def load_data(args) -> Data:
    """Load ``args.dataset``; an ImageFolder tree of that name under ``args.data_dir`` goes before a download.

    Raises:
        InputError: the data is missing, damaged or smaller than asked for; the message names the place.
    """
    spec = DATASETS[args.dataset]
    with distributed.in_turn():  # one downloads and decodes
        if args.dataset == "digits":
            arrays = _digits()
        elif args.dataset == "synthetic":
            arrays = _synthetic()
        elif tree := _find_tree(Path(args.data_dir), args.dataset):
            arrays = _image_folder(*tree, spec.channels)
        else:
            arrays = _torchvision(args.dataset, Path(args.data_dir))
    train, test = (Split(_at_least(images, SMALLEST), labels.long(), spec).to(args.device) for images, labels in arrays)
    classes = int(train.labels.max()) + 1
    for split, count, flag in (
        (train, args.train_samples, "--train_samples"),
        (test, args.test_samples, "--test_samples"),
    ):
        if count is not None and count > len(split):
            raise InputError(f"{flag} must be from 1 to {len(split)}, got {count}")
    train, test = balanced_part(train, args.train_samples), balanced_part(test, args.test_samples)
    return Data(train, test, balanced_part(train, args.early_time_samples), classes)


def _at_least(images: Tensor, side: int) -> Tensor:
    """Enlarge uint8 images [N,C,H,W] that are smaller than ``side``."""
    if min(images.shape[-2:]) >= side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def balanced_part(split: Split, count: int | None) -> Split:
    """The same ``count`` samples every time, as many of each class as there can be; all, if there are no more."""
    if count is None or count >= len(split):
        return split
    labels = split.labels.cpu()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[labels[shuffled].sort(stable=True).indices]
    sizes = labels.bincount()
    rank_in_class = torch.cat([torch.arange(size) for size in sizes])
    return split.part(by_class[rank_in_class.sort(stable=True).indices[:count]].sort().values.to(split.labels.device))


# --- data sets that need no download ---------------------------------------------------------------------------------


def _digits():
    """Scikit-learn's 1,797 handwritten digits, 8x8 with values 0 to 16; a fifth of each class is for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # [N,1,8,8]
    labels = torch.from_numpy(bunch.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=bunch.target, random_state=0)
    return [(images[part], labels[part]) for part in (train, test)]


def _synthetic(train: int = 1000, test: int = 200, classes: int = 10):
    """Ten coarse colour patterns, one a class, under noise; the same every time."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(classes, 3, 4, 4, generator=generator)
    splits = []
    for count in (train, test):
        labels = torch.arange(count) % classes
        images = F.interpolate(patterns, size=(32, 32), mode="nearest")[labels]
        images = images + 0.3 * torch.randn(images.shape, generator=generator)
        splits.append(((images.clamp(0, 1) * 255).to(torch.uint8), labels))
    return splits


# --- torchvision's data sets -----------------------------------------------------------------------------------------


def _torchvision_datasets():
    """torchvision's data sets; imported only when they are needed, which the digits are without."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"torchvision cannot be used beside torch {torch.__version__} ({error}): "
            "install both together, from the same place"
        ) from error
    return datasets


def _torchvision(dataset: str, data_dir: Path):
    root = data_dir / dataset
    place = f"put the images into {root}/train/<class>/*.png and {root}/test/<class>/*.png"
    if dataset == "tinyimagenet":
        raise InputError(
            f"{root} has no train and test (or val) folder, and tinyimagenet is not downloaded: "
            f"unpack tiny-imagenet-200.zip in {data_dir}, or {place}"
        )
    datasets = _torchvision_datasets()
    options = {
        "cifar10": (datasets.CIFAR10, {"train": True}, {"train": False}),
        "cifar100": (datasets.CIFAR100, {"train": True}, {"train": False}),
        "fmnist": (datasets.FashionMNIST, {"train": True}, {"train": False}),
        "svhn": (datasets.SVHN, {"split": "train"}, {"split": "test"}),
    }
    kind, *splits = options[dataset]
    try:
        return [_as_tensors(_downloaded(kind, root, split)) for split in splits]
    except (OSError, RuntimeError, HTTPException) as error:
        raise InputError(
            f"{dataset} is not in {root} and could not be downloaded ({error}): {place}, "
            f"or torchvision's {kind.__name__} files into {root}"
        ) from error


def _downloaded(kind, root: Path, split: dict):
    try:
        return kind(root, **split, download=False)
    except RuntimeError:  # torchvision's way to say that the files are not there or not whole
        return kind(root, **split, download=True)


def _as_tensors(dataset) -> tuple[Tensor, Tensor]:
    """torchvision's arrays to images uint8 [N,C,H,W] and labels [N]."""
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:  # [N,H,W], grey
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:  # [N,H,W,C]
        images = images.permute(0, 3, 1, 2)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    return images.contiguous(), torch.as_tensor(labels)


# --- ImageFolder trees -----------------------------------------------------------------------------------------------


def _find_tree(data_dir: Path, dataset: str) -> tuple[Path, Path] | None:
    """The training and test folder of a tree; Tiny ImageNet's own name is accepted, and ``val`` for ``test``."""
    names = [dataset, "tiny-imagenet-200"] if dataset == "tinyimagenet" else [dataset]
    for root in (data_dir / name for name in names):
        # the official Tiny ImageNet has a test folder too, without labels
        held_out = ("val",) if (root / "val" / _VAL_LABELS).is_file() else ("test", "val")
        train, tests = root / "train", [root / name for name in held_out if (root / name).is_dir()]
        if train.is_dir() and tests:
            return train, tests[0]
        if train.is_dir() or tests:
            missing = "train" if tests else "test (or val)"
            raise InputError(f"{root} has no {missing} folder beside {(tests or [train])[0].name}")
    return None


_VAL_LABELS = "val_annotations.txt"  # the official Tiny ImageNet's: file name, class, box


def _image_folder(train: Path, test: Path, channels: int):
    train_images, train_labels, classes = _cached(train, channels)
    test_images, test_labels, test_classes = _cached(test, channels)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise InputError(f"{train} and {test} must have the same classes; only one of them has {', '.join(odd[:5])}")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise InputError(f"the images of {train} and {test} differ in size")
    return [(train_images, train_labels), (test_images, test_labels)]


def _cached(folder: Path, channels: int) -> tuple[Tensor, Tensor, list[str]]:
    """A folder's images, labels and class names, from the cache beside it if the folder has not changed since."""
    cache = folder.with_name(f"{folder.name}.cache.safetensors")
    fingerprint = _fingerprint(folder, channels)
    if cache.exists():
        try:
            tensors, metadata = read_tensors(cache, "it is decoded again")
            if metadata["fingerprint"] == fingerprint:
                return tensors["images"], tensors["labels"], metadata["classes"]
        except (InputError, KeyError):
            pass  # a cache that cannot be read is no loss
    samples, classes = _list_images(folder)
    images, labels = _decode(samples, channels)
    if _fingerprint(folder, channels) != fingerprint:
        raise InputError(f"the files of {folder} changed while they were read: run the command again once they rest")
    try:
        write_tensors(cache, {"images": images, "labels": labels}, {"fingerprint": fingerprint, "classes": classes})
    except OSError as error:
        print(f"note: {folder} is decoded again next time, its cache cannot be written ({error})")
    return images, labels, classes


def _fingerprint(folder: Path, channels: int) -> str:
    """Changes when a file comes, goes, or is written."""
    digest = hashlib.sha256(str(channels).encode())
    for directory, subdirectories, files in os.walk(folder):
        subdirectories.sort()
        for name in sorted(files):
            path = os.path.join(directory, name)
            try:
                stat = os.stat(path)
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror}): replace or remove it") from error
            digest.update(f"{os.path.relpath(path, folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _list_images(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """Paths with class numbers, and the class names in alphabetical order."""
    annotations = folder / _VAL_LABELS
    if annotations.is_file():
        rows = [line.split("\t")[:2] for line in annotations.read_text("utf-8", "replace").splitlines()]
        if not rows or any(len(row) < 2 for row in rows):
            raise InputError(f"{annotations} is damaged: every line must hold a file name, a tab and a class")
        classes = sorted({name for _, name in rows})
        return [(str(folder / "images" / file), classes.index(name)) for file, name in rows], classes
    try:
        tree = _torchvision_datasets().ImageFolder(folder)
    except FileNotFoundError as error:
        raise InputError(f"{folder} must hold a folder of images for each class ({error})") from error
    return tree.samples, tree.classes


def _decode(samples: list[tuple[str, int]], channels: int) -> tuple[Tensor, Tensor]:
    """Decode images of one size into uint8 [N,C,H,W], labels [N]."""
    from PIL import Image

    def pixels(path: str) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(image.height, image.width, -1)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} cannot be decoded as an image ({error}): replace or remove it") from error

    first = pixels(samples[0][0])
    images = torch.empty(len(samples), *first.shape, dtype=torch.uint8)  # [N,H,W,C]
    with ThreadPoolExecutor() as pool:
        paths = [path for path, _ in samples]
        progress = tqdm(pool.map(pixels, paths), total=len(paths), desc="decoding", unit="image", disable=None)
        for index, array in enumerate(progress):
            if array.shape != first.shape:
                raise InputError(
                    f"{paths[index]} is {array.shape[1]}x{array.shape[0]} pixels where {paths[0]} is "
                    f"{first.shape[1]}x{first.shape[0]}: all images must have one size"
                )
            images[index] = torch.from_numpy(array.copy())
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in samples])
