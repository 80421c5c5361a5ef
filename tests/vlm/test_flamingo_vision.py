"""vlm/flamingo.py --vision: any vision encoder of transformers before any language model, OpenFlamingo's weights."""

import pytest
import torch
from transformers import CLIPImageProcessorPil

from tests import eyes, llamas
from tests.conftest import gradients
from tests.vlm import test_open_flamingo
from utils import pretrained
from utils.run import UserError
from vlm import few_shot, flamingo, flamingo_model, tower

IMAGE, END = 98, 99
TOWERS = ("clip_vision_model", "siglip_vision_model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder of a tiny vision encoder}, as `from_pretrained` finds them."""
    root = tmp_path_factory.mktemp("vision")
    for kind in TOWERS:
        eyes.tower(kind).save_pretrained(root / kind)
        CLIPImageProcessorPil(image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(
            root / kind
        )
    return {kind: str(root / kind) for kind in TOWERS}


def text():
    return torch.tensor([[1, 7, IMAGE, 8, END, IMAGE, 9, 10, END]])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("vision", TOWERS)
def test_any_vision_encoder_before_any_language_model(folders, vision, kind, every):
    vision_tower = tower.load(folders[vision])
    assert vision_tower.size == 28 and vision_tower.width == 16
    photos = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    features = vision_tower(vision_tower.pixels(photos))[None]
    assert features.shape == (1, 2, 16, 16)  # two photos, 4 x 4 patches
    language = eyes.speaker(kind)
    plain = language(text().where(text() < IMAGE, 5)).logits
    made = flamingo_model.Flamingo(
        language, [IMAGE, END], vision_tower.width, every, latents=3, latent_width=12
    )
    assert list(made.cross_layer_ids) == list(range(0, 2, every)) and len(made.cross) == 2 // every
    # gates at zero: the language model as it was
    now = made(text().where(text() < IMAGE, 5), made.resample(features))
    assert torch.equal(now[..., :IMAGE], plain[..., :IMAGE])
    # open gates: each word knows the photos before it, and no later one
    eyes.shake(made.cross, 0.3)
    seen = made(text(), made.resample(features))
    for photo, first in ((0, 2), (1, 5)):
        other = features.clone()
        other[:, photo] += 1
        moved = (made(text(), made.resample(other)) - seen).abs().amax(-1)[0]
        assert moved[:first].max() == 0 and moved[first] > 0
    # all new parts learn, the tower and the language model do not
    learned = gradients(made, made(text(), made.resample(features)))
    assert learned.keys() == made.trainable_parameters().keys()
    assert all(gradient.abs().max() > 0 for gradient in learned.values())


def test_the_whole_script_with_another_vision_encoder(folders, tmp_path, monkeypatch):
    asked = []

    def photos(size):
        asked.append(size)
        return eyes.shop(24, size)

    monkeypatch.setattr(flamingo.data, "groceries", photos)
    cfg = flamingo.Config(
        steps=2, batch=4, longest=2, every=1, latents=5, evaluate_shots=(0, 1), judged=10, vision=folders[TOWERS[1]],
        layer=-1, language=llamas.folder(tmp_path / "speaker"), out=str(tmp_path / "out"),
    )  # fmt: skip
    found = flamingo.main(cfg)
    assert asked[0] == 28 and found["new layers before layers"] == "0, 1"
    meta = flamingo.checkpoint.read(tmp_path / "out" / "model.safetensors")[1]
    assert meta == {"dim_in": 16, "every": 1, "latents": 5}


def test_layer_flag_chooses_the_hidden_states(folders, tmp_path, monkeypatch):
    asked = []

    def load(name, layer, on):
        asked.append((name, layer))
        raise UserError("enough")

    monkeypatch.setattr(flamingo.tower, "load", load)
    cfg = flamingo.Config(
        vision="somewhere", layer=-1, language=llamas.folder(tmp_path / "x"), out=str(tmp_path)
    )
    with pytest.raises(UserError, match="enough"):
        flamingo.main(cfg)
    assert asked == [("somewhere", -1)]


def test_weights_of_open_flamingo_are_loaded_and_evaluated_without_training(
    folders, tmp_path, monkeypatch
):
    """A folder of the layout, with the real tokenizer: <|endofchunk|> comes first in its table."""
    monkeypatch.setattr(flamingo.data, "groceries", lambda size: eyes.shop(24, size))
    monkeypatch.setattr(few_shot, "train", None)  # not called
    language = llamas.folder(tmp_path / "speaker")
    tokenizer, speaker = pretrained.language_model(language)
    theirs = test_open_flamingo.Reference(heads=1, head_dim=64, language=speaker.float())
    (tmp_path / "weights").mkdir()
    test_open_flamingo.write(tmp_path / "weights" / "model.safetensors", theirs.weights())
    built = []
    real = flamingo.build

    def build(*about):
        built.append(real(*about))
        return built[-1]

    monkeypatch.setattr(flamingo, "build", build)
    cfg = flamingo.Config(
        weights=str(tmp_path / "weights"), vision=folders[TOWERS[0]], layer=-1, language=language, evaluate_shots=(0,),
        judged=10, out=str(tmp_path / "out"),
    )  # fmt: skip
    found = flamingo.main(cfg)
    count = len(tokenizer)
    assert built[0].new_ids.tolist() == [count + 1, count] and built[0].new_embeddings is None
    assert "loss" not in found and 0 <= found["0 examples"]["14 kinds"] <= 1
    assert found["parameters, new"] == sum(p.numel() for p in theirs.perceiver.parameters()) + sum(
        p.numel() for p in theirs.lang_encoder.gated_cross_attn_layers.parameters()
    )
    assert not (tmp_path / "out" / "model.safetensors").exists()
