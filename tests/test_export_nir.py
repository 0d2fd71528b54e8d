"""NIR files, run by an interpreter without torch, against the networks themselves."""

import numpy as np
import pytest
import torch

nir = pytest.importorskip("nir")

from networks import recorded  # noqa: E402
from nir_interpreter import run  # noqa: E402
from test_export import sparse_network  # noqa: E402

from models.lif import LIF  # noqa: E402
from utils.export import network_graph  # noqa: E402
from utils.nir_export import nir_bytes  # noqa: E402


def outputs(model, images, timesteps, folder):
    """What the file of a network says for images, by node."""
    path = folder / "network.nir"
    path.write_bytes(nir_bytes(network_graph(model, tuple(images.shape[1:]))))
    return run(path, images.numpy(), timesteps)


@pytest.mark.parametrize(
    ("arch", "size", "constants", "timesteps"),
    [
        ("vgg16", 32, {}, 3),
        ("vgg16", 64, {}, 2),
        ("resnet19", 32, {}, 3),
        ("resnet34", 32, {}, 3),
        ("alexnet", 32, {}, 1),
        ("alexnet", 32, {}, 5),
        ("alexnet", 48, {"tau": 2.0, "v_threshold": 0.6}, 3),
    ],
)
def test_every_spike_of_the_file_is_one_of_the_network(arch, size, constants, timesteps, tmp_path):
    model, _, images = sparse_network(arch, size, **constants)
    found = outputs(model, images, timesteps, tmp_path)
    spikes = {name: spikes.numpy() for name, (_, spikes) in recorded(model, images, timesteps, LIF).items()}
    differing = sum(np.count_nonzero(spikes[name] != found[name]) for name in spikes)
    print(f"{arch} {size} T={timesteps}: {sum(s.size for s in spikes.values())} compared, {differing} differ")
    assert differing == 0
    with torch.no_grad():
        np.testing.assert_allclose(found["output"], model(images, timesteps).numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("v_threshold", [1.0, 0.7])
def test_a_membrane_that_is_exactly_at_the_threshold_fires(dtype, v_threshold, tmp_path):
    model, _, images = sparse_network("vgg16", dtype=dtype, tau=1.0, v_threshold=v_threshold)
    norm = model.stem_fire.norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias[:] = v_threshold
        norm.bias[1] = torch.nextafter(norm.bias[1], torch.zeros((), dtype=dtype))
    found = outputs(model, images, 2, tmp_path)["stem_fire.neuron"]
    assert np.array_equal(found, recorded(model, images, 2, LIF)["stem_fire.neuron"][1].numpy())
    assert found[:, :, 0].all()
    assert not found[:, :, 1].any()
