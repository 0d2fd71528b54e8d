"""ONNX files, run by onnxruntime, against the networks themselves."""

import numpy as np
import pytest
import torch

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

import onnxruntime  # noqa: E402
from test_export import sparse_network  # noqa: E402

from utils.export import network_graph  # noqa: E402
from utils.onnx_export import onnx_bytes  # noqa: E402


@pytest.mark.parametrize(("arch", "timesteps"), [("alexnet", 1), pytest.param("resnet19", 3, marks=pytest.mark.slow)])
def test_onnxruntime_gives_the_networks_logits_for_any_number_of_images(arch, timesteps):
    model, _, images = sparse_network(arch, dtype=torch.float32)
    session = onnxruntime.InferenceSession(onnx_bytes(network_graph(model, (3, 32, 32)), timesteps))
    for some in (images, images[:1]):
        with torch.no_grad():
            expected = model(some, timesteps).numpy()
        (logits,) = session.run(["logits"], {"images": some.numpy()})
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
