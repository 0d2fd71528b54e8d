"""Trees of image files, a folder for each class, decoded once and cached."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .files import InputError, read_tensors, write_tensors

Arrays = tuple[Tensor, Tensor]  # images uint8 [N,C,H,W], labels int64 [N]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel, of values 0 to 1
_VAL_LABELS = "val_annotations.txt"  # the official Tiny ImageNet's: file name, class, box


def torchvision_datasets():
    """torchvision's data sets; imported only when they are needed, which the digits are without."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"torchvision does not work with torch {torch.__version__} ({error}): "
            "install both together, from the same place"
        ) from error
    return datasets


def find_tree(data_dir: Path, dataset: str) -> tuple[Path, Path] | None:
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


def load_tree(train: Path, test: Path, channels: int | None, classes: int | None) -> tuple[Arrays, Arrays, Statistics]:
    """Images and labels of a training and a test folder, and the statistics of the training images.

    Args:
        train: holds a folder for each class.
        test: the same, or the official Tiny ImageNet's ``val``.
        channels: of an image; None takes those of the first one.
        classes: how many there must be; None for any number.

    Raises:
        InputError: a file or folder is not what it should be; the message names it.
    """
    channels = channels or _channels(train)
    one, other = _cached(train, channels), _cached(test, channels)
    if one.classes != other.classes:
        odd = sorted(set(one.classes) ^ set(other.classes))
        raise InputError(f"{train} and {test} must have the same classes; only one of them has {', '.join(odd[:5])}")
    if classes is not None and len(one.classes) != classes:
        name = train.parent.name
        raise InputError(f"{train} has {len(one.classes)} classes, {name} has {classes}: give the tree another name")
    if one.images.shape[1:] != other.images.shape[1:]:
        raise InputError(f"the images of {train} and {test} differ in size")
    return (one.images, one.labels), (other.images, other.labels), (tuple(one.mean), tuple(one.std))


def _channels(folder: Path) -> int:
    """1 if the first image of a folder is grey, 3 if it has colours."""
    with _opened(_list_images(folder)[0][0][0]) as image:
        return 1 if image.mode in ("1", "L", "LA") else 3


@contextmanager
def _opened(path: str) -> Iterator:
    """An image; what cannot be decoded, now or later, is named."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut its values off at 255
                raise InputError(f"{path} has more than 8 bits a channel: convert the images of the tree to 8 bits")
            yield image
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
        tree = torchvision_datasets().ImageFolder(folder)
    except FileNotFoundError as error:
        raise InputError(f"{folder} must hold a folder of images for each class ({error})") from error
    return tree.samples, tree.classes


def _decode(samples: list[tuple[str, int]], channels: int) -> Arrays:
    """Decode images of one size."""

    def pixels(path: str) -> np.ndarray:
        with _opened(path) as image:
            return np.array(image.convert("RGB" if channels == 3 else "L")).reshape(image.height, image.width, -1)

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
