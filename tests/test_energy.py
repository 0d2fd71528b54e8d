"""Energies against sums written out for two layers."""

import pytest

from utils.energy import access_pj, energies, operations_uj

KB = 8 * 2**10  # bits
LAYERS = {  # the first sees the image once, the second spikes
    "stem": {"weights": 40, "weights_left": 10, "fan_in": 20, "inputs": 300, "outputs": 500}
    | {"synops": 0.0, "macs": 700.0, "dense_macs": 20_000},
    "classifier": {"weights": 2**20, "weights_left": 2**19, "fan_in": 2**10, "inputs": 500, "outputs": 2**20}
    | {"synops": 30_000.0, "macs": 0.0, "dense_macs": 2**20},
}
COST = {"layer_costs": LAYERS, "neuron_costs": {"fire": {"neurons": 500}}, "timesteps": 4}


def test_a_memorys_access_costs_more_the_larger_it_is():
    for size, energy in ((1, 10), (8, 10), (20, 15), (32, 20), (528, 60), (1024, 100), (4096, 200), (2**20, 1300)):
        assert 64 * access_pj(size * KB) == pytest.approx(energy)


def test_operations():
    assert operations_uj(1e6, 0) == pytest.approx(0.9)
    assert operations_uj(0, 1e6) == pytest.approx(4.6)
    assert operations_uj(1e6, 1e6, "fp16") == pytest.approx(0.4 + 1.5)
    assert operations_uj(1e6, 1e6, "int8") == pytest.approx(0.03 + 0.23)


@pytest.mark.parametrize(
    ("kind", "bits", "state", "add", "mac"), [("fp32", 32, 32, 0.9, 4.6), ("int8", 8, 16, 0.03, 0.23)]
)
def test_a_spiking_network_and_the_anns_of_its_shape(kind, bits, state, add, mac):
    found = energies(COST)
    assert found["this network"][kind] == pytest.approx(1e-6 * (add * 30_000 + mac * 700))
    small = 10 / 64  # pJ a bit, of memories below 8 KB
    stem = 700 * ((bits + 5) * small + bits * small)  # an index below 20 takes 5 bits
    whole = bits * access_pj(2**20 * bits)
    # half of the weights and their indices take more than all weights in int8
    weight = (bits + 10) * access_pj(2**19 * (bits + 10)) if kind == "fp32" else whole
    classifier = 30_000 * (weight + 2 * state * access_pj(2**20 * state))
    neurons = 4 * 500 * 2 * state * small
    memory = found["this network"][f"{kind} with memory"] - found["this network"][kind]
    assert memory == pytest.approx(1e-6 * (stem + classifier + neurons))

    for name, macs, stem_bits in (("pruned ANN", (5_000, 2**19), bits + 5), ("dense ANN", (20_000, 2**20), bits)):
        assert found[name][kind] == pytest.approx(1e-6 * mac * sum(macs))
        weight_bits = weight if name == "pruned ANN" else whole
        reads = macs[0] * (stem_bits + bits) * small + macs[1] * (weight_bits + bits * small)
        writes = 500 * bits * small + 2**20 * bits * access_pj(2**20 * bits)
        memory = found[name][f"{kind} with memory"] - found[name][kind]
        assert memory == pytest.approx(1e-6 * (reads + writes))


def test_without_spikes_sums_are_written_once():
    ann = energies(COST | {"neuron_costs": {}, "timesteps": 1})
    writes = 500 * 32 * 10 / 64 + 2**20 * 32 * access_pj(2**25)
    membranes = 4 * 500 * 2 * 32 * 10 / 64
    difference = ann["this network"]["fp32 with memory"] - energies(COST)["this network"]["fp32 with memory"]
    assert difference == pytest.approx(1e-6 * (writes - membranes))
