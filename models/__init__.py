"""Spiking VGG16, ResNet19, ResNet34 and AlexNet: ``model(images [B,C,H,W], timesteps) -> logits [T,B,classes]``."""

from functools import partial

from torch import nn

from .alexnet import AlexNet
from .lif import LIF
from .resnet import ResNet19, ResNet34
from .vgg import VGG16

ARCHITECTURES = {"vgg16": VGG16, "resnet19": ResNet19, "resnet34": ResNet34, "alexnet": AlexNet}
NEURONS = ("lif", "relu")
BATCH_NORMS = ("per_timestep", "over_time")


def build_model(
    arch: str,
    channels: int,
    classes: int,
    neuron: str = "lif",
    width: float = 1.0,
    batch_norm: str = "per_timestep",
    tau: float = 4 / 3,
    v_threshold: float = 1.0,
    surrogate_alpha: float = 2.0,
) -> nn.Module:
    """Build a network with freshly drawn weights (torch's global generator).

    Args:
        arch: ``vgg16``, ``resnet19``, ``resnet34`` or ``alexnet``.
        channels: channels of an image.
        classes: number of classes.
        neuron: ``lif``, or ``relu`` for the ANN of the same shape, which the paper transfers tickets from (4.3).
        width: factor on the number of channels of every hidden layer.
        batch_norm: where training statistics come from, see ``models.layers.BatchNorm``.
        tau: membrane time constant in timesteps, at least 1.
        v_threshold: firing threshold, more than 0.
        surrogate_alpha: slope of the ATan surrogate gradient, more than 0.

    Returns:
        A module that maps images [B, channels, H, W] (H and W at least 32) and a number of timesteps T
        to logits [T, B, classes].

    Raises:
        ValueError: an unknown choice (the message names the choices), a size that is not positive, or a constant out
            of its range.
    """
    for name, value, choices in (
        ("arch", arch, ARCHITECTURES),
        ("neuron", neuron, NEURONS),
        ("batch_norm", batch_norm, BATCH_NORMS),
    ):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")
    if min(channels, classes, width) <= 0:
        raise ValueError(f"channels, classes and width must be positive, got {channels}, {classes}, {width}")
    lif = partial(LIF, tau, v_threshold, surrogate_alpha)
    return ARCHITECTURES[arch](channels, classes, lif if neuron == "lif" else nn.ReLU, width, batch_norm)
