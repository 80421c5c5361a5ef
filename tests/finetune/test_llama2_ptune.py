"""finetune/llama2_ptune.py: who knows its neighbours? Its equality with PEFT is in test_llama2_prompt.py."""

import pytest
import torch

from finetune import llama2_ptune


@pytest.mark.parametrize("encoder, others", [("lstm", True), ("mlp", False)])
def test_one_free_vector_moves_all_words_of_the_lstm_and_one_of_the_mlp(encoder, others):
    soft = llama2_ptune.PromptEncoder(5, 32, 12, encoder)
    before = soft().detach()
    with torch.no_grad():
        soft.embedding.weight[2] += 1
    moved = (soft().detach() - before).abs().amax(1) > 0
    assert moved.tolist() == [others, others, True, others, others]


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_the_prompt_that_is_saved_is_the_one_that_was_trained(encoder):
    """The encoder is in eval mode when the prompt is written, and in training mode before."""
    soft = llama2_ptune.PromptEncoder(5, 32, 12, encoder)
    trained = soft.train()().detach()
    assert torch.equal(soft.eval()(), trained) and not torch.equal(trained, soft.embedding.weight)
