"""vlm/connector.py: projectors, joined neighbours, pooling and resamplers equal to transformers' and torch's."""

import pytest
import torch
import torch.nn.functional as F
from transformers import IdeficsConfig, LlavaConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from tests import eyes
from tests.conftest import gradients
from utils.run import UserError
from vlm import connector
from vlm.connector_probe import NAMES


def test_two_layers_are_llavas_projector(parity):
    config = LlavaConfig(vision_config=eyes.tower().config, text_config=eyes.speaker().config)
    theirs, ours = LlavaMultiModalProjector(config), connector.build("mlp2x_gelu", 16, 24)
    ours[0].load_state_dict(theirs.linear_1.state_dict())
    ours[2].load_state_dict(theirs.linear_2.state_dict())
    x = torch.randn(2, 9, 16)
    name = "transformers LlavaMultiModalProjector"
    parity("Connector", "connector.build mlp2x_gelu", name, ours(x), theirs(x))
    mine, them = gradients(ours, ours(x)), gradients(theirs, theirs(x))
    parity(
        "Connector",
        "connector.build mlp2x_gelu, gradients",
        name,
        list(mine.values()),
        list(them.values()),
    )


def idefics2(ours):
    """{name of theirs: name of ours} of a resampler with RMSNorm and SwiGLU."""
    names = {"latents": "latents", "norm.weight": "norm.weight"}
    for i in range(len(ours.layers)):
        for mine, them in (
            ("norm_latents", "input_latents_norm"), ("norm_context", "input_context_norm"),
            ("norm_mlp", "post_attention_layernorm"), ("q_proj", "self_attn.q_proj"), ("k_proj", "self_attn.k_proj"),
            ("v_proj", "self_attn.v_proj"), ("o_proj", "self_attn.o_proj"), ("mlp.gate_proj", "mlp.gate_proj"),
            ("mlp.up_proj", "mlp.up_proj"), ("mlp.down_proj", "mlp.down_proj"),
        ):  # fmt: skip
            names[f"layers.{i}.{them}.weight"] = f"layers.{i}.{mine}.weight"
    return names


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_resampler_is_that_of_idefics2(kv_heads, parity):
    about = {
        "depth": 2,
        "latents": 5,
        "heads": 4,
        "kv_heads": kv_heads,
        "head_dim": 6,
        "mlp_ratio": 4,
    }
    ours = eyes.shake(connector.build("perceiver", 24, 24, **about))
    theirs = Idefics2PerceiverResampler._from_config(
        Idefics2PerceiverConfig(
            hidden_size=24, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=6,
            num_key_value_heads=kv_heads, hidden_act="silu", rms_norm_eps=1e-6,
        )
    )  # fmt: skip
    names, weights = idefics2(ours), ours.state_dict()
    theirs.load_state_dict({them: weights[mine] for them, mine in names.items()})
    x = torch.randn(3, 9, 24)
    look = lambda: theirs(x, torch.ones(3, 9, dtype=torch.long))  # noqa: E731
    other = look() if isinstance(look(), torch.Tensor) else look().last_hidden_state
    name = f"transformers Idefics2PerceiverResampler, {kv_heads} keys for 4 heads"
    parity("Connector", "connector.PerceiverResampler", name, ours(x), other)
    mine, them = gradients(ours, ours(x)), gradients(theirs, other)
    parity(
        "Connector",
        "connector.PerceiverResampler, gradients",
        name,
        {n: mine[names[n]] for n in them},
        them,
        1e-4,
    )


def test_flamingos_resampler_is_that_of_idefics(parity):
    config = IdeficsConfig(
        vision_config={"embed_dim": 24}, perceiver_config={"qk_layer_norms_perceiver": False}
    )
    theirs = IdeficsPerceiverResampler(config, 24, 2, 4, 6, 5)
    about = {"depth": 2, "latents": 5, "heads": 4, "kv_heads": 4, "head_dim": 6, "mlp_ratio": 4}
    ours = eyes.shake(connector.build("perceiver", 24, 24, **about, use_rmsnorm_swiglu=False))
    weights = ours.state_dict()
    names = {
        "latents": "latents",
        "layer_norm.weight": "norm.weight",
        "layer_norm.bias": "norm.bias",
    }
    for i in range(2):
        pairs = {
            "0.context_layer_norm": "norm_context", "0.latents_layer_norm": "norm_latents", "1.ln": "norm_mlp",
            "0.q_proj": "q_proj", "0.k_proj": "k_proj", "0.v_proj": "v_proj", "0.output_proj": "o_proj",
            "1.fc": "mlp.0", "1.c_proj": "mlp.2",
        }  # fmt: skip
        for them, mine in pairs.items():
            for leaf in ("weight", "bias"):
                if f"layers.{i}.{mine}.{leaf}" in weights:
                    names[f"blocks.{i}.{them}.{leaf}"] = f"layers.{i}.{mine}.{leaf}"
    theirs.load_state_dict({them: weights[mine] for them, mine in names.items()})
    x = torch.randn(3, 9, 24)
    name = "transformers IdeficsPerceiverResampler"
    parity(
        "Connector",
        "connector.PerceiverResampler, use_rmsnorm_swiglu=False",
        name,
        ours(x),
        theirs(x),
    )
    mine, them = gradients(ours, ours(x)), gradients(theirs, theirs(x))
    both = {n: mine[names[n]] for n in them}, them
    parity(
        "Connector",
        "connector.PerceiverResampler, use_rmsnorm_swiglu=False, gradients",
        name,
        *both,
        1e-4,
    )


def test_joined_neighbours_are_pixel_unshuffled(parity):
    ours, x = connector.build("concat4", 8, 6), torch.randn(2, 36, 8)
    maps = x.transpose(1, 2).unflatten(2, (6, 6))
    # Channels outside, places inside
    theirs = F.pixel_unshuffle(maps, 2).flatten(2).transpose(1, 2)
    theirs = theirs.unflatten(2, (8, 4)).transpose(2, 3).flatten(2)
    parity("Connector", "connector.Concat.join", "torch pixel_unshuffle", ours.join(x), theirs, 0)
    assert ours.join(torch.randn(2, 49, 8)).shape == (2, 16, 32)  # 7 x 7 is filled up to 8 x 8


@pytest.mark.parametrize("name", ["pool3", "bilinear3"])
def test_pooling_is_torchs(name, parity):
    ours, x = connector.build(name, 8, 6), torch.randn(2, 49, 8)
    maps = x.transpose(1, 2).unflatten(2, (7, 7))
    modules = {
        "pool3": torch.nn.AdaptiveAvgPool2d(3),
        "bilinear3": torch.nn.Upsample(size=(3, 3), mode="bilinear"),
    }
    theirs = modules[name](maps).flatten(2).transpose(1, 2)
    parity(
        "Connector", f"connector.Pool.shrink {name}", "torch, the same call", ours.shrink(x), theirs
    )


def test_pooling_known_cases():
    """A grid of 7 that counts its columns: means over areas that overlap, and samples between the nearest four."""
    x = torch.arange(7.0).expand(7, 7).reshape(1, 49, 1)
    pooled = connector.build("pool3", 1, 1).shrink(x)[0, :, 0]
    torch.testing.assert_close(pooled, torch.tensor([1.0, 3.0, 5.0] * 3))  # columns 0-2, 2-4, 4-6
    sampled = connector.build("bilinear3", 1, 1).shrink(x)[0, :, 0]
    torch.testing.assert_close(sampled, torch.tensor([2 / 3, 3.0, 16 / 3] * 3))


@pytest.mark.parametrize("name", [*NAMES, "mlp3x_gelu", "identity", "concat9", "pool2"])
def test_shapes_and_counts(name):
    ours = connector.build(name, 16, 16)
    found = ours(torch.randn(2, 49, 16))
    assert found.shape == (2, connector.tokens(ours, 49), 16)


def test_a_resampler_does_not_care_where(seeded):
    """Without positions in the vision features, latents see a bag: the order of tokens changes nothing."""
    x, order = torch.randn(1, 49, 16), torch.randperm(49)
    ours = connector.build("perceiver", 16, 16)
    torch.testing.assert_close(ours(x), ours(x[:, order]), atol=1e-5, rtol=1e-4)
    pooled = connector.build("pool3", 16, 16)
    assert not torch.allclose(pooled(x), pooled(x[:, order]), atol=1e-3)


def test_latents_that_see_themselves_are_another_network():
    x = torch.randn(2, 9, 16)
    torch.manual_seed(1)
    among_keys = connector.build("perceiver", 16, 16)
    apart = connector.build("perceiver", 16, 16, concat_latents_kv=False)
    apart.load_state_dict(among_keys.state_dict())
    assert not torch.allclose(among_keys(x), apart(x), atol=1e-3)
    assert apart.attention_map(x).shape == (2, 16, 9)
    torch.testing.assert_close(apart.attention_map(x).sum(-1), torch.ones(2, 16))


def test_weights_from_when_input_proj_was_called_inlet_still_load():
    ours, other = (connector.build("perceiver", 12, 16) for _ in range(2))
    old = {name.replace("input_proj.", "inlet."): p for name, p in ours.state_dict().items()}
    assert {"inlet.weight", "inlet.bias"} <= old.keys()
    other.load_state_dict(old)
    within = torch.nn.ModuleDict({"connector": connector.build("perceiver", 12, 16)})
    within.load_state_dict({f"connector.{name}": p for name, p in old.items()})
    x = torch.randn(2, 9, 12)
    assert torch.equal(other(x), ours(x)) and torch.equal(within["connector"](x), ours(x))


@pytest.mark.parametrize(
    "name, says",
    [
        ("mlp0x_gelu", "no connector"), ("conv", "no connector"), ("concat3", "squares"), ("pool", "no connector"),
        ("identity", "16 numbers a token, the language model 24"), ("", "no connector"),
    ],
)  # fmt: skip
def test_bad_names_are_one_line(name, says):
    with pytest.raises(UserError, match=says):
        connector.build(name, 16, 24)


def test_bad_shapes_are_one_line():
    with pytest.raises(UserError, match="no square grid"):
        connector.build("pool3", 16, 24)(torch.randn(1, 50, 16))
    with pytest.raises(UserError, match="cannot share"):
        connector.build("perceiver", 16, 24, heads=8, kv_heads=3)
