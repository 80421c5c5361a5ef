"""vlm/sparsity_study.py, kumaraswamy.py's study: mosaics, training of gates, choices of tokens, what is scored."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.run import UserError
from vlm import kumaraswamy, sparsity, sparsity_study


@pytest.fixture(scope="module")
def fruit():
    """Twelve photos of five groups: apples 0-2, melons 3-5, oranges 6-7, pears 8-10, satsumas 11."""
    coarse = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4])
    fine = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 8, 9, 10, 11])
    names = ["a", "b", "c", "d", "e"]
    kinds = list(sparsity_study.fruit_photos.NAMES)[:12]
    return SimpleNamespace(coarse=coarse, fine=fine, coarse_names=names, fine_names=kinds)


def test_mosaics_have_four_groups_and_ask_about_one_of_several_kinds(fruit):
    found = sparsity_study.draw_mosaics(fruit, torch.arange(12), 200, np.random.default_rng(0))
    groups = fruit.coarse[found.photos]
    assert all(len(set(four)) == 4 for four in groups.tolist())
    chosen = found.photos.gather(1, found.asked[:, None])[:, 0]
    assert torch.equal(fruit.coarse[chosen], found.groups)
    assert torch.equal(fruit.fine[chosen], found.kinds)
    # never oranges or satsumas, of which there is one kind; every place is asked about
    assert set(found.groups.tolist()) == {0, 1, 3} and set(found.asked.tolist()) == {0, 1, 2, 3}


def test_tokens_of_a_mosaic_are_those_of_its_photos_in_order():
    tokens = torch.arange(12.0)[:, None, None].expand(12, 9, 2)
    mosaics = SimpleNamespace(photos=torch.tensor([[3, 0, 7, 11]]))
    found = sparsity_study.tokens_of(tokens, mosaics)
    assert found.shape == (1, 36, 2) and found[0, ::9, 0].tolist() == [3, 0, 7, 11]


def made_tokens(fruit):
    """Image tokens in which a part says the group, another the kind."""
    torch.manual_seed(0)
    tokens = 0.1 * torch.randn(12, 9, 32)
    tokens[torch.arange(12), :, fruit.coarse] += 3
    tokens[torch.arange(12), :, 10 + fruit.fine] += 3
    return tokens


def test_gates_learn_to_open_where_the_prompt_points(fruit):
    cfg = sparsity_study.Config(steps=150, batch=32)
    torch.manual_seed(0)
    words = torch.randn(5, 3, 32)
    prompts = words, torch.ones(5, 3)
    tokens = made_tokens(fruit)
    gates = sparsity_study.Gates(32, 12)
    history = list(sparsity_study.train(gates, cfg, fruit, torch.arange(12), tokens, prompts))
    assert len(history) == 150 and np.mean([h[0] for h in history[-20:]]) < 0.5 * history[0][0]
    mosaics = sparsity_study.draw_mosaics(fruit, torch.arange(12), 50, np.random.default_rng(1))
    patches = sparsity_study.tokens_of(tokens, mosaics)
    with torch.no_grad():
        p = gates.probability(patches, words[mosaics.groups], torch.ones(50, 3))
    inside = p.view(50, 4, 9).sum(2).gather(1, mosaics.asked[:, None])[:, 0] / p.sum(1)
    assert inside.mean() > 0.7
    # some quarter is open, as the prior wants
    assert 0.1 < p.mean() < 0.45


def test_the_loss_is_cross_entropy_and_divergence(fruit):
    torch.manual_seed(0)
    gates = sparsity_study.Gates(8, 3)
    patches, words = torch.randn(4, 36, 8), torch.randn(4, 2, 8)
    about = patches, words, torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
    losses = []
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        cfg = sparsity_study.Config(prior_weight=weight)
        loss, p = gates.loss(*about, cfg)
        losses.append(loss)
    expected = sparsity.gate_loss(p, 9.0, 27.0).mean()
    assert torch.allclose(losses[1] - losses[0], expected, atol=1e-4)


def test_choices_keep_as_many_tokens_as_their_names_say():
    torch.manual_seed(0)
    gates = sparsity_study.Gates(8, 3).eval()
    patches, words, mask = torch.randn(1, 36, 8), torch.randn(1, 2, 8), torch.ones(1, 2)
    cfg = sparsity_study.Config(keep=(1, 9))
    with torch.no_grad():
        found = sparsity_study.choices(cfg, gates, patches, words, mask, torch.Generator())
        p = gates.probability(patches, words, mask)[0]
    counts = {name: kept.shape[1] for name, kept in found.items()}
    gated = max(int((p > 0.5).sum()), 1)
    expected = {"all": 36, "gates": gated}
    expected |= {f"{way} {k}": k for k in (1, 9) for way in ("top-k", "random", "evenly spaced")}
    assert counts == expected
    # the nine of highest probability, for the cosine decides both
    best = p.topk(9).indices.sort().values
    assert torch.equal(found["top-k 9"], patches[:, best])
    assert torch.equal(found["all"], patches)


def test_answers_are_those_about_the_kept_tokens(fruit, monkeypatch):
    """The right kind is ranked first if the tokens of the photo asked for are among those kept."""
    mosaics = sparsity_study.draw_mosaics(fruit, torch.arange(12), 8, np.random.default_rng(2))
    tokens = torch.arange(12.0)[:, None, None].expand(12, 9, 8).clone()
    asked = []

    def choose(cfg, gates, patches, words, mask, generator):
        i = len(asked) // 2
        own = patches.view(1, 4, 9, 8)[:, mosaics.asked[i]]
        return {"own": own, "nothing": own * 0 - 1}

    def embed(tokenizer, model, question, kept):
        asked.append(question)
        return kept

    def rank(tokenizer, model, embeds, names, question):
        photo = int(embeds[0, 0, 0])
        wanted = (
            ""
            if photo < 0
            else sparsity_study.fruit_photos.NAMES[fruit.fine_names[fruit.fine[photo]]]
        )
        return torch.tensor([[float(name == wanted) for name in names]])

    monkeypatch.setattr(sparsity_study, "choices", choose)
    monkeypatch.setattr(sparsity_study.prompted_answers, "embed_prompt", embed)
    monkeypatch.setattr(sparsity_study.prompted_answers, "rank_answers", rank)
    prompts = torch.zeros(5, 2, 8), torch.ones(5, 2)
    cfg = sparsity_study.Config()
    rows = sparsity_study.score(cfg, None, None, None, fruit, mosaics, tokens, prompts)
    assert rows["own"]["accuracy"] == 1 and rows["own"]["tokens"] == 9
    assert rows["nothing"]["accuracy"] < 1
    assert asked[::2] == [sparsity_study.question(int(g)) for g in mosaics.groups]


@pytest.mark.parametrize(
    "flags", [{"keep": (0,)}, {"keep": (37,)}, {"keep": ()}, {"steps": 0}, {"prior_open": 1.0}]
)
def test_flags_are_checked(flags, tmp_path):
    with pytest.raises(UserError):
        sparsity_study.main(sparsity_study.Config(out=str(tmp_path), **flags))


def test_distance_of_a_match_from_beta_is_the_integral():
    from scipy import integrate, stats

    alpha, beta = torch.tensor([2.0]), torch.tensor([5.0])
    a, b = kumaraswamy.match_beta(alpha, beta)

    def difference(x):
        ours = float(kumaraswamy.log_density(torch.tensor([x], dtype=torch.float64), a, b).exp()[0])
        return abs(ours - stats.beta.pdf(x, 2, 5)) / 2

    expected = integrate.quad(difference, 0, 1, limit=400)[0]
    assert float(kumaraswamy.total_variation(alpha, beta)[0]) == pytest.approx(expected, abs=1e-4)


def test_the_match_fails_where_both_parameters_are_small(tmp_path):
    metrics = kumaraswamy.main(kumaraswamy.Config(points=5, out=str(tmp_path)))
    found = metrics["total variation"]
    assert found["at alpha"] < 0.1 and found["and beta"] < 0.1 and found["largest"] > 0.2
    assert metrics["Beta(2.0, 5.0)"]["total variation"] < 0.03
    assert (tmp_path / "kumaraswamy.png").stat().st_size > 10_000


def test_grid_is_checked(tmp_path):
    with pytest.raises(UserError, match="above 1"):
        kumaraswamy.main(kumaraswamy.Config(points=1, out=str(tmp_path)))
