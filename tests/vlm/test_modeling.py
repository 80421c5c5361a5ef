"""vlm/modeling.py: any encoder with any language model is a model of transformers, and computes what LLaVA computes."""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests import eyes
from utils.run import UserError
from vlm import modeling
from vlm.config import VLMConfig

IMAGE = 99  # the token of the tiny vocabularies


def tiny(vision="clip_vision_model", text="llama", connector="mlp2x_gelu", **more):
    """A model of random weights, none of them zero or one."""
    torch.manual_seed(2)
    config = VLMConfig(
        vision_config=eyes.tower(vision).config if vision else None,
        text_config=eyes.speaker(text).config,
        connector=connector,
        image_token_id=IMAGE,
        **more,
    )
    return eyes.shake(modeling.VLM(config)).eval()


def asked(model, pictures=1):
    """Text with two words before each picture and two behind, and noise as pictures."""
    torch.manual_seed(3)
    image = torch.full((model.image_tokens,), IMAGE)
    parts = []
    for i in range(pictures):
        parts += [torch.tensor([5 + i, 6]), image, torch.tensor([7, 8 + i])]
    side = model.vision.size
    return torch.cat(parts)[None], torch.randn(pictures, 3, side, side)


def test_logits_loss_and_gradients_are_those_of_transformers(parity):
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**eyes.VIT),
        text_config=LlamaConfig(**eyes.LLAMA, vocab_size=100, tie_word_embeddings=True),
        image_token_index=IMAGE,
        tie_word_embeddings=True,
    )
    theirs = eyes.shake(LlavaForConditionalGeneration(config)).eval()
    ours = modeling.VLM(
        VLMConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            connector="mlp2x_gelu",
            image_token_id=IMAGE,
        )
    ).eval()
    ours.vision.network.load_state_dict(theirs.model.vision_tower.state_dict())
    ours.language.model.load_state_dict(theirs.model.language_model.state_dict())
    projector = theirs.model.multi_modal_projector
    ours.connector[0].load_state_dict(projector.linear_1.state_dict())
    ours.connector[2].load_state_dict(projector.linear_2.state_dict())
    ids, pixels = asked(ours, pictures=2)
    labels = ids.masked_fill(ids == IMAGE, -100)
    labels[:, :3] = -100
    mine = ours(ids, pixels, labels=labels)
    other = theirs(input_ids=ids, pixel_values=pixels, labels=labels)
    parity("LLaVA", "modeling.VLM", "LlavaForConditionalGeneration", mine.logits, other.logits)
    parity("LLaVA", "modeling.VLM loss", "LlavaForConditionalGeneration", mine.loss, other.loss)
    mine.loss.backward()
    other.loss.backward()
    pairs = {
        "connector": (ours.connector[0].weight, projector.linear_1.weight),
        "embeddings": (
            ours.get_input_embeddings().weight,
            theirs.get_input_embeddings().weight,
        ),
        "encoder": (
            next(ours.vision.network.parameters()),
            next(theirs.model.vision_tower.parameters()),
        ),
    }
    for name, (a, b) in pairs.items():
        parity(
            "LLaVA",
            f"modeling.VLM, {name}, gradient",
            "LlavaForConditionalGeneration",
            a.grad,
            b.grad,
        )
    for p, q in pairs.values():
        assert p.grad.abs().sum() > 0 and q.grad.abs().sum() > 0


COMBINATIONS = [
    ("clip_vision_model", "llama", "mlp2x_gelu"),
    ("siglip_vision_model", "gpt2", "perceiver"),
    ("dinov2", "qwen2", "linear"),
    ("resnet", "llama", "pool2"),
    ("convnext", "opt", "linear"),
    (None, "llama", "pool2"),
]


@pytest.mark.parametrize("vision, text, connector", COMBINATIONS)
def test_every_combination_is_saved_generates_and_learns(vision, text, connector, tmp_path):
    more = {"perceiver": {"depth": 1, "n_latents": 5}} if connector == "perceiver" else {}
    model = tiny(vision, text, connector, **more)
    ids, pixels = asked(model)
    # the folder holds all of it: nothing is new, nothing is left out
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids, pixels).logits, model(ids, pixels).logits)
    # greedy search with the cache is greedy search without
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(ids, pixel_values=pixels, **settings)
    longer = ids
    for _ in range(4):
        with torch.no_grad():
            best = model(longer, pixels).logits[:, -1].argmax(-1, keepdim=True)
        longer = torch.cat([longer, best], dim=1)
    assert torch.equal(written, longer)
    # every part learns
    model.train()
    model(ids, pixels, labels=ids).loss.backward()
    for part in (model.vision, model.connector, model.language):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_efficientnet_stays_in_fp32(tmp_path):
    """A model in bf16 is loaded in bf16, but for batch statistics that would suffer."""
    model = tiny(None, "llama", "pool2")
    model.language.bfloat16()
    model.connector.bfloat16()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert {p.dtype for p in again.vision.parameters()} == {torch.float32}
    assert {p.dtype for p in again.language.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in again.connector.parameters()} == {torch.bfloat16}


def test_features_instead_of_pictures():
    model = tiny()
    ids, pixels = asked(model)
    with torch.no_grad():
        features = model.get_image_features(pixels)
        assert features.shape == (1, model.image_tokens, 24)
        assert torch.equal(model(ids, image_features=features).logits, model(ids, pixels).logits)


def test_text_alone_needs_no_picture():
    model = tiny()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.language(ids).logits)


@pytest.mark.parametrize("places, pictures", [(1, 0), (0, 1), (2, 1)])
def test_places_and_pictures_must_agree(places, pictures):
    model = tiny()
    ids, pixels = asked(model, pictures=max(places, pictures))
    if places == 0:
        ids = torch.tensor([[5, 6]])
    with pytest.raises(UserError, match="places for a picture's tokens"):
        model(ids, pixels[:pictures] if pictures else None)


def test_labels_that_are_not_learned_change_nothing():
    model = tiny()
    ids, pixels = asked(model)
    labels = ids.masked_fill(ids == IMAGE, -100)
    with torch.no_grad():
        whole = model(ids, pixels, labels=labels)
        logp = whole.logits[0, :-1].log_softmax(-1)
        learned = labels[0, 1:] != -100
        expected = -logp[learned].gather(1, labels[0, 1:][learned][:, None]).mean()
    torch.testing.assert_close(whole.loss, expected)


def test_lora_of_peft_saves_and_loads_its_own_files(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = tiny()
    ids, pixels = asked(model)
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["connector"])
    adapted = get_peft_model(model, settings)
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # B begins with zeros: A moves from the second step on
        adapted(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    with torch.no_grad():
        before = tiny()(ids, pixels).logits
        mine = adapted(input_ids=ids, pixel_values=pixels).logits
        read = fresh(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(mine, read) and not torch.allclose(mine, before)


def test_trainer_of_transformers_takes_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny()
    ids, pixels = asked(model)
    row = {"input_ids": ids[0], "pixel_values": pixels[0], "labels": ids[0]}
    with torch.no_grad():
        before = model(ids, pixels, labels=ids).loss.item()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=[row] * 8)
    assert trainer.train().training_loss < before
    with torch.no_grad():
        assert model.eval()(ids, pixels, labels=ids).loss.item() < 0.8 * before
