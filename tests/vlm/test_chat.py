"""vlm/chat.py: a conversation with pictures is that of transformers' LLaVA; what the cache keeps changes nothing."""

import pytest
import torch

from tests import eyes
from tests.vlm.chats import Recorded, anew, loud, picture
from utils.run import UserError
from vlm import chat, generation, llava, llava_transformers, prompts
from vlm import tower as towers
from vlm.prompts import IMAGE

TURNS = [(1, "What is it?"), (0, "Is it green?"), (2, f"Is {IMAGE} like {IMAGE}?"), (0, "Why?")]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """tokenizer, LLaVA of tiny parts: 16 tokens a picture."""
    tokenizer, model = eyes.talker(tmp_path_factory.mktemp("talker"))
    return tokenizer, loud(model)


def test_turns_with_several_pictures_are_those_of_transformers(talker, parity):
    """Ids of the answers by `generate`, logits by a forward pass, over the whole conversation each time."""
    tokenizer, model = talker
    theirs = llava_transformers.to_transformers(model)
    processor = llava_transformers.processor(model, tokenizer)
    conversation = Recorded(tokenizer, model, max_new_tokens=6)
    messages = []
    seen = []
    ids = {"ours": [], "theirs": []}
    logits = {"ours": [], "theirs": []}
    for count, question in TURNS:
        new = [picture(len(seen) + i) for i in range(count)]
        seen += new
        # theirs
        placed = question if IMAGE in question else f"{IMAGE}\n" * count + question
        messages.append({"role": "user", "content": placed})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(images=seen, text=text, return_tensors="pt")
        about = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        about["eos_token_id"] = prompts.ends(tokenizer, model.language)
        out = theirs.generate(**inputs, **about)[0, inputs["input_ids"].shape[1] :]
        ids["theirs"].append(out)
        logits["theirs"].append(theirs(**inputs).logits[:, -1])
        # ours
        for one in new:
            conversation.add(one)
        conversation.said = []
        conversation.logits = []
        said = "".join(conversation.ask(question))
        ids["ours"].append(torch.tensor(conversation.said))
        logits["ours"].append(conversation.logits[0])
        messages.append({"role": "assistant", "content": said.strip()})
    name = "transformers LlavaForConditionalGeneration"
    about = "chat.Conversation, four turns, three pictures"
    parity("Multi-turn chat", f"{about}, ids", f"{name}.generate", ids["ours"], ids["theirs"], 0)
    parity("Multi-turn chat", f"{about}, logits", name, logits["ours"], logits["theirs"], 1e-4)
    assert len({tuple(x.tolist()) for x in ids["ours"]}) == 4
    assert conversation.turns[2][0] == TURNS[2][1] and len(conversation.shown) == 3


def test_one_question_is_that_of_generation(talker):
    tokenizer, model = talker
    conversation = chat.Conversation(tokenizer, model, 5)
    conversation.add(picture(3))
    said = "".join(conversation.ask("What?"))
    wanted, p = generation.answer_and_probability(tokenizer, model, picture(3), "What?", 5)
    assert said.strip() == wanted
    assert float(torch.tensor(conversation.log_p).exp()) == pytest.approx(p, rel=1e-3)
    # the probability is that of the last answer alone
    "".join(conversation.ask("And now?"))
    again = anew(conversation)
    again.undo()
    "".join(again.ask("And now?"))
    assert conversation.log_p == pytest.approx(again.log_p, rel=1e-3)


@pytest.mark.parametrize("kind", [*eyes.SPEAKERS, "sliding"])
def test_what_the_cache_keeps_changes_nothing(kind, talker, monkeypatch, parity):
    """Any language model: the logits of each question equal those of reading the conversation anew."""
    tokenizer, _ = talker
    sliding = kind == "sliding"
    # a window shorter than the conversation cannot be cropped: all is read again
    window = {"sliding_window": 24}
    monkeypatch.setitem(eyes.SPEAKERS, "mistral", eyes.LLAMA | (window if sliding else {}))
    language = eyes.speaker("mistral" if sliding else kind, len(tokenizer))
    language = eyes.shake(language, 0.2)
    vision = towers.VisionTower(eyes.tower())
    model = loud(llava.build(vision, "mlp2x_gelu", language, tokenizer).eval())
    conversation = Recorded(tokenizer, model, max_new_tokens=3)
    rows = {"kept": [], "anew": []}
    for seed in range(3):
        conversation.add(picture(seed))
        other = anew(conversation)
        conversation.logits = []
        for each in (conversation, other):
            "".join(each.ask("Which?"))
        assert conversation.turns == other.turns
        rows["kept"].append(conversation.logits[0])
        rows["anew"].append(other.logits[0])
    name = f"chat.Conversation with its cache, {kind}"
    parity("Multi-turn chat", name, "the whole conversation read anew", *rows.values(), 1e-4)
    assert sliding or conversation.reused > 40


def test_only_what_is_new_is_read(talker):
    tokenizer, model = talker
    conversation = Recorded(tokenizer, model, max_new_tokens=4)
    conversation.add(picture(0))
    "".join(conversation.ask("What is it?"))
    first = len(conversation.cached_keys)
    assert conversation.fed == first and conversation.reused == 0
    length = len(conversation.prompt("Why?")[0])
    before = conversation.fed
    said = len(conversation.said)
    "".join(conversation.ask("Why?"))
    new = len(conversation.said) - said
    # prompt and first question are found; the end of the answer, the question and its answer are read
    assert conversation.fed - before == length - conversation.reused + new - 1
    assert first - 4 <= conversation.reused <= first
    kept = conversation.cache
    assert kept and kept.get_seq_length() == len(conversation.cached_keys)


def test_another_picture_in_the_same_place_is_read(talker):
    tokenizer, model = talker
    said = []
    for seed in (0, 1):
        conversation = Recorded(tokenizer, model, max_new_tokens=6)
        conversation.add(picture(0))
        "".join(conversation.ask("What?"))
        conversation.undo()
        assert len(conversation.waiting) == 1 and not conversation.shown
        if seed:
            conversation.clear()
            conversation.add(picture(1))
        other = anew(conversation)
        said.append("".join(conversation.ask("What?")))
        assert said[-1] == "".join(other.ask("What?"))
        # the same picture again is found, another one is not
        assert conversation.reused > 16 if seed == 0 else conversation.reused < 16
    assert said[0] != said[1]


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_pass_leaves_no_half_cache(layer, talker, monkeypatch):
    """Ctrl-C between two layers: some have the new keys, others do not."""
    tokenizer, model = talker
    conversation = Recorded(tokenizer, model, max_new_tokens=5)
    conversation.add(picture(0))
    "".join(conversation.ask("What?"))
    block = model.language.model.layers[layer]
    whole = block.forward
    calls = []

    def stopped(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **more)

    monkeypatch.setattr(block, "forward", stopped)
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        pieces += conversation.ask("Why?")
    monkeypatch.undo()
    # what was said before it stays a turn
    assert len(conversation.turns) == 2 and conversation.cache is None
    other = anew(conversation)
    assert "".join(conversation.ask("And?")) == "".join(other.ask("And?"))


def test_a_question_that_is_refused_changes_nothing(talker):
    tokenizer, model = talker
    conversation = Recorded(tokenizer, model, max_new_tokens=4, max_prompt=60)
    conversation.add(picture(0))
    for question, line in (
        (" ", "type a question"),
        (f"{IMAGE} or {IMAGE}?", "2 <image> in the question, 1 pictures"),
        ("why " * 100, "--max-prompt is 60.*in a chat /undo and /clear make room"),
        ("why " * 600, "has 512 positions"),
    ):
        with pytest.raises(UserError, match=line):
            "".join(conversation.ask(question))
        assert not conversation.turns and len(conversation.waiting) == 1
    # no more than fits into the positions, however many turns
    with pytest.raises(UserError, match="512 positions.*/clear"):
        for _ in range(60):
            "".join(conversation.ask("why?"))
    turns = list(conversation.turns)
    assert 10 < len(turns) < 60
    conversation.undo()
    conversation.undo()
    assert "".join(conversation.ask("why?")) and len(conversation.turns) == len(turns) - 1


def test_one_image_becomes_the_tokens_of_its_picture(talker):
    """As prompts.chat writes them, and with tiles as many as each picture has."""
    tokenizer, model = talker
    conversation = chat.Conversation(tokenizer, model)
    for seed in range(2):
        conversation.add(picture(seed))
    question = f"A {IMAGE} and{IMAGE}\nb?"
    ids, _, keys = conversation.prompt(question)
    assert ids == prompts.chat(tokenizer, [(question, None)], model.count)[0]
    assert [key for key in keys if isinstance(key, tuple)] == [
        (name, i) for name in range(2) for i in range(16)
    ]
    tiled = chat.Conversation(tokenizer, model, tiles=4)
    sizes = [(30, 90), (50, 50)]
    for size in sizes:
        tiled.add(picture(0, size))
    ids, embeddings, _ = tiled.prompt(question)
    counts = [len(x) for x in embeddings]
    assert len(set(counts)) == 2 and ids.count(model.image_id) == sum(counts)


def test_control_tokens_and_empty_answers_are_text(talker, monkeypatch):
    tokenizer, model = talker
    conversation = Recorded(tokenizer, model, max_new_tokens=2)
    "".join(conversation.ask("a<|im_end|>\ud800b"))
    assert "\ud800" not in conversation.turns[0][0]
    ids = conversation.prompt("c")[0]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3
    # an answer of its end alone
    conversation.end_ids = list(range(len(tokenizer)))
    assert "".join(conversation.ask("c")) == "" and conversation.turns[-1] == ("c", "")
    assert len(conversation.prompt("d")[0]) > len(ids)
