import math

import pytest
import torch
from conftest import lively
from scipy.spatial.distance import jensenshannon
from torch.nn import functional as F

from models import build_model
from utils.early_bird import has_settled, recent_masks, window_distance
from utils.early_time import divergence, divergences, early_time


def logits_whose_means_are(*means):
    """[T,N,classes] whose running mean after t timesteps is means[t-1]."""
    sums = torch.stack([t * mean for t, mean in enumerate(means, 1)])
    return torch.diff(sums, dim=0, prepend=torch.zeros_like(sums[:1]))


def kl(p, q):
    return sum(float(a) * torch.log(a / b) for a, b in zip(p, q, strict=True))


def test_divergence_is_equation_1_on_known_distributions():
    # direction matters: D(P_t || P_T) of these differs from D(P_T || P_t) by far
    p2, p3, p4 = (torch.tensor(p, dtype=torch.float64) for p in ([0.9, 0.1], [0.7, 0.3], [0.5, 0.5]))
    logits = logits_whose_means_are(*(p.log().unsqueeze(0) for p in (p2, p2, p3, p4)))
    expected = [1, kl(p3, p4) / kl(p2, p4)]
    assert divergences(logits) == pytest.approx([float(e) for e in expected])
    assert kl(p3, p4) / kl(p2, p4) != pytest.approx(float(kl(p4, p3) / kl(p4, p2)), rel=0.05)


def test_divergence_is_normalised_by_the_fewest_not_the_largest():
    p2, p3, p4 = (torch.tensor(p).log().unsqueeze(0) for p in ([0.6, 0.4], [0.9, 0.1], [0.5, 0.5]))
    first, second = divergences(logits_whose_means_are(p2, p2, p3, p4))
    assert first == 1
    assert second > 1


def test_divergence_averages_over_images():
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 5)
    p = [logits[:t].mean(0).softmax(-1) for t in (2, 3, 4)]
    each = [[float(kl(p[t][n], p[2][n])) for n in range(2)] for t in (0, 1)]
    assert divergences(logits)[1] == pytest.approx(sum(each[1]) / sum(each[0]), rel=1e-5)


def test_jensen_shannon_is_scipys_symmetric_and_at_most_ln_2():
    torch.manual_seed(0)
    p, q = (5 * torch.randn(2, 40, 7, dtype=torch.float64)).log_softmax(-1)
    js = divergence(p, q, "js")
    expected = torch.tensor([jensenshannon(a.exp(), b.exp()) ** 2 for a, b in zip(p, q, strict=True)])  # its root
    torch.testing.assert_close(js, expected)
    torch.testing.assert_close(js, divergence(q, p, "js"))
    assert (divergence(p, q) - divergence(q, p)).abs().max() > 0.1
    apart = torch.tensor([[50.0, 0], [0, 50]], dtype=torch.float64).log_softmax(-1)
    assert js.max() < divergence(*apart, "js") == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="unknown divergence 'tv': choose from kl, js"):
        divergence(p, q, "tv")


def test_jensen_shannon_is_averaged_and_normalised_as_kl_is_and_decides():
    torch.manual_seed(1)
    logits = torch.randn(5, 6, 4)
    p = [logits[:t].double().mean(0).softmax(-1) for t in (2, 3, 4, 5)]
    js = [sum(jensenshannon(a, b) ** 2 for a, b in zip(p[i], p[3], strict=True)) for i in range(3)]
    assert divergences(logits, "js") == pytest.approx([1, js[1] / js[0], js[2] / js[0]])
    between = (divergences(logits)[1] + js[1] / js[0]) / 2
    assert {early_time(logits, between, kind) for kind in ("kl", "js")} == {3, 4}


@pytest.mark.parametrize("arch", ["vgg16", "resnet19"])
def test_one_pass_equals_rerunning_the_network_for_each_t(arch):
    torch.manual_seed(0)
    model = lively(
        build_model(arch, 3, 10, width=0.125).double(), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    ).eval()
    model.classifier.weight.data.mul_(50)  # an untrained classifier says nothing
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        target = model(images, 5).mean(0)
        separate = [
            F.kl_div(target.log_softmax(-1), model(images, t).mean(0).softmax(-1), reduction="batchmean")
            for t in (2, 3, 4)
        ]
        result = divergences(model(images, 5))
    assert float(separate[0]) > 1e-6
    assert result == pytest.approx([float(s / separate[0]) for s in separate], rel=1e-6)


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0, 6), (0.05, 6), (0.1, 6), (0.2, 5), (0.4, 4), (0.6, 3), (1, 3), (1.01, 2)]
)
def test_early_time_is_the_first_below_the_threshold(monkeypatch, threshold, expected):
    monkeypatch.setattr("utils.early_time.divergences", lambda logits, kind, fewest: [1, 0.5, 0.3, 0.1])
    assert early_time(torch.zeros(6, 1, 2), threshold) == expected


def test_any_number_of_timesteps_has_candidates():
    torch.manual_seed(0)
    assert len(divergences(torch.randn(3, 4, 5))) == 1
    assert len(divergences(torch.randn(9, 4, 5))) == 7
    with pytest.raises(ValueError, match="more than 2 timesteps"):
        divergences(torch.randn(2, 4, 5))


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_network_that_says_nothing_about_time_keeps_all_timesteps(kind):
    logits = torch.randn(1, 4, 5).expand(5, 4, 5)
    assert divergences(logits, kind) == [1, 1, 1]
    assert early_time(logits, 0.6, kind) == 5
    with pytest.raises(ValueError, match="finite"):
        divergences(logits * torch.nan, kind)


def masks_from(*rows):
    return [{"w": torch.tensor([bit == "1" for bit in row])} for row in rows]


def epochs_until_settled(masks, window, tolerance, kind="hamming"):
    recent = recent_masks(window)
    for epoch, mask in enumerate(masks, 1):
        recent.append(mask)
        if has_settled(recent, tolerance, kind):
            return epoch
    return None


def test_early_bird_waits_for_a_full_window_of_close_masks():
    still = masks_from(*["11110000"] * 10)
    assert epochs_until_settled(still, window=5, tolerance=0.02) == 6  # the current mask and q = 5 before it
    assert epochs_until_settled(still[:5], window=5, tolerance=0.02) is None
    moved = masks_from("00001111", *["11110000"] * 10)
    assert epochs_until_settled(moved, window=5, tolerance=0.02) == 7  # the first has to leave the window


def test_early_bird_compares_with_the_oldest_of_the_window_not_only_the_last():
    drifting = masks_from("11110000", "01111000", "00111100", "00011110", "00001111")
    assert epochs_until_settled(drifting, window=1, tolerance=0.3) == 2
    assert epochs_until_settled(drifting, window=2, tolerance=0.3) is None


def test_early_bird_tolerance_is_strict_and_depends_on_the_distance():
    step = masks_from("11000000", "10100000")
    recent = recent_masks(1)
    recent.extend(step)
    assert window_distance(recent) == 0.25
    assert not has_settled(recent, 0.25)
    assert has_settled(recent, 0.26)
    assert window_distance(recent, "jaccard") == pytest.approx(2 / 3)
    assert not has_settled(recent, 0.5, "jaccard")
