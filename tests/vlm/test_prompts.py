"""vlm/prompts.py, vlm/templates.py: prompts and targets of any chat template, masked as transformers does it."""

import copy
import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests import eyes, fuzz, llamas
from utils import checkpoint
from utils.run import UserError
from vlm import conversations, data, generation, llava_io, llava_parts, prompts
from vlm.fruit_photos import QUESTION
from vlm.prompts import IMAGE, TEMPLATES

TURNS = [(f"{IMAGE}\nWhat is it?", "a pear"), ("Is it red?", "no"), ("Sure?", "yes, I am")]

# In the style of well-known models: special words, the template, what is learned of TURNS
STYLES = {
    "llama-3": (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|start_header_id|>", "<|end_header_id|>"],
        "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role"
        " + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "a pear<|eot_id|>no<|eot_id|>yes, I am<|eot_id|>",
    ),
    "gemma": (
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        ["<start_of_turn>", "<end_of_turn>"],
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role)"
        " + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "a pear<end_of_turn>no<end_of_turn>yes, I am<end_of_turn>",
    ),
    "phi-3": (
        {"eos_token": "<|endoftext|>"},
        ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "a pear<|end|>no<|end|>yes, I am<|end|>",
    ),
    "qwen2.5": (
        {},
        [],
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "a pear<|im_end|>no<|im_end|>yes, I am<|im_end|>",
    ),
    "mistral": (
        {"bos_token": "<s>", "eos_token": "</s>"},
        ["[INST]", "[/INST]"],
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        " a pear</s> no</s> yes, I am</s>",
    ),
}  # fmt: skip
LEARNED = {
    "plain": "a pear<|im_end|>no<|im_end|>yes, I am<|im_end|>",
    "vicuna": " a pear<|im_end|> no<|im_end|> yes, I am<|im_end|>",
    "llava_llama_2": " a pear <|im_end|> no <|im_end|> yes, I am <|im_end|>",
    "mistral_instruct": " a pear<|im_end|> no<|im_end|> yes, I am<|im_end|>",
    "chatml": "a pear<|im_end|>no<|im_end|>yes, I am<|im_end|>",
}


def smollm2(*words):
    """A copy of SmolLM2's tokenizer with <image> and these words."""
    tokenizer = copy.deepcopy(llamas.tokenizer())
    add(tokenizer, {}, [IMAGE, *words])
    return tokenizer


def add(tokenizer, named, words):
    more = {**named, "additional_special_tokens": words}
    tokenizer.add_special_tokens(more, replace_extra_special_tokens=False)


@pytest.fixture(scope="module")
def talkers():
    """{name: a tokenizer with this template}: ours, and those in the style of other models."""
    found = {}
    for name in TEMPLATES:
        found[name] = smollm2()
        prompts.use_template(found[name], name)
    for name, (named, words, template, _) in STYLES.items():
        found[name] = smollm2(*words)
        add(found[name], named, [])
        found[name].chat_template = template
        prompts.use_template(found[name])
        assert found[name].chat_template == template
    return found


EVERY = [*TEMPLATES, *STYLES]


def learned(ids, supervised):
    return [i for i, is_target in zip(ids, supervised) if is_target]


def as_messages(turns, count, system=""):
    """Turns as transformers takes them, with <image> as often as a picture has tokens."""
    found = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        found.append({"role": "user", "content": question.replace(IMAGE, IMAGE * count)})
        found.append({"role": "assistant", "content": answer})
    return found


SETS = {
    "fruit, train": "fd50efa8a67235971a9533871b33976b513b0be559e478e629e9f4607b26dad0",
    "fruit, test": "115f9544f6e9cf670b7956cc462bfb9487dd9b3cfcd0623f789e062ea1f5de9b",
    "emoji": "a2aef43a6b53ac177f5de881eec4bd15ed7d79b851e5554275f84e5d78443c7c",
}


@pytest.mark.parametrize("name", SETS)
def test_chatml_is_what_the_weights_of_the_book_learned(talkers, tmp_path, name):
    """ids and supervised of every row as they were when llava.safetensors was trained."""
    rows = data.emoji(tmp_path, 200) if name == "emoji" else data.fruit(name[7:])
    made = [prompts.chat(talkers["chatml"], conversations.turns_of(one), 9) for one in rows]
    assert hashlib.sha256(json.dumps(made).encode()).hexdigest() == SETS[name]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_ids_and_mask_are_those_of_transformers(talkers, parity, name, system):
    tokenizer = talkers[name]
    ids, supervised = prompts.chat(tokenizer, TURNS, 4, system)
    theirs = tokenizer.apply_chat_template(
        as_messages(TURNS, 4, system), return_assistant_tokens_mask=True, return_dict=True
    )
    mine = {"ids": torch.tensor(ids), "mask": torch.tensor(supervised).long()}
    other = {
        "ids": torch.tensor(theirs["input_ids"]),
        "mask": torch.tensor(theirs["assistant_masks"]),
    }
    assert ids.count(tokenizer.convert_tokens_to_ids(IMAGE)) == 4 and any(supervised)
    counterpart = "transformers apply_chat_template(return_assistant_tokens_mask=True)"
    parity("Prompt templates", f"prompts.chat, {name}", counterpart, mine, other, 0)


@pytest.mark.parametrize("name", EVERY)
def test_answers_and_their_ends_are_learned_and_nothing_else(talkers, name):
    tokenizer = talkers[name]
    ids, supervised = prompts.chat(tokenizer, TURNS, 4)
    text = tokenizer.decode(learned(ids, supervised))
    assert text == (STYLES[name][3] if name in STYLES else LEARNED[name])
    # all of it is the text of the template
    whole = tokenizer.apply_chat_template(as_messages(TURNS, 4), tokenize=False)
    assert tokenizer.decode(ids) == whole
    # of each turn the end is one token, the one that stops generation
    end = tokenizer.convert_tokens_to_ids(prompts.end_of_answer(tokenizer))
    assert learned(ids, supervised).count(end) == 3 and ids[supervised.index(True) - 1] != end
    assert end in prompts.ends(tokenizer, eyes.speaker())


@pytest.mark.parametrize("name", EVERY)
def test_what_is_asked_in_use_begins_what_was_learned(talkers, name):
    tokenizer = talkers[name]
    ids, supervised = prompts.chat(tokenizer, TURNS, 4)
    for k in range(len(TURNS)):
        asked, none = prompts.chat(tokenizer, [*TURNS[:k], (TURNS[k][0], None)], 4)
        assert ids[: len(asked)] == asked and supervised[len(asked)] and not none[-1]
        assert sum(none) == sum(supervised[: len(asked)])
    # the first prompt is what transformers would ask
    one = as_messages(TURNS[:1], 4)[:1]
    theirs = tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False)
    asked, _ = prompts.chat(tokenizer, [(TURNS[0][0], None)], 4)
    assert asked == tokenizer(theirs, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("answer", ["yes", "\n\n  yes", "end", "user", "think", "a\n", "n n"])
def test_answers_that_look_like_the_template_end_where_they_end(talkers, name, answer):
    """Spaces at the border join no token, and an answer may say what the template says."""
    tokenizer = talkers[name]
    turns = [("What?", answer), ("And?", answer)]
    ids, supervised = prompts.chat(tokenizer, turns, 1)
    whole = tokenizer.apply_chat_template(as_messages(turns, 1), tokenize=False)
    assert tokenizer.decode(ids) == whole
    asked, _ = prompts.chat(tokenizer, [("What?", None)], 1)
    assert ids[: len(asked)] == asked and supervised.index(True) == len(asked)
    end = tokenizer.convert_tokens_to_ids(prompts.end_of_answer(tokenizer))
    answers = tokenizer.decode(learned(ids, supervised)).split(prompts.end_of_answer(tokenizer))
    assert [text.strip() for text in answers] == [answer.strip(), answer.strip(), ""]
    assert learned(ids, supervised)[-1] == end
    made = generation.answer_ids(tokenizer, "What?", answer)
    assert learned(*prompts.chat(tokenizer, [(f"{IMAGE}\nWhat?", answer)], 1)) == made


@pytest.mark.parametrize("name", EVERY)
def test_what_somebody_types_is_no_command(talkers, name):
    tokenizer = talkers[name]
    special = [word for word in tokenizer.all_special_tokens if word != IMAGE]
    said = "".join(f" {word} x" for word in special)
    ids, _ = prompts.chat(tokenizer, [(f"{IMAGE}{said}", f"no{said}{IMAGE}")], 3)
    plain, _ = prompts.chat(tokenizer, [(IMAGE, "no")], 3)
    for word in (*special, IMAGE):
        number = tokenizer.convert_tokens_to_ids(word)
        assert ids.count(number) == plain.count(number), word


def test_a_system_message_is_no_command(talkers):
    tokenizer = talkers["chatml"]
    ids, _ = prompts.chat(tokenizer, [("What?", "no")], 1, "Be brief.<|im_end|>")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


@pytest.mark.parametrize("name", ["vicuna", "llava_llama_2", "mistral_instruct", "chatml"])
def test_pictures_stand_where_the_text_has_them(name):
    tokenizer = smollm2(prompts.START, prompts.END)
    prompts.use_template(tokenizer, name)
    question = f"{IMAGE} or{IMAGE}? Which is red, left{IMAGE}"
    text = tokenizer.decode(prompts.chat(tokenizer, [(question, None)], 2)[0])
    place = f"{prompts.START}{IMAGE * 2}{prompts.END}"
    assert question.replace(IMAGE, place) in text and text.count(IMAGE) == 6
    assert IMAGE not in tokenizer.decode(prompts.chat(tokenizer, [("red?", "no")], 2)[0])
    system = tokenizer.decode(prompts.chat(tokenizer, [("red?", "no")], 2, "Be brief.")[0])
    assert system.count("Be brief.") == 1 and system.index("Be brief.") < system.index("red?")


# Two turns and a third question, with bos "<s>" and eos "</s>", behind a system message where there is one
TEXTS = {
    "plain": "<s><image>a pear</s>Is it red?no</s>Sure?",
    "vicuna": "<s>Be brief. USER: <image>\nWhat is it? ASSISTANT: a pear</s>"
    "USER: Is it red? ASSISTANT: no</s>USER: Sure? ASSISTANT:",
    "llava_llama_2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is it? [/INST] a pear </s>"
    "<s>[INST] Is it red? [/INST] no </s><s>[INST] Sure? [/INST]",
    "mistral_instruct": "<s>[INST] Be brief.\n\n<image>\nWhat is it? [/INST] a pear</s>"
    "[INST] Is it red? [/INST] no</s>[INST] Sure? [/INST]",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\na pear<|im_end|>\n<|im_start|>user\nIs it red?<|im_end|>\n"
    "<|im_start|>assistant\nno<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_formats_are_these(name):
    tokenizer = smollm2()
    add(tokenizer, {"bos_token": "<s>", "eos_token": "</s>"}, [])
    prompts.use_template(tokenizer, name)
    system = "" if name == "plain" else "Be brief."
    ids, _ = prompts.chat(tokenizer, [*TURNS[:2], ("Sure?", None)], 1, system)
    assert tokenizer.decode(ids) == TEXTS[name]
    # without a system message nothing stands in its place
    ids, _ = prompts.chat(tokenizer, [*TURNS[:2], ("Sure?", None)], 1)
    frames = ("<|im_start|>system\nBe brief.<|im_end|>\n", "<<SYS>>\nBe brief.\n<</SYS>>\n\n")
    text = TEXTS[name]
    for frame in (*frames, "Be brief.\n\n", "Be brief. "):
        text = text.replace(frame, "")
    assert tokenizer.decode(ids) == text


def test_of_two_words_the_longer_ends_an_answer():
    tokenizer = smollm2("<|e|>")
    # an added token that is not special, as those of Phi and Qwen
    tokenizer.add_tokens(["<|e|>!"])
    tokenizer.chat_template = TEMPLATES["chatml"].replace("<|im_end|>", "<|e|>!")
    prompts.use_template(tokenizer)
    assert prompts.end_of_answer(tokenizer) == "<|e|>!"
    ids, supervised = prompts.chat(tokenizer, TURNS, 1)
    assert tokenizer.decode(learned(ids, supervised)) == "a pear<|e|>!no<|e|>!yes, I am<|e|>!"


def test_plain_is_pictures_and_caption(talkers):
    tokenizer = talkers["plain"]
    pair = [(f"Look: {IMAGE}{IMAGE}\nWhat is it?", "a pear"), ("Which?", None)]
    bos = tokenizer.bos_token
    made = tokenizer.decode(prompts.chat(tokenizer, pair, 2)[0])
    assert made == f"{bos}{IMAGE * 4}a pear<|im_end|>Which?"


def test_without_a_template_it_is_vicuna_and_the_choice_is_saved(tmp_path):
    tokenizer = smollm2()
    own = tokenizer.chat_template
    prompts.use_template(tokenizer)
    assert tokenizer.chat_template == own
    tokenizer.chat_template = None
    ids, _ = prompts.chat(tokenizer, TURNS, 4)
    prompts.use_template(tokenizer)
    assert tokenizer.chat_template == TEMPLATES["vicuna"]
    assert prompts.chat(tokenizer, TURNS, 4)[0] == ids
    (tmp_path / "own.jinja").write_text(TEMPLATES["mistral_instruct"] + "\n", "utf-8")
    prompts.use_template(tokenizer, str(tmp_path / "own.jinja"))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert prompts.chat(again, TURNS, 4) == prompts.chat(tokenizer, TURNS, 4)
    assert "[INST]" in again.decode(prompts.chat(again, TURNS, 4)[0])
    shutil.rmtree(tmp_path / "saved")


def test_content_in_parts_is_read_as_texts_are(talkers):
    """Templates of processors take the content as a list of parts."""
    tokenizer = smollm2()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    prompts.use_template(tokenizer)
    assert prompts.chat(tokenizer, TURNS, 4) == prompts.chat(talkers["chatml"], TURNS, 4)
    assert prompts.end_of_answer(tokenizer) == "<|im_end|>"


def test_a_template_without_an_end_gets_eos():
    """As llava-hf's own: a space behind an answer, no token. The space is not learned."""
    tokenizer = smollm2()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    prompts.use_template(tokenizer)
    ids, supervised = prompts.chat(tokenizer, TURNS[1:], 4)
    assert tokenizer.decode(learned(ids, supervised)) == " no<|im_end|> yes, I am<|im_end|>"
    text = "USER: Is it red? ASSISTANT: no<|im_end|> USER: Sure? ASSISTANT: yes, I am<|im_end|> "
    assert tokenizer.decode(ids) == text and prompts.end_of_answer(tokenizer) == "<|im_end|>"


def test_the_date_of_a_template_is_the_same_every_day():
    tokenizer = smollm2()
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y %f') %}{% endif %}"
        + "{{ date_string }}"
        + TEMPLATES["chatml"]
    )
    prompts.use_template(tokenizer)
    ids, _ = prompts.chat(tokenizer, TURNS, 1)
    assert tokenizer.decode(ids).startswith("26 Jul 2024")


def test_a_piece_gets_no_space_that_the_text_has_not(parity):
    """SentencePiece writes a space before what begins a text; a piece of a conversation begins none."""
    letters = ["▁", *"USER:ASITNabcdefghijklmnopqrstuvwxyz?\n0"]
    vocabulary = {letter: i for i, letter in enumerate(dict.fromkeys(["<unk>", *letters]))}
    bare = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    bare.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    add(tokenizer, {}, [IMAGE])
    assert len(tokenizer(" a", add_special_tokens=False).input_ids) == 3
    prompts.use_template(tokenizer)
    turns = [(f"{IMAGE}\nwhat?", "a pear"), ("red?", "no")]
    ids, supervised = prompts.chat(tokenizer, turns, 2)
    theirs = tokenizer.apply_chat_template(
        as_messages(turns, 2), return_assistant_tokens_mask=True, return_dict=True
    )
    parity(
        "Prompt templates",
        "prompts.tokens_behind",
        "transformers apply_chat_template, SentencePiece's normalizer",
        torch.tensor([ids, supervised]),
        torch.tensor([theirs["input_ids"], theirs["assistant_masks"]]),
        0,
    )


BAD = [
    ("{% for m in messages %}", "the chat template fails"),
    ("{{ messages[0].content", "the chat template fails"),
    ("", "is empty"),
    ("{{ bos_token }}", "leaves out what the user says"),
    ("{{ raise_exception('not today') }}", "fails: not today"),
    ("{{ messages[9].content + 1 }}", "the chat template fails"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "the chat template fails"),
    # the prompt is no beginning, the answer is not there, or is changed
    ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "its own prompt"),
    ("{{ messages[0].content }}", "changes the answer"),
    ("{% for m in messages %}{{ m.content | upper | replace('IMAGE', 'image') }}{% endfor %}", "changes the answer"),
    # its end is no token
    (TEMPLATES["chatml"].replace("<|im_end|>", "<|done|>"), "'<|done|>' behind an answer is no token"),
    ("{% for m in messages %}{{ '<image>' + m.content }}{% endfor %}", "each <image> of a question once"),
]  # fmt: skip


@pytest.mark.parametrize("text, says", BAD)
def test_a_bad_template_is_refused_in_one_line(tmp_path, text, says):
    tokenizer = llamas.tokenizer()
    own = tokenizer.chat_template
    path = tmp_path / "bad.jinja"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError) as found:
        prompts.use_template(tokenizer, str(path))
    line = str(found.value)
    assert says in line and "bad.jinja" in line and "vicuna" in line and "\n" not in line
    assert tokenizer.chat_template == own and len(line) < 700
    # its own, from a folder that somebody wrote
    tokenizer = smollm2()
    tokenizer.chat_template = text or "\n"
    with pytest.raises(UserError, match="chat template its own"):
        prompts.use_template(tokenizer)


def test_files_that_are_no_text_are_refused(tmp_path):
    tokenizer = llamas.tokenizer()
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    for name, says in (
        ("latin.jinja", "not UTF-8"),
        ("none.jinja", "No such file"),
        (".", "cannot read"),
    ):
        with pytest.raises(UserError, match=says) as found:
            prompts.use_template(tokenizer, str(tmp_path / name))
        assert "one of plain, vicuna" in str(found.value)


def test_damaged_templates_are_taken_or_refused(tmp_path):
    """500 damaged Jinja files, fixed seed: what is taken learns answers with their ends, or says why not."""
    tokenizer = smollm2()
    path = tmp_path / "damaged.jinja"
    outcomes = []
    for bad in fuzz.damaged(TEMPLATES["chatml"].encode(), 500, seed=1):
        path.write_bytes(bad)
        made = fuzz.reads_or_refuses(lambda: taught(tokenizer, str(path)))
        outcomes.append(made is not None)
        assert made is None or "a pear" in made and "<|im_end|>" in made
    assert 20 < sum(outcomes) < 400  # both happen


def taught(tokenizer, path):
    prompts.use_template(tokenizer, path)
    return tokenizer.decode(learned(*prompts.chat(tokenizer, TURNS[:1], 1)))


def test_an_earlier_turn_written_in_another_way_is_refused():
    """Some templates drop what an answer thought once it is an earlier turn: prompts in use would differ."""
    tokenizer = smollm2()
    tokenizer.chat_template = TEMPLATES["chatml"].replace(
        "{{- message['content'] + '<|im_end|>' }}\n        {%- endgeneration %}",
        "{{- ('<think>\n\n</think>' if loop.last else '') + message['content'] + '<|im_end|>' }}"
        "\n        {%- endgeneration %}",
    )
    prompts.use_template(tokenizer)
    ids, supervised = prompts.chat(tokenizer, [("What?", "think")], 1)
    assert tokenizer.decode(learned(ids, supervised)) == "<think>\n\n</think>think<|im_end|>"
    with pytest.raises(UserError, match="writes an earlier turn in another way"):
        prompts.chat(tokenizer, TURNS, 1)


def test_a_question_is_asked_and_an_answer_refused_without_a_word_that_ends_it():
    """Some tokenizers have neither an end nor padding: to ask works, to teach when to stop cannot."""
    bare = Tokenizer(models.WordLevel({"[UNK]": 0, "what": 1, "apple": 2, "\n": 3}, "[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]")
    language = eyes.speaker()
    language.generation_config.eos_token_id = None
    assert prompts.add_words(tokenizer, language) == 4 and prompts.ends(tokenizer, language) == []
    prompts.use_template(tokenizer)
    ids, supervised = prompts.chat(tokenizer, [(f"{IMAGE} what", None)], 2)
    assert ids.count(4) == 2 and not any(supervised)
    with pytest.raises(UserError, match="no word that ends an answer"):
        prompts.chat(tokenizer, [("what", "apple")], 2)


def test_an_answer_stops_at_every_word_that_ends_one(talkers):
    language = eyes.speaker()
    language.generation_config.eos_token_id = [7, 9]
    tokenizer = talkers["llama-3"]
    assert prompts.end_of_answer(tokenizer) == "<|eot_id|>"
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert prompts.ends(tokenizer, language) == sorted({7, 9, end})


def test_weights_are_asked_in_the_template_of_their_training(tmp_path, monkeypatch):
    """The header of the file holds its text; one that does not fit is refused."""
    language = eyes.speaker()
    connector = torch.nn.Linear(1, 1)
    made = llava_parts.Parts(torch.nn.Identity(), connector, language, 0)
    monkeypatch.setattr(llava_io, "language_model", lambda name, on: (smollm2(), language))
    monkeypatch.setattr(llava_io.tower, "load", lambda *names: made.vision)
    monkeypatch.setattr(llava_io, "build", lambda *names, **more: made)
    named = {"language": "x", "vision": "x", "connector": "x", "layer": -2, "select": "patch"}
    weights = {f"connector.{name}": x for name, x in connector.state_dict().items()}
    found = []
    for template in ({}, {"chat_template": TEMPLATES["llava_llama_2"]}, {"chat_template": "{{ x"}):
        path = tmp_path / f"{len(found)}.safetensors"
        checkpoint.write(path, weights, named | {"scale": 2.0} | template)
        if len(found) < 2:
            found.append(llava_io.restore(path)[0].chat_template)
    assert found == [smollm2().chat_template, TEMPLATES["llava_llama_2"]]
    with pytest.raises(UserError, match="the chat template fails"):
        llava_io.restore(path)


def test_smollm2_speaks_chatml_without_its_own_system_message():
    """vlm/llava_parts.py: a question about a photo of nine tokens has 24 in all, in its own template 45."""
    tokenizer, language = llava_parts.language_model("smollm2")
    prompts.add_words(tokenizer, language)
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    ids = generation.prompt_ids(tokenizer, SimpleNamespace(language=language), QUESTION, 9)
    own, _ = prompts.chat(smollm2(), [(f"{IMAGE}\n{QUESTION}", None)], 9)
    assert ids.shape[1] == 24 and len(own) == 45 and own[-24:] == ids[0].tolist()
