"""vlm/book_encoders.py: the masked autoencoder and CLIP's space as `--vision`, other sizes, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from papers import clip, mae, vit
from tests import eyes, llamas
from utils import checkpoint, data, pretrained
from utils.run import UserError
from vlm import book_encoders, llava, llava_io, tower


@pytest.fixture(scope="module")
def shipped():
    return tower.load("mae")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder of papers/clip.py with random projections."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    towers = clip.Towers(torch.randn(1280), 0.5 + torch.rand(1280), 384, 16, 0.07).eval()
    clip.save(towers, folder, clip.Config())
    return folder, towers


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(0)
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)


def test_the_autoencoder_sees_what_it_was_trained_to_see(shipped, pictures, parity):
    assert (shipped.count, shipped.width, shipped.size, shipped.lead) == (64, 128, 64, 1)
    pixels = shipped.pixels(pictures)
    assert torch.allclose(pixels, data.to_float(pictures), atol=1e-6)
    model, _ = mae.load(mae.WEIGHTS)
    # without masking, in the order of the patches
    noise = torch.arange(64.0).expand(2, 64)
    theirs, mask, _ = model.forward_encoder(pixels, 0, noise)
    found = shipped.network(pixels)
    assert not mask.any() and len(found.hidden_states) == 7
    name = "mae.forward_encoder, nothing masked"
    mine = found.last_hidden_state
    parity("Vision tower", "book_encoders.MaskedAutoencoder", name, mine, theirs, 1e-5)
    assert torch.equal(shipped(pixels), found.hidden_states[-2][:, 1:])


@pytest.mark.parametrize("size", [32, 96])
def test_another_size_has_interpolated_positions(size, parity):
    made = tower.load("mae", size=size)
    assert made.count == (size // 8) ** 2 and made.size == size
    x = torch.randn(1, 3, size, size)
    model, _ = mae.load(mae.WEIGHTS)
    position = vit.resize_positions(model.position, (8, 8), (size // 8, size // 8))
    start = made.network(x).hidden_states[0]
    assert torch.allclose(start[:, 1:], model.embed(x) + position[:, 1:], atol=1e-6)
    mine = tower.interpolate(model.position, 1, (size // 8, size // 8))
    parity("Vision tower", "tower.interpolate", "vit.resize_positions", mine, position, 1e-6)
    # a sine table of that size would be another one
    other = mae.sincos_2d(128, size // 8, size // 8, cls_token=True)
    assert (other - position[0]).abs().max() > 0.1


def test_other_sizes_have_other_features(shipped, pictures):
    larger = tower.load("mae", size=128)
    assert tower.fingerprint(larger) != tower.fingerprint(shipped)
    big = F.interpolate(pictures.float(), scale_factor=2).to(torch.uint8)
    assert larger(larger.pixels(big)).shape == (2, 256, 128)


@pytest.mark.parametrize("size", [96, 288])
def test_efficientnet_at_another_size(size, pictures):
    made = tower.load("efficientnet", size=size)
    assert made.count == (size // 32) ** 2
    pixels = made.pixels(pictures)
    assert pixels.shape == (2, 3, size, size)
    network = pretrained.efficientnet()
    maps = network.extract_features(pretrained.efficientnet_input(pictures, size))
    expected = F.layer_norm(maps.flatten(2).transpose(1, 2), (1280,))
    assert torch.allclose(made(pixels), expected, atol=1e-4)


def test_the_space_of_clip_at_every_place(space, pictures, parity):
    folder, towers = space
    made = tower.load(str(folder))
    assert (made.count, made.width) == (49, 16)
    pixels = made.pixels(pictures)
    found = made(pixels)
    assert torch.allclose(found.norm(dim=-1), torch.ones(2, 49), atol=1e-5)
    # place by place what CLIP gives for a picture with these pooled features
    maps = pretrained.efficientnet().extract_features(pixels).flatten(2).transpose(1, 2)
    theirs = torch.stack([towers.encode_image(maps[:, n]) for n in range(49)], 1)
    name = "clip.Towers.encode_image at each place"
    parity("Vision tower", "book_encoders.ClipMaps", name, found, theirs.detach(), 1e-5)


def test_what_is_refused(tmp_path, space):
    for name, size, line in [
        ("mae", 60, "multiple of 8"),
        ("efficientnet", 100, "multiple of 32"),
        (str(tmp_path / "none.safetensors"), None, "no checkpoint"),
    ]:
        with pytest.raises(UserError, match=line):
            tower.load(name, size=size)
    with pytest.raises(UserError, match="last maps are read"):
        tower.load("efficientnet", layer=-1)
    # weights of something else, a space of other features
    other = checkpoint.write(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"b": 1})
    with pytest.raises(UserError, match=r"another network|--"):
        tower.load(str(other))
    tensors, meta = checkpoint.read(space[0] / "space.safetensors")
    checkpoint.write(tmp_path / "space.safetensors", tensors, meta | {"image": "mae"})
    with pytest.raises(UserError, match="other features"):
        tower.load(str(tmp_path))


def test_a_llava_with_each_encoder_and_its_weights_come_back(tmp_path, space, pictures):
    """Image tokens reach the language model; a folder of a model is refused, it has no place for them."""
    tokenizer, language = pretrained.language_model(llamas.folder(tmp_path / "lm"))
    for name, count in (("mae", 64), (str(space[0]), 49)):
        model = llava.build(name, "linear", language, tokenizer)
        assert model.count == count
        tokens = model.image_features(model.vision.pixels(pictures.float().byte()))
        assert tokens.shape == (2, count, language.config.hidden_size)
        with pytest.raises(UserError, match="cannot hold this encoder"):
            llava_io.save(model, tokenizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_plain_towers_are_saved_as_before():
    book_encoders.check_saved(tower.load("efficientnet"))
    book_encoders.check_saved(tower.VisionTower(eyes.tower()))
    with pytest.raises(UserError, match="cannot hold"):
        book_encoders.check_saved(tower.load("efficientnet", size=160))
