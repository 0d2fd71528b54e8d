"""Loaders of data sets: from their files, or from none, to uint8 images and int64 labels on the CPU."""

from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from .augment import Recipe
from .files import InputError
from .trees import Arrays, find_tree, load_tree, torchvision_datasets

DEFAULT_DIR = "dataset/"


@dataclass(frozen=True)
class Spec:
    """A data set's statistics per channel (of values 0 to 1) and augmentation; of those that the paper's code knows,
    also the usual number of epochs, and the number of classes."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    recipe: Recipe
    epochs: int | None = None
    classes: int | None = None

    @property
    def channels(self) -> int:
        return len(self.mean)


_CIFAR = Recipe(padding=4, flip=True, cutout=16)
_HALF = ((0.5,) * 3, (0.5,) * 3)
DATASETS = {
    "cifar10": Spec((0.4913, 0.4821, 0.4465), (0.2023, 0.1994, 0.2010), _CIFAR, 300, 10),
    "cifar100": Spec((0.5071, 0.4867, 0.4408), (0.2673, 0.2564, 0.2762), _CIFAR, 300, 100),
    "svhn": Spec(*_HALF, Recipe(padding=4), 150, 10),
    "fmnist": Spec((0.5,), (0.5,), Recipe(padding=4, flip=True), 150, 10),
    "tinyimagenet": Spec((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), Recipe(padding=8, flip=True), 300, 200),
    "digits": Spec((0.5,), (0.5,), Recipe(padding=4), 60, 10),
    "synthetic": Spec(*_HALF, Recipe(padding=4), 60, 10),
}
_OWN = Recipe(padding=4, flip=True)  # of any other tree of images


def load_arrays(dataset: str, data_dir: Path) -> tuple[Arrays, Arrays, Spec]:
    """Load the training and test split of a data set. A tree ``data_dir/<dataset>/{train,test}/<class>/*`` goes before
    torchvision's files in ``data_dir/<dataset>``, and these before a download. A tree that is none of ``DATASETS`` is
    normalised by the mean and deviation of its training images.

    Returns:
        Two pairs of images, uint8 [N,C,H,W] in their own size, and labels, int64 [N]; and what is fixed for them.

    Raises:
        InputError: the data is missing, damaged, or has not the classes of the set that it is named after; the message
            names the place.
    """
    if dataset == "digits":
        return *_digits(), DATASETS[dataset]
    if dataset == "synthetic":
        return *_synthetic(), DATASETS[dataset]
    if tree := find_tree(data_dir, dataset):
        spec = DATASETS.get(dataset)
        *arrays, statistics = load_tree(*tree, spec and spec.channels, spec and spec.classes)
        return *arrays, spec or Spec(*statistics, _OWN)
    if dataset not in DATASETS:
        known = ", ".join(DATASETS)
        raise InputError(f"{data_dir / dataset} has no train and test folder, and {dataset} is none of {known}")
    return *_torchvision(dataset, data_dir / dataset), DATASETS[dataset]


# --- data sets that need no download ---------------------------------------------------------------------------------


def _digits() -> tuple[Arrays, Arrays]:
    """Scikit-learn's 1,797 handwritten digits, 8x8 with values 0 to 16; a fifth of each class is for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # [N,1,8,8]
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=bunch.target, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test])


def _synthetic(train: int = 1000, test: int = 200, classes: int = 10) -> tuple[Arrays, Arrays]:
    """Ten coarse colour patterns, one a class, under noise. Made of integers, so they are the same on every CPU."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(256, (classes, 3, 4, 4), generator=generator)
    patterns = patterns.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)  # [classes,3,32,32]

    def split(count: int) -> Arrays:
        labels = torch.arange(count) % classes
        noise = torch.randint(-128, 129, (count, 3, 32, 32), generator=generator)
        return (patterns[labels] + noise).clamp(0, 255).to(torch.uint8), labels

    return split(train), split(test)


# --- torchvision's data sets -----------------------------------------------------------------------------------------


def _torchvision(dataset: str, root: Path) -> tuple[Arrays, Arrays]:
    place = f"put the images into {root}/train/<class>/*.png and {root}/test/<class>/*.png"
    classes = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fmnist": "FashionMNIST", "svhn": "SVHN"}
    if dataset not in classes:
        own = f", or unpack tiny-imagenet-200.zip in {root.parent}" if dataset == "tinyimagenet" else ""
        raise InputError(f"{root} has no train and test folder, and {dataset} is not downloaded: {place}{own}")
    if not root.parent.is_dir() and root.parent != Path(DEFAULT_DIR):
        raise InputError(
            f"there is no folder {root.parent}: {place}, or make the folder, and {dataset} is downloaded into it"
        )
    kind = getattr(torchvision_datasets(), classes[dataset])
    train, test = ({"split": name} if dataset == "svhn" else {"train": name == "train"} for name in ("train", "test"))
    try:
        return _as_tensors(_downloaded(kind, root, train)), _as_tensors(_downloaded(kind, root, test))
    except (OSError, RuntimeError, HTTPException) as error:
        raise InputError(
            f"{dataset} is not in {root} and could not be downloaded ({error}): {place}, "
            f"or torchvision's {kind.__name__} files into {root}"
        ) from error


def _downloaded(kind, root: Path, split: dict):
    try:
        return kind(root, **split, download=False)
    except RuntimeError:  # torchvision's way to say that the files are not there or not whole
        print(f"{root} holds neither train and test folders nor torchvision's files: {kind.__name__} is downloaded")
        return kind(root, **split, download=True)


def _as_tensors(dataset) -> Arrays:
    """torchvision's arrays to images uint8 [N,C,H,W] and labels [N]."""
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:  # [N,H,W], grey
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:  # [N,H,W,C]
        images = images.permute(0, 3, 1, 2)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    return images.contiguous(), torch.as_tensor(labels).long()
