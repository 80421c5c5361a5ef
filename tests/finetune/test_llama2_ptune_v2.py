"""finetune/llama2_ptune_v2.py: every number is free. Its equality with PEFT is in test_llama2_prompt.py."""

import torch

from finetune import llama2_prefix, llama2_ptune_v2
from tests.llamas import tiny


def test_deep_prompts_begin_as_a_text_and_every_number_gets_a_gradient():
    model = tiny().requires_grad_(False)
    kept = llama2_prefix.read(model, torch.tensor([7, 8, 9, 10]))
    prompt = llama2_ptune_v2.DeepPrompt(4, *llama2_prefix.sizes(model), kept)
    assert torch.equal(prompt(), kept)
    ids = torch.randint(2, 120, (2, 5))
    logits = llama2_prefix.network(model, prompt)(ids, torch.ones_like(ids, dtype=torch.bool))
    logits.log_softmax(-1)[..., 0].sum().backward()
    assert (prompt.embedding.weight.grad != 0).all()
