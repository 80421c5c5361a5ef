"""deploy/contrastive.py: Eq. 5 computed directly, without a cache, one candidate at a time."""

import pytest
import torch

from deploy import contrastive, decode, generation
from tests.deploy.test_decode import END, PAD, padded, talker
from utils.run import UserError


@pytest.fixture(scope="module")
def model():
    return talker()


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, 120, (3, 7))


def brute_force(model, ids, k, alpha, new, eos=()):
    """Su et al. 2022, Eq. 5, for one prompt (N,): every candidate in a text of its own."""
    text = ids.tolist()
    for _ in range(new):
        with torch.no_grad():
            out = model(torch.tensor([text]), output_hidden_states=True)
        p, candidates = out.logits[0, -1].softmax(-1).topk(k)
        states = out.hidden_states[-1][0]
        scores = []
        for probability, candidate in zip(p, candidates.tolist()):
            with torch.no_grad():
                longer = model(torch.tensor([[*text, candidate]]), output_hidden_states=True)
            h = longer.hidden_states[-1][0, -1]
            similarity = max(torch.cosine_similarity(h, x, dim=0) for x in states)
            scores.append((1 - alpha) * probability - alpha * similarity)
        text.append(candidates[torch.stack(scores).argmax()].item())
        if text[-1] in eos:
            break
    return text[len(ids) :]


@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (8, 0.3), (3, 1.0)])
def test_the_search_is_equation_5(model, ids, parity, k, alpha):
    mine = contrastive.contrastive_search(model, k=k, alpha=alpha, max_new_tokens=12, input_ids=ids)
    theirs = torch.tensor([brute_force(model, row, k, alpha, 12) for row in ids])
    where = (
        "contrastive.contrastive_search",
        "Su et al. Eq. 5 without cache, by torch.cosine_similarity",
    )
    parity("Decoding", *where, mine.double(), theirs.double(), atol=0)
    greedy = generation.greedy(model, max_new_tokens=12, input_ids=ids)
    assert not torch.equal(mine, greedy)


def test_padding_is_not_what_was_said_and_an_end_is_an_end(model, ids):
    options = {"k": 4, "alpha": 0.6, "max_new_tokens": 12, "eos": END, "pad": PAD}
    mine = contrastive.contrastive_search(model, **options, **padded(ids))
    lengths = set()
    for row, first in ((0, 0), (1, 3), (2, 1)):
        alone = brute_force(model, ids[row, first:], 4, 0.6, 12, END)
        assert mine[row, : len(alone)].tolist() == alone
        assert (mine[row, len(alone) :] == PAD).all()
        lengths.add(len(alone))
    assert min(lengths) < max(lengths) == mine.shape[1]
    # all of them end at once: nothing more is read
    first = contrastive.contrastive_search(model, max_new_tokens=1, input_ids=ids)
    ends = first.flatten().tolist()
    rest = contrastive.contrastive_search(model, max_new_tokens=9, eos=ends, input_ids=ids)
    assert torch.equal(rest, first)


def test_without_a_penalty_or_without_a_choice_it_is_greedy(model, ids):
    greedy = generation.greedy(model, max_new_tokens=10, input_ids=ids)
    for options in ({"alpha": 0.0}, {"k": 1, "alpha": 0.9}):
        mine = contrastive.contrastive_search(model, max_new_tokens=10, input_ids=ids, **options)
        assert torch.equal(mine, greedy)
    x = model.get_input_embeddings()(ids).detach()
    mine = contrastive.contrastive_search(model, max_new_tokens=6, inputs_embeds=x)
    assert torch.equal(mine, contrastive.contrastive_search(model, max_new_tokens=6, input_ids=ids))


def test_what_is_read_of_the_chosen_token_is_not_read_again(model, ids):
    """One pass over K tokens of each prompt a step."""
    seen = []
    hook = model.model.register_forward_hook(lambda m, a, out: seen.append(tuple(out[0].shape[:2])))
    tokens = contrastive.contrastive_stream(model, k=5, max_new_tokens=3, input_ids=ids)
    assert next(tokens).shape == (3,) and len(list(tokens)) == 2
    hook.remove()
    assert seen == [(3, 7), (15, 1), (15, 1), (15, 1)]


def test_the_penalty_is_the_largest_cosine_to_what_is_no_padding():
    before = torch.tensor([[[9.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])
    candidates = torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
    all_of_it = contrastive.degeneration_penalty(candidates, before, torch.tensor([[1, 1, 1]]))
    torch.testing.assert_close(all_of_it, torch.tensor([[1.0, 0.0]]))
    rest = contrastive.degeneration_penalty(candidates, before, torch.tensor([[0, 1, 1]]))
    torch.testing.assert_close(rest, torch.tensor([[0.5**0.5, -(0.5**0.5)]]))


def test_a_loop_is_left(model):
    """A prompt that says the same words again and again: greedy search stays in it longer."""
    torch.manual_seed(3)
    ids = torch.randint(3, 120, (4, 3)).repeat(1, 6)
    options = {"max_new_tokens": 40, "input_ids": ids}
    dull = generation.greedy(model, **options)
    mine = contrastive.contrastive_search(model, k=8, alpha=0.6, **options)
    again = [[decode.repeated(row.tolist(), 2) for row in rows] for rows in (dull, mine)]
    assert sum(again[1]) < sum(again[0])


@pytest.mark.parametrize(
    "bad",
    [{"k": 0}, {"alpha": -0.1}, {"alpha": 1.1}, {"max_new_tokens": 0}, {"max_new_tokens": 122}],
)
def test_values_that_make_no_sense_are_refused(model, ids, bad):
    with pytest.raises(UserError):
        contrastive.contrastive_search(model, input_ids=ids, **bad)
