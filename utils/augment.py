"""Augmentation of uint8 batches on their device: random crop, flip and Cutout, each sample its own."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Recipe:
    """How a data set is augmented. ``padding``: zeros around the image before the random crop back to its size, in
    pixels. ``flip``: mirror half of the images. ``cutout``: side of the square set to 0, in pixels, 0 for none."""

    padding: int = 0
    flip: bool = False
    cutout: int = 0


@dataclass(frozen=True)
class Draws:
    """The random numbers of N images; indexing gives those of a part. Drawn on the CPU for a whole epoch, so that they
    do not depend on the device or the batch size, and moved to the device once."""

    corner: Tensor  # [N,2] top left corner of the crop in the padded image, row and column
    mirror: Tensor  # [N] bool
    hole: Tensor  # [N,2] centre of the Cutout square, row and column

    def __getitem__(self, part) -> "Draws":
        return Draws(self.corner[part], self.mirror[part], self.hole[part])

    def to(self, device) -> "Draws":
        return Draws(self.corner.to(device), self.mirror.to(device), self.hole.to(device))


def draw(recipe: Recipe, count: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
    """Draw the random numbers for ``count`` images of ``size`` (height, width) from a CPU generator."""
    corner = torch.randint(2 * recipe.padding + 1, (count, 2), generator=generator)
    mirror = torch.rand(count, generator=generator) < (0.5 if recipe.flip else 0.0)
    hole = (torch.rand(count, 2, generator=generator) * torch.tensor(size)).long()
    return Draws(corner, mirror, hole)


def augment(images: Tensor, recipe: Recipe, draws: Draws) -> Tensor:
    """uint8 [B,C,H,W] to uint8 [B,C,H,W]: crop, flip, then Cutout, as the paper's code orders them.

    The Cutout square is centred on a pixel of the image, so it may reach over the edge and be smaller there. It is cut
    before normalisation: it becomes 0 in the image, not 0 in the network's input.
    """
    count, _, height, width = images.shape
    if recipe.padding:
        padded = F.pad(images, [recipe.padding] * 4)
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # view [B,C,2p+1,2p+1,H,W]
        images = crops[torch.arange(count, device=images.device), :, draws.corner[:, 0], draws.corner[:, 1]]
    if recipe.flip:
        images = torch.where(draws.mirror.view(-1, 1, 1, 1), images.flip(-1), images)
    if recipe.cutout:
        rows = _inside(height, draws.hole[:, 0], recipe.cutout)  # [B,H]
        columns = _inside(width, draws.hole[:, 1], recipe.cutout)  # [B,W]
        images = images * ~(rows[:, None, :, None] & columns[:, None, None, :])
    return images


def _inside(length: int, centre: Tensor, side: int) -> Tensor:
    """Centres [B] to bool [B, length]: the pixels from centre - side/2 up to, not including, centre + side/2."""
    offset = torch.arange(length, device=centre.device) - centre[:, None]
    return (offset >= -(side // 2)) & (offset < side // 2)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B,C,H,W] to fp32: pixels over 255, minus the channel's mean [C], over its deviation [C]."""
    scale = 1 / (255 * std)
    return torch.addcmul((-mean / std).view(-1, 1, 1), images.float(), scale.view(-1, 1, 1))
