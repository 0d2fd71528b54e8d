"""The neuron: leaky integrate-and-fire over a whole sequence at once, and its ANN stand-in."""

import torch
from spikingjelly.activation_based import functional, surrogate
from torch import Tensor, nn


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons, input currents [T, B, ...] to spikes [T, B, ...] of 0 and 1.

    With tau = 4/3 the membrane follows v <- 0.25 v + 0.75 x, fires at 1, and is reset to 0. The gradient of a spike is
    that of the ATan surrogate (supplement A); none flows through the reset. The membrane starts at 0 in every call, so
    there is no state to reset, and it is kept in fp32 when the currents are bf16.
    """

    tau = 4 / 3
    v_threshold = 1.0
    v_reset = 0.0

    def __init__(self):
        super().__init__()
        self.surrogate = surrogate.ATan(alpha=2.0)

    def forward(self, current: Tensor) -> Tensor:
        membrane = torch.zeros_like(current[0], dtype=torch.promote_types(current.dtype, torch.float32))  # [B, ...]
        spikes, _, _ = functional.lif_multi_step(
            current,
            membrane,
            tau=self.tau,
            decay_input=True,
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            surrogate_function=self.surrogate,
            detach_reset=True,
        )
        return spikes


def make_neuron(kind: str) -> nn.Module:
    """``lif``: a spiking neuron. ``relu``: the activation of the ANN that the paper transfers tickets from (4.3)."""
    return LIF() if kind == "lif" else nn.ReLU()
