"""vlm/ptb_tokenizer.py against the Java program of the COCO evaluation; METEOR where Java is at hand."""

import random
import re
import subprocess

import pytest

from utils import data
from vlm import caption_java
from vlm.ptb_tokenizer import ptb_tokenize

CAPTIONS = """Two dogs don't play; it's a man's t-shirt.
A black-and-white cat (asleep) -- on a 3.5 m sofa... at 10 a.m. in the U.S.
Mr. Smith can't pay $5.00 or 1,000 euros, and/or #1 & 50% of "it".
She cannot, gonna, wanna, gotta go! 'Tis a cat. I'd've. They're we'll
A sign that reads "no parking" at 2:30pm, mother-in-law's 1/2 cup, o'clock
A St. Bernard on 5th Ave. near the U.K. flag no. 5 vs. 6 etc.
A 4x4 truck, a 3D print and 2 20th-century 2000s cars at 5pm.
The dog's bone isn't here; the dogs' bones aren't.
a group of people sitting around a table,eating [one] {two}
A sign reading 'STOP'; it’s don’t “smart”""".split("\n")


def test_a_caption_as_people_write_it():
    assert ptb_tokenize("It's a man's T-shirt (red), isn't it?") == (
        "it 's a man 's t-shirt -lrb- red -rrb- is n't it".split()
    )
    assert ptb_tokenize("...") == []


def java(sentences, folder):
    """Tokens of each sentence by the Java program, without the punctuation that the evaluation drops."""
    dropped = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
    place = caption_java.package()
    assert place is not None
    (jar,) = place.glob("tokenizer/stanford-corenlp-*.jar")
    path = folder / "captions.txt"
    path.write_text("\n".join(sentences), "utf-8")
    command = [
        "java",
        "-Dfile.encoding=UTF-8",
        "-cp",
        str(jar),
        "edu.stanford.nlp.process.PTBTokenizer",
    ]
    found = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", str(path)], capture_output=True, check=True
    )
    lines = found.stdout.decode("utf-8").split("\n")
    return [[w for w in line.split() if w not in dropped] for line in lines[: len(sentences)]]


needs_java = pytest.mark.skipif(caption_java.package() is None, reason="there is no Java here")


@needs_java
def test_tokens_are_those_of_the_java_program(tmp_path):
    names = sorted(set(data.emoji(32)[1]))
    assert [ptb_tokenize(t) for t in CAPTIONS] == java(CAPTIONS, tmp_path)
    assert [ptb_tokenize(t) for t in names] == java(names, tmp_path)


@needs_java
def test_sentences_of_manuals_have_the_same_tokens_but_for_versions(tmp_path):
    sentences = []
    for _, page in data.docs():
        for sentence in re.split(r"(?<=[.!?])\s+", page.replace("\n", " ")):
            # no code, no addresses
            prose = re.fullmatch(r"[\w .,;:!?'()\"-]{20,200}", sentence)
            if prose and not re.search(r"[^\w ]{2}|_| {2}|\)\w", sentence):
                sentences.append(sentence)
    chosen = random.Random(0).sample(sentences, 1000)
    theirs = java(chosen, tmp_path)
    wrong = [text for text, tokens in zip(chosen, theirs) if ptb_tokenize(text) != tokens]
    assert len(wrong) <= 10, wrong


@needs_java
@pytest.mark.long
def test_meteor_is_that_of_the_java_program():
    said = [["a", "person", "riding", "horses"], ["a", "dog", "plays"]]
    people = [
        [["a", "man", "rides", "a", "horse"]],
        [["two", "cats"], ["dogs", "playing", "outside"]],
    ]
    found = caption_java.java_scores(said, people)
    # a stem counts, and so does the better reference
    same = caption_java.java_scores(said, [[tokens] for tokens in said])
    assert 0.05 < found["METEOR"] < 0.5 < same["METEOR"]


def test_without_java_the_scores_are_left_out(monkeypatch):
    monkeypatch.setattr(caption_java.shutil, "which", lambda name: None)
    assert caption_java.java_scores([["a"]], [[["a"]]]) == {}
