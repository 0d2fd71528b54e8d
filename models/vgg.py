"""VGG16 (Simonyan & Zisserman, ICLR 2015) for small images: 13 convolutions, 5 max-pools, one linear layer."""

from collections.abc import Callable

from torch import Tensor, nn

from .layers import Conv3x3, GlobalAvgPool, HalvingMaxPool, Linear, NormAndFire, scaled

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG16 with batch norm and spiking neurons; 14,728,266 parameters for CIFAR-10, 14,715,584 of them prunable.

    The image is the input current of every timestep, so the first convolution and its batch norm run once per image.
    Images larger than 32x32 leave the last pool larger than 1x1 and are averaged there.
    """

    def __init__(self, channels: int, classes: int, neuron: Callable[[], nn.Module], width: float, batch_norm: str):
        super().__init__()
        layers = []
        for stage in STAGES:
            for out_channels in stage:
                out_channels = scaled(out_channels, width)
                layers += [Conv3x3(channels, out_channels), NormAndFire(out_channels, neuron, batch_norm)]
                channels = out_channels
            layers.append(HalvingMaxPool())
        self.stem, self.stem_fire = layers[:2]
        self.features = nn.Sequential(*layers[2:], GlobalAvgPool())
        self.classifier = Linear(channels, classes)
        self.apply(init_weights)

    def forward(self, images: Tensor, timesteps: int) -> Tensor:
        current = self.stem(images.unsqueeze(0))  # [1,B,C,H,W]
        spikes = self.stem_fire(current, timesteps=timesteps)  # [T,B,C,H,W]
        features = self.features(spikes)  # [T,B,C]
        return self.classifier(features)  # [T,B,classes]


def init_weights(module: nn.Module) -> None:
    """He et al.'s normal initialisation by fan-out; the classifier starts near zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
