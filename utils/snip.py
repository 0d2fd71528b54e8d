"""SNIP: connection sensitivity at initialisation (Lee et al., ICLR 2019; Fig. 10 of the paper)."""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from . import distributed
from .data import Split
from .masks import prunable

BATCH = 100  # images; the gradient is summed over batches, so that memory does not grow with the number of samples


def snip_scores(model: nn.Module, samples: Split, timesteps: int) -> dict[str, Tensor]:
    """|w dL/dw| of every prunable weight, by parameter name.

    L is the training loss on the un-augmented samples, with batch norm in training mode and the gradient of spikes that
    of the surrogate. The model is not changed. On several ranks the scores are those of rank 0: CUDA adds up gradients
    in any order.

    Args:
        model: at initialisation.
        samples: class-balanced training images.
        timesteps: number of timesteps T of the forward pass.
    """
    model = copy.deepcopy(model).train()
    model.zero_grad()
    for images, labels in samples.batches(BATCH):
        logits = model(images, timesteps)  # [T,B,classes]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(timesteps))
        (loss * len(labels) / len(samples)).backward()
    scores = {name: (weight * weight.grad).detach().abs() for name, weight in prunable(model).items()}
    distributed.from_rank_0(scores.values())
    return scores
