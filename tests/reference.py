"""The independent reference for the networks of supplement G, as ``benchmarks.loop`` is for the other two."""

import torch
from spikingjelly.activation_based import functional
from torch import nn
from torch.nn import functional as F

from benchmarks import loop
from benchmarks.loop import LoopBlock, lif


class LoopResNet34(nn.Module):
    def __init__(self, channels, classes, width):
        super().__init__()
        before = int(64 * width)
        self.conv, self.bn, self.lif = nn.Conv2d(channels, before, 3, 1, 1, bias=False), nn.BatchNorm2d(before), lif()
        plan = 3 * [(64, 1)] + [(128, 2)] + 3 * [(128, 1)] + [(256, 2)] + 5 * [(256, 1)] + [(512, 2)] + 2 * [(512, 1)]
        blocks = []
        for out, stride in plan:
            blocks.append(LoopBlock(before, int(out * width), stride))
            before = int(out * width)
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(before, classes)

    def forward(self, images, timesteps):
        functional.reset_net(self)
        current = self.bn(self.conv(images))
        return torch.stack([self.linear(self.blocks(self.lif(current)).mean((2, 3))) for _ in range(timesteps)])


class LoopAlexNet(nn.Module):
    def __init__(self, channels, classes, width):
        super().__init__()
        a, b, c, d, hidden = (int(n * width) for n in (64, 192, 384, 256, 4096))
        self.conv1, self.bn1 = nn.Conv2d(channels, a, 3, 2, 1), nn.BatchNorm2d(a)
        self.conv2, self.bn2 = nn.Conv2d(a, b, 3, 1, 1), nn.BatchNorm2d(b)
        self.conv3, self.bn3 = nn.Conv2d(b, c, 3, 1, 1), nn.BatchNorm2d(c)
        self.conv4, self.bn4 = nn.Conv2d(c, d, 3, 1, 1), nn.BatchNorm2d(d)
        self.conv5, self.bn5 = nn.Conv2d(d, d, 3, 1, 1), nn.BatchNorm2d(d)
        self.fc1, self.fc2, self.fc3 = nn.Linear(4 * d, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, classes)
        self.lif = nn.ModuleList(lif() for _ in range(7))

    def forward(self, images, timesteps):
        functional.reset_net(self)
        current = self.bn1(self.conv1(images))
        outputs = []
        for _ in range(timesteps):
            x = F.max_pool2d(self.lif[0](current), 2)
            x = F.max_pool2d(self.lif[1](self.bn2(self.conv2(x))), 2)
            x = self.lif[2](self.bn3(self.conv3(x)))
            x = self.lif[3](self.bn4(self.conv4(x)))
            x = F.max_pool2d(self.lif[4](self.bn5(self.conv5(x))), 2)
            x = self.lif[5](self.fc1(x.flatten(1)))
            outputs.append(self.fc3(self.lif[6](self.fc2(x))))
        return torch.stack(outputs)


def loop_of(model, arch, channels, classes, width):
    """The reference with the model's weights and statistics; both define their layers in the same order."""
    networks = {"resnet34": LoopResNet34, "alexnet": LoopAlexNet}
    if arch not in networks:
        return loop.loop_of(model, arch, channels, classes, width)
    network = networks[arch](channels, classes, width).to(next(model.parameters()))
    network.load_state_dict(dict(zip(network.state_dict(), model.state_dict().values(), strict=True)))
    return network
