"""deploy/decode.py: the same tokens and scores as transformers' generate, whatever the way and whatever the prompt."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from deploy import decode, generation, logits_processors
from tests import llamas
from utils import pretrained
from utils.run import UserError

# Not 0: transformers takes a pad id of 0 for none and fills up what beam search found with the end token
PAD = 2
# Several ids end a text, so that some texts are short and some are long
END = [1, 5, 9, 20, 21, 22, 23]


def talker(vocabulary=120, seed=0):
    """A tiny random Llama that has opinions and moods: spread logits, other words at other places."""
    made = llamas.tiny(vocabulary=vocabulary, seed=seed)
    for name, p in made.model.layers.named_parameters():
        p.data *= 1 if "norm" in name else 10
    # No longer that of the embeddings
    made.lm_head.weight = torch.nn.Parameter(0.5 * torch.randn(vocabulary, 32))
    return made


@pytest.fixture
def model():
    return talker()


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(3, 120, (3, 7))


def padded(ids):
    """The second prompt has four tokens only, the third six."""
    mask = torch.arange(7) >= torch.tensor([0, 3, 1])[:, None]
    return {"input_ids": torch.where(mask, ids, PAD), "attention_mask": mask.long()}


def generate(model, new=16, eos=1, **options):
    """What transformers makes: new tokens, and the scores of beam search."""
    options = (
        {"top_k": 0, "top_p": 1.0, "temperature": 1.0} | options
        if options.get("do_sample")
        else options
    )
    options = {
        "do_sample": False,
        "pad_token_id": PAD,
        "return_dict_in_generate": True,
        "output_scores": True,
    } | options
    made = model.generate(max_new_tokens=new, eos_token_id=eos, **options)
    prompt = 0 if "inputs_embeds" in options else options["input_ids"].shape[1]
    return made.sequences[:, prompt:], getattr(made, "sequences_scores", None)


def same(parity, ours, counterpart, mine, theirs):
    parity("Decoding", ours, counterpart, mine.double(), theirs.double(), atol=0)


@pytest.mark.parametrize("eos", [None, 1, END])
def test_greedy_is_that_of_generate(model, ids, parity, eos):
    mine = generation.greedy(model, input_ids=ids, max_new_tokens=16, eos=eos, pad=PAD)
    theirs, _ = generate(model, eos=eos, input_ids=ids)
    same(parity, "generation.greedy", "transformers generate", mine, theirs)
    assert len(mine.unique()) > 8  # it does not say the same word for ever


def test_left_padded_prompts_are_those_of_generate_and_as_if_alone(model, ids, parity):
    batch = padded(ids)
    mine = generation.greedy(model, max_new_tokens=16, eos=END, pad=PAD, **batch)
    same(
        parity,
        "generation.greedy, padded",
        "transformers generate, padded",
        mine,
        generate(model, eos=END, **batch)[0],
    )
    for row, start in ((1, 3), (2, 1)):
        alone = generation.greedy(
            model, input_ids=ids[row : row + 1, start:], max_new_tokens=16, eos=END, pad=PAD
        )[0]
        assert (
            mine[row, : len(alone)].tolist() == alone.tolist()
            and (mine[row, len(alone) :] == PAD).all()
        )
    wrong = generation.greedy(
        model, input_ids=batch["input_ids"], max_new_tokens=16, eos=END, pad=PAD
    )
    assert not torch.equal(mine, wrong)  # without the mask the padding is read as text


def test_positions_count_from_the_first_word_and_not_from_the_padding(ids, parity):
    """Llama would not notice, its positions are relative; GPT-2 has a vector for each."""
    shape = {"vocab_size": 120, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    gpt2 = GPT2LMHeadModel(
        GPT2Config(**shape, bos_token_id=None, eos_token_id=1, initializer_range=0.6)
    ).eval()
    batch, end = padded(ids), {"eos": END, "pad": PAD, "max_new_tokens": 16}
    mine = generation.greedy(gpt2, **end, **batch)
    same(
        parity,
        "generation.greedy, GPT-2",
        "transformers generate, GPT-2",
        mine,
        generate(gpt2, eos=END, **batch)[0],
    )
    alone = generation.greedy(gpt2, input_ids=ids[1:2, 3:], **end)[0]
    assert mine[1, : len(alone)].tolist() == alone.tolist()
    tokens, scores = generation.beam(gpt2, beams=3, **end, **batch)
    theirs, their_scores = generate(gpt2, eos=END, num_beams=3, **batch)
    same(parity, "generation.beam, GPT-2", "transformers beam search, GPT-2", tokens[:, 0], theirs)
    torch.testing.assert_close(scores[:, 0], their_scores)
    text = torch.randint(3, 120, (3, 5))
    together = generation.log_probs(gpt2, text, **batch)[1:2]
    torch.testing.assert_close(
        together,
        generation.log_probs(gpt2, text[1:2], input_ids=ids[1:2, 3:]),
        atol=1e-4,
        rtol=1e-5,
    )


@pytest.mark.parametrize("padding", [False, True])
def test_embeddings_are_as_good_as_ids(model, ids, parity, padding):
    """The way of a vision-language model, whose prompt has no ids where the image stands."""
    batch = padded(ids) if padding else {"input_ids": ids}
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    x = model.get_input_embeddings()(batch["input_ids"]).detach()
    mine = generation.greedy(model, inputs_embeds=x, max_new_tokens=12, **rest)
    assert torch.equal(mine, generation.greedy(model, max_new_tokens=12, **batch))
    theirs, _ = generate(model, new=12, inputs_embeds=x, **rest)
    same(parity, "generation.greedy, embeddings", "transformers generate, embeddings", mine, theirs)
    tokens, scores = generation.beam(
        model, beams=3, inputs_embeds=x, max_new_tokens=12, eos=END, pad=PAD, **rest
    )
    theirs, their_scores = generate(model, new=12, eos=END, num_beams=3, inputs_embeds=x, **rest)
    assert torch.equal(tokens[:, 0], theirs)
    torch.testing.assert_close(scores[:, 0], their_scores)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("eos", [None, 1, END])
def test_beams_and_their_scores_are_those_of_generate(
    model, ids, parity, eos, length_penalty, early_stopping
):
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    for batch in ({"input_ids": ids}, padded(ids)):
        tokens, scores = generation.beam(
            model, beams=4, num_return=3, max_new_tokens=16, eos=eos, pad=PAD, **options, **batch
        )
        theirs = generate(model, eos=eos, num_beams=4, num_return_sequences=3, **options, **batch)
        same(parity, "generation.beam", "transformers beam search", tokens.flatten(0, 1), theirs[0])
        parity(
            "Decoding",
            "generation.beam scores",
            "transformers sequences_scores",
            scores.flatten(),
            theirs[1],
        )
    if eos == END and length_penalty < 1:
        assert (tokens == PAD).any()  # some ended early and were filled up


def test_one_beam_is_greedy_and_the_score_is_the_log_probability(model, ids):
    tokens, scores = generation.beam(
        model, beams=1, max_new_tokens=10, length_penalty=0.0, input_ids=ids
    )
    assert torch.equal(tokens[:, 0], generation.greedy(model, input_ids=ids, max_new_tokens=10))
    log_p = generation.log_probs(model, tokens[:, 0], input_ids=ids)
    torch.testing.assert_close(scores[:, 0], log_p.sum(1))


def test_a_wide_search_finds_the_likeliest_of_all_texts():
    """Six words, three tokens: 216 texts. A search as wide as that misses none; greedy is not always the best."""
    model = talker(vocabulary=6)
    prompts, every = (
        torch.cartesian_prod(*[torch.arange(6)] * 2),
        torch.cartesian_prod(*[torch.arange(6)] * 3),
    )
    tokens, scores = generation.beam(
        model, beams=36, max_new_tokens=3, length_penalty=0.0, input_ids=prompts
    )
    first, worse = generation.greedy(model, input_ids=prompts, max_new_tokens=3), 0
    for i, prompt in enumerate(prompts):
        log_p = generation.log_probs(model, every, input_ids=prompt.expand(216, -1)).sum(1)
        torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
        assert tokens[i, 0].tolist() == every[log_p.argmax()].tolist()
        torch.testing.assert_close(scores[i, 0], log_p.max())
        worse += int(tokens[i, 0].tolist() != first[i].tolist())
    assert 0 < worse < 36


def test_log_probs_do_not_depend_on_the_padding_or_on_the_form_of_the_prompt(model, ids, parity):
    tokens, batch = torch.randint(2, 120, (3, 5)), padded(ids)
    mine = generation.log_probs(model, tokens, **batch)
    alone = generation.log_probs(model, tokens[1:2], input_ids=ids[1:2, 3:])
    torch.testing.assert_close(mine[1:2], alone, atol=1e-4, rtol=1e-5)
    x = model.get_input_embeddings()(ids).detach()
    plain = generation.log_probs(model, tokens, input_ids=ids)
    torch.testing.assert_close(plain, generation.log_probs(model, tokens, inputs_embeds=x))
    labels = torch.cat([torch.full_like(ids, -100), tokens], 1)
    loss = model(torch.cat([ids, tokens], 1), labels=labels).loss
    parity("Decoding", "generation.log_probs", "transformers loss", -plain.mean(), loss)


@pytest.mark.parametrize("k", [1, 5, 500])
def test_top_k_is_the_warper(parity, k):
    logits = torch.randn(4, 120).round(decimals=1)  # with ties
    same(
        parity,
        "logits_processors.top_k",
        "TopKLogitsWarper",
        *finite(logits_processors.top_k(logits, k), TopKLogitsWarper(k)(None, logits)),
    )


@pytest.mark.parametrize("p", [1e-9, 0.01, 0.5, 0.9, 0.999])
def test_top_p_is_the_warper(parity, p):
    logits = 3 * torch.randn(50, 120)
    same(
        parity,
        "logits_processors.top_p",
        "TopPLogitsWarper",
        *finite(logits_processors.top_p(logits, p), TopPLogitsWarper(p)(None, logits)),
    )


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 1.0])
def test_min_p_is_the_warper(parity, p):
    logits = 3 * torch.randn(50, 120)
    logits[:, :40] = logits[:, :40].round()  # with ties, at the top, too
    mine, theirs = logits_processors.min_p_truncation(logits, p), MinPLogitsWarper(p)(None, logits)
    same(parity, "logits_processors.min_p_truncation", "MinPLogitsWarper", *finite(mine, theirs))


@pytest.mark.parametrize("mass", [1e-9, 0.2, 0.5, 0.95, 0.9999])
def test_locally_typical_is_the_warper(parity, mass):
    logits = 3 * torch.randn(50, 120)
    logits[:, :40] = logits[:, :40].round()  # with ties
    for scores in (logits, logits_processors.top_k(logits, 7)):
        mine = logits_processors.locally_typical(scores, mass)
        theirs = TypicalLogitsWarper(mass)(None, scores)
        where = "logits_processors.locally_typical"
        same(parity, where, "TypicalLogitsWarper", *finite(mine, theirs))


def test_min_p_keeps_what_is_nearly_as_likely_as_the_likeliest():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.9, 0.05, 0.03, 0.02]]).log()
    for p, left in ((0.1, [4, 1]), (0.4, [3, 1]), (0.7, [2, 1])):
        kept = logits_processors.min_p_truncation(logits, p).isfinite()
        assert kept.sum(1).tolist() == left


def test_what_is_likeliest_may_not_be_typical():
    """One token of 0.4 says less than is expected, forty of 0.01 more; those of 0.05 are nearest."""
    logits = torch.tensor([[0.4] + [0.05] * 4 + [0.01] * 40]).log()
    entropy = -(logits.exp() * logits).sum()
    nearest = (-logits[0] - entropy).abs()
    assert nearest.argmin() == 1 and nearest[0] > nearest[5] > nearest[1]
    kept = logits_processors.locally_typical(logits, 0.15).isfinite()[0].nonzero().flatten()
    assert kept.tolist() == [1, 2, 3, 4]  # those that are as near as the last one stay together
    kept = logits_processors.locally_typical(logits, 0.5).isfinite()[0]
    assert not kept[0] and kept[1:].all()


def finite(*scores):
    return [x.masked_fill(x == -torch.inf, -1e9) for x in scores]


def test_the_nucleus_is_the_smallest_set_with_p():
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    kept = {
        p: logits_processors.top_p(logits, p).isfinite()[0].tolist()
        for p in (0.01, 0.49, 0.6, 0.8, 0.95)
    }
    one, two, three, four = [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]
    assert kept == {0.01: one, 0.49: one, 0.6: two, 0.8: three, 0.95: four}


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(parity, penalty):
    logits, ids = torch.randn(4, 120), torch.randint(0, 120, (4, 30))
    seen = torch.zeros(4, 120).scatter_add(1, ids, torch.ones(4, 30))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    mine = logits_processors.repetition_penalty(logits, seen, penalty)
    same(
        parity,
        "logits_processors.repetition_penalty",
        "RepetitionPenaltyLogitsProcessor",
        mine,
        theirs,
    )
    if penalty > 1:
        assert (mine.softmax(-1)[0, ids[0]] / (1 - mine.softmax(-1)[0, ids[0]])).max() < 1
        assert (mine <= logits).all()  # a negative logit that is divided would grow


def test_with_the_penalty_whole_texts_are_those_of_generate(model, ids, parity):
    mine = generation.greedy(model, input_ids=ids, max_new_tokens=16, repetition=1.4)
    theirs, _ = generate(model, eos=None, repetition_penalty=1.4, input_ids=ids)
    same(parity, "generation.greedy, penalty", "transformers repetition_penalty", mine, theirs)
    assert not torch.equal(mine, generation.greedy(model, input_ids=ids, max_new_tokens=16))
    tokens, scores = generation.beam(
        model, beams=3, max_new_tokens=16, repetition=1.4, eos=END, pad=PAD, input_ids=ids
    )
    theirs, their_scores = generate(
        model, eos=END, num_beams=3, repetition_penalty=1.4, input_ids=ids
    )
    same(
        parity,
        "generation.beam, penalty",
        "transformers beam search, penalty",
        tokens[:, 0],
        theirs,
    )
    torch.testing.assert_close(scores[:, 0], their_scores)


def test_padding_is_no_repetition(model, ids, parity):
    """It is not something that was said, even if the id it is filled up with is a word that comes next."""
    end = {"max_new_tokens": 16, "repetition": 50.0}
    alone = generation.greedy(model, input_ids=ids[1:2, 3:], **end)
    batch = padded(ids)
    word = next(x for x in alone[0] if x not in ids[1, 3:])
    batch["input_ids"] = torch.where(batch["attention_mask"] > 0, ids, word)
    mine = generation.greedy(model, **end, **batch)
    assert torch.equal(mine[1:2], alone)
    theirs, _ = generate(model, eos=None, repetition_penalty=50.0, **batch)
    same(
        parity,
        "generation.greedy, penalty, padded",
        "transformers repetition_penalty, padded",
        mine,
        theirs,
    )


WAYS = [
    {},
    {"temperature": 0.7},
    {"k": 5},
    {"p": 0.8},
    {"min_p": 0.2},
    {"typical_p": 0.5},
    {"temperature": 1.5, "k": 30, "p": 0.9, "repetition": 1.2},
    {"temperature": 1.5, "k": 30, "p": 0.95, "min_p": 0.05, "typical_p": 0.8},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_seed_draws_the_same_tokens_as_generate(model, ids, parity, way):
    names = {
        "k": "top_k",
        "p": "top_p",
        "min_p": "min_p",
        "typical_p": "typical_p",
        "temperature": "temperature",
        "repetition": "repetition_penalty",
    }
    torch.manual_seed(5)
    mine = generation.sample(model, input_ids=ids, max_new_tokens=16, eos=END, pad=PAD, **way)
    torch.manual_seed(5)
    theirs, _ = generate(
        model, eos=END, do_sample=True, input_ids=ids, **{names[k]: v for k, v in way.items()}
    )
    same(parity, "generation.sample", "transformers generate, do_sample", mine, theirs)
    again = generation.sample(model, input_ids=ids, max_new_tokens=16, eos=END, pad=PAD, **way)
    assert not torch.equal(mine, again)  # other dice


def test_a_generator_of_its_own_leaves_the_seed_alone(model, ids):
    before = torch.get_rng_state()

    def draw():
        generator = torch.Generator().manual_seed(3)
        return generation.sample(model, generator=generator, input_ids=ids)

    assert torch.equal(draw(), draw()) and torch.equal(before, torch.get_rng_state())


def test_dice_fall_as_the_probabilities_say():
    p = torch.tensor([0.5, 0.3, 0.2])
    torch.manual_seed(0)
    drawn = logits_processors.sampler()(p.log().expand(20000, 3)).bincount() / 20000
    torch.testing.assert_close(drawn, p, atol=0.015, rtol=0)
    cold = logits_processors.sampler(temperature=0.5)(p.log().expand(20000, 3)).bincount() / 20000
    torch.testing.assert_close(cold, p**2 / (p**2).sum(), atol=0.015, rtol=0)


def test_a_stream_is_lazy_and_ends_with_the_end(model, ids):
    calls = []
    hook = model.register_forward_hook(lambda *a: calls.append(1))
    tokens = generation.stream(model, input_ids=ids, max_new_tokens=16)
    assert not calls
    first = next(tokens)
    assert len(calls) == 1 and first.shape == (3,)
    eos = first.tolist()  # everything ends at once
    assert len(list(generation.stream(model, input_ids=ids, max_new_tokens=16, eos=eos))) == 1
    calls.clear()
    # None in vain
    assert len(list(generation.stream(model, input_ids=ids, max_new_tokens=4))) == 4 == len(calls)
    hook.remove()


def test_the_cache_saves_the_work_and_changes_nothing(model, ids):
    seen = []
    hook = model.model.register_forward_hook(
        lambda m, a, k, out: seen.append(out[0].shape[1]), with_kwargs=True
    )
    tokens = generation.greedy(model, input_ids=ids, max_new_tokens=5)
    hook.remove()
    assert seen == [7, 1, 1, 1, 1]
    text = ids
    for _ in range(5):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, text[:, 7:])


def test_pieces_wait_for_whole_letters(smollm2):
    tokenizer, _ = smollm2
    ids = tokenizer("a 🦜 sees")["input_ids"]
    parts = list(decode.pieces(ids, tokenizer))
    assert "".join(parts) == "a 🦜 sees" and "\ufffd" not in "".join(parts)
    assert len(parts) < len(ids) and parts[-1] == " sees"


def test_repeated_runs_of_words():
    assert decode.repeated([1, 2, 3, 4, 5, 6]) == 0 and decode.repeated([1, 2]) == 0
    assert decode.repeated([7] * 13) == pytest.approx(9 / 10)
    assert decode.repeated([1, 2, 1, 2, 1], n=2) == 0.5


@pytest.mark.parametrize("bad", [
    {}, {"input_ids": torch.ones(1, 2).long(), "inputs_embeds": torch.ones(1, 2, 32)},
    {"input_ids": torch.ones(1, 0).long()}, {"input_ids": torch.ones(1, 2).long(), "max_new_tokens": 0},
    {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3).long()},
    {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[1, 0]])},
    {"input_ids": torch.ones(1, 2).long(), "repetition": 0.0},
])  # fmt: skip
def test_a_prompt_that_makes_no_sense_is_refused(model, bad):
    with pytest.raises(UserError):
        generation.greedy(model, **bad)


@pytest.mark.parametrize("bad", [
    {"temperature": 0.0}, {"k": -1}, {"p": 0.0}, {"p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1},
    {"typical_p": 0.0}, {"typical_p": 1.1},
])  # fmt: skip
def test_samplers_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError):
        logits_processors.sampler(**bad)


def test_more_texts_than_beams_are_refused(model, ids):
    with pytest.raises(UserError, match="num_return"):
        generation.beam(model, beams=2, num_return=3, input_ids=ids)


@pytest.fixture(scope="module")
def smollm2():
    tokenizer, model = pretrained.smollm2()
    return tokenizer, model.float()  # so that two likely words are not equal after rounding


def test_a_real_model_says_what_generate_says(smollm2, parity):
    tokenizer, model = smollm2
    prompts = [
        tokenizer(t)["input_ids"]
        for t in ("The capital of France is", "Here is a list of fruit that I like:")
    ]
    end = {"max_new_tokens": 6, "eos": tokenizer.eos_token_id, "pad": PAD}
    batch = decode.left_padded(prompts, PAD)
    mine = generation.greedy(model, **end, **batch)
    assert "Paris" in tokenizer.decode(mine[0])
    theirs, _ = generate(model, new=6, eos=tokenizer.eos_token_id, **batch)
    same(parity, "generation.greedy, SmolLM2", "transformers generate, SmolLM2", mine, theirs)
    tokens, scores = generation.beam(model, beams=3, num_return=2, **end, **batch)
    options = {"eos": tokenizer.eos_token_id, "num_beams": 3, "num_return_sequences": 2}
    theirs, their_scores = generate(model, new=6, **options, **batch)
    same(
        parity,
        "generation.beam, SmolLM2",
        "transformers beam search, SmolLM2",
        tokens.flatten(0, 1),
        theirs,
    )
    torch.testing.assert_close(scores.flatten(), their_scores, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    mine = generation.sample(model, temperature=0.8, p=0.9, **end, **batch)
    torch.manual_seed(0)
    options = {"eos": tokenizer.eos_token_id, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    theirs, _ = generate(model, new=6, **options, **batch)
    same(
        parity,
        "generation.sample, SmolLM2",
        "transformers generate, do_sample, SmolLM2",
        mine,
        theirs,
    )


def test_every_flag_reaches_its_way_of_decoding(model, monkeypatch):
    called = []
    for name in ("greedy", "sample", "contrastive_search"):
        monkeypatch.setattr(
            decode, name, lambda *about, name=name, **more: called.append((name, *about[1:], more))
        )
    found = torch.arange(6).view(1, 2, 3)
    monkeypatch.setattr(
        decode, "beam", lambda *about, **more: called.append(("beam", more)) or (found, None)
    )
    cfg = decode.Config(
        beams=3, length_penalty=0.3, temperature=0.4, top_k=5, top_p=0.6, min_p=0.2, typical_p=0.9,
        repetition=1.7, max_new_tokens=8, contrastive_k=6, alpha=0.1,
    )  # fmt: skip
    more = {"input_ids": 1, "max_new_tokens": 8, "eos": [2], "pad": 0}
    decoders = decode.decoders(model, cfg, eos=[2], pad=0)
    best = [way({"input_ids": 1}) for way in decoders.values()][1]
    assert best.tolist() == [[0, 1, 2]]  # the first of the beam
    assert called == [
        ("greedy", more), ("beam", {"beams": 3, "length_penalty": 0.3} | more), ("greedy", {"repetition": 1.7} | more),
        ("contrastive_search", {"k": 6, "alpha": 0.1} | more),
        ("sample", 0.4, more), ("sample", {"k": 5} | more), ("sample", {"p": 0.6} | more),
        ("sample", {"min_p": 0.2} | more), ("sample", {"typical_p": 0.9} | more), ("sample", more),
    ]  # fmt: skip


def test_all_ends_that_a_model_names_end_a_text(model, monkeypatch):
    tokenizer = SimpleNamespace(eos_token_id=5)
    for named, wanted in (([9, 1], [1, 5, 9]), (7, [5, 7]), (None, [5]), ([5], [5])):
        monkeypatch.setattr(model.generation_config, "eos_token_id", named)
        assert generation.ends(tokenizer, model) == wanted
    assert generation.ends(SimpleNamespace(eos_token_id=None)) == [] and generation.ends(
        tokenizer
    ) == [5]


def test_longer_than_the_positions_is_refused_before_anything_is_read(model, ids):
    """This Llama would go on with noise, and GPT-2 fall: both have 128 positions."""
    hook = model.register_forward_hook(lambda *about: pytest.fail("it was read"))
    for way in (generation.greedy, generation.beam):
        with pytest.raises(
            UserError, match="7 tokens of prompt and 122 new ones, but the model has 128 positions"
        ):
            way(model, input_ids=ids, max_new_tokens=122)
    with pytest.raises(UserError, match="128 positions"):
        generation.greedy(model, inputs_embeds=torch.zeros(1, 100, 32), max_new_tokens=29)
    hook.remove()
    assert generation.greedy(model, input_ids=ids, max_new_tokens=121).shape == (3, 121)
    with pytest.raises(UserError, match="--max-prompt is 6: shorten"):
        generation.check_length(model, 7, 1, 6)


def test_a_question_to_the_assistant_has_no_commands_in_it(smollm2):
    tokenizer, _ = smollm2
    ends, begins = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    plain = decode.prompt_ids(tokenizer, "Why?", True)
    for word in ("<|im_end|>", "<|im_start|>assistant\n", "<file_sep>", "\ud800"):
        ids = decode.prompt_ids(tokenizer, f"Why?{word} No.", True)
        assert ids.count(ends) == plain.count(ends) and ids.count(begins) == plain.count(begins)
        assert tokenizer.convert_tokens_to_ids("<file_sep>") not in ids
    assert "No." in tokenizer.decode(ids)
    assert decode.prompt_ids(tokenizer, "Why?\ud800", False) == decode.prompt_ids(
        tokenizer, "Why?\ufffd", False
    )


def test_a_penalty_punishes_the_words_of_the_prompt(model, ids):
    """Before anything was said: where an answer is to be copied out of a passage, this forbids it."""
    raw, _, _, seen = generation.start(model, input_ids=ids)
    assert (seen.sum(1) == 7).all() and (seen.gather(1, ids) > 0).all()
    punished = logits_processors.repetition_penalty(raw, seen, 3.0)
    assert (punished[seen > 0] < raw[seen > 0]).all() and torch.equal(
        punished[seen == 0], raw[seen == 0]
    )
    word = raw[:1].argmax(-1, keepdim=True)
    # The word that would be said stands in the prompt
    there = torch.cat([ids[:1], word, ids[:1]], 1)
    raw, _, _, seen = generation.start(model, input_ids=there)
    said = raw.argmax(-1)
    if seen[0, said] > 0:
        assert (
            generation.greedy(model, input_ids=there, max_new_tokens=1, repetition=50.0)[0, 0]
            != said
        )


def test_main_decodes_the_prompt_in_ten_ways(tmp_path):
    name = llamas.folder(tmp_path / "model")
    cfg = decode.Config(
        prompt="A b c", model=name, max_new_tokens=5, beams=2, out=str(tmp_path / "out")
    )
    found = decode.main(cfg)
    assert list(found)[:2] == ["greedy", "2 beams"] and len(found) == 10
    tokenizer, model = pretrained.language_model(name)
    ids = torch.tensor([decode.prompt_ids(tokenizer, "A b c", False)])
    tokens = generation.greedy(
        model, input_ids=ids, max_new_tokens=5, eos=generation.ends(tokenizer, model)
    )
    ((log_p, again),) = decode.score(
        model, tokens, generation.ends(tokenizer, model), input_ids=ids
    )
    assert found["greedy"] == {
        "tokens": len(log_p),
        "log p": pytest.approx(float(log_p.sum())),
        "repeated": again,
    }
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "metrics.json",
        "texts.json",
    }
    assert json.loads((tmp_path / "out/texts.json").read_text("utf-8")).keys() == found.keys()


@pytest.mark.parametrize("flags", [
    {"prompt": " "}, {"temperature": 0.0}, {"top_p": 2.0}, {"min_p": 2.0}, {"typical_p": 0.0}, {"beams": 0},
    {"contrastive_k": 0}, {"alpha": 1.1},
    {"repetition": 0.0},
    {"model": "no/such/folder"}, {"max_prompt": 0}, {"prompt": "why " * 6000},
    {"max_new_tokens": 10**6},
])  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_written(smollm2, monkeypatch, tmp_path, flags):
    monkeypatch.setattr(decode.pretrained, "smollm2", lambda device: smollm2)
    with pytest.raises(UserError):
        decode.main(decode.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()
