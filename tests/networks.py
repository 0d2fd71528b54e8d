"""Small networks that fire, and the independent reference for all architectures: loops over timesteps."""

import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn import functional as F

from benchmarks import loop
from benchmarks.loop import LoopBlock, lif
from models.lif import LIF
from utils.data import Split


class Exact(Split):
    """A split in fp64."""

    def part(self, indices):
        return Exact(*vars(super().part(indices)).values())

    def batches(self, batch_size):
        return ((pixels.double(), labels) for pixels, labels in super().batches(batch_size))


def lively(model, images):
    """Bring the running statistics close to the data's, so that an untrained network fires in eval mode in every layer,
    up to the hidden one of ResNet19, which no batch norm feeds."""
    if isinstance(getattr(model, "hidden", None), nn.Linear):
        model.hidden.weight.data.mul_(20)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 0.5
        for _ in range(5):
            model.train()(images, 3)
        for norm in norms:
            norm.momentum = 0.1
        rates = firing_rates(model, images, 3)
    assert all(0 < rate < 1 for rate in rates.values()), rates
    return model.train()


def recorded(model, images, timesteps, kind):
    """Inputs and outputs of all modules of a kind, by name, in eval mode."""
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
        for name, module in model.named_modules()
        if isinstance(module, kind)
    ]
    with torch.no_grad():
        model.eval()(images, timesteps)
    for hook in hooks:
        hook.remove()
    return seen


def firing_rates(model, images, timesteps):
    """Spikes per neuron and timestep in eval mode, by layer."""
    return {name: spikes.mean().item() for name, (_, spikes) in recorded(model, images, timesteps, LIF).items()}


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
        self.fc1, self.bn6 = nn.Linear(4 * d, hidden), nn.BatchNorm1d(hidden)
        self.fc2, self.bn7 = nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden)
        self.fc3 = nn.Linear(hidden, classes)
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
            x = self.lif[5](self.bn6(self.fc1(x.flatten(1))))
            outputs.append(self.fc3(self.lif[6](self.bn7(self.fc2(x)))))
        return torch.stack(outputs)


def loop_of(model, arch, channels, classes, width, tau=4 / 3, v_threshold=1.0, surrogate_alpha=2.0):
    """The reference with the model's weights and statistics; both define their layers in the same order."""
    networks = {
        "vgg16": loop.LoopVGG16,
        "resnet19": loop.LoopResNet19,
        "resnet34": LoopResNet34,
        "alexnet": LoopAlexNet,
    }
    network = networks[arch](channels, classes, width).to(next(model.parameters()))
    network.load_state_dict(dict(zip(network.state_dict(), model.state_dict().values(), strict=True)))
    for module in network.modules():
        if isinstance(module, neuron.LIFNode):
            module.tau, module.v_threshold, module.surrogate_function.alpha = tau, v_threshold, surrogate_alpha
    return network
