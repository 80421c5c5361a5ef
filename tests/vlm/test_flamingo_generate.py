"""vlm/flamingo_generate.py: interleaved prompts, cached greedy decoding, the command, bad prompts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests import eyes, llamas
from utils import checkpoint, pretrained
from utils.run import UserError
from vlm import few_shot, flamingo, flamingo_generate, flamingo_model, tower

IMAGE, END = 98, 99


def model(kind="llama"):
    """A tiny Flamingo whose gates are open and whose weights are all moved."""
    language = eyes.shake(eyes.speaker(kind), 0.1)
    torch.manual_seed(3)
    made = flamingo.Flamingo(
        language, [IMAGE, END], dim_in=16, every=1, latents=3, latent_width=12
    ).eval()
    return eyes.shake(made, 0.3)


def prompt():
    return torch.tensor([[1, 7, IMAGE, 8, END, IMAGE, 9, 10]])


def whole_reading(made, ids, latents, count, end_ids):
    """The same without a cache: the whole text is read again for each word."""
    found = []
    for _ in range(count):
        logits = made(ids, latents)[0, -1].float()
        logits[IMAGE] = -torch.inf
        found.append(int(logits.argmax()))
        if found[-1] in end_ids:
            break
        ids = torch.cat([ids, torch.tensor([[found[-1]]])], 1)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_cached_decoding_gives_the_words_of_whole_readings(kind):
    made = model(kind)
    differ = 0
    for seed in range(5):
        latents = made.resample(
            torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(seed))
        )
        wanted = whole_reading(made, prompt(), latents, 8, {END})
        assert list(flamingo_generate.generate(made, prompt(), latents, {END}, 8)) == wanted
        blind = flamingo_generate.generate(made, prompt(), 0 * latents, {END}, 8)
        differ += list(blind) != wanted
    assert differ  # the pictures are seen


class Scripted:
    """In the place of a Flamingo: its next words are known, and it notes what it is asked to read."""

    def __init__(self, words):
        self.new_ids = torch.tensor([IMAGE, END])
        self.words = list(words)
        self.read = []

    def states(self, ids, latents, before=0, cache=None):
        self.read.append((ids.tolist(), before))
        return torch.zeros(1, ids.shape[1], 4)

    def head(self, states):
        logits = torch.zeros(1, 100)
        for rank, word in enumerate(self.words.pop(0)):
            logits[0, word] = 10 - rank
        return logits


def test_decoding_ends_with_the_end_of_the_chunk_and_new_words_see_the_last_picture():
    made = Scripted([[20], [21], [END], [22]])
    assert list(flamingo_generate.generate(made, prompt(), None, {END}, 9)) == [20, 21, END]
    # the prompt, then each word alone, behind two pictures
    assert made.read == [(prompt().tolist(), 0), ([[20]], 2), ([[21]], 2)]
    made = Scripted([[20], [21], [22]])
    assert list(flamingo_generate.generate(made, prompt(), None, {END}, 2)) == [20, 21]


def test_no_picture_is_generated():
    made = Scripted([[IMAGE, 33], [END]])
    assert list(flamingo_generate.generate(made, prompt(), None, {END}, 5)) == [33, END]


@pytest.fixture(scope="module")
def tokenizer():
    """SmolLM2's, with both new words."""
    found, language = pretrained.smollm2()
    few_shot.add_words(found, language)
    return found


def read_back(tokenizer, shots, text):
    ids = flamingo_generate.interleaved_ids(tokenizer, 1, shots, text)
    assert ids.shape[0] == 1 and ids[0, 0] == 1
    return tokenizer.decode(ids[0, 1:])


def test_a_prompt_is_written_as_chunks_were_in_training(tokenizer):
    assert read_back(tokenizer, (), "<image>the color is") == "<image> the color is"
    assert read_back(tokenizer, (), " <image>  the color is ") == "<image> the color is"
    assert read_back(tokenizer, (), "<image>") == "<image>"
    two = read_back(tokenizer, ("a dax ", "a wug"), "<image>a")
    assert two == "<image> a dax<|endofchunk|><image> a wug<|endofchunk|><image> a"
    # the same by hand, in one prompt
    assert (
        read_back(tokenizer, (), "<image>a dax<|endofchunk|><image> a wug<|endofchunk|><image>a")
        == two
    )
    # tokens of an example are those of a chunk in training
    ids = flamingo_generate.interleaved_ids(tokenizer, 1, ("red apple",), "<image>")[0].tolist()
    assert ids[1:-1] == few_shot.chunk(tokenizer, "red apple")


def test_control_tokens_that_somebody_typed_are_letters(tokenizer):
    ids = flamingo_generate.interleaved_ids(tokenizer, 1, ("x<|im_end|>",), "<image>a<|im_end|>b")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids[0]


def test_both_words_and_the_ends_of_texts_end_an_answer(tokenizer):
    made = model()
    made.new_ids = torch.tensor([IMAGE, 77])
    found = flamingo_generate.ends(tokenizer, made)
    assert 77 in found and tokenizer.eos_token_id in found and IMAGE not in found


def picture(path, value):
    Image.fromarray(np.full((40, 30, 3), value, np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A folder of a tiny language model, weights of a Flamingo before it, three pictures."""
    root = tmp_path_factory.mktemp("speaks")
    language = llamas.folder(root / "speaker")
    known, loaded = pretrained.language_model(language)
    new_ids = few_shot.add_words(known, loaded)
    shape = {"dim_in": 1280, "every": 1, "latents": 3}
    torch.manual_seed(0)
    made = flamingo_model.Flamingo(loaded, new_ids, **shape)
    eyes.shake(made.cross, 0.3)
    weights = checkpoint.write(root / "w.safetensors", made.trainable_parameters(), shape)
    pictures = [picture(root / f"{value}.png", value) for value in (10, 120, 250)]
    return {"language": language, "weights": str(weights)}, pictures


def test_the_command_prints_and_keeps_an_answer(speaker, tmp_path, monkeypatch, capsys):
    about, (dark, grey, light) = speaker
    seen = []
    real = flamingo_generate.answer

    def answer(tokenizer, made, tower, start_id, pictures, *more):
        seen.append((pictures[:, 0, 0, 0].tolist(), *more))
        return real(tokenizer, made, tower, start_id, pictures, *more)

    monkeypatch.setattr(flamingo_generate, "answer", answer)
    monkeypatch.setattr(few_shot, "train", None)  # not called
    cfg = flamingo.Config(
        image=(light,), prompt="<image>the color is", shots=(f"{dark}:a dax", f"{grey}:a wug"),
        max_new_tokens=4, out=str(tmp_path / "out"), **about,
    )  # fmt: skip
    found = flamingo.main(cfg)
    printed = capsys.readouterr().out
    # pictures of the examples in their order, then that of the prompt
    assert seen == [([10, 120, 250], "<image>the color is", ["a dax", "a wug"], 4)]
    assert (
        "<image> a dax<|endofchunk|>\n<image> a wug<|endofchunk|>\n<image>the color is" in printed
    )
    assert found["answer"] in printed and found["examples"] == 2 and found["answer"]
    assert (tmp_path / "out" / "metrics.json").is_file()
    # pictures are read in their order, all by themselves
    shown = []

    def generate(made, ids, latents, end_ids, count):
        shown.append(latents)
        return iter(())

    monkeypatch.setattr(flamingo_generate, "generate", generate)
    for image, shots in ((light, (dark, grey)), (dark, ()), (grey, ()), (light, ())):
        named = tuple(f"{path}:x" for path in shots)
        flamingo.main(flamingo.Config(**vars(cfg) | {"image": (image,), "shots": named}))
    alone = torch.cat(shown[1:], 1)
    torch.testing.assert_close(shown[0], alone, atol=0.05, rtol=0.05)
    assert (alone[0, 0] - alone[0, 2]).abs().max() > 0.2


def test_features_of_a_prompt_are_those_of_training(monkeypatch):
    """bf16, one row of tokens for each picture."""
    shown = []

    def resample(features):
        shown.append(features)
        return features

    new_ids = torch.tensor([IMAGE, END])
    made = SimpleNamespace(new_ids=new_ids, resample=resample, language=eyes.speaker())
    vision_tower = tower.VisionTower(eyes.tower())
    pictures = torch.randint(256, (6, 3, 28, 28), dtype=torch.uint8)
    monkeypatch.setattr(flamingo_generate, "interleaved_ids", lambda *about: torch.tensor([[1]]))
    monkeypatch.setattr(flamingo_generate, "ends", lambda *about: {END})
    flamingo_generate.answer(None, made, vision_tower, 1, pictures, "<image>")
    wanted = vision_tower(vision_tower.pixels(pictures)).bfloat16()
    assert shown[0].shape == (1, 6, 16, 16)
    torch.testing.assert_close(shown[0][0], wanted.float(), atol=0.05, rtol=0.05)
    assert torch.equal(shown[0].bfloat16().float(), shown[0])


def test_bad_prompts_and_pictures_are_refused_in_one_line(speaker, tmp_path, monkeypatch):
    monkeypatch.setattr(flamingo, "ANSWERS", flamingo.WEIGHTS)
    about, (dark, grey, _) = speaker
    (tmp_path / "text.png").write_text("no picture")
    out = tmp_path / "out"
    asked = {"image": (dark,), "prompt": "<image>a"}
    for flags, says in (
        ({"prompt": ""}, "--prompt is missing"),
        ({"prompt": "", "image": (), "shots": (f"{dark}:a",)}, "--prompt is missing"),
        ({"prompt": "the color is"}, "write <image> where the picture stands"),
        ({"prompt": "<image>a<image>b"}, "has 2 <image>, --image names 1 pictures"),
        ({"image": ()}, "has 1 <image>, --image names 0 pictures"),
        ({"image": (dark, grey)}, "has 1 <image>, --image names 2 pictures"),
        ({"image": ("no/such.png",)}, "no/such.png"),
        ({"image": (str(tmp_path / "text.png"),)}, "not a readable image"),
        ({"shots": (dark,)}, "an example is PICTURE:TEXT"), ({"shots": (f"{dark}:",)}, "PICTURE:TEXT"),
        ({"shots": (f"{dark}:a<image>",)}, "without <image>"), ({"shots": ("no/such.png:a",)}, "no/such.png"),
        ({"max_new_tokens": 0}, "--max_new_tokens"), ({"prompt": "<image>" + "a b " * 99}, "positions"),
        ({"weights": "", "vision": "x"}, "in front of smollm2"), ({"weights": "", "latents": 4}, "--latents 4"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says) as error:
            flamingo.main(flamingo.Config(**{"out": str(out)} | about | asked | flags))
        assert "\n" not in str(error.value)
        assert not list(out.glob("metrics.json"))


@pytest.mark.parametrize("flags", [{"image": ("no/such.png",)}, {"shots": ("no/such.png:a",)}])
def test_pictures_are_read_before_the_weights(flags, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    asked = {"image": (str(tmp_path / "a.png"),), "prompt": "<image>a"} | flags
    with pytest.raises(UserError, match="no/such.png"):
        flamingo_generate.check_flags(flamingo.Config(**asked))
