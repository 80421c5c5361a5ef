"""FLOPs of a vision-language step: formulas against PyTorch's counter on the real model, part by part."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING

from tests import eyes
from training import flops as training_flops
from training import presets
from utils.run import UserError
from vlm import build, flops, flops_parts, modeling, step_model
from vlm.config import VLMConfig
from vlm.step_model import Step

PERCEIVER = {
    "depth": 2, "n_latents": 5, "n_heads": 4, "n_query_groups": 2, "head_dim": 6, "concat_latents_kv": True,
}  # fmt: skip
WIDE = {"hidden_size": 24, "num_attention_heads": 4}  # an encoder as wide as the language model
MODELS: dict[str, dict[str, Any]] = {
    "CLIP, mlp2x_gelu, Llama": {},
    "SigLIP, mlp2x_gelu, Llama": {"vision": "siglip_vision_model"},
    "CLIP, linear, Qwen2": {"connector": "linear", "language": "qwen2"},
    "CLIP, mlp3x_gelu, all tokens, last layer": {
        "connector": "mlp3x_gelu", "select": "all", "vision_layer": -1,
    },
    "CLIP, pool2": {"connector": "pool2"},
    "CLIP, bilinear3": {"connector": "bilinear3"},
    "CLIP, concat4": {"connector": "concat4"},
    "CLIP, concat9, grid of 4 filled up": {"connector": "concat9"},
    "CLIP, perceiver": {"connector": "perceiver", "perceiver": PERCEIVER},
    "CLIP, perceiver of its own width": {
        "connector": "perceiver", "perceiver": PERCEIVER | {"hidden_size": 20},
    },
    "CLIP, four tokens of largest norm": {
        "connector": "linear", "sparsity_plugins": ["topk_norm4"],
    },
    "CLIP, perceiver, keys of the image alone": {
        "connector": "perceiver", "perceiver": PERCEIVER | {"concat_latents_kv": False},
    },
    "CLIP of equal width, identity": {"connector": "identity", "wide": True},
    "CLIP, tiles of LLaVA-1.6": {"tiles": 4},
    "CLIP, pool2, tiles of chosen sizes": {
        "connector": "pool2", "image_grid_pinpoints": [[28, 56], [84, 28]],
    },
    "CLIP, tile_perceiver": {"connector": "tile_perceiver", "perceiver": PERCEIVER, "tiles": 4},
}  # fmt: skip


def made(vision="clip_vision_model", language="llama", connector="mlp2x_gelu", wide=False, **more):
    """Configuration of a tiny model."""
    seen = CONFIG_MAPPING[vision](**eyes.VIT | (WIDE if wide else {}))
    text = CONFIG_MAPPING[language](**eyes.LLAMA | {"vocab_size": 100})
    return VLMConfig(
        connector=connector, vision_config=seen, text_config=text, image_token_id=99, **more
    )


PICTURE = (90, 40)  # of those that are tiled


def counted(config, step):
    """The real step under PyTorch's counter -> FLOPs of the forward pass by part, and of the backward pass."""
    model = step_model.build(config, step, attention="eager").float()
    batch = step_model.inputs(model, step)
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        loss = model(**batch, use_cache=False).loss
    with backward:
        loss.backward()
    found = forward.get_flop_counts()
    parts = {}
    for name in ("vision", "connector", "language"):
        parts[name] = sum(found.get(f"StepVLM.{name}", {}).values())
    assert sum(parts.values()) == forward.get_total_flops()
    return parts, backward.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("train_type", flops.TRAIN_TYPES)
def test_flops_are_those_that_torch_counts(parity, name, train_type):
    """Two conversations of two pictures: every part forward, all backward, with and without checkpointing."""
    if "identity" in name and train_type in ("projector", "use_lora"):
        with pytest.raises(UserError, match="no weights"):
            flops.step(made(**MODELS[name]), train_type)
        return
    config = made(**MODELS[name])
    shape = {"batch": 2, "images": 2, "text_tokens": 8, "picture": PICTURE}
    for checkpointing in (False, True):
        parts = flops.step(config, train_type, checkpointing=checkpointing, **shape)
        step = Step(train_type, checkpointing=checkpointing, **shape)
        forward, backward = counted(config, step)
        assert {key: part.forward for key, part in parts.items()} == forward
        ours = sum(part.backward + part.recomputed for part in parts.values())
        parity("FLOPs", f"flops.step, {name}", "FlopCounterMode", ours, backward, atol=0)


@pytest.mark.parametrize("train_type", ["projector", "use_lora"])
def test_cached_features_leave_out_the_encoder(parity, train_type):
    config = made()
    shape = {"batch": 2, "images": 2, "text_tokens": 8, "cached": True}
    forward, backward = counted(config, Step(train_type, **shape))
    parts = flops.step(config, train_type, **shape)
    assert parts["vision"].total == forward["vision"] == 0
    theirs = sum(forward.values()) + backward
    ours = flops.total(parts)
    parity("FLOPs", "flops.step, cached features", "FlopCounterMode", ours, theirs, atol=0)


def test_tiles_multiply_what_the_encoder_sees():
    """3 x 1 tiles of 28 pixels beside the whole; 12 rows of 4 cells, each with a newline, behind 16 of the whole."""
    config = made(tiles=4)
    assert flops_parts.tiles_and_tokens(config, 16, (84, 28)) == (4, 16 + 12 * 5)
    assert flops_parts.tiles_and_tokens(made(), 16, (84, 28)) == (1, 16)
    plain = flops.step(made(), "projector", text_tokens=8)
    tiled = flops.step(config, "projector", text_tokens=8, picture=(84, 28))
    for part in ("vision", "connector"):
        assert tiled[part].total == 4 * plain[part].total


def test_texts_alone_and_ranks_of_lora():
    config = made()
    alone = flops.step(config, "use_lora", images=0, text_tokens=8)
    assert alone["vision"].total == alone["connector"].total == 0
    few, more, most = (
        flops.step(config, "use_lora", lora_rank=r)["language"].total for r in (1, 2, 3)
    )
    assert most - more == more - few > 0


def test_backward_pass_of_products():
    """weights 10, of which 4 get nothing that learns, attention 3."""
    part = flops_parts.Products(10, 3, 4)
    assert part.forward == 13
    assert part.backward(trained=True, before=True) == 26
    assert part.backward(trained=True, before=False) == 22
    assert part.backward(trained=False, before=True) == 16
    assert part.backward(trained=False, before=False) == 0
    assert part + part * 2 == flops_parts.Products(30, 9, 12)


def test_checkpointing_of_a_whole_model_makes_a_frozen_encoder_learn():
    """transformers lets the inputs require gradients, which `build` avoids by asking the language model alone."""
    config = made()
    step = Step("projector", text_tokens=8)
    model = step_model.build(config, step, attention="eager").float()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with FlopCounterMode(display=False) as counter:
        model(**step_model.inputs(model, step), use_cache=False).loss.backward()
    frozen = flops.step(config, "projector", text_tokens=8, checkpointing=True)
    assert counter.get_total_flops() > flops.total(frozen) + 0.5 * frozen["vision"].forward


def test_llama_alone_agrees_with_the_formula_of_pretraining(parity):
    text: Any = presets.configuration("llama2-7b")
    length = 704
    layer = flops_parts.decoder_layer(text, length).forward
    ours = 32 * layer + flops_parts.head(text, length).forward
    theirs = training_flops.forward_flops(text, 1, length)
    kind = "flops_parts.decoder_layer, head"
    parity("FLOPs", kind, "training.flops.forward_flops", ours, theirs, atol=0)


@pytest.fixture(scope="module")
def seven():
    """LLaVA-1.5-7B."""
    config = VLMConfig(
        vision_name_or_path="clip-vit-large-patch14-336",
        text_name_or_path="llama2-7b",
        connector="mlp2x_gelu",
    )
    return build.configurations(config)


def test_flops_of_llava_of_7b(seven, parity):
    """The encoder as PyTorch counts it, and nearly 2 N = 13.5 GFLOPs a token for Llama-2-7B."""
    parts = flops.step(seven, "freeze_vision", text_tokens=128)
    seven.vision_config._attn_implementation = "eager"
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        modeling.vision_network(seven)(pixel_values=torch.zeros(1, 3, 336, 336))
    seen = counter.get_total_flops()
    ours = parts["vision"].forward
    parity("FLOPs", "flops_parts.vision_encoder, CLIP-L-336", "FlopCounterMode", ours, seen, atol=0)
    assert ours == 381_918_216_192
    assert parts["language"].forward / 704 == pytest.approx(2 * 6.74e9, rel=0.02)
    assert parts["language"].backward == 2 * parts["language"].forward
    projector = flops.step(seven, "projector", text_tokens=128)
    whole = flops.total(projector) / flops.total(parts)
    assert whole == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"train_type": "lora"}, "no --train_type lora"),
        ({"batch": 0}, "above 0"),
        ({"text_tokens": 0}, "above 0"),
        ({"images": -1}, "0 or more"),
        ({"train_type": "none", "cached": True}, "no cached features"),
    ],
)
def test_steps_that_make_no_sense(change, line):
    with pytest.raises(UserError, match=line):
        flops.step(made(), **{"train_type": "projector"} | change)


def test_parts_without_a_formula():
    for change, line in (
        ({"vision_config": None}, "no formula for EfficientNet"),
        ({"text_config": CONFIG_MAPPING["gpt2"]()}, "no formula for gpt2"),
        ({"connector": "honeybee"}, "the connector 'honeybee'"),
    ):
        config = made()
        for name, value in change.items():
            setattr(config, name, value)
        with pytest.raises(UserError, match=line):
            flops.step(config, "projector")
