import math

import pytest
import torch
from networks import lively
from scipy.spatial.distance import jensenshannon
from torch.nn import functional as F

from models import build_model
from utils.early_bird import EarlyBird
from utils.early_time import EarlyTime, divergence, divergences

# --- Early-Bird ------------------------------------------------------------------------------------------------------


def masks_from(*rows):
    return [{"w": torch.tensor([bit == "1" for bit in row])} for row in rows]


def epochs_until_settled(masks, *arguments):
    bird = EarlyBird(*arguments)
    settled = [bird.observe(mask)["settled"] for mask in masks]
    return settled.index(True) + 1 if True in settled else None


def test_a_mask_settles_when_a_full_window_is_close_to_it():
    still = masks_from(*["11110000"] * 10)
    assert epochs_until_settled(still, 5, 0.02) == 6  # the current mask and q = 5 before it
    assert epochs_until_settled(still[:5], 5, 0.02) is None
    moved = masks_from("00001111", *["11110000"] * 10)
    assert epochs_until_settled(moved, 5, 0.02) == 7  # the first has to leave the window


def test_the_oldest_of_the_window_counts_as_the_last_does():
    drifting = masks_from("11110000", "01111000", "00111100", "00011110", "00001111")
    assert epochs_until_settled(drifting, 1, 0.3) == 2
    assert epochs_until_settled(drifting, 2, 0.3) is None


@pytest.mark.parametrize(("kind", "value"), [("hamming", 2 / 8), ("jaccard", 2 / 3)])
def test_the_distance_asked_for_decides_and_has_to_be_below_the_tolerance(kind, value):
    step = masks_from("11000000", "10100000")
    assert epochs_until_settled(step, 1, value, kind) is None
    assert epochs_until_settled(step, 1, value + 1e-6, kind) == 2


def test_both_distances_are_logged_and_the_newest_mask_is_the_ticket():
    bird = EarlyBird(2, 0.5)
    assert bird.mask == {}
    first, second, third = masks_from("11000000", "10100000", "10010000")
    assert bird.observe(first) == {"hamming": 0, "jaccard": 0, "settled": False}
    bird.observe(second)
    assert bird.observe(third) == {"hamming": 0.25, "jaccard": pytest.approx(2 / 3), "settled": True}
    assert bird.settled
    assert bird.mask is third


# --- Early-Time ------------------------------------------------------------------------------------------------------


def logits_whose_means_are(*means):
    """[T,N,classes] whose running mean after t timesteps is means[t-1]."""
    sums = torch.stack([t * mean for t, mean in enumerate(means, 1)])
    return torch.diff(sums, dim=0, prepend=torch.zeros_like(sums[:1]))


def test_divergences_are_equation_1():
    """The direction matters, images are averaged before the quotient, and t = 2 divides also where it is not the
    largest."""
    torch.manual_seed(0)
    log_p = (2 * torch.randn(6, 5, 4, dtype=torch.float64)).log_softmax(-1)  # P_1 .. P_6 of 5 images
    kl = [F.kl_div(log_p[-1], log_p[t - 1], reduction="batchmean", log_target=True).item() for t in (2, 3, 4, 5)]
    assert max(kl) > kl[0]
    found = divergences(logits_whose_means_are(*log_p))
    assert found == pytest.approx([value / kl[0] for value in kl], rel=1e-9)
    assert found[0] == 1


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
    with pytest.raises(ValueError, match="kl, js"):
        divergence(p, q, "tv")


def test_the_kind_of_divergence_decides():
    torch.manual_seed(1)
    logits = torch.randn(5, 6, 4, dtype=torch.float64)
    p = [logits[:t].mean(0).softmax(-1) for t in (2, 3, 4, 5)]
    js = [sum(jensenshannon(a, b) ** 2 for a, b in zip(p[i], p[3], strict=True)) for i in range(3)]
    assert divergences(logits, "js") == pytest.approx([value / js[0] for value in js])
    between = (divergences(logits)[1] + js[1] / js[0]) / 2
    assert {EarlyTime(5, 1, between, kind).observe(0, logits)["early_time"] for kind in ("kl", "js")} == {3, 4}


@pytest.mark.parametrize("arch", ["vgg16", "resnet19"])
def test_one_pass_equals_rerunning_the_network_for_each_t(arch):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    model = lively(build_model(arch, 3, 10, width=0.125).double(), images).eval()
    model.classifier.weight.data.mul_(50)  # an untrained classifier says nothing
    with torch.no_grad():
        means = {t: model(images, t).mean(0) for t in (2, 3, 4, 5)}
        found = divergences(model(images, 5))
    target = means[5].log_softmax(-1)
    separate = [F.kl_div(target, means[t].softmax(-1), reduction="batchmean").item() for t in (2, 3, 4)]
    assert separate[0] > 1e-6
    assert found == pytest.approx([value / separate[0] for value in separate], rel=1e-6)


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0, 6), (0.05, 6), (0.1, 6), (0.2, 5), (0.4, 4), (0.6, 3), (1, 3), (1.01, 2)]
)
def test_early_time_is_the_first_below_the_threshold(monkeypatch, threshold, expected):
    monkeypatch.setattr("utils.early_time.divergences", lambda logits, kind: [1, 0.5, 0.3, 0.1])
    clock = EarlyTime(6, 1, threshold)
    assert clock.observe(0, torch.zeros(6, 1, 2))["early_time"] == clock.timesteps == expected


def test_early_time_decides_once_after_its_epoch_and_continues_from_its_state(monkeypatch):
    values = iter([[0.1, 0.1], [1, 0.4], [0.1, 0.1], [0.1, 0.1]])
    monkeypatch.setattr("utils.early_time.divergences", lambda logits, kind: next(values))
    clocks, rows = [EarlyTime(4, 2, 0.6)], []
    for epoch in (0, 1, 0, 1):  # the epoch comes again where a later stage starts before it
        rows.append(clocks[-1].observe(epoch, torch.zeros(4, 1, 2)))
        resumed = EarlyTime(4, 2, 0.6)
        resumed.load_state_dict(clocks[-1].state_dict())
        clocks.append(resumed)
    assert [row.get("early_time") for row in rows] == [None, 3, None, None]
    assert [row["divergences"] for row in rows] == [[0.1, 0.1], [1, 0.4], [0.1, 0.1], [0.1, 0.1]]
    assert [clock.timesteps for clock in clocks] == [4, 3, 3, 3, 3]


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_networks_that_say_nothing_about_time_keep_all_timesteps(kind):
    logits = torch.randn(1, 4, 5).expand(5, 4, 5)
    for silent in (logits, torch.zeros(5, 4, 5)):
        row = EarlyTime(5, 1, 0.6, kind).observe(0, silent)
        assert row == {"divergences": [1, 1, 1], "early_time": 5}
    with pytest.raises(ValueError, match="finite"):
        divergences(logits * torch.nan, kind)


def test_any_number_of_timesteps_above_2_has_candidates():
    assert [len(divergences(torch.randn(timesteps, 4, 5))) for timesteps in (3, 9)] == [1, 7]
    with pytest.raises(ValueError, match="more than 2"):
        divergences(torch.randn(2, 4, 5))
