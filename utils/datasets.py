"""Loaders of data sets: from their files, or from none, to uint8 images and int64 labels on the CPU."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .augment import Recipe
from .files import InputError, read_tensors, write_tensors

DEFAULT_DIR = "dataset/"
Arrays = tuple[Tensor, Tensor]  # images uint8 [N,C,H,W], labels int64 [N]


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
_VAL_LABELS = "val_annotations.txt"  # the official Tiny ImageNet's: file name, class, box


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
    if tree := _find_tree(data_dir, dataset):
        return _image_folder(*tree, DATASETS.get(dataset))
    if dataset not in DATASETS:
        raise InputError(f"{data_dir / dataset} has no train and test folder")
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


def _torchvision_datasets():
    """torchvision's data sets; imported only when they are needed, which the digits are without."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"torchvision does not work with torch {torch.__version__} ({error}): "
            "install both together, from the same place"
        ) from error
    return datasets


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
    kind = getattr(_torchvision_datasets(), classes[dataset])
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


# --- trees of image files --------------------------------------------------------------------------------------------


def _find_tree(data_dir: Path, dataset: str) -> tuple[Path, Path] | None:
    """The training and test folder of a tree; Tiny ImageNet's own name is accepted, and ``val`` for ``test``."""
    names = [dataset, "tiny-imagenet-200"] if dataset == "tinyimagenet" else [dataset]
    for root in (data_dir / name for name in names):
        # the official Tiny ImageNet has a test folder too, without labels
        held_out = ("val",) if (root / "val" / _VAL_LABELS).is_file() else ("test", "val")
        train, tests = root / "train", [root / name for name in held_out if (root / name).is_dir()]
        if train.is_dir() and tests:
            return train, tests[0]
        if train.is_dir():
            raise InputError(f"{root} has a train folder, but no test (or val) folder")
        if tests:
            raise InputError(f"{root} has a {tests[0].name} folder, but no train folder")
    return None


class _Folder(NamedTuple):
    """A training or test folder; mean and std are those of its images, per channel."""

    images: Tensor
    labels: Tensor
    classes: list[str]
    mean: list[float]
    std: list[float]


def _image_folder(train: Path, test: Path, spec: Spec | None) -> tuple[Arrays, Arrays, Spec]:
    channels = spec.channels if spec else _channels(train)
    one, other = _cached(train, channels), _cached(test, channels)
    if one.classes != other.classes:
        odd = sorted(set(one.classes) ^ set(other.classes))
        raise InputError(f"{train} and {test} must have the same classes; only one of them has {', '.join(odd[:5])}")
    if spec and len(one.classes) != spec.classes:
        name = train.parent.name
        raise InputError(
            f"{train} has {len(one.classes)} classes, {name} has {spec.classes}: give the tree another name"
        )
    if one.images.shape[1:] != other.images.shape[1:]:
        raise InputError(f"the images of {train} and {test} differ in size")
    spec = spec or Spec(tuple(one.mean), tuple(one.std), _OWN)
    return (one.images, one.labels), (other.images, other.labels), spec


def _channels(folder: Path) -> int:
    """1 if the first image of a folder is grey, 3 if it has colours."""
    from PIL import Image

    path = _list_images(folder)[0][0][0]
    try:
        with Image.open(path) as image:
            return 1 if image.mode in ("1", "L", "LA", "I;16") else 3
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be decoded as an image ({error}): replace or remove it") from error


def _statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel of images uint8 [N,C,H,W], as values 0 to 1; counted, so exact on every CPU."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(images.shape[1])]).double()
    shares /= shares.sum(1, keepdim=True)  # [C,256]
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.tolist(), std.clamp(min=1 / 255).tolist()  # of one grey value


def _cached(folder: Path, channels: int) -> _Folder:
    """A folder's images, labels and class names, from the cache next to it if the folder has not changed since."""
    cache = folder.with_name(f"{folder.name}.cache.safetensors")
    fingerprint = _fingerprint(folder, channels)
    if cache.exists():
        try:
            tensors, metadata = read_tensors(cache)
            if metadata["fingerprint"] == fingerprint:
                return _Folder(**tensors, **{name: metadata[name] for name in ("classes", "mean", "std")})
        except (InputError, KeyError):
            pass  # a cache that cannot be read is no loss
    samples, classes = _list_images(folder)
    images, labels = _decode(samples, channels)
    if _fingerprint(folder, channels) != fingerprint:
        raise InputError(f"the files of {folder} changed while they were read: run the command again once they rest")
    found = _Folder(images, labels, classes, *_statistics(images))
    try:
        metadata = {"fingerprint": fingerprint, "classes": classes, "mean": found.mean, "std": found.std}
        write_tensors(cache, {"images": images, "labels": labels}, metadata)
    except OSError as error:
        print(f"note: {folder} is decoded again next time, its cache cannot be written ({error})")
    return found


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


def _decode(samples: list[tuple[str, int]], channels: int) -> Arrays:
    """Decode images of one size."""
    from PIL import Image

    def pixels(path: str) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return np.array(image.convert("RGB" if channels == 3 else "L")).reshape(image.height, image.width, -1)
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
            images[index] = torch.from_numpy(array)
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in samples])
