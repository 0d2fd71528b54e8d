"""AlexNet for small images: 5 convolutions, 3 max-pools, 3 linear layers (supplement G)."""

from collections.abc import Callable

from torch import Tensor, nn

from .layers import AvgPoolTo, Conv3x3, HalvingMaxPool, Linear, NormAndFire, scaled

STAGES = ((64,), (192,), (384, 256, 256))
GRID = 2  # the linear layers see 2x2 pixels
HIDDEN = (4096, 4096)


class AlexNet(nn.Module):
    """AlexNet with batch norm and spiking neurons; 23,290,954 parameters for CIFAR-10, 23,262,912 of them prunable.

    The paper does not give its layers; these are those usual on CIFAR-10. 3x3 convolutions of 64 (stride 2), 192, 384,
    256 and 256 channels, a 2x2 max-pool after the first, the second and the last; then two linear layers of 4096
    spiking units, and the classifier. All have biases, all but the classifier have batch norm: without it the linear
    layers stay silent where much is pruned at initialisation. There is no dropout. The image is the input current of
    every timestep, so the first convolution and its batch norm run once per image. Images larger than 32x32 leave the
    last pool larger than 2x2 and are averaged to that there.
    """

    def __init__(self, channels: int, classes: int, neuron: Callable[[], nn.Module], width: float, batch_norm: str):
        super().__init__()
        layers, stride = [], 2
        for stage in STAGES:
            for out_channels in stage:
                out_channels = scaled(out_channels, width)
                layers += [
                    Conv3x3(channels, out_channels, stride=stride),
                    NormAndFire(out_channels, neuron, batch_norm),
                ]
                channels, stride = out_channels, 1
            layers.append(HalvingMaxPool())
        self.stem, self.stem_fire = layers[:2]
        self.features = nn.Sequential(*layers[2:], AvgPoolTo(GRID), nn.Flatten(2))
        units, layers = channels * GRID**2, []
        for hidden in HIDDEN:
            hidden = scaled(hidden, width)
            layers += [Linear(units, hidden), NormAndFire(hidden, neuron, batch_norm)]
            units = hidden
        self.hidden = nn.Sequential(*layers)
        self.classifier = Linear(units, classes)
        self.apply(init_weights)

    def forward(self, images: Tensor, timesteps: int) -> Tensor:
        current = self.stem(images.unsqueeze(0))  # [1,B,C,H,W]
        spikes = self.stem_fire(current, timesteps=timesteps)  # [T,B,C,H,W]
        hidden = self.hidden(self.features(spikes))  # [T,B,4096]
        return self.classifier(hidden)  # [T,B,classes]


def init_weights(module: nn.Module) -> None:
    """He et al.'s normal initialisation by fan-in."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)
