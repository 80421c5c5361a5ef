"""vlm/confidence.py: calibration error against torchmetrics, temperature against scipy, coverage, votes."""

from typing import Any

import pytest
import torch
from scipy import optimize
from torchmetrics.functional.classification import multiclass_calibration_error

from utils.run import UserError
from vlm import confidence


@pytest.fixture
def answers():
    """Probabilities (400,5) of an overconfident classifier, and the truth."""
    torch.manual_seed(0)
    logits = torch.randn(400, 5)
    truth = torch.distributions.Categorical(logits=logits).sample()
    return (3 * logits).softmax(-1), truth


@pytest.mark.parametrize("bins", [5, 10, 15])
def test_calibration_error_is_that_of_torchmetrics(answers, bins, parity):
    p, truth = answers
    sure, label = p.max(-1)
    mine = confidence.expected_calibration_error(sure, label == truth, bins)
    theirs = multiclass_calibration_error(p, truth, 5, n_bins=bins)
    name = "torchmetrics multiclass_calibration_error"
    tensors = torch.tensor(mine), theirs
    parity("Pseudo-labels", "confidence.expected_calibration_error", name, *tensors, 1e-6)


def test_a_reliability_diagram_has_every_sample_in_its_bin():
    sure = torch.tensor([0.05, 0.1, 0.11, 0.95, 1.0])
    right = torch.tensor([False, True, False, True, True])
    rows = confidence.reliability(sure, right)
    assert [row[0] for row in rows] == [2, 1, 2]
    assert rows[0][1:] == pytest.approx((0.075, 0.5)) and rows[2][1:] == pytest.approx((0.975, 1))
    # too sure here, not sure enough there: that does not cancel out
    error = confidence.expected_calibration_error(torch.tensor([0.3, 0.9]), torch.tensor([1, 0]))
    assert error == pytest.approx(0.8)
    # all right and sure: no error; all wrong and sure: one
    ones = torch.ones(4)
    assert confidence.expected_calibration_error(ones, ones > 0) == 0
    assert confidence.expected_calibration_error(ones, ones < 0) == 1


def test_the_temperature_is_the_one_of_scipy_and_undoes_the_scale(answers, parity):
    p, truth = answers

    def loss(t):
        scaled = (p.double().log() / t).softmax(-1)
        return -float(scaled.gather(1, truth[:, None]).log().mean())

    mine = confidence.fit_temperature(p, truth)
    found: Any = optimize.minimize_scalar(
        loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-7}
    )
    parity(
        "Pseudo-labels",
        "confidence.fit_temperature",
        "scipy minimize_scalar",
        torch.tensor(mine),
        torch.tensor(found.x),
        1e-4,
    )
    # logits were multiplied by three
    assert 2.5 < mine < 3.6
    before, after = p.max(-1).values, confidence.scale(p, mine).max(-1).values
    right = p.argmax(-1) == truth
    error = confidence.expected_calibration_error
    assert error(after, right) < 0.5 * error(before, right)


def test_a_temperature_moves_no_answer(answers, parity):
    p, _ = answers
    scaled = confidence.scale(p, 2.0)
    theirs = (p.log() / 2).softmax(-1)
    parity("Pseudo-labels", "confidence.scale", "torch softmax of logits / T", scaled, theirs, 1e-6)
    assert torch.equal(scaled.argmax(-1), p.argmax(-1))
    assert (scaled.max(-1).values < p.max(-1).values).all()
    # a class of probability zero stays finite
    assert confidence.scale(torch.tensor([[1.0, 0.0]]), 3.0).isfinite().all()


def test_the_temperature_of_what_is_never_wrong_is_the_lowest():
    p = torch.tensor([[0.7, 0.3]] * 4)
    assert confidence.fit_temperature(p, torch.zeros(4).long()) == pytest.approx(0.05)
    assert confidence.fit_temperature(p, torch.ones(4).long()) == pytest.approx(20)
    with pytest.raises(UserError, match="there are none"):
        confidence.fit_temperature(p[:0], torch.zeros(0).long())


def test_votes_agreement_and_consensus():
    answers = torch.tensor([[0, 1, -1], [0, 2, -1], [0, 1, 2]])  # three prompts, three photos
    p = confidence.votes(answers, 3, smoothing=0.5)
    assert torch.allclose(p[0], torch.tensor([3.5, 0.5, 0.5]) / 4.5)
    assert torch.allclose(p[1], torch.tensor([0.5, 2.5, 1.5]) / 4.5)
    # no vote is no certainty
    assert torch.allclose(p[2], torch.tensor([0.5, 0.5, 1.5]) / 2.5)
    label = p.argmax(-1)
    assert label.tolist() == [0, 1, 2]
    assert torch.allclose(confidence.agreement(answers, label), torch.tensor([1, 2 / 3, 1 / 3]))
    both = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]], [[0.8, 0.2]]])
    assert torch.allclose(confidence.consensus(both), torch.tensor([[0.6, 0.4]]))


def test_coverage_keeps_equal_confidences_together():
    sure = torch.tensor([0.9, 0.5, 0.5, 0.7])
    right = torch.tensor([True, False, True, True])
    thresholds, coverage, accuracy = confidence.coverage_curve(sure, right)
    assert torch.allclose(thresholds, torch.tensor([0.9, 0.7, 0.5]))
    assert coverage.tolist() == [0.25, 0.5, 1.0] and accuracy.tolist() == [1.0, 1.0, 0.75]


def test_the_threshold_is_the_lowest_that_is_good_enough():
    sure = torch.tensor([0.9, 0.8, 0.7, 0.6])
    right = torch.tensor([False, True, True, False])
    # above 0.9 alone nothing is right, above 0.7 two in three are
    assert confidence.choose_threshold(sure, right, 0.6) == pytest.approx(0.7)
    assert confidence.choose_threshold(sure, right, 0.5) == pytest.approx(0.6)
    assert confidence.choose_threshold(sure, right, 0.9) == 2.0
