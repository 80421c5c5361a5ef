"""deploy/constrained.py, token_mask.py: whatever the logits are and however few tokens there are, it is JSON."""

import json

import pytest
import torch

from deploy import constrained, generation, json_schema
from deploy.json_grammar import JsonGrammar, read
from deploy.logits_processors import sampler
from deploy.token_bytes import token_bytes
from deploy.token_mask import REFUSED, TokenMask, plain_from
from tests import llamas
from utils import pretrained
from utils.run import UserError

ENDS = [0, 2]
FIELDS = ["name:string", "age:integer", "mood:happy,sad", "wise:boolean", "size:number"]


@pytest.fixture(scope="module")
def tokens():
    return token_bytes(llamas.tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with the real tokenizer."""
    return llamas.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mask(tokens):
    return TokenMask(JsonGrammar(4, root="object"), tokens, ENDS)


@pytest.fixture(scope="module")
def of_fields(tokens):
    return TokenMask(json_schema.ObjectGrammar(json_schema.fields(FIELDS)), tokens, ENDS)


BEGINNINGS = [
    "",
    "{",
    '{"',
    '{"a\\',
    '{"a\\u0',
    '{"a":',
    '{"a":-',
    '{"a":[1',
    '{"a":[[["',
    '{"a":"b"}',
    '{"a":t',
]


@pytest.mark.parametrize("text", BEGINNINGS)
def test_the_mask_is_that_of_every_token_tried_alone(mask, text):
    state = (read(mask.grammar, text), ())
    check_mask(mask, state)


@pytest.mark.parametrize("waiting", [(1, 0x80, 0xBF), (2, 0x80, 0x9F), (3, 0x90, 0xBF)])
def test_in_the_middle_of_a_letter_only_its_bytes_may_come(mask, waiting):
    state = (read(mask.grammar, '{"a'), waiting)
    check_mask(mask, state)
    may = [mask.tokens[i] for i in mask.allowed(state, 99).nonzero().flatten()]
    assert may and all(waiting[1] <= token[0] <= waiting[2] for token in may)
    nowhere = (read(mask.grammar, '{"a":1'), ())
    assert mask.byte_step(nowhere, 0xC3) is None  # no such letter outside of strings


def check_mask(mask, state):
    """Compare it with a walk over the bytes of each token."""
    wanted = torch.full((mask.vocabulary,), REFUSED, dtype=torch.int16)
    for i in range(len(mask.tokens)):
        after = mask.advance(state, i)
        if after is not None:
            wanted[i] = mask.left(after)
    if not state[1] and mask.grammar.is_complete(state[0]):
        wanted[ENDS] = 0
    assert torch.equal(mask.bytes_left(state), wanted)
    assert (wanted < REFUSED).sum() > 2 and (wanted == REFUSED).sum() > 100
    assert mask.bytes_left(state) is mask.bytes_left(state)  # the second time it is there


def test_the_end_may_come_only_where_the_text_is_complete(mask):
    for text, complete in (
        ('{"a": [1]}', True),
        ("{}\n", True),
        ('{"a": [1]', False),
        ("{", False),
        ("", False),
    ):
        allowed = mask.allowed((read(mask.grammar, text), ()), 50)
        assert bool(allowed[ENDS].all()) == bool(allowed[ENDS].any()) == complete
    special = llamas.tokenizer().all_special_ids
    assert not allowed[[i for i in special if i not in ENDS]].any()


def test_when_few_tokens_are_left_only_what_can_be_closed_may_come(mask):
    state = (read(mask.grammar, '{"a":'), ())
    for left in range(12):
        for i in mask.allowed(state, left).nonzero().flatten().tolist():
            assert len(mask.grammar.closing(mask.advance(state, i)[0])) <= left
    assert not mask.allowed(state, 0).any() and mask.allowed(state, 1).any()


def bias(kind, tokens):
    """What random logits love, for each token."""
    loved = {
        "anything": lambda token: False,
        "quotes": lambda token: b'"' in token,
        "brackets": lambda token: (
            token.strip(b" \n\t")[:1] in (b"{", b"[") or token.endswith((b":", b": "))
        ),
        "escapes": lambda token: b"\\" in token or b'"' in token or token == b"u",
        "pieces": lambda token: plain_from(token) == len(token) or b'"' in token,
    }[kind]
    return torch.tensor([6.0 * bool(token and loved(token)) for token in tokens])


@pytest.mark.parametrize("kind", ["anything", "quotes", "brackets", "escapes", "pieces"])
def test_random_logits_write_json(mask, of_fields, tokens, kind):
    """50 texts each, of 2 to 40 tokens; that the end is hated changes nothing."""
    torch.manual_seed(0)
    love = bias(kind, tokens)
    lengths = {2: 5, 3: 5, 7: 10, 16: 20, 40: 10}
    seen = []
    for most, rows in lengths.items():
        seen += write(mask, love, most, rows)
    assert len(seen) == 50 and all(isinstance(json.loads(text), dict) for text in seen)
    assert len(set(seen)) > 25
    least = of_fields.left(of_fields.start)
    for text in write(of_fields, love, least, 5) + write(of_fields, love, least + 20, 10):
        made = json.loads(text)
        assert [type(made[k]) for k in ("name", "age", "mood", "wise")] == [str, int, str, bool]
        assert made["mood"] in ("happy", "sad") and list(made)[-1] == "size"


def write(mask, love, most, rows):
    """Texts of at most so many tokens from random logits."""
    pick = constrained.ConstrainedPick(mask, max_new_tokens=most)
    hate = torch.zeros(rows, 1)
    hate[rows // 2 :] = -50.0
    written = [b""] * rows
    for _ in range(most):
        logits = 2 * torch.randn(rows, mask.vocabulary) + love
        logits[:, ENDS] += hate
        before = list(pick.states) or [mask.start] * rows
        chosen = pick(logits).tolist()
        for row, (state, token) in enumerate(zip(before, chosen)):
            if state is not None and token not in ENDS:
                written[row] += mask.tokens[token]
                assert pick.states[row] is not None  # what was chosen may come
            else:
                assert pick.states[row] is None
        if not any(pick.states):
            break
    return [text.decode("utf-8") for text in written]


def test_a_model_writes_json_in_a_batch(folder):
    """Through generation.stream, with padding and draws."""
    tokenizer, model = pretrained.language_model(folder)
    mask = TokenMask(JsonGrammar(4), token_bytes(tokenizer), ENDS)
    ids = torch.randint(20, 1000, (3, 6))
    batch = {
        "input_ids": ids,
        "attention_mask": (torch.arange(6) >= torch.tensor([[0], [2], [3]])).long(),
    }
    pick = constrained.ConstrainedPick(mask, sampler(1.5, 50, 0.9, 0.01, 0.9), 12)
    rows = torch.stack(list(generation.stream(model, pick, 12, ENDS, pad=ENDS[0], **batch)), 1)
    for row in rows:
        json.loads(tokenizer.decode(row, skip_special_tokens=True))
    assert pick.seconds > 0


def test_of_the_tokens_that_may_come_the_pick_takes_the_one_it_would_take_anyway(mask):
    pick = constrained.ConstrainedPick(mask)
    pick.states = [(read(mask.grammar, text), ()) for text in ('{"a', '{"a":')]
    logits = torch.randn(2, mask.vocabulary)
    word = llamas.tokenizer()(" Paris")["input_ids"][0]
    logits[:, word] = 99.0
    first, second = pick(logits).tolist()
    assert first == word != second
    allowed = mask.allowed((read(mask.grammar, '{"a":'), ()), 39)
    assert second == int(logits[1].masked_fill(~allowed, -torch.inf).argmax())
    # any other pick is asked, too: here that of the least likely
    least = constrained.ConstrainedPick(mask, lambda x: x.where(x.isfinite(), torch.inf).argmin(-1))
    least.states = [(read(mask.grammar, '{"a":'), ())]
    assert int(least(logits[1:])) == int(logits[1].masked_fill(~allowed, torch.inf).argmin())


BYTES = [bytes([byte]) for byte in range(256)]  # the smallest vocabulary


def test_a_vocabulary_wider_than_the_tokens():
    mask = TokenMask(JsonGrammar(2), BYTES, ENDS, vocabulary=300)
    allowed = mask.allowed(mask.start, 20)
    assert allowed.shape == (300,) and allowed.sum() > 10 and not allowed[256:].any()


def test_old_states_make_room():
    mask = TokenMask(JsonGrammar(8), BYTES, ENDS, max_states=3)
    for depth in range(6):
        mask.bytes_left((read(mask.grammar, "[" * depth), ()))
    assert [stack for (_, stack), _ in mask.cache] == ["[[[", "[[[[", "[[[[["]


def test_what_cannot_be_made_sure_is_refused():
    mask = TokenMask(JsonGrammar(2, root="object"), BYTES, ENDS)
    constrained.ConstrainedPick(mask, max_new_tokens=2)
    with pytest.raises(UserError, match="shortest text has 2 bytes"):
        constrained.ConstrainedPick(mask, max_new_tokens=1)
    with pytest.raises(UserError, match="1 bytes are no token"):
        TokenMask(JsonGrammar(), [token for token in BYTES if token != b"}"], ENDS)


@pytest.mark.parametrize("fields", [(), ("wise:boolean", "mood:happy,sad")])  # ends by itself
def test_main_answers_in_json(folder, tmp_path, fields):
    cfg = constrained.Config(
        model=folder, fields=fields, max_new_tokens=70, out=str(tmp_path / "out")
    )
    rows = constrained.main(cfg)
    texts = json.loads((tmp_path / "out/texts.json").read_text("utf-8"))
    made = json.loads(texts["constrained"])
    assert isinstance(made, dict) and texts.keys() == {"free", "constrained"}
    assert [*made] == [text.split(":")[0] for text in fields] if fields else True
    assert rows["constrained"]["JSON"] and not rows["free"]["JSON"]
    assert rows["masks"]["states"] > 1 and rows["constrained"]["tokens"] <= 70
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "metrics.json",
        "texts.json",
    }


def test_a_real_model_fills_in_the_fields():
    """SmolLM2 knows what a name is; only the form is ours."""
    tokenizer, model = pretrained.smollm2()
    cfg = constrained.Config(fields=("city:string", "country:string"))
    mask = TokenMask(
        constrained.grammar(cfg), token_bytes(tokenizer), ENDS, model.config.vocab_size
    )
    ids = constrained.decode.prompt_ids(tokenizer, "What is the capital of France?", True)
    pick = constrained.ConstrainedPick(mask, max_new_tokens=40)
    stream = generation.stream(model, pick, 40, ENDS, input_ids=torch.tensor([ids]))
    text = tokenizer.decode([int(token) for token in stream], skip_special_tokens=True)
    assert json.loads(text)["city"] == "Paris", text


@pytest.mark.parametrize("flags", [
    {"prompt": " "}, {"fields": ("a",)}, {"fields": ("a:text",)}, {"max_new_tokens": 0}, {"max_new_tokens": 1},
    {"max_depth": 0}, {"temperature": -1.0}, {"model": "no/such/folder"}, {"max_new_tokens": 10**6},
    {"fields": ("a:string", "b:string"), "max_new_tokens": 8},
])  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_written(folder, tmp_path, flags):
    flags = {"model": folder} | flags
    with pytest.raises(UserError):
        constrained.main(constrained.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def test_flags_reach_the_grammar_and_the_sampler(folder, tmp_path, monkeypatch):
    cfg = constrained.Config(max_depth=3)
    assert constrained.grammar(cfg) == JsonGrammar(3, "object")
    drawn = []
    monkeypatch.setattr(constrained, "sampler", lambda t: drawn.append(t) or sampler(t))
    out = str(tmp_path / "out")
    constrained.main(constrained.Config(model=folder, temperature=0.7, max_new_tokens=3, out=out))
    assert drawn == [0.7]
