"""deploy/speculative.py: the same text as without drafts, the same distribution in sampling, fewer passes."""

import pytest
import torch
from scipy import stats

from deploy import caches, kv_cache, speculative
from deploy.drafters import DraftModel, EarlyExit, PromptLookup
from deploy.llama import Llama
from tests import llamas
from tests.deploy.test_decode import talker
from utils.run import UserError


@pytest.fixture(scope="module")
def llama():
    return Llama(talker())


@pytest.fixture(scope="module")
def small():
    """A model that agrees sometimes: the same words, one layer."""
    return Llama(llamas.tiny(layers=1, seed=3))


class Oracle:
    """Knows the text, and errs at some places."""

    def __init__(self, text, wrong=()):
        self.text = text
        self.wrong = wrong

    def propose(self, tokens, count, temperature=0.0):
        places = range(len(tokens), min(len(tokens) + count, len(self.text)))
        draft = [119 - self.text[i] if i in self.wrong else self.text[i] for i in places]
        return draft, torch.nn.functional.one_hot(
            torch.tensor(draft, dtype=torch.long), 120
        ).float()


def plain(llama, ids, new):
    cache = caches.GrowingCache(llama)
    return kv_cache.generate(llama, torch.tensor([ids]), new, cache)[0].tolist()


PROMPT = [5, 6, 7, 8, 5, 6, 7, 9, 5, 6]


@pytest.mark.parametrize("fixed", [0, 1, 5])
@pytest.mark.parametrize("kind", ["lookup", "small", "early exit", "oracle"])
def test_greedy_text_is_that_of_plain_decoding(llama, small, kind, fixed, parity):
    theirs = plain(llama, PROMPT, 25)
    drafter = {
        "lookup": lambda: PromptLookup(120, 3, 1),
        "small": lambda: DraftModel(small),
        "early exit": lambda: EarlyExit(llama, 1),
        "oracle": lambda: Oracle(PROMPT + theirs, wrong=(13, 14, 22)),
    }[kind]()
    mine, counts = speculative.generate(llama, PROMPT, 25, drafter, fixed=fixed)
    name = f"speculative.generate, {kind}, {fixed or 'adaptive'}"
    parity(
        "Speculative decoding", name, "plain decoding", torch.tensor(mine), torch.tensor(theirs), 0
    )
    assert counts.passes + counts.accepted == 25
    if kind == "oracle":
        assert counts.passes < 25 and counts.accepted < counts.proposed


def test_a_drafter_that_is_always_right_needs_the_fewest_passes(llama):
    text = PROMPT + plain(llama, PROMPT, 24)
    _, counts = speculative.generate(llama, PROMPT, 24, Oracle(text), fixed=5)
    assert counts.passes == 4 and counts.accepted == counts.proposed == 20
    assert speculative.expected_tokens(1, 5) == 6


def test_nothing_comes_after_an_end(llama):
    """The end lies within a draft that is right."""
    theirs = plain(llama, PROMPT, 25)
    end = theirs[8]
    cut = theirs[: theirs.index(end) + 1]
    oracle = Oracle(PROMPT + theirs)
    assert speculative.generate(llama, PROMPT, 25, oracle, fixed=5, eos=(end,))[0] == cut
    nothing = speculative.NoDrafts()
    assert speculative.generate(llama, PROMPT, 25, nothing, eos=(end,))[0] == cut


def test_the_same_model_is_always_right(llama):
    _, counts = speculative.generate(llama, PROMPT, 24, DraftModel(llama), fixed=5)
    assert counts.passes == 4 and counts.accepted == 20
    # as many tokens as were asked for, though drafts of five do not fit
    for new in (1, 2, 9, 22):
        found, _ = speculative.generate(llama, PROMPT, new, DraftModel(llama), fixed=5)
        assert found == plain(llama, PROMPT, new)
    whole = EarlyExit(llama, len(llama.layers))
    assert speculative.generate(llama, PROMPT, 24, whole, fixed=5)[1].passes == 4
    assert len(llama.layers) == 2 and len(EarlyExit(llama, 1).llama.layers) == 1


def test_tokens_of_a_pass_are_those_of_the_theory():
    """Each token of a draft right with probability alpha: counted over many passes."""
    torch.manual_seed(0)
    for alpha, draft in ((0.3, 3), (0.8, 5)):
        right = torch.rand(40000, draft) < alpha
        counted = 1 + right.long().cumprod(1).sum(1).float().mean()
        assert speculative.expected_tokens(alpha, draft) == pytest.approx(float(counted), rel=0.02)


def test_a_draft_model_forgets_what_was_not_kept(llama):
    """After a draft of which nothing was kept its next one is that of the text as it is."""
    drafter = DraftModel(llama)
    first, _ = drafter.propose(PROMPT, 4)
    for text in (
        [*PROMPT, 119 - first[0]],
        [*PROMPT, first[0], 119 - first[1]],
        [*PROMPT, *first, 7, 8],
    ):
        assert drafter.propose(text, 3)[0] == plain(llama, text, 3)
        assert drafter.cache.seen == len(text) + 2


def test_lookup_finds_the_latest_place_of_the_longest_run():
    lookup = PromptLookup(120, longest=2, shortest=1)
    assert lookup.find([1, 2, 3, 9, 2, 4, 1, 2], 2) == [3, 9]
    assert lookup.find([1, 2, 3, 1, 2, 4, 1, 2], 2) == [4, 1]
    assert lookup.find([7, 2, 3, 9, 2], 3) == [3, 9, 2]
    assert lookup.find([1, 2, 3], 4) == []
    draft, q = lookup.propose([7, 2, 3, 2], 1)
    assert draft == [3] and q.shape == (1, 120) and q[0, 3] == 1
    assert lookup.propose([7, 2, 3, 2], 0)[0] == []
    # one token is not enough, unless it is asked for
    assert PromptLookup(120).find([7, 2, 3, 9, 2], 3) == []
    assert PromptLookup(120).find([7, 2, 3, 9, 7, 2], 3) == [3, 9, 7]


def test_kept_tokens_have_the_distribution_of_the_model():
    """Two tokens of a draft from q, kept or not by the rule: pairs of kept tokens against p, chi squared."""
    generator = torch.Generator().manual_seed(1)
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.3, 0.2]])
    q = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.3, 0.3, 0.0, 0.4]])
    n = 20000
    first = torch.zeros(4)
    second = torch.zeros(4)
    third = torch.zeros(4)
    for _ in range(n):
        draft = torch.multinomial(q, 1, generator=generator)[:, 0].tolist()
        kept = speculative.accept_sampled(p, q, draft, generator)
        first[kept[0]] += 1
        if len(kept) > 1:
            second[kept[1]] += 1
        if len(kept) > 2:
            third[kept[2]] += 1
    for counted, wanted in ((first, p[0]), (second, p[1]), (third, p[2])):
        wanted = float(counted.sum()) * wanted.double() / wanted.double().sum()
        assert stats.chisquare(counted.numpy(), wanted.numpy()).pvalue > 0.001
    # a draft that is kept with probability sum min(p, q): Leviathan et al., Theorem 3.5
    assert float(second.sum()) / n == pytest.approx(
        float(torch.minimum(p[0], q[0]).sum()), abs=0.02
    )


@pytest.mark.parametrize("kind", ["lookup", "small"])
def test_sampled_texts_have_the_distribution_of_plain_sampling(llama, small, kind):
    """The second new token of many texts, against its exact distribution."""
    temperature = 3.0
    ids = torch.tensor([PROMPT])
    none = caches.NoCache(llama)
    first = (llama(ids, none.positions(10), none)[0, -1] / temperature).softmax(-1)
    best = first.topk(120)
    after = torch.zeros(120)
    for p, token in zip(best.values, best.indices):
        text = torch.cat([ids, token.view(1, 1)], 1)
        logits = llama(text, none.positions(11), none)[0, -1]
        after += p * (logits / temperature).softmax(-1)
    generator = torch.Generator().manual_seed(2)
    counted = torch.zeros(120)
    n = 400
    for _ in range(n):
        drafter = PromptLookup(120, 1, 1) if kind == "lookup" else DraftModel(small, 40, generator)
        about = {"fixed": 2, "temperature": temperature, "generator": generator}
        new, _ = speculative.generate(llama, PROMPT, 3, drafter, **about)
        counted[new[1]] += 1
    # the eight likeliest, and all others together
    likely = after.topk(8).indices
    seen = [*counted[likely].tolist(), n - float(counted[likely].sum())]
    wanted = [*(n * after[likely]).tolist(), n * (1 - float(after[likely].sum()))]
    scale = sum(seen) / sum(wanted)
    assert stats.chisquare(seen, [w * scale for w in wanted]).pvalue > 0.001


def test_the_length_of_drafts_follows_what_was_right():
    assert speculative.next_length(4, 4, 4, 8) == 6
    assert speculative.next_length(7, 7, 7, 8) == 8
    assert speculative.next_length(4, 3, 4, 8) == 3
    assert speculative.next_length(1, 0, 1, 8) == 1
    assert speculative.next_length(4, 0, 0, 8) == 3


def test_bad_numbers_are_one_line(llama, tmp_path):
    for about in (([], 3, 8, 0), ([5], 0, 8, 0), ([5], 3, 0, 0), ([5], 3, 8, -1)):
        ids, new, longest, fixed = about
        with pytest.raises(UserError, match="at least|asks for one"):
            speculative.generate(llama, ids, new, PromptLookup(120), longest, fixed)
    for longest, shortest in ((0, 0), (2, 3), (3, 0)):
        with pytest.raises(UserError, match="0 < shortest <= longest"):
            PromptLookup(120, longest, shortest)
    for flags in ({"texts": 0}, {"texts": 7}, {"fixed": -1}, {"shortest": 0}, {"layers": 99}):
        with pytest.raises(UserError):
            speculative.main(speculative.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
