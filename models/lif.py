"""The neuron: leaky integrate-and-fire over a whole sequence at once."""

import torch
from spikingjelly.activation_based import functional, surrogate
from torch import Tensor, nn


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons, input currents [T, B, ...] to spikes [T, B, ...] of 0 and 1.

    The membrane follows v <- v + (current - v) / tau, fires when it reaches the threshold, and is reset to 0. With
    tau = 4/3 that is v <- 0.25 v + 0.75 current. The gradient of a spike is that of the ATan surrogate (supplement A);
    none flows through the reset. The membrane starts at 0 in every call, so there is no state to reset, and it is kept
    in fp32 when the currents are bf16.

    Args:
        tau: time constant, in timesteps, at least 1.
        v_threshold: membrane potential that fires, above 0.
        surrogate_alpha: steepness of the surrogate, above 0.

    Raises:
        ValueError: a constant out of its range.
    """

    def __init__(self, tau: float = 4 / 3, v_threshold: float = 1.0, surrogate_alpha: float = 2.0):
        super().__init__()
        if not tau >= 1:
            raise ValueError(f"tau must be at least 1, got {tau}")
        for name, value in (("v_threshold", v_threshold), ("surrogate_alpha", surrogate_alpha)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.tau = tau
        self.v_threshold = v_threshold
        self.surrogate = surrogate.ATan(alpha=surrogate_alpha)

    def forward(self, current: Tensor) -> Tensor:
        membrane = torch.zeros_like(current[0], dtype=torch.promote_types(current.dtype, torch.float32))  # [B, ...]
        spikes, _, _ = functional.lif_multi_step(
            current,
            membrane,
            tau=self.tau,
            decay_input=True,
            v_threshold=self.v_threshold,
            v_reset=0.0,
            surrogate_function=self.surrogate,
            detach_reset=True,
        )
        return spikes
