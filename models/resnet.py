"""Spiking ResNets: ResNet19 (Zheng et al., AAAI 2021) with the stages of the paper's official code, and ResNet34."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .layers import BatchNorm, Conv1x1, Conv3x3, GlobalAvgPool, Linear, NormAndFire, scaled

# channels, blocks, stride of the first block
STAGES_19 = ((128, 3, 2), (256, 3, 2), (512, 2, 2))
STAGES_34 = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that joins before the second neuron, [T,B,in,H,W] to [T,B,out,H/s,W/s]."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, neuron: Callable[[], nn.Module], batch_norm: str
    ):
        super().__init__()
        self.conv1 = Conv3x3(in_channels, out_channels, stride=stride, bias=False)
        self.fire1 = NormAndFire(out_channels, neuron, batch_norm)
        self.conv2 = Conv3x3(out_channels, out_channels, bias=False)
        self.fire2 = NormAndFire(out_channels, neuron, batch_norm)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                Conv1x1(in_channels, out_channels, stride=stride, bias=False), BatchNorm(out_channels, batch_norm)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.fire1(self.conv1(x))
        return self.fire2(self.conv2(out), self.shortcut(x))


class ResNet(nn.Module):
    """A stem of 64 channels, stages of basic blocks, global average pool, classifier, with spiking neurons.

    The stem is a 3x3 convolution without a max-pool, as is usual for small images; it and its batch norm run once per
    image.

    Args:
        channels: of an image.
        classes: number of classes.
        neuron: makes a layer of neurons.
        width: factor on all channels.
        batch_norm: see ``models.layers.BatchNorm``.
        stages: channels, blocks, and stride of the first block of each stage.
        hidden: spiking units before the classifier; 0 for none.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        neuron: Callable[[], nn.Module],
        width: float,
        batch_norm: str,
        stages: tuple[tuple[int, int, int], ...],
        hidden: int,
    ):
        super().__init__()
        in_channels = scaled(64, width)
        self.stem = Conv3x3(channels, in_channels, bias=False)
        self.stem_fire = NormAndFire(in_channels, neuron, batch_norm)
        blocks = []
        for out_channels, count, stride in stages:
            out_channels = scaled(out_channels, width)
            for block in range(count):
                blocks.append(BasicBlock(in_channels, out_channels, stride if block == 0 else 1, neuron, batch_norm))
                in_channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = GlobalAvgPool()
        self.hidden = None
        if hidden:
            self.hidden = Linear(in_channels, scaled(hidden, width))
            self.hidden_neuron = neuron()
            in_channels = scaled(hidden, width)
        self.classifier = Linear(in_channels, classes)

    def forward(self, images: Tensor, timesteps: int) -> Tensor:
        current = self.stem(images.unsqueeze(0))  # [1,B,C,H,W]
        spikes = self.blocks(self.stem_fire(current, timesteps=timesteps))  # [T,B,C,H,W]
        features = self.pool(spikes)  # [T,B,C]
        if self.hidden is not None:
            features = self.hidden_neuron(self.hidden(features))  # [T,B,256]
        return self.classifier(features)  # [T,B,classes]


# 12,630,858 parameters for CIFAR-10, 12,619,968 of them prunable
ResNet19 = partial(ResNet, stages=STAGES_19, hidden=256)
# 21,379,592 parameters for Tiny ImageNet's 200 classes, 21,362,368 of them prunable (supplement G)
ResNet34 = partial(ResNet, stages=STAGES_34, hidden=0)
