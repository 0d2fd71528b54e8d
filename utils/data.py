"""Data sets as uint8 tensors on the device, and the batches drawn from them."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from . import augment as augmentation
from .datasets import Spec, load_arrays
from .files import InputError

SMALLEST = 32  # side in pixels; the networks halve an image up to five times


@dataclass(frozen=True)
class Split:
    """Images uint8 [N,C,H,W] and labels int64 [N] on one device, with how to normalise and augment them."""

    images: Tensor
    labels: Tensor
    spec: Spec

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, count: int) -> int:
        """Images that have the pixels of ``count`` images of 32x32, at least 1 and at most all."""
        height, width = self.images.shape[-2:]
        return min(max(1, count * SMALLEST**2 // (height * width)), len(self))

    def part(self, indices: Tensor | slice) -> "Split":
        return Split(self.images[indices], self.labels[indices], self.spec)

    def to(self, device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device), self.spec)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images fp32 [B,C,H,W] and labels [B], in order, as they are."""
        mean, std = self._statistics()
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield augmentation.normalise(images, mean, std), labels

    def augmented_batches(
        self,
        batch_size: int,
        shuffle: torch.Generator,
        augment: torch.Generator,
        share: Callable[[int], slice] = slice,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order: normalised augmented images fp32 [B,C,H,W], labels [B].

        All that is random is drawn before the first batch, so it depends neither on the device nor on ``batch_size``.

        Args:
            batch_size: B; the last batch may be smaller.
            shuffle: CPU generator of the order.
            augment: CPU generator of the augmentation.
            share: number of images of a batch -> the slice of it to return; all of it by default.
        """
        device, recipe = self.images.device, self.spec.recipe
        mean, std = self._statistics()
        order = torch.randperm(len(self), generator=shuffle).to(device)
        draws = augmentation.draw(recipe, len(self), tuple(self.images.shape[-2:]), augment).to(device)
        for start in range(0, len(self), batch_size):
            own = share(min(batch_size, len(self) - start))
            indices = order[start:][own]
            images = augmentation.augment(self.images[indices], recipe, draws[start:][own])
            yield augmentation.normalise(images, mean, std), self.labels[indices]

    def _statistics(self) -> tuple[Tensor, Tensor]:
        device = self.images.device
        return torch.tensor(self.spec.mean, device=device), torch.tensor(self.spec.std, device=device)


@dataclass(frozen=True)
class Data:
    """The training and test split of a data set, and the training images held out by ``--valid_samples``, if any."""

    train: Split
    test: Split
    classes: int
    valid: Split | None = None

    @property
    def channels(self) -> int:
        return self.train.spec.channels

    def checksum(self) -> str:
        """Checksum of all images and labels."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            for tensor in (split.images, split.labels):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.flatten().cpu().numpy())
        return digest.hexdigest()[:16]


def load_data(args) -> Data:
    """Load ``args.dataset`` from ``args.data_dir`` to ``args.device``, of each split the balanced part that
    ``args.train_samples`` and ``args.test_samples`` ask for. Images smaller than 32x32 are enlarged to that.
    ``args.valid_samples`` training images, drawn by ``args.seed``, are held out before.

    Raises:
        InputError: the data is missing, damaged or smaller than asked for; the message names the place or the flag.
    """
    *arrays, spec = load_arrays(args.dataset, Path(args.data_dir))
    train, test = (Split(enlarged(images, SMALLEST), labels, spec) for images, labels in arrays)
    classes, valid = int(train.labels.max()) + 1, None
    if args.valid_samples:
        _check_count("--valid_samples", args.valid_samples, len(train) - 1)
        held = balanced_indices(train, args.valid_samples, args.seed)
        valid, train = train.part(held).to(args.device), train.part(_others(held, len(train)))
    for split, count, flag in (
        (train, args.train_samples, "--train_samples"),
        (test, args.test_samples, "--test_samples"),
    ):
        _check_count(flag, count, len(split))
    train, test = balanced_part(train, args.train_samples), balanced_part(test, args.test_samples)
    return Data(train.to(args.device), test.to(args.device), classes, valid)


def _check_count(flag: str, count: int | None, most: int) -> None:
    if count is not None and not 1 <= count <= most:
        raise InputError(f"{flag} must be from 1 to {most}, got {count}")


def _others(indices: Tensor, count: int) -> Tensor:
    """The indices below ``count`` that are not among ``indices``, in order."""
    others = torch.ones(count, dtype=torch.bool)
    others[indices] = False
    return others.nonzero().flatten()


def enlarged(images: Tensor, side: int) -> Tensor:
    """Enlarge uint8 images [N,C,H,W] bilinearly where a side is shorter than ``side``. With a power of two the
    arithmetic in fp64 is exact, so the pixels are the same on every CPU."""
    size = [max(side, length) for length in images.shape[-2:]]
    if size == list(images.shape[-2:]):
        return images
    parts = (F.interpolate(part.double(), size=size, mode="bilinear") for part in images.split(1000))
    return torch.cat([part.round().to(torch.uint8) for part in parts])


def balanced_part(split: Split, count: int | None) -> Split:
    """The same ``count`` samples every time, as many of each class as there can be; all, if there are no more."""
    if count is None or count >= len(split):
        return split
    return split.part(balanced_indices(split, count).to(split.labels.device))


def balanced_indices(split: Split, count: int, seed: int = 0) -> Tensor:
    """Sorted indices of ``count`` samples drawn by a seed, as many of each class as there can be; on the CPU."""
    labels = split.labels.cpu()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].sort(stable=True).indices]
    rank_in_class = torch.cat([torch.arange(size) for size in labels.bincount()])
    return by_class[rank_in_class.sort(stable=True).indices[:count]].sort().values
