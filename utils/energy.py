"""Energy of a network's operations and memory accesses for one image, estimated from counts; no torch is needed.

Energies are those of 45 nm and 0.9 V (Horowitz, "Computing's energy problem", ISSCC 2014): an addition, a
multiplication, and an access of 64 bits of a memory of 8 KB, 32 KB, 1 MB, or of DRAM. Between these sizes an access is
interpolated; a smaller memory takes what 8 KB takes, a larger one grows with the root of its size up to DRAM. Counting
accesses of weights and membranes beside operations follows Lemaire et al. ("An analytical estimation of spiking neural
networks energy efficiency", ICONIP 2022); the formula is our own.

Each layer has memories of its own for its weights, its inputs and its sums. With e(M) the energy of an access to a
memory M, per bit:

    accumulation          w e(weights) + 2 s e(membranes)     the weight is read; the membrane is read and written
    multiply-accumulate   w e(weights) + b e(inputs)          weight and input are read; the sum stays where it is made
    output of an ANN      b e(outputs)                        it is written once
    neuron and timestep   2 s e(membranes)                    leak and threshold: the membrane is read and written

b are the bits of a number, s those of a membrane. w are b and the bits of a column's index, where weights are stored in
compressed rows; or b, where the dense layer is smaller. Nothing is reused in a register but an ANN's sum. Not counted:
the transport of spikes, the neurons' own arithmetic, biases, shortcuts, pools, leakage, clocks and control.
"""

from itertools import pairwise
from math import ceil, log2, sqrt

ADD_PJ = {"fp32": 0.9, "fp16": 0.4, "int8": 0.03}
MAC_PJ = {"fp32": 0.9 + 3.7, "fp16": 0.4 + 1.1, "int8": 0.03 + 0.2}
BITS = {"fp32": 32, "fp16": 16, "int8": 8}
MEMBRANE_BITS = {"fp32": 32, "fp16": 16, "int8": 16}  # a sum of int8 does not fit in 8
SRAM_PJ = ((8 * 2**10, 10.0), (32 * 2**10, 20.0), (2**20, 100.0))  # bytes, an access of 64 bits
DRAM_PJ = 1300.0
MEMORY = "{} with memory"


def operations_uj(adds: float, macs: float, kind: str = "fp32") -> float:
    """Microjoules of accumulations and multiply-accumulates alone."""
    return 1e-6 * (ADD_PJ[kind] * adds + MAC_PJ[kind] * macs)


def access_pj(size: float) -> float:
    """Picojoules of an access to one bit of a memory of so many bits."""
    size /= 8
    energy = SRAM_PJ[0][1]
    for (small, less), (large, more) in pairwise(SRAM_PJ):
        if size > small:
            energy = less + (more - less) * (min(size, large) - small) / (large - small)
    if size > SRAM_PJ[-1][0]:
        energy = min(DRAM_PJ, energy * sqrt(size / SRAM_PJ[-1][0]))
    return energy / 64


def energies(cost: dict) -> dict[str, dict[str, float]]:
    """Microjoules for one image: of the network that was measured, and of the pruned and the dense ANN of its shape,
    whose zeros cost what other numbers do.

    Args:
        cost: ``layer_costs``, ``neuron_costs`` and ``timesteps``, see ``utils.activity.measure``.

    Returns:
        For each network and for fp32, fp16 and int8 the energy of the operations, and with memory.
    """
    layers, neurons = cost["layer_costs"].values(), cost["neuron_costs"].values()
    pruned = [
        layer | {"synops": 0, "macs": layer["dense_macs"] * layer["weights_left"] / layer["weights"]}
        for layer in layers
    ]
    dense = [layer | {"synops": 0, "macs": layer["dense_macs"], "weights_left": layer["weights"]} for layer in layers]
    found = {}
    for name, of_layers, timesteps in (
        ("this network", layers, cost["timesteps"]),
        ("pruned ANN", pruned, None),
        ("dense ANN", dense, None),
    ):
        found[name] = {}
        for kind in ADD_PJ:
            adds, macs = (sum(layer[field] for layer in of_layers) for field in ("synops", "macs"))
            operations = operations_uj(adds, macs, kind)
            memory = sum(_layer_pj(layer, kind) for layer in of_layers)
            if timesteps is None or not neurons:
                memory += sum(_written_pj(layer["outputs"], BITS[kind], 1) for layer in of_layers)
            else:
                memory += sum(_written_pj(layer["neurons"], MEMBRANE_BITS[kind], 2 * timesteps) for layer in neurons)
            found[name] |= {kind: operations, MEMORY.format(kind): operations + 1e-6 * memory}
    return found


def _layer_pj(layer: dict, kind: str) -> float:
    """Picojoules of the accesses of a layer's operations."""
    bits, state = BITS[kind], MEMBRANE_BITS[kind]
    dense, compressed = layer["weights"] * bits, layer["weights_left"] * (bits + ceil(log2(max(2, layer["fan_in"]))))
    weight_bits = compressed / max(1, layer["weights_left"]) if compressed < dense else bits
    weight = weight_bits * access_pj(min(dense, compressed))
    accumulate = weight + 2 * state * access_pj(state * layer["outputs"])
    return layer["synops"] * accumulate + layer["macs"] * (weight + bits * access_pj(bits * layer["inputs"]))


def _written_pj(count: int, bits: int, times: int) -> float:
    return times * count * bits * access_pj(bits * count)
