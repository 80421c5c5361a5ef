"""Samples of many lengths for vlm/packing.py: images with a question, tweets, pages of manuals, mixed by weight."""

from utils import data
from utils.text import plain
from vlm.prompts import IGNORE
from vlm.samplers import Mixture


def conversation(tokenizer, question, answer, image, tokens=49):
    """A photo, a question and an answer as a sample: the answer and the token that ends it are
    supervised."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # the names of special tokens in them are plain text
    question = plain(question, tokenizer)
    answer = plain(answer, tokenizer)
    place = tokenizer.convert_tokens_to_ids("<file_sep>")  # so this token stands for images only
    prompt = encode("<|im_start|>user\n")
    prompt += [place] * tokens
    prompt += encode(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
    target = encode(f"{answer}<|im_end|>")
    return {"ids": prompt + target, "labels": [IGNORE] * len(prompt) + target, "images": [image]}


def collect(tokenizer, count, length, seed=0):
    """A mixture as for a LLaVA: half images, a quarter tweets, a quarter of one to eight paragraphs
    of manuals."""
    # manuals, in pieces of different lengths
    manuals = []
    for k, (_, page) in enumerate(data.docs()):
        paragraphs = page.split("\n\n")
        size = 1 + k % 8
        for i in range(0, len(paragraphs), size):
            manuals.append("\n\n".join(paragraphs[i : i + size]))
    # sources, and how often each is drawn
    sources = {
        "pictures": [*enumerate(data.emoji()[1])],
        "tweets": [text for text, _ in data.tweets()],
        "manuals": [text for text in manuals if len(text) > 80],
    }
    mixture = Mixture(sources, {"pictures": 2, "tweets": 1, "manuals": 1}, seed)
    samples = []
    for _, item in zip(range(count), mixture):
        if isinstance(item, tuple):
            number, name = item
            samples.append(conversation(tokenizer, "What does the picture show?", name, number))
        else:
            ids = tokenizer(plain(item, tokenizer), truncation=True, max_length=length)["input_ids"]
            samples.append({"ids": ids, "labels": list(ids), "images": []})
    return samples
