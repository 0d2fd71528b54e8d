"""ResNet19: the directly trained spiking ResNet of Zheng et al. (AAAI 2021), in the paper's proportions."""

from torch import Tensor, nn

from .layers import BatchNorm, Conv1x1, Conv3x3, GlobalAvgPool, Linear, NormAndFire, scaled
from .lif import make_neuron

STAGES = ((128, 3), (256, 3), (512, 2))  # channels, blocks; a stage's first block halves the image


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that joins before the second neuron, [T,B,in,H,W] to [T,B,out,H/s,W/s]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, neuron: str, batch_norm: str):
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


class ResNet19(nn.Module):
    """ResNet19 with spiking neurons; 12,630,858 parameters for CIFAR-10, 12,619,968 of them prunable.

    Stem of 64 channels, 8 basic blocks, global average pool, and 256 spiking units before the classifier. The stem's
    convolution and batch norm run once per image.
    """

    def __init__(self, channels: int, classes: int, neuron: str, width: float, batch_norm: str):
        super().__init__()
        in_channels = scaled(64, width)
        self.stem = Conv3x3(channels, in_channels, bias=False)
        self.stem_fire = NormAndFire(in_channels, neuron, batch_norm)
        blocks = []
        for out_channels, count in STAGES:
            out_channels = scaled(out_channels, width)
            for block in range(count):
                blocks.append(BasicBlock(in_channels, out_channels, 2 if block == 0 else 1, neuron, batch_norm))
                in_channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = GlobalAvgPool()
        hidden = scaled(256, width)
        self.hidden = Linear(in_channels, hidden)
        self.hidden_neuron = make_neuron(neuron)
        self.classifier = Linear(hidden, classes)

    def forward(self, images: Tensor, timesteps: int) -> Tensor:
        current = self.stem(images.unsqueeze(0))  # [1,B,C,H,W]
        spikes = self.blocks(self.stem_fire(current, timesteps=timesteps))  # [T,B,C,H,W]
        hidden = self.hidden_neuron(self.hidden(self.pool(spikes)))  # [T,B,256]
        return self.classifier(hidden)  # [T,B,classes]
