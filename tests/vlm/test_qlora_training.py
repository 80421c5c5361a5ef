"""vlm/train.py --quant.bits: QLoRA of the language model, by our layer and by bitsandbytes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.lora_layers import LoRALinear
from finetune.quantization import QuantLinear
from tests import eyes
from vlm import connector, llava, packing, tower, trainable
from vlm import train as teach
from vlm.config import QuantConfig
from vlm.train_config import Config, changed

IMAGE = 99


def quantised(bits, backend="ours", kind="use_lora"):
    """A tiny Llava whose language model is stored in few bits."""
    quant = QuantConfig(bits, double_quant=False, backend=backend)
    cfg = changed(Config(), train_type=kind, precision="fp32", r=2, quant=quant)
    torch.manual_seed(0)
    # rows of whole blocks of 64: bitsandbytes on a CPU is wrong for others
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    language = eyes.shake(LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval(), 0.1)
    join = connector.build("linear", 16, 64)
    model = llava.Llava(tower.VisionTower(eyes.tower()), join, language, IMAGE)
    trainable.set_trainable(model, cfg)
    for module in model.language.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32  # of bitsandbytes: products, too
    with torch.no_grad():  # B is zero at first
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def step(model):
    """Loss and gradients of a conversation about a picture."""
    ids = [5, *[IMAGE] * 16, *range(6, 30)]
    labels = [-100] * 20 + ids[20:]
    batch = packing.pad([{"ids": ids, "labels": labels}], 0)
    features = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1))
    value = teach.Learner(model)(batch, features)
    value.backward()
    return value, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_are_stored_in_few_bits_and_lora_learns(bits):
    model = quantised(bits)
    layers = [m for m in model.language.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 14 and all(isinstance(m.base, QuantLinear) for m in layers)
    assert not [m for m in model.connector.modules() if isinstance(m, QuantLinear)]
    value, gradients = step(model)
    assert value.isfinite()
    assert len(gradients) == 2 + 2 * 14 and all(g.abs().sum() > 0 for g in gradients.values())


def test_the_connector_learns_through_matrices_of_few_bits():
    _, gradients = step(quantised(4, kind="projector"))
    assert sorted(gradients) == ["connector.bias", "connector.weight"]


def test_a_step_is_that_of_bitsandbytes(parity):
    mine, ours = step(quantised(4))
    theirs, other = step(quantised(4, "bitsandbytes"))
    names = "4 bits"
    parity("LLaVA, QLoRA", f"vlm.train, {names}", "bitsandbytes, loss", mine, theirs, 1e-3)
    assert ours.keys() == other.keys()
    parity("LLaVA, QLoRA", f"vlm.train, {names}", "bitsandbytes, gradients", ours, other, 1e-3)
