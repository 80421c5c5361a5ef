"""papers/vit.py: the vision transformer of transformers, positions of another grid, attention, crops."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from papers import attention_rollout, photos, vit
from tests.conftest import gradients
from tests.vits import shake, theirs
from utils import checkpoint, data
from utils.run import UserError

SMALL = {"image": 16, "patch": 4, "width": 32, "depth": 2, "heads": 4, "classes": 3}
THEIRS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
          "image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-6}  # fmt: skip


@pytest.fixture
def pair():
    torch.manual_seed(0)
    ours = shake(vit.ViT(**SMALL))
    other = ViTForImageClassification(ViTConfig(**THEIRS, num_labels=3)).eval()
    other.load_state_dict(theirs(ours.state_dict()))
    return ours, other


def test_logits_and_gradients_are_those_of_transformers(pair, parity):
    ours, other = pair
    x = torch.randn(2, 3, 16, 16)
    parity(
        "ViT", "vit.ViT.forward", "transformers.ViTForImageClassification", ours(x), other(x).logits
    )
    mine, them = theirs(gradients(ours, ours(x))), gradients(other, other(x).logits)
    parity(
        "ViT", "vit.ViT gradients", "transformers.ViTForImageClassification gradients", mine, them
    )


def test_the_states_are_those_of_vit_model(parity):
    torch.manual_seed(0)
    ours, other = (
        shake(vit.ViT(**SMALL)),
        ViTModel(ViTConfig(**THEIRS), add_pooling_layer=False).eval(),
    )
    weights = {
        k.removeprefix("vit."): v
        for k, v in theirs(ours.state_dict()).items()
        if "classifier" not in k
    }
    other.load_state_dict(weights)
    x = torch.randn(2, 3, 16, 16)
    parity(
        "ViT",
        "vit.ViT.features",
        "transformers.ViTModel",
        ours.features(x),
        other(x).last_hidden_state,
    )


@pytest.mark.parametrize("size", [(24, 24), (8, 8), (16, 32)])
def test_positions_of_another_grid_are_those_of_transformers(pair, parity, size):
    ours, other = pair
    x = torch.randn(2, 3, *size)
    name = f"transformers interpolate_pos_encoding, 16 x 16 to {size[0]} x {size[1]}"
    parity(
        "ViT", "vit.resize_positions", name, ours(x), other(x, interpolate_pos_encoding=True).logits
    )


def test_attention_maps_are_those_of_transformers(pair, parity):
    ours, other = pair
    other.set_attn_implementation("eager")
    x = torch.randn(2, 3, 16, 16)
    maps = torch.stack(other(x, output_attentions=True).attentions, 1)
    parity("ViT", "vit.ViT.maps", "transformers attentions", ours.maps(x), maps)


def test_patches_by_convolution_are_unfold_and_multiply(parity):
    torch.manual_seed(0)
    embedding, x = vit.PatchEmbedding(4, 3, 8), torch.randn(2, 3, 8, 12)
    parity(
        "ViT",
        "vit.PatchEmbedding",
        "torch unfold and linear",
        embedding(x),
        vit.unfold_and_multiply(embedding, x),
    )


def test_the_class_token_and_the_mean_read_different_states():
    torch.manual_seed(0)
    model, x = shake(vit.ViT(**SMALL)), torch.randn(2, 3, 16, 16)
    states = model.features(x)
    assert torch.equal(model(x), model.head(states[:, 0]))
    model.pool = "mean"
    torch.testing.assert_close(model(x), model.head(states[:, 1:].mean(1)))


def test_rollout_of_known_attention():
    """A block in which each token looks at itself changes nothing; one in which all look at token 0 moves half."""
    eye, first = torch.eye(3), torch.tensor([[1.0, 0, 0]] * 3)
    maps = torch.stack([eye, eye])[None, :, None]
    assert torch.equal(attention_rollout.rollout(maps)[0], eye)
    maps = torch.stack([eye, first])[None, :, None]
    torch.testing.assert_close(attention_rollout.rollout(maps)[0], 0.5 * first + 0.5 * eye)
    both = attention_rollout.rollout(torch.rand(2, 3, 4, 5, 5).softmax(-1))
    torch.testing.assert_close(both.sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_map_is_drawn_the_right_way_up(pool):
    """All of them look at one patch, that of row 0 and column 2: the map is hot there, and not where it would be
    transposed or upside down."""
    model = vit.ViT(**SMALL)
    model.pool = pool
    hot = 1 + 2
    model.maps = lambda x: torch.zeros(1, 2, 4, 17, 17).index_fill(-1, torch.tensor(hot), 1.0)
    found = attention_rollout.rollout_map(model, torch.zeros(1, 3, 16, 16))[0]
    assert found[0, 2] == 1 and (found > 0.5).sum() == 1


def test_one_patch_is_a_map_and_not_nan():
    model = vit.ViT(**SMALL | {"patch": 16})
    assert attention_rollout.rollout_map(model, torch.randn(2, 3, 16, 16)).isfinite().all()


def test_a_whole_crop_is_the_photo_and_a_mirror_its_mirror():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 16, 16)
    made = photos.crops(x, 16, smallest=1 - 1e-6)
    # an area of one still has an aspect: compare the middle rows of those that are nearly square
    assert made.shape == x.shape and made.min() >= 0 and made.max() <= 1
    ramp = torch.linspace(0, 1, 32).expand(200, 3, 32, 32)
    rising = photos.crops(ramp, 8)[:, 0, 0].diff(dim=-1).sum(-1) > 0
    assert 60 < int(rising.sum()) < 140  # half of them are mirrored


def test_accuracies_add_up_the_kinds_of_a_group():
    class Fruit:
        fine, coarse = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])
        fine_names, coarse_names = ["a", "b", "c"], ["ab", "c"]

    # The likeliest kind is c, the likeliest group ab
    logits = torch.tensor([[0.3, 0.3, 0.4]]).log()
    found = photos.accuracies(logits, Fruit, torch.tensor([1]))
    assert found == {"14 kinds": 0.0, "5 groups": 1.0}


def test_a_probe_finds_what_is_linear():
    torch.manual_seed(0)
    x = torch.randn(300, 10)
    y = (x[:, 0] > 0).long()
    found = photos.probe(x, y, torch.arange(200), torch.arange(200, 300)).argmax(-1)
    assert (found == y[200:]).float().mean() > 0.95


def test_the_loss_falls():
    torch.manual_seed(0)
    images, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 3
    images[labels == 0], images[labels == 1] = 0, 255
    cfg = vit.Config(steps=60, batch=8, image_size=16)
    losses = list(vit.train(vit.ViT(**SMALL), images, labels, cfg))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_an_encoder_of_another_network_is_refused(tmp_path):
    wide = vit.ViT(**(SMALL | {"width": 64}))
    path = checkpoint.write(
        tmp_path / "wide.safetensors", wide.state_dict(), {"image_size": 16, "patch": 4}
    )
    with pytest.raises(UserError, match="another network"):
        vit.load_encoder(vit.ViT(**SMALL), path)
    path = checkpoint.write(
        tmp_path / "none.safetensors", {"position": wide.position}, {"image_size": 16, "patch": 4}
    )
    with pytest.raises(UserError):
        vit.load_encoder(wide, path)


def test_an_encoder_of_another_grid_is_fitted(tmp_path):
    large = shake(vit.ViT(**(SMALL | {"image": 32})))
    path = checkpoint.write(
        tmp_path / "large.safetensors", large.state_dict(), {"image_size": 32, "patch": 4}
    )
    small = vit.load_encoder(vit.ViT(**SMALL), path)
    assert torch.equal(small.embed.projection.weight, large.embed.projection.weight)
    torch.testing.assert_close(small.position, vit.resize_positions(large.position, (8, 8), (4, 4)))


@pytest.mark.parametrize("flags", [{"steps": 0}, {"lr": 0}, {"patch": 7}, {"size": "XXL"}, {"batch": 0}, {"patch": 0},
                                   {"weights": "nothing.safetensors"}, {"patch": 16}])  # fmt: skip
def test_bad_flags(flags, tmp_path):
    with pytest.raises(UserError):
        vit.main(vit.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def test_files_that_hold_no_encoder_are_refused_in_one_line(tmp_path):
    from utils import checkpoint as files

    model = vit.build(64, 8)
    whole, meta = files.read(vit.WEIGHTS)
    cases = {
        "meta": (whole, {"latent": 4}), "none": (whole, None),
        "position": ({k: v for k, v in whole.items() if k != "position"}, meta),
        "deeper": (whole | {"blocks.9.norm1.weight": whole["blocks.0.norm1.weight"].clone()}, meta),
    }  # fmt: skip
    for name, (tensors, about) in cases.items():
        files.write(tmp_path / f"{name}.safetensors", tensors, about)
        with pytest.raises(UserError, match="no encoder|another network"):
            vit.load_encoder(model, tmp_path / f"{name}.safetensors")


def test_a_device_that_is_not_there_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="--device"):
        vit.main(vit.Config(device="nope", out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_photos_to_learn_from_are_never_judged():
    fruit = data.groceries(64)
    learn, judge = photos.split(fruit)
    assert (
        len(learn) == 732 and len(judge) == 1322 and not set(learn.tolist()) & set(judge.tolist())
    )
    assert "test" not in {fruit.split[i] for i in learn} and {fruit.split[i] for i in judge} == {
        "test"
    }


def test_a_probe_never_sees_whom_it_judges():
    """Spoiled features and labels of the photos to be judged change nothing but their own answers."""
    torch.manual_seed(0)
    y = torch.randint(4, (60,))
    x = torch.randn(4, 8)[y] + 0.5 * torch.randn(60, 8)
    learn, judge = torch.arange(40), torch.arange(40, 60)
    spoiled, wrong = x.clone(), y.clone()
    spoiled[50:], wrong[40:] = 1e3, 0
    torch.manual_seed(1)
    first = photos.probe(x, y, learn, judge)
    torch.manual_seed(1)
    second = photos.probe(spoiled, wrong, learn, judge)
    assert torch.equal(first[:10], second[:10])
