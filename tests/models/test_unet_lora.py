"""LoRA of a U-Net: equal to PEFT's; nothing at first, nothing but itself learns, merged it is the same."""

import copy
from typing import Any

import pytest
import torch

from models.unet import UNet
from models.unet_lora import LoRA, add_lora, lora_state, merge
from utils.run import UserError


def small():
    torch.manual_seed(0)
    return UNet(4, (16, 32), layers=1, attention=(True, True), context_dim=24, head_dim=16)


def inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24)


def shaken(model):
    """B is zero at first, and any two LoRAs agree."""
    for name, weight in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(weight, std=0.1)
    return model


def test_equals_peft(parity):
    from peft import LoraConfig, inject_adapter_in_model

    ours = small()
    names = add_lora(ours, 4, 8)
    shaken(ours)
    about = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    theirs = inject_adapter_in_model(about, small())
    pairs = [(ours.get_submodule(name), layer_of(theirs, name)) for name in names]
    with torch.no_grad():
        for mine, (other_a, other_b) in pairs:
            other_a.copy_(mine.lora_A)
            other_b.copy_(mine.lora_B)
    x = inputs()
    a, b = ours(*x), theirs(*x)
    parity("DreamBooth", "unet_lora.LoRA", "peft.LoraConfig in the same U-Net", a, b)
    a.square().mean().backward()
    b.square().mean().backward()
    slopes = [weight.grad for mine, _ in pairs for weight in (mine.lora_A, mine.lora_B)]
    other = [weight.grad for _, weights in pairs for weight in weights]
    parity("DreamBooth", "unet_lora.LoRA, gradients", "peft", slopes, other)


def layer_of(model: Any, name):
    """PEFT's two matrices of a layer."""
    layer = model.get_submodule(name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def test_every_attention_has_it_and_nothing_else_learns():
    model = small()
    names = add_lora(model, 4, 4)
    # five transformer blocks with two attentions each, and four linear layers in each
    blocks = sum(type(m).__name__ == "TransformerBlock" for m in model.modules())
    assert len(names) == 8 * blocks and len(set(names)) == len(names)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == set(lora_state(model)) and len(learns) == 2 * len(names)
    model(*inputs()).square().mean().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learns)


def test_nothing_changes_at_first():
    plain = small()
    model = copy.deepcopy(plain)
    add_lora(model, 4, 4)
    x = inputs()
    assert torch.equal(model(*x), plain(*x))


def test_merged_is_the_same_and_plain():
    model = small()
    add_lora(model, 4, 8)
    shaken(model)
    x = inputs()
    before = model(*x)
    merge(model)
    assert not any(isinstance(m, LoRA) for m in model.modules())
    torch.testing.assert_close(model(*x), before, atol=1e-5, rtol=1e-4)
    small().load_state_dict(model.state_dict())  # the names of a plain network
    assert (before - small()(*x)).abs().max() > 1e-3


def test_rank_must_be_one_or_more():
    with pytest.raises(UserError, match="--rank"):
        add_lora(small(), 0, 1)
