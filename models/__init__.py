"""Spiking VGG16, ResNet19, ResNet34 and AlexNet: ``model(images [B,C,H,W], timesteps) -> logits [T,B,classes]``."""

from torch import nn

from .alexnet import AlexNet
from .layers import compile_blocks
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
    compile: bool = False,
) -> nn.Module:
    """Build a network with freshly drawn weights (torch's global generator).

    Args:
        arch: ``vgg16``, ``resnet19``, ``resnet34`` or ``alexnet``.
        channels: channels of an image.
        classes: number of classes.
        neuron: ``lif``, or ``relu`` for the ANN of the same shape.
        width: factor on the number of channels of every hidden layer.
        batch_norm: where training statistics come from, see ``models.layers.BatchNorm``.
        compile: fuse what lies between convolutions into one kernel each; see ``models.layers.compile_blocks``.

    Returns:
        A module that maps images [B, channels, H, W] (H and W at least 32) and a number of timesteps T
        to logits [T, B, classes].

    Raises:
        ValueError: an unknown choice (the message names the choices) or a size that is not positive.
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
    model = ARCHITECTURES[arch](channels, classes, neuron, width, batch_norm)
    if compile:
        compile_blocks(model)
    return model
