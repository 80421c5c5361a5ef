"""vlm/connector_probe.py: a marker at its place, what is learned of kind and place, held-out photos."""

from dataclasses import replace

import pytest
import torch

from tests import eyes
from utils.run import UserError
from vlm import connector, connector_probe


def test_a_marker_is_where_it_should_be():
    found = connector_probe.insert_marker(
        torch.zeros(9, 49, 2), torch.arange(9), torch.ones(2, 2, 2)
    )
    found = found[..., 0].unflatten(1, (7, 7))
    for i, (top, left) in enumerate(connector_probe.PLACES):
        assert found[i].sum() == 4 and found[i, top, left] == found[i, top + 1, left + 1] == 1


@pytest.mark.parametrize(
    "name, sees", [("pool3", True), ("mlp2x_gelu", True), ("pool1", False), ("perceiver", False)]
)
def test_it_learns_what_and_where(name, sees):
    """Kinds that are a direction, a marker at a place: one mean, and latents that see a bag, cannot say where."""
    kinds = torch.randint(14, (200,))
    maps = torch.randn(14, 1, 16)[kinds] + 0.3 * torch.randn(200, 49, 16)
    torch.manual_seed(0)
    probe = connector_probe.Probe(connector.build(name, 16, 32), 49, 32)
    cfg, on, marker = (
        connector_probe.Config(steps=60, batch=64, lr=1e-2),
        torch.device("cpu"),
        2 * torch.randn(2, 2, 16),
    )
    losses = list(connector_probe.train(probe, maps, kinds, marker, cfg, on))
    assert losses[-1] < 0.8 * losses[0]
    found = connector_probe.score(probe, maps, kinds, marker, on)
    assert found["what"] > 0.6 and (found["where"] > 0.6) == sees and (sees or found["where"] < 0.3)


def test_photos_that_train_and_photos_that_score_are_shown_apart(monkeypatch, tmp_path):
    """main: each connector learns from the photos to learn from, and is scored on the others, with their own kinds."""
    fruit, shown = eyes.shop(), []
    monkeypatch.setattr(connector_probe.data, "groceries", lambda size: fruit)
    monkeypatch.setattr(connector_probe.tower, "load", lambda *about, **more: None)
    said = lambda vision_tower, images: images[:, :1, 0, 0].float()[..., None].expand(-1, 49, 1280)  # noqa: E731
    monkeypatch.setattr(connector_probe.tower, "vision_features", said)
    monkeypatch.setattr(connector_probe, "draw", lambda *about: None)

    def train(probe, maps, kinds, marker, cfg, on):
        shown.append((probe, maps, kinds))
        yield 1.0

    def score(probe, maps, kinds, marker, on):
        shown.append((probe, maps, kinds))
        return {"what": 0.5, "where": 0.25}

    monkeypatch.setattr(connector_probe, "train", train)
    monkeypatch.setattr(connector_probe, "score", score)
    cfg = connector_probe.Config(
        names=("pool1", "linear"), width=8, steps=1, judged=15, out=str(tmp_path / "out")
    )
    found = connector_probe.main(cfg)
    assert (
        found["pool1"]["tokens"] == 1
        and found["linear"]["tokens"] == 49
        and found["linear"]["where"] == 0.25
    )
    for i, (probe, maps, kinds) in enumerate(shown):
        numbers = maps[:, 0, 0].long()
        assert torch.equal(kinds, numbers % 3) and probe.join is shown[i - i % 2][0].join
        assert (
            numbers.tolist() == list(range(20))
            if i % 2 == 0
            else min(numbers) >= 20 and len(numbers) == 15
        )
    # token sparsification before the connector
    sparse = replace(cfg, names=("linear",), sparsity_plugins=("pool3", "topk_norm4"))
    assert connector_probe.main(sparse)["linear"]["tokens"] == 4


def test_bad_flags_are_one_line():
    with pytest.raises(UserError, match="above 0"):
        connector_probe.main(connector_probe.Config(steps=0))
