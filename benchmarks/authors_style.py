"""The yardstick of ``speed.py``: each piece of work in the style of the authors' release, written independently of it
and of ``models/`` and ``utils/``. The networks are those of ``loop.py``, a Python loop over timesteps."""

from collections.abc import Callable
from functools import wraps

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


def with_tf32(function: Callable) -> Callable:
    """A function that runs as torch comes: on a GPU, convolutions in fp32 use TF32, which this project turns off."""

    @wraps(function)
    def wrapped(*args):
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
        try:
            return function(*args)
        finally:
            torch.backends.cudnn.allow_tf32 = before

    return wrapped


@with_tf32
def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, timesteps: int):
    """One step on images [B,C,H,W]; gradients are masked parameter by parameter, |w| < 1e-6 standing for pruned."""
    loss = sum(F.cross_entropy(logits, labels) for logits in model(images, timesteps)) / timesteps
    optimizer.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        if "weight" in name:
            parameter.grad = torch.where(parameter.abs() < 1e-6, 0.0, parameter.grad)
    optimizer.step()


@with_tf32
@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, timesteps: int) -> Tensor:
    """Predicted classes [N] of images [N,C,H,W], 100 at a time."""
    return torch.cat([model(part, timesteps).mean(0).argmax(-1) for part in images.split(100)])


def prune(weights: dict[str, np.ndarray], masks: dict[str, np.ndarray], fraction: float) -> dict[str, np.ndarray]:
    """Masks without the smallest ``fraction`` of the survivors: a Python list of all of them, sorted."""
    alive = []
    for name, mask in masks.items():
        alive += list(np.abs(weights[name][np.nonzero(mask)]))
    threshold = np.sort(np.array(alive))[int(len(alive) * fraction)]
    return {name: np.where(np.abs(weights[name]) < threshold, 0.0, mask) for name, mask in masks.items()}


def mask_distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Fraction of entries that differ, layer by layer in floats."""
    differing = sum(np.sum(np.abs(a[name] - b[name])) for name in a)
    return float(differing / sum(mask.size for mask in a.values()))


class Images(Dataset):
    """uint8 images [N,32,32,3] as torchvision's data sets give them, one PIL image at a time."""

    def __init__(self, images: np.ndarray):
        self.images = images
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.49, 0.48, 0.45), (0.2, 0.2, 0.2)),
                transforms.Lambda(cutout),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.fromarray(self.images[index]))


def cutout(image: Tensor, side: int = 16) -> Tensor:
    """A square of an image [C,H,W] set to 0 through a mask in numpy."""
    height, width = image.shape[1:]
    y, x = np.random.randint(height), np.random.randint(width)  # noqa: NPY002
    mask = np.ones((height, width), np.float32)
    mask[max(0, y - side // 2) : y + side // 2, max(0, x - side // 2) : x + side // 2] = 0
    return image * torch.from_numpy(mask)


def loader(images: np.ndarray, batch_size: int) -> DataLoader:
    """Shuffled batches, fp32 [B,3,32,32], made in this process."""
    return DataLoader(Images(images), batch_size, shuffle=True)
