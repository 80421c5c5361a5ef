"""vlm/processor.py: chat templates that write the beginning-of-sequence token, messages in parts, batches."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessorPil, LlavaProcessor

from tests import llamas
from utils.run import UserError
from vlm.processor import VLMProcessor
from vlm.prompts import IMAGE, TEMPLATES, chat

TURN = [{"role": "user", "content": f"{IMAGE}\nWhat is it?"}]
# The template of a processor: the content of a message is a list of parts
IN_PARTS = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(template="vicuna"):
    """Of SmolLM2, but as Llama's it puts <s> before every text."""
    made = copy.deepcopy(llamas.tokenizer())
    made.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": [IMAGE]})
    rule = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.bos_token_id)])
    made.backend_tokenizer.post_processor = rule
    made.chat_template = TEMPLATES.get(template, template)
    assert made("a").input_ids[0] == made.bos_token_id
    return made


def images():
    """28 x 28 pixels become 16 tokens, patches of 7."""
    size = {"height": 28, "width": 28}
    return CLIPImageProcessorPil(size=size, crop_size=size)


@pytest.fixture(scope="module")
def made():
    return VLMProcessor(images(), tokenizer(), image_tokens=16)


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def parts(seed=0, words="What is it?"):
    """A message as processors of transformers take it."""
    content = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_training(template):
    """bos stands where the template writes it: once, or never, whatever the tokenizer puts before a text."""
    ours = VLMProcessor(images(), tokenizer(template), image_tokens=16)
    found = ours.apply_chat_template(
        parts(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids, _ = chat(ours.tokenizer, [(TURN[0]["content"], None)], 16)
    assert found["input_ids"].tolist() == [ids]
    assert ids.count(ours.tokenizer.bos_token_id) == (template != "chatml")


@pytest.mark.parametrize("template", ["vicuna", "llava_llama_2"])
def test_ids_are_those_of_transformers_llava_processor(parity, template):
    """`apply_chat_template` of transformers, and our call on the text that it writes."""
    about = {"patch_size": 7, "vision_feature_select_strategy": "full"}
    theirs = LlavaProcessor(images(), tokenizer(template), **about)
    theirs.chat_template = TEMPLATES[template]
    ours = VLMProcessor(images(), tokenizer(template), image_tokens=16)
    more = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    options = {"images": [picture()]}
    other = theirs.apply_chat_template(TURN, processor_kwargs=options, return_tensors="pt", **more)
    text = ours.apply_chat_template(TURN, add_generation_prompt=True)
    mine = ours(picture(), text, return_tensors="pt")
    starts = int((mine["input_ids"] == ours.tokenizer.bos_token_id).sum())
    assert starts == 1 and mine["input_ids"][0, 0] == ours.tokenizer.bos_token_id
    name = f"VLMProcessor, {template}"
    for key in ("input_ids", "pixel_values"):
        parity("LLaVA", f"{name}, {key}", "LlavaProcessor", mine[key], other[key], atol=0)


def test_a_text_without_bos_gets_one(made):
    bos = made.tokenizer.bos_token_id
    assert made(text="words").input_ids[0][0] == bos
    assert made(text="words", add_special_tokens=False).input_ids[0][0] != bos
    # one of two texts has it already: the library's own rule is kept
    both = made(text=["<s>words", "words"]).input_ids
    assert both[0][:2] == [bos, bos] and both[1][0] == bos
    assert made(text=["<s>words", "<s>more"]).input_ids[1].count(bos) == 1


def test_conversations_in_a_batch(made):
    """Two conversations: padded, two pictures in their order; the same as one by one."""
    two = [parts(1), parts(2, "And this, what is it called?")]
    options = {"padding": True, "padding_side": "left"}
    more = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    found = made.apply_chat_template(two, processor_kwargs=options, return_tensors="pt", **more)
    for i, one in enumerate(two):
        alone = made.apply_chat_template(one, return_tensors="pt", **more)
        ids = found["input_ids"][i][found["attention_mask"][i].bool()]
        assert torch.equal(ids, alone["input_ids"][0])
        assert torch.equal(found["pixel_values"][i], alone["pixel_values"][0])
    ids = made.apply_chat_template(two[0], add_generation_prompt=True, tokenize=True)
    text = made.apply_chat_template(two[0], add_generation_prompt=True)
    assert ids == made(picture(1), text).input_ids


def test_a_template_that_reads_parts():
    made = VLMProcessor(images(), tokenizer(IN_PARTS), image_tokens=1)
    for turn in (TURN, parts()):
        text = made.apply_chat_template(turn, add_generation_prompt=True)
        assert text == f"<s>user: {IMAGE}\nWhat is it?<|im_end|>assistant: "


def test_a_part_of_another_kind_is_one_line(made):
    turn = [{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}]
    with pytest.raises(UserError, match="image or text: video"):
        made.apply_chat_template(turn)
    place = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    text = made.apply_chat_template(place)
    assert f"{IMAGE}\na" in text
    with pytest.raises(UserError, match="1 <image> in the text, but 0 pictures"):
        made.apply_chat_template(place, tokenize=True)
