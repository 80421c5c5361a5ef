"""papers/mae.py: equal to transformers' masked autoencoder; and six ways of reading the paper wrongly, each noticed."""

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae import modeling_vit_mae

from papers import mae, mae_claims, mae_evaluation, mae_figures, photos, vit
from papers.patches import patchify, unpatchify
from tests.conftest import gradients
from tests.vits import shake, theirs
from utils.run import UserError

SMALL = {"image": 16, "patch": 4, "width": 32, "depth": 2, "heads": 4, "decoder": (16, 1, 2)}
N = 16  # patches


def ours(**changes):
    torch.manual_seed(0)
    model = mae.MAE(**(SMALL | changes))
    positions = model.position.clone(), model.decoder_position.clone()
    shake(model)
    model.position.data, model.decoder_position.data = positions
    return model


def their(model, ratio=0.75, **changes):
    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=16, patch_size=4,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, layer_norm_eps=1e-6, mask_ratio=ratio, norm_pix_loss=model.norm_pix, **changes,
    )  # fmt: skip
    other = ViTMAEForPreTraining(config).eval()
    other.load_state_dict(theirs(model.state_dict()))
    return other


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_everything_is_that_of_transformers(ratio, norm_pix, parity):
    model = ours(norm_pix=norm_pix)
    other, x, noise = their(model, ratio), torch.randn(3, 3, 16, 16), torch.rand(3, N)
    loss, pred, mask = model(x, ratio, noise)
    found = other(x, noise=noise)
    name = f"ratio {ratio}, norm_pix {norm_pix}"
    parity("MAE", f"mae.MAE loss, {name}", "transformers.ViTMAEForPreTraining", loss, found.loss)
    parity(
        "MAE",
        f"mae.MAE drawn patches, {name}",
        "transformers.ViTMAEForPreTraining",
        pred,
        found.logits,
    )
    parity(
        "MAE",
        f"mae.random_masking, {name}",
        "transformers.ViTMAEForPreTraining mask",
        mask,
        found.mask,
    )
    mine = theirs(gradients(model, loss))
    them = gradients(other, found.loss)
    parity(
        "MAE",
        f"mae.MAE gradients, {name}",
        "transformers.ViTMAEForPreTraining gradients",
        mine,
        them,
    )


def test_the_encoder_is_a_vision_transformer(parity):
    """Nothing hidden, in the order of the noise: the states of vit.ViT with the same weights."""
    model, x = ours(), torch.randn(2, 3, 16, 16)
    plain = vit.ViT(16, 4, 3, 32, 2, 4)
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}, strict=False
    )
    states, mask, _ = model.forward_encoder(x, 0, torch.arange(N).expand(2, -1).float())
    assert mask.sum() == 0
    parity(
        "MAE",
        "mae.MAE.forward_encoder, nothing hidden",
        "own vit.ViT.features",
        states,
        plain.features(x),
    )


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 2)])
def test_positions_are_those_of_transformers(grid, parity):
    table = modeling_vit_mae.build_2d_sinusoidal_position_embedding(
        *grid, embed_dim=24, cls_token=True
    )
    columns_first = torch.cat([table[:, 12:], table[:, :12]], 1)  # as the authors' weights have it
    name = f"transformers' 2d sinusoids, grid {grid[0]} x {grid[1]}"
    parity("MAE", "mae.sincos_2d", name, mae.sincos_2d(24, *grid, cls_token=True), columns_first)
    assert torch.equal(mae.sincos_2d(24, *grid), columns_first[1:])


def test_positions_of_a_new_model_are_what_a_new_model_there_should_have(parity):
    """transformers 5.24 leaves them zero, and does not train them either: its model made from a config does not know
    where a patch is. Its own function, called by hand, writes what is here."""
    config = ViTMAEConfig(hidden_size=32, image_size=16, patch_size=4, num_hidden_layers=1, decoder_num_hidden_layers=1,
                          num_attention_heads=4, decoder_hidden_size=16, decoder_num_attention_heads=2)  # fmt: skip
    other, model = ViTMAEForPreTraining(config), mae.MAE(**SMALL)
    other.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    other.vit.embeddings.initialize_weights()
    other.decoder._is_hf_initialized = False
    other.decoder.initialize_weights(N)
    mine = [model.position, model.decoder_position]
    them = [other.vit.embeddings.position_embeddings, other.decoder.decoder_pos_embed]
    parity(
        "MAE",
        "mae.MAE positions",
        "transformers.ViTMAEForPreTraining, its initialize_weights",
        mine,
        them,
    )


@pytest.mark.parametrize("size", [(24, 24), (8, 16)])
def test_another_size_is_that_of_transformers(size, parity):
    model = ours()
    other, x = their(model), torch.randn(2, 3, *size)
    noise = torch.rand(2, size[0] * size[1] // 16)
    states = model.forward_encoder(x, 0.75, noise)[0]
    found = other.vit(x, noise=noise, interpolate_pos_encoding=True).last_hidden_state
    parity(
        "MAE",
        "mae.MAE.forward_encoder",
        f"transformers, 16 x 16 to {size[0]} x {size[1]}",
        states,
        found,
    )
    assert model(x)[1].shape == (2, size[0] * size[1] // 16, 48)


def test_patches_are_those_of_transformers_and_come_back(parity):
    model, x = ours(), torch.randn(2, 3, 16, 16)
    other = their(model)
    parity("MAE", "patches.patchify", "transformers patchify", patchify(x, 4), other.patchify(x))
    parity("MAE", "patches.unpatchify", "transformers unpatchify", unpatchify(patchify(x, 4), 4),
           other.unpatchify(other.patchify(x)))  # fmt: skip
    wide = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(wide, 4), 4, (2, 3)), wide)
    with pytest.raises(UserError, match="patches"):
        patchify(wide, 5)
    with pytest.raises(UserError, match="fill"):
        unpatchify(patchify(wide, 4), 4)


# --- six misreadings: each property holds for ours, and fails for the wrong version beside it


def tokens():
    """(2,8,1): each token is its own number."""
    return torch.arange(8.0).expand(2, 8)[..., None]


def hides_three_quarters(masking):
    visible, mask, _ = masking(tokens(), 0.75, torch.rand(2, 8))
    return visible.shape[1] == 2 and bool((mask.sum(1) == 6).all())


def mask_names_the_hidden(masking):
    visible, mask, _ = masking(tokens(), 0.75, torch.rand(2, 8))
    return all(
        {*v[:, 0].tolist()} == {*torch.where(m == 0)[0].tolist()} for v, m in zip(visible, mask)
    )


def order_comes_back(masking):
    x = tokens()
    visible, mask, ids = masking(x, 0.75, torch.rand(2, 8))
    filled = torch.cat([visible, -torch.ones(2, 6, 1)], 1).gather(1, ids[..., None])
    return torch.equal(filled, torch.where(mask[..., None] == 0, x, -torch.ones(1)))


def keeps_three_quarters(x, ratio, noise):
    return mae.random_masking(x, 1 - ratio, noise)


def mask_of_a_second_shuffle(x, ratio, noise):
    visible, _, ids = mae.random_masking(x, ratio, noise)
    return visible, mae.random_masking(x, ratio, 1 - noise)[1], ids


def restores_by_the_shuffle_itself(x, ratio, noise):
    visible, mask, ids = mae.random_masking(x, ratio, noise)
    return visible, mask, ids.argsort(1)


@pytest.mark.parametrize(
    "holds, wrong",
    [
        (hides_three_quarters, keeps_three_quarters),
        (mask_names_the_hidden, mask_of_a_second_shuffle),
        (order_comes_back, restores_by_the_shuffle_itself),
    ],
    ids=lambda f: f.__name__,
)
def test_misreadings_of_the_masking(holds, wrong):
    torch.manual_seed(0)
    assert holds(mae.random_masking)
    assert not holds(wrong)


class PositionsAfterMasking(mae.MAE):
    def forward_encoder(self, x, ratio, noise=None):
        x, mask, ids_restore = mae.random_masking(self.embed(x), ratio, noise)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position[:, : 1 + x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore


def knows_where_a_patch_stood(kind):
    """One patch is visible, first in the upper left corner, then in the lower right: its state must change."""
    torch.manual_seed(0)
    model, patch = kind(**SMALL), torch.randn(3, 4, 4)
    images = torch.zeros(2, 3, 16, 16)
    images[0, :, :4, :4], images[1, :, -4:, -4:] = patch, patch
    noise = torch.ones(2, N)
    noise[0, 0] = noise[1, -1] = 0
    states = model.forward_encoder(images, 1 - 1 / N, noise)[0]
    return not torch.allclose(states[0], states[1], atol=1e-4)


def test_misreading_positions_after_masking():
    assert knows_where_a_patch_stood(mae.MAE)
    assert not knows_where_a_patch_stood(PositionsAfterMasking)


class LossOverAll(mae.MAE):
    def forward_loss(self, imgs, pred, mask):
        return super().forward_loss(imgs, pred, torch.ones_like(mask))


def ignores_what_is_visible(kind):
    torch.manual_seed(0)
    model, imgs, pred = kind(**SMALL), torch.randn(2, 3, 16, 16), torch.randn(2, N, 48)
    mask = (torch.rand(2, N) < 0.75).float()
    other = torch.where(mask[..., None] == 0, pred + 1, pred)
    return bool(
        torch.isclose(model.forward_loss(imgs, pred, mask), model.forward_loss(imgs, other, mask))
    )


def test_misreading_the_loss_over_visible_patches():
    assert ignores_what_is_visible(mae.MAE)
    assert not ignores_what_is_visible(LossOverAll)


class Knows(mae.MAE):
    """A network that has learned all there is: it says each patch with its mean and spread taken out."""

    def forward(self, imgs, ratio=0.75, noise=None):
        patches = patchify(imgs, self.patch)
        mean, spread = mae.moments(patches)
        _, mask, _ = mae.random_masking(patches, ratio, noise)
        pred = (patches - mean) / spread
        return self.forward_loss(imgs, pred, mask), pred, mask


def test_misreading_pictures_without_undoing_norm_pix():
    x = torch.randn(2, 3, 16, 16)
    model = Knows(**SMALL, norm_pix=True)
    assert model(x)[0] < 1e-10
    torch.testing.assert_close(mae_figures.draw(model, x, 0.75)[1], x, atol=1e-5, rtol=0)
    model.norm_pix = False  # the wrong version: as the network says it
    assert not torch.allclose(mae_figures.draw(model, x, 0.75)[1], x, atol=0.1)


def test_pasted_pictures_keep_what_was_visible():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 3, 16, 16), torch.rand(2, N)
    model = ours()
    hidden, _, pasted = mae_figures.draw(model, x, 0.75, noise)
    mask = mae.random_masking(torch.zeros(2, N, 1), 0.75, noise)[1]
    for view in (hidden, pasted):
        same = (patchify(view, 4) == patchify(x, 4)).all(-1)
        assert torch.equal(same, mask == 0)


def test_a_ratio_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match="leaves none"):
        mae.random_masking(torch.zeros(1, 8, 1), 0.9)
    with pytest.raises(UserError):
        mae.random_masking(torch.zeros(1, 8, 1), 1)
    with pytest.raises(UserError, match="multiple of 4"):
        mae.sincos_2d(10, 2, 2)


def test_mask_tokens_in_the_encoder_stand_in_masked_places():
    """The other way of Table 1c: what is hidden has no say, but a place; and the encoder reads every patch."""
    torch.manual_seed(0)
    model = mae_claims.network(mae_claims.MaskTokensInEncoder, mae.Config()).eval()
    with torch.no_grad():
        model.encoder_mask_token.normal_()
    x, other = torch.randn(2, 3, 64, 64).unbind(0)
    noise = torch.rand(1, (64 // mae.Config().patch) ** 2)
    states, mask, restore = model.forward_encoder(x[None], 0.75, noise)
    assert states.shape[1] == mask.shape[1] + 1 and torch.equal(
        restore[0], torch.arange(mask.shape[1])
    )
    patch = mae.Config().patch
    hidden = (
        mask.view(1, 1, 64 // patch, 64 // patch)
        .repeat_interleave(patch, 2)
        .repeat_interleave(patch, 3)
    )
    same = torch.where(hidden == 1, other, x[None])  # other pixels, where nobody looks
    assert torch.equal(model.forward_encoder(same, 0.75, noise)[0], states)
    assert not torch.allclose(model.forward_encoder(other[None], 0.75, noise)[0], states)


def test_the_ratio_that_is_asked_for_is_the_one_that_trains(monkeypatch):
    seen, whole = set(), mae.random_masking
    monkeypatch.setattr(
        mae, "random_masking", lambda x, r, *rest: (seen.add(r), whole(x, r, *rest))[1]
    )
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    list(
        mae.train(mae.MAE(**SMALL), images, mae.Config(steps=1, batch=2, image_size=16, ratio=0.4))
    )
    assert seen == {0.4}


def test_features_are_the_mean_of_patches_with_nothing_hidden():
    torch.manual_seed(0)
    model, images = (
        mae.build(64, 16).eval(),
        torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8),
    )
    with torch.no_grad():
        found = mae_evaluation.features(model, images, 64)
        states = model.forward_encoder(photos.whole(images, 64), 0)[0]
    torch.testing.assert_close(found, states[:, 1:].mean(1))
    assert not torch.allclose(found, states[:, 0])


def test_the_loss_falls():
    torch.manual_seed(0)
    images = torch.randint(256, (2, 3, 1, 1), dtype=torch.uint8).expand(-1, -1, 32, 32).contiguous()
    cfg = mae.Config(steps=40, batch=8, image_size=16)
    losses = list(mae.train(mae.MAE(**SMALL), images, cfg))
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_training_does_not_move_the_positions():
    torch.manual_seed(0)
    images, model = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), mae.MAE(**SMALL)
    before = model.position.clone()
    list(mae.train(model, images, mae.Config(steps=2, batch=4, image_size=16)))
    assert torch.equal(model.position, before)


@pytest.mark.parametrize("flags", [{"ratio": 1.0}, {"ratio": 0.99}, {"ratio": 0}, {"patch": 7}, {"decoder": "none"},
                                   {"steps": 0}, {"data": "/nowhere"}, {"size": "XL"}, {"tune": -1}])  # fmt: skip
def test_bad_flags(flags, tmp_path):
    with pytest.raises(UserError):
        mae.main(mae.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"pretrained": True, "ratio": 0.99}, "0.99"), ({"patch": 32, "ratio": 0.5}, "0.9"),
        ({"pretrained": True, "patch": 16}, "--patch 8"), ({"lr": float("inf")}, "--lr"),
        ({"image_size": 4096}, "--image-size"),
    ],
)  # fmt: skip
def test_what_would_fail_late_is_refused_early(tmp_path, flags, says):
    with pytest.raises(UserError, match=says):
        mae.main(mae.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
