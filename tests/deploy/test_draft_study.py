"""deploy/draft_study.py and the n-grams of drafters.py: counts, costs, predictions, and every table of the command."""

from collections import Counter

import pytest
import torch

from deploy import distill_draft, draft_study, speculative
from deploy.caches import NoCache
from deploy.drafters import DraftModel, NGram, draft_llama
from deploy.llama import Llama
from tests import llamas
from tests.deploy.test_decode import talker
from utils import data, pretrained
from utils.run import UserError


def test_a_reduced_head_says_what_the_whole_model_says(pair, parity):
    """The layers of a whole model: logits of the tokens that it knows are those of the model."""
    model = llamas.tiny()
    tokens = torch.tensor([90, 4, 17])
    small = draft_llama(distill_draft.draft_of(model, 2, tokens), pair[0])
    ids = torch.tensor([[5, 6, 7, 8]])
    cache = NoCache(small)
    mine = small(ids, cache.positions(4), cache)[..., tokens]
    about = ("Speculative decoding", "drafters.ReducedHead", "transformers.LlamaForCausalLM")
    parity(*about, mine, model(ids).logits[..., tokens])


def test_speedup_is_that_of_the_theorem():
    """A pass over a draft at the cost of a single one: Leviathan et al., Theorem 3.8."""
    alpha, gamma, c = 0.8, 5, 0.05
    wanted = (1 - alpha ** (gamma + 1)) / ((1 - alpha) * (gamma * c + 1))
    assert draft_study.speedup(alpha, gamma, c) == pytest.approx(wanted)
    # guesses that are never right cost what drafting and the longer pass cost
    assert draft_study.speedup(0, 3, 0.1, verify=1.2) == pytest.approx(1 / 1.5)
    assert draft_study.speedup(1, 3, 0.0) == 4


def test_ngrams_are_counted():
    texts = [[1, 2, 3, 1, 2, 4, 1, 2, 3], [5, 2, 7]]
    ngram = NGram(texts, 10)
    for context in ((1, 2), (9, 2), (3,)):
        size = 2 if context == (1, 2) else 1
        known = list(context[-size:])
        counted = Counter(
            text[i + size]
            for text in texts
            for i in range(len(text) - size)
            if text[i : i + size] == known
        )
        wanted = torch.zeros(10)
        for token, count in counted.items():
            wanted[token] = count / counted.total()
        assert torch.equal(ngram.distribution(list(context)), wanted)
    # nothing is known of 9: all alike; no run goes from one text into the next
    assert torch.equal(ngram.distribution([9]), torch.full((10,), 0.1))
    assert torch.equal(ngram.distribution([2, 3]), torch.eye(10)[1])
    assert torch.equal(NGram([[1, 2], [3]], 10).distribution([2]), torch.full((10,), 0.1))


def test_ngrams_propose_the_likeliest_or_draw():
    ngram = NGram([[1, 2, 3, 1, 2, 4, 1, 2, 3]], 10, torch.Generator().manual_seed(0))
    draft, q = ngram.propose([1, 2], 3)
    assert draft == [3, 1, 2] and torch.equal(q, torch.eye(10)[[3, 1, 2]])
    drawn = [ngram.propose([1, 2], 1, temperature=1.0) for _ in range(300)]
    threes = sum(draft == [3] for draft, _ in drawn)
    assert threes / 300 == pytest.approx(2 / 3, abs=0.1)
    assert torch.allclose(drawn[0][1][0, [3, 4]], torch.tensor([2 / 3, 1 / 3]))
    assert ngram.propose([1, 2], 0)[1].shape == (0, 10)


@pytest.fixture(scope="module")
def pair():
    return Llama(talker()), Llama(llamas.tiny(layers=1, seed=3))


def test_acceptance_along_a_text_is_what_speculative_decoding_finds(pair):
    """Greedy, drafts of one token: proposals that are kept, place by place."""
    llama, small = pair
    prompt = [5, 6, 7, 8, 5, 6, 7, 9]
    plain, _ = speculative.generate(llama, prompt, 30, speculative.NoDrafts())
    right = 0
    for place in range(30):
        right += DraftModel(small, 64).propose(prompt + plain[:place], 1)[0] == [plain[place]]
    assert 0 < right < 30
    assert draft_study.alpha_of(llama, small, prompt, plain) == pytest.approx(right / 30)
    # sampling: the mean over the same places
    p = draft_study.distributions(llama, torch.tensor(prompt + plain))[7:-1]
    q = draft_study.distributions(small, torch.tensor(prompt + plain))[7:-1]
    wanted = torch.minimum(p, q).sum(-1).mean()
    found = draft_study.alpha_of(llama, small, prompt, plain, 1.0)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    assert draft_study.alpha_of(llama, llama, prompt, plain, 1.0) == pytest.approx(1, rel=1e-5)


def test_acceptance_by_position(pair):
    llama, small = pair
    pieces = torch.randint(2, 120, (2, 6))
    ngram = NGram([[5, 6, 7, 8]], 120)
    found = draft_study.acceptance_by_position(llama, small, ngram, pieces)
    p = draft_study.distributions(llama, pieces[1])
    q = draft_study.distributions(llama, pieces[0])
    assert p.shape == q.shape == (6, 120)
    model = []
    grams = []
    for piece in pieces:
        p = draft_study.distributions(llama, piece)
        model.append(torch.minimum(p, draft_study.distributions(small, piece)).sum(-1))
        rows = [ngram.distribution(piece[: i + 1].tolist()) for i in range(6)]
        grams.append(torch.minimum(p, torch.stack(rows)).sum(-1))
    torch.testing.assert_close(found["draft model"], (model[0] + model[1]) / 2)
    torch.testing.assert_close(found["n-grams"], (grams[0] + grams[1]) / 2)


def test_costs_are_of_each_width(pair):
    verify, draft = draft_study.pass_costs(*pair, longest=3, rounds=2, before=8)
    assert len(verify) == 4 and min(verify) > 0 and draft > 0


def test_every_setting_is_compared_with_plain_decoding(pair):
    llama, small = pair
    cfg = draft_study.Config(max_new_tokens=12, lengths=(1, 3))
    settings = draft_study.settings_of(cfg, llama, small, NGram([[5, 6, 7, 8]], 120))
    assert list(settings)[0] == "plain"
    prompts = [[5, 6, 7], [8, 9, 5]]
    rows, alpha = draft_study.compare_speed(llama, small, settings, prompts, cfg)
    assert 0 <= alpha <= 1 and rows["plain"]["speed"] == 1 == rows["plain"]["tokens a pass"]
    assert all(row["same text"] == 2 for row in rows.values())
    for length in (1, 3):
        assert settings[f"draft of {length}"][1] == length
    # the draft model is given to the drafter: the model itself is always right
    settings = draft_study.settings_of(cfg, llama, llama, NGram([[5, 6]], 120))
    rows, alpha = draft_study.compare_speed(llama, llama, settings, prompts, cfg)
    assert alpha == 1 and rows["draft of 3"]["tokens a pass"] == 4


@pytest.mark.long
def test_every_table_and_file_is_there(tmp_path):
    tokenizer = pretrained.smollm2()[0]
    model = llamas.tiny(layers=3, vocabulary=len(tokenizer))
    model.config.max_position_embeddings = 2048
    pretrained.save(model, tokenizer, tmp_path / "teacher")
    draft = distill_draft.draft_of(model, 1, torch.arange(300))
    pretrained.save(draft, tokenizer, tmp_path / "draft")
    pages = data.docs()[:100]
    small = {"max_new_tokens": 4, "texts": 1, "lengths": (1, 2), "rounds": 1, "held_out": 1}
    folders = {"model": str(tmp_path / "teacher"), "draft": str(tmp_path / "draft")}
    cfg = draft_study.Config(**small, **folders, length=16, out=str(tmp_path / "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "docs", lambda: pages)
        rows = draft_study.main(cfg)
    assert (tmp_path / "out/draft_study.png").stat().st_size > 5000
    c = rows["token of the draft"]["c"]
    for kind in ("copy", "go on", "answer", "go on, sampled"):
        alpha = rows[f"{kind}, alpha"]["alpha"]
        row = rows[f"{kind}, draft of 2"]
        verify = rows["pass over 3"]["passes"]
        assert row["predicted"] == pytest.approx(draft_study.speedup(alpha, 2, c, verify))
        assert row["tokens predicted"] == pytest.approx(1 + alpha + alpha**2)
        memory = rows["c by bytes read"]["c"]
        assert row["memory-bound"] == pytest.approx(draft_study.speedup(alpha, 2, memory))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head = 32 * len(tokenizer)
    wanted = (layer + 32 + 300 * 32) / (3 * layer + 32 + head)
    assert rows["c by bytes read"]["c"] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"lengths": ()}, "start at 1"),
        ({"lengths": (0,)}, "start at 1"),
        ({"length": 1}, "--length at 2"),
        ({"texts": 7}, "--texts: 6 at most"),
        ({"draft": "no/such/draft"}, "no language model at"),
    ],
)
def test_flags_that_make_no_sense(flags, line, tmp_path):
    with pytest.raises(UserError, match=line):
        draft_study.main(draft_study.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
