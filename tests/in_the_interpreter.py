"""The fused block in Triton's interpreter, against the plain layers in fp64.

``TRITON_INTERPRET=1 python tests/in_the_interpreter.py`` runs every case below and prints what it found as JSON: for
the fused block and for the plain one in the same precision, the share of spikes that differ from those in fp64, and the
relative errors of the rest. No membrane comes so near to the threshold that rounding in fp32 decides on a spike.
"""

import copy
import itertools
import json
from functools import partial

import torch
from torch.nn import functional as F

from models import build_model
from models.layers import NormAndFire, fuse_blocks
from models.lif import LIF

NEAR = 2e-5  # to the threshold
SHAPE = (2, 20, 5, 7)  # [B,C,H,W]: neither rows nor channels fill their tiles, and a group has several chunks
STATISTICS, KINDS = ("per_timestep", "over_time"), ("plain", "shortcut", "stem")
CONSTANTS = {"tau": 1.7, "v_threshold": 0.8, "surrogate_alpha": 3.0}


def cases():
    """Name -> what a block is tried with, beside the defaults of ``compare_blocks``."""
    found = {}
    for timesteps, statistics, kind in itertools.product((1, 3, 5), STATISTICS, KINDS):
        found[f"{kind} {statistics} T={timesteps}"] = {"timesteps": timesteps, "statistics": statistics, "kind": kind}
    for kind in KINDS:
        found[f"{kind} eval"] = {"kind": kind, "training": False}
        found[f"{kind} other constants"] = {"kind": kind, "constants": CONSTANTS}
    for statistics, kind in itertools.product(STATISTICS, KINDS):
        found[f"{kind} {statistics} bf16"] = {"statistics": statistics, "kind": kind, "dtype": torch.bfloat16}
    found["eval bf16"] = {"training": False, "dtype": torch.bfloat16}
    found["units"] = {"shape": (40, 70)}  # of a linear layer; two columns of tiles
    found["far from 0"] = {"mean": 300.0, "statistics": "over_time", "near": 2e-4}
    found["contiguous"] = {"innermost": False, "kind": "shortcut"}
    found["T=16"] = {"timesteps": 16, "shape": (2, 3, 2, 3)}
    return found


BLOCKS = cases()
NETWORKS = {
    f"{arch} {statistics}": (arch, statistics)
    for arch, statistics in (("vgg16", "per_timestep"), ("resnet19", "over_time"))
}


def main():
    torch.set_num_threads(1)
    # oneDNN's gradient of a 1x1 convolution with a stride, channels innermost and fewer than 8, corrupts memory (2.14)
    torch.backends.mkldnn.enabled = False
    found = {name: compare_blocks(**case) for name, case in BLOCKS.items()}
    found |= {name: compare_networks(*case) for name, case in NETWORKS.items()}
    print(json.dumps(found))


def compare_blocks(
    kind="plain",
    statistics="per_timestep",
    timesteps=3,
    training=True,
    dtype=torch.float32,
    shape=SHAPE,
    constants=None,
    mean=3.0,
    innermost=True,
    near=NEAR,
):
    """A block in fp64, the plain one and the fused one."""
    channels, steps = shape[1], timesteps if kind == "stem" else None
    for seed in itertools.count():
        torch.manual_seed(seed)
        block = NormAndFire(channels, partial(LIF, **(constants or {})), statistics).train(training)
        torch.nn.init.uniform_(block.norm.weight, 0.8, 2.0)
        torch.nn.init.uniform_(block.norm.bias, 0.2, 0.9)
        block.norm.running_mean.uniform_(2.0, 4.0)
        block.norm.running_var.uniform_(2.0, 5.0)
        x = (2 * torch.randn(1 if steps else timesteps, *shape) + mean).to(dtype)
        shortcut = (torch.rand(timesteps, *shape) > 0.8).to(dtype) if kind == "shortcut" else None
        spikes_grad = torch.randn(timesteps, *shape).to(dtype)
        exact = copy.deepcopy(block).double()
        distance = nearest(exact)
        truth = outcome(exact, x.double(), shortcut if shortcut is None else shortcut.double(), steps, spikes_grad)
        if min(distance) > near:
            break
    plain = outcome(copy.deepcopy(block), x, shortcut, steps, spikes_grad)
    fuse_blocks(block)
    if innermost:
        x, shortcut, spikes_grad = (t if t is None else channels_innermost(t) for t in (x, shortcut, spikes_grad))
    fused = outcome(block, x, shortcut, steps, spikes_grad)
    return {
        "fused": errors(fused, truth),
        "plain": errors(plain, truth),
        "rate": truth["spikes"].mean().item(),
        "dtype": str(fused["spikes"].dtype),
        "innermost": fused["spikes"].movedim(2, -1).is_contiguous(),
        "batches": block.norm.num_batches_tracked.item(),
        "training": training,
    }


def compare_networks(arch, statistics):
    """Logits and all gradients of a small network, fused in fp32, against the plain one in fp64."""
    labels = torch.tensor([1, 4])
    for seed in itertools.count():
        torch.manual_seed(seed)
        model = build_model(arch, 3, 10, width=0.0625, batch_norm=statistics, v_threshold=0.6)
        if arch == "resnet19":
            model.hidden.weight.data.mul_(20)  # no batch norm feeds its neurons
        exact, images = copy.deepcopy(model).double(), torch.randn(2, 3, 32, 32)
        distance = nearest(exact)
        logits = exact(images.double(), 2)
        if min(distance) > NEAR:
            break
    fuse_blocks(model)
    calls = []
    for module in model.modules():
        if isinstance(module, NormAndFire):
            module.register_forward_hook(lambda *_: calls.append(None))
    ours = model.to(memory_format=torch.channels_last)(images, 2)
    for out in (logits, ours):
        F.cross_entropy(out.flatten(0, 1), labels.repeat(2)).backward()
    assert (logits[:, 0] != logits[:, 1]).any(), "the last layer is silent"
    found = {"logits": error(ours, logits), "blocks": len(calls)}
    for (name, a), b in zip(model.named_parameters(), exact.parameters(), strict=True):
        if b.grad.norm() > 1e-12:  # a bias before batch norm has none but rounding
            found[name] = error(a.grad, b.grad)
    for (name, a), b in zip(model.named_buffers(), exact.buffers(), strict=True):
        if a.is_floating_point():
            found[name] = error(a, b)
    return found


def nearest(model):
    """Takes how near membranes come to the threshold in the next forward pass of a model."""
    distance = []

    def look(neuron, inputs, spikes):
        v = 0.0
        for current in inputs[0]:
            h = v + (current - v) / neuron.tau
            distance.append((h - neuron.v_threshold).abs().min().item())
            v = torch.where(h >= neuron.v_threshold, 0.0, h)

    for module in model.modules():
        if isinstance(module, LIF):
            module.register_forward_hook(look)
    return distance


def outcome(block, x, shortcut, steps, spikes_grad):
    """Spikes, gradients and running statistics of a call."""
    inputs = {"x": x, "shortcut": shortcut}
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if tensor is not None}
    spikes = block(**inputs, timesteps=steps)
    spikes.backward(spikes_grad.to(spikes.dtype))
    found = {"spikes": spikes.detach()}
    found |= {name: tensor.grad for name, tensor in inputs.items()}
    found |= {name: parameter.grad for name, parameter in block.norm.named_parameters()}
    return found | {name: getattr(block.norm, name) for name in ("running_mean", "running_var")}


def errors(found, truth):
    differ = (found["spikes"] != truth["spikes"]).double().mean().item()
    return {name: error(value, truth[name]) for name, value in found.items()} | {"spikes": differ}


def error(ours, truth):
    """Relative, of the norm."""
    return ((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-9)).item()


def channels_innermost(x):
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


if __name__ == "__main__":
    main()
