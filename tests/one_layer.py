"""Methods on a network of one linear layer: ``Trainer`` trains it, and a loop in numpy does the same."""

import numpy as np
import torch
from torch import nn

from utils.data import Data, Split
from utils.datasets import DATASETS
from utils.flags import get_args
from utils.training import Trainer, generator, learning_rate

RATE, MOMENTUM, DECAY, EPOCHS = 0.1, 0.8, 0.01, 3
FLAGS = f"--dataset synthetic --batch_size 4 --end_iter {EPOCHS} --device cpu --learning_rate {RATE}"
FLAGS += f" --momentum {MOMENTUM} --weight_decay {DECAY}"


class Linear(nn.Module):
    """One layer that answers alike at all timesteps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12, dtype=torch.float64) / 3)

    def forward(self, images, timesteps):
        return (images.flatten(1).double() @ self.weight.T).expand(timesteps, -1, -1)


class OneLayer:
    """The layer, its images, flags and trainer: five steps an epoch, the last not full."""

    def __init__(self):
        self.args = get_args("train_snn_none.py", "none", None, FLAGS.split())
        torch.manual_seed(0)
        images = torch.randint(256, (18, 3, 2, 2), dtype=torch.uint8)
        self.split = Split(images, torch.arange(18) % 4, DATASETS["synthetic"])
        self.model = Linear()
        self.trainer = Trainer(self.model, Data(self.split, self.split, 4), self.args)

    @property
    def weight(self):
        """A copy of the weights, for numpy."""
        return self.model.weight.detach().numpy().copy()

    def draws(self, epoch):
        """The generator that a method draws from in an epoch."""
        return generator(self.args, "after_step", 0, epoch)

    def gradients(self, epoch):
        """For every step of an epoch: the rate, and the gradient of the loss as a function of the weights."""
        shuffled = [generator(self.args, purpose, 0, epoch) for purpose in ("shuffle", "augment")]
        for inputs, labels in self.split.augmented_batches(4, *shuffled):
            x = inputs.flatten(1).double().numpy()

            def gradient(weight, x=x, labels=labels):
                p = np.exp(x @ weight.T)
                return (p / p.sum(1, keepdims=True) - np.eye(4)[labels]).T @ x / len(x)

            yield learning_rate(self.args, epoch), gradient

    def assert_weights_are(self, weight):
        np.testing.assert_allclose(self.weight, weight, rtol=1e-5, atol=1e-7)  # the loss is in fp32
