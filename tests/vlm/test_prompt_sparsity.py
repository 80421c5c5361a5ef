"""vlm/prompt_sparsity.py: top-k by the prompt inside a LLaVA; whose words choose, training, packing, saved models."""

import copy

import pytest
import torch

from tests import eyes, llamas
from tests.vlm.test_llava import IMAGE_ID
from utils.run import UserError
from vlm import (
    chat,
    connector,
    flops_parts,
    generation,
    llava,
    llava_io,
    packing,
    prompts,
    sparsity,
    token_sparsity,
)
from vlm import prompt_sparsity as ps
from vlm import train as teach
from vlm.serve import worker

K = 5


def plugin(coarse=0, width=12, keep=K):
    torch.manual_seed(0)
    made = ps.PromptSparsity(keep, width, coarse)
    torch.nn.init.normal_(made.norm.weight)
    return made.eval()


@pytest.fixture
def some():
    """Tokens (3,16,12), words (3,7,12), mask (3,7)."""
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 4:] = False
    return torch.randn(3, 16, 12), torch.randn(3, 7, 12), mask


def model(plugins=("prompt5",), tokenizer=None):
    """A tiny LLaVA: 16 vision features, K image tokens chosen by the prompt."""
    torch.manual_seed(3)
    made = llamas.tiny(vocabulary=len(tokenizer)) if tokenizer else eyes.speaker()
    tokenizer = tokenizer or Words()
    about = ("linear", made, tokenizer)
    tower = llava.llava_parts.tower.VisionTower(eyes.tower(), -2, "patch")
    options = {"sparsity_plugins": plugins}
    found = llava.build(tower, *about, options=options)
    for p in found.connector.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5)
    # words are small: a query is theirs, not that of the bias
    torch.nn.init.zeros_(found.connector.by_prompt.query.project.bias)
    return found.eval()


class Words:
    """A tokenizer that has the word <image> already."""

    pad_token_id = 0
    eos_token = None

    def __len__(self):
        return 50

    def add_special_tokens(self, *about, **more):
        return 0

    def convert_tokens_to_ids(self, word):
        return IMAGE_ID


def text(rows=2, places=K, seed=0):
    ids = torch.randint(3, IMAGE_ID, (rows, places + 8), generator=torch.manual_seed(seed))
    ids[:, 3 : 3 + places] = IMAGE_ID
    return ids


def test_the_kept_tokens_are_those_of_top_k_unchanged(some, parity):
    tokens, words, mask = some
    made = plugin()
    query = made.query(words, mask.float())
    _, indices = sparsity.top_k(made.norm(tokens), query, K)
    kept = token_sparsity.take(tokens, indices)
    name = "sparsity.top_k"
    parity("Token sparsity", "prompt_sparsity.PromptSparsity", name, made(*some), kept, 0)
    assert not torch.equal(made(tokens, words.flip(0), mask), kept)


def test_a_prompt_without_words_has_the_null_query(some):
    tokens, words, mask = some
    made = plugin()
    _, indices = sparsity.top_k(made.norm(tokens), made.query.null.expand(3, -1), K)
    found = made(tokens, words, torch.zeros_like(mask))
    assert torch.equal(found, token_sparsity.take(tokens, indices))


def test_two_resolutions_are_means_over_a_grid_and_the_best(some):
    made = plugin(coarse=2)
    both = made(*some)
    assert both.shape[1] == made.count(16) == 4 + K
    assert torch.equal(both[:, :4], token_sparsity.pool(some[0], 2))
    assert torch.equal(both[:, 4:], plugin()(*some))


def test_training_samples_tokens_by_the_softmax_of_their_scores(some):
    """Gumbel-max: one token of 16 with p = softmax(logits)."""
    tokens, words, mask = (x[:1] for x in some)
    made = plugin(keep=1)
    logits = made.scale * sparsity.cosine(made.norm(tokens), made.query(words, mask.float()))
    p = logits.softmax(1)[0].detach()
    made.train()
    many = [x.expand(20_000, *x.shape[1:]) for x in (tokens, words, mask)]
    drawn = (made(*many).detach()[:, 0, None] == tokens).all(-1).float().mean(0)
    assert (drawn - p).abs().max() < 4 * (0.25 / 20_000) ** 0.5


def test_gradients_reach_the_query_through_the_gates_of_kept_tokens(some):
    tokens, words, mask = some
    made = plugin()
    weights = torch.randn(3, K, 12)
    (made(*some) * weights).sum().backward()
    mine = made.query.project.weight.grad.clone()
    made.zero_grad()
    # the same by hand: sum over kept tokens of (weight . token) times p
    query = made.query(words, mask.float())
    cosine = sparsity.cosine(made.norm(tokens), query)
    _, indices = sparsity.top_k(made.norm(tokens), query, K)
    p = torch.sigmoid(made.scale * cosine).gather(1, indices)
    inner = (weights * token_sparsity.take(tokens, indices)).sum(-1)
    (p * inner.detach()).sum().backward()
    assert mine.abs().max() > 0
    assert torch.allclose(mine, made.query.project.weight.grad, atol=1e-5)


def test_prompts_are_no_padding_and_no_answers():
    ids = torch.full((2, 6), 7)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    labels = torch.full((2, 6), prompts.IGNORE)
    labels[:, 3] = 7
    assert ps.prompts_of(ids, mask, labels).tolist() == [[1, 1, 1, 0, 1, 0], [0, 1, 1, 0, 1, 1]]
    assert ps.prompts_of(ids).tolist() == [[1] * 6] * 2
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]] * 2)
    block = torch.ones(2, 1, 6, 6)
    assert ps.prompts_of(ids, block, labels, segments).tolist() == [[1, 1, 2, 0, 2, 0]] * 2


def test_each_picture_is_chosen_by_the_words_of_its_own_conversation():
    made = model()
    table = made.language.get_input_embeddings()
    tokens = torch.randn(3, 16, 24)
    # a row of two conversations, a row of one
    ids = torch.cat([text(1, seed=1), text(1, seed=2)], dim=1)
    one = torch.cat([text(1, seed=3), torch.full((1, 13), 5)], dim=1)
    ids = torch.cat([ids, one])
    prompt_of = torch.ones_like(ids)
    prompt_of[0, 13:] = 2
    prompt_of[1, 13:] = 0
    places = ids == IMAGE_ID
    words = table(ids.masked_fill(places, 0))
    found = ps.choose(made.connector, tokens, places, words, prompt_of)
    for n, own in enumerate((text(1, seed=1), text(1, seed=2), text(1, seed=3))):
        is_image = own == IMAGE_ID
        alone = table(own.masked_fill(is_image, 0))
        expected = made.connector.by_prompt(tokens[n : n + 1], alone, ~is_image)
        assert torch.equal(found[n : n + 1], expected)
    # without the numbers the neighbour's words count, too
    other = ps.choose(made.connector, tokens, places, words)
    assert not torch.equal(other[:1], found[:1])
    with pytest.raises(UserError, match="the text has 15 places .* 2 pictures fill 5 each"):
        ps.choose(made.connector, tokens[:2], places, words)


def test_the_answer_does_not_choose_and_packed_rows_are_as_padded_ones():
    made = model()
    learner = teach.Learner(made).eval()
    pixels = torch.randn(2, 3, 28, 28)
    samples = []
    for ids in text().tolist():
        labels = [prompts.IGNORE] * 10 + ids[10:]
        samples.append({"ids": ids, "labels": labels})
    padded = packing.pad(samples, 0)
    rows = packing.packed([samples], 0)
    rows["mask"] = packing.block_mask(rows["segments"], torch.float32)
    made.language.set_attn_implementation("eager")
    assert torch.allclose(learner(padded, pixels), learner(rows, pixels), rtol=1e-5)
    # what is to be learned is no part of the query
    chosen = []
    by_prompt = made.connector.by_prompt
    by_prompt.register_forward_hook(lambda module, args, out: chosen.append(args[2]))
    learner(padded, pixels)
    assert chosen[0].tolist() == [[True] * 3 + [False] * 5 + [True] * 2 + [False] * 3] * 2


def test_a_batch_without_pictures_has_gradients_of_zero():
    made = model()
    learner = teach.Learner(made)
    ids = text()[:, :3].repeat(1, 3)
    batch = packing.pad([{"ids": row, "labels": row} for row in ids.tolist()], 0)
    learner(batch, None).backward()
    grads = [p.grad for p in made.connector.parameters()]
    assert all(g is not None and not g.any() for g in grads)


@pytest.fixture(scope="module")
def spoken():
    """A tiny LLaVA with the real tokenizer -> tokenizer, model."""
    # a copy: a word is added to it
    tokenizer = copy.deepcopy(llamas.tokenizer())
    prompts.use_template(tokenizer, "chatml")
    return tokenizer, model(tokenizer=tokenizer).eval()


def test_another_question_sees_other_tokens(spoken):
    tokenizer, made = spoken
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    seen = generation.photo_embeddings(made, image)
    assert seen.shape[1] == 16 and made.count == ps.places_for(made, seen) == K
    kept = []
    for question in ("What is on the left?", "What is on the right, under the tree?"):
        ids = generation.prompt_ids(tokenizer, made, question, K)
        embeds = made.embed(ids, seen)
        places = (ids == made.image_id)[0]
        kept.append(embeds[0, places])
        words = made.language.get_input_embeddings()(ids[:, ~places])
        everything = torch.ones(words.shape[:2], dtype=torch.bool)
        assert torch.equal(kept[-1], made.connector.by_prompt(seen, words, everything)[0])
    assert not torch.equal(kept[0], kept[1])
    assert isinstance(generation.answer(tokenizer, made, image, "What?", max_new_tokens=3), str)


def test_a_saved_folder_chooses_the_same_tokens(spoken, tmp_path):
    tokenizer, made = spoken
    llava_io.save(made, tokenizer, tmp_path / "saved")
    _, again = llava.load(str(tmp_path / "saved"))
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    ids = generation.prompt_ids(tokenizer, made, "What is it?", K)
    embeds = [m.embed(ids, generation.photo_embeddings(m, image)).float() for m in (made, again)]
    assert torch.allclose(*embeds, atol=0.05)
    # as a model of transformers: its forward pass and its generate
    from vlm.modeling import VLM

    theirs = VLM.from_pretrained(tmp_path / "saved").float().eval()
    pixels = torch.randn(1, 3, 28, 28)
    mine = theirs(input_ids=ids, pixel_values=pixels).logits
    prompt_of = torch.ones_like(ids)
    embeds = theirs.embed(ids, theirs.get_image_features(pixels), prompt_of)
    assert torch.equal(mine, theirs.language(inputs_embeds=embeds).logits)
    # left padding is no part of the prompt
    wide = torch.cat([torch.full((1, 4), 5), ids], dim=1)
    mask = torch.ones_like(wide)
    mask[:, :4] = 0
    about = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    padded = theirs(input_ids=wide, pixel_values=pixels, **about).logits
    assert torch.allclose(padded[:, 4:], mine, atol=1e-4)
    one = theirs.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=1, do_sample=False)
    assert int(one[0, -1]) == int(mine[0, -1].argmax())


def test_what_keeps_tokens_for_several_questions_refuses(spoken, monkeypatch):
    tokenizer, made = spoken
    with pytest.raises(UserError, match="a chat keeps them for several: ask with --image"):
        chat.Conversation(tokenizer, made)
    monkeypatch.setattr(llava, "load", lambda *about: (tokenizer, made))
    with pytest.raises(UserError, match="a server keeps them"):
        worker.load(worker.Config())


@pytest.mark.parametrize(
    "plugins, says",
    [
        (("prompt",), "have a number"),
        (("prompt0",), "have a number"),
        (("coarse3",), "come last"),
        (("prompt9", "coarse3"), "come last"),
        (("prompt9", "pool3"), "come last"),
        (("prompt9", "prompt9"), "come once"),
    ],
)
def test_bad_names(plugins, says):
    with pytest.raises(UserError, match=says):
        connector.build("linear", 8, 8, plugins)


def test_plugins_before_and_behind_the_connector():
    made = connector.build("linear", 8, 12, ("pool3", "coarse2", "prompt4"))
    assert connector.tokens(made, 49) == 8 and made(torch.randn(1, 49, 8)).shape == (1, 9, 12)
    assert not connector.has_places(made)
    with pytest.raises(UserError, match="coarse2 needs a grid of tokens"):
        connector.build("perceiver", 8, 12, ("coarse2", "prompt4"))
    with pytest.raises(UserError, match="keeps 17 of 16 tokens"):
        connector.tokens(connector.build("linear", 8, 8, ("prompt17",)), 16)
    config = flops_config(["topk_norm9", "coarse2", "prompt4"])
    assert flops_parts.image_tokens(config, 49) == 8
    assert flops_parts.connector_tokens(config, 49) == 9


def flops_config(plugins):
    from vlm.config import VLMConfig

    return VLMConfig(connector="linear", sparsity_plugins=plugins)
