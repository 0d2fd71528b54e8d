"""An independent reference: the networks as a Python loop over timesteps with spikingjelly's single-step neurons."""

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn
from torch.nn import functional as F

CHANNELS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def lif():
    return neuron.LIFNode(
        tau=4.0 / 3.0,
        v_threshold=1.0,
        v_reset=0.0,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
        step_mode="s",
    )


class LoopVGG16(nn.Module):
    def __init__(self, channels, classes, width):
        super().__init__()
        layers = []
        for entry in CHANNELS:
            if entry == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                out = int(entry * width)
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), lif()]
                channels = out
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, classes)

    def forward(self, images, timesteps):
        functional.reset_net(self)
        current = self.layers[:2](images)
        outputs = []
        for _ in range(timesteps):
            features = self.layers[2:](current).mean((2, 3))
            outputs.append(self.linear(features))
        return torch.stack(outputs)


class LoopBlock(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.lif1, self.lif2 = lif(), lif()
        self.down = stride == 2
        if self.down:
            self.conv3, self.bn3 = nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)

    def forward(self, x):
        out = self.bn2(self.conv2(self.lif1(self.bn1(self.conv1(x)))))
        return self.lif2(out + (self.bn3(self.conv3(x)) if self.down else x))


class LoopResNet19(nn.Module):
    def __init__(self, channels, classes, width):
        super().__init__()
        before = int(64 * width)
        self.conv, self.bn, self.lif = nn.Conv2d(channels, before, 3, 1, 1, bias=False), nn.BatchNorm2d(before), lif()
        blocks = []
        for out, count in ((128, 3), (256, 3), (512, 2)):
            for i in range(count):
                blocks.append(LoopBlock(before, int(out * width), 2 if i == 0 else 1))
                before = int(out * width)
        self.blocks = nn.Sequential(*blocks)
        self.linear1, self.lif1 = nn.Linear(before, int(256 * width)), lif()
        self.linear2 = nn.Linear(int(256 * width), classes)

    def forward(self, images, timesteps):
        functional.reset_net(self)
        current = self.bn(self.conv(images))
        outputs = []
        for _ in range(timesteps):
            features = F.adaptive_avg_pool2d(self.blocks(self.lif(current)), 1).flatten(1)
            outputs.append(self.linear2(self.lif1(self.linear1(features))))
        return torch.stack(outputs)


def loop_of(model, arch, channels, classes, width):
    """The reference with the model's weights and statistics; both define their layers in the same order."""
    loop = {"vgg16": LoopVGG16, "resnet19": LoopResNet19}[arch](channels, classes, width).to(next(model.parameters()))
    state = dict(zip(loop.state_dict(), model.state_dict().values(), strict=True))
    loop.load_state_dict(state)
    return loop
