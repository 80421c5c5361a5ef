"""Pretrained models: the right weights in the right places, told by what they say about things we know."""

import socket

import pytest
import torch

from utils import assets, data, pretrained


@pytest.fixture(scope="module")
def encoder():
    return pretrained.minilm()


@pytest.fixture(scope="module")
def network():
    return pretrained.efficientnet()


def is_frozen(model):
    return not model.training and not any(p.requires_grad for p in model.parameters())


def test_minilm_knows_what_is_alike(encoder):
    tokenizer, model = encoder
    assert is_frozen(model) and sum(p.numel() for p in model.parameters()) == 22_713_216
    texts = ["a cat sits on the mat", "a kitten lies on the carpet", "share prices fell sharply", "stocks lost value"]
    x = pretrained.embed(texts, tokenizer, model)
    assert x.shape == (4, 384) and torch.allclose(x.norm(dim=1), torch.ones(4))
    alike = x @ x.T
    assert min(alike[0, 1], alike[2, 3]) > 0.4 and alike[:2, 2:].max() < 0.2


def test_embedding_does_not_depend_on_the_batch(encoder):
    """Padding must not leak into the mean."""
    short, long = "red apple", "a very long sentence about " + "many things and " * 20
    alone = pretrained.embed([short], *encoder)
    beside = pretrained.embed([short, long], *encoder)[:1]
    one_by_one = pretrained.embed([long, short], *encoder, batch=1)[1:]
    assert torch.allclose(alone, beside, atol=1e-5) and torch.allclose(alone, one_by_one, atol=1e-5)
    assert pretrained.embed([], *encoder).shape == (0, 384)


def test_efficientnet_recognises_pictures(network):
    """Drawings, not photos, and still: ImageNet classes 849 teapot, 805 soccer ball."""
    assert is_frozen(network) and sum(p.numel() for p in network.parameters()) == 4_652_008
    images, captions, _ = data.emoji()
    picked = images[[captions.index(name) for name in ("teapot", "soccer ball")]]
    assert network(pretrained.efficientnet_input(picked)).argmax(1).tolist() == [849, 805]


def test_efficientnet_input_is_scaled_as_in_training():
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    for images in (white, data.to_float(white), white[:, :1]):
        x = pretrained.efficientnet_input(images)
        assert x.shape == (1, 3, 224, 224) and torch.allclose(x, torch.tensor(1.0))
    assert torch.allclose(pretrained.efficientnet_input(white * 0), torch.tensor(-127 / 128))


def test_efficientnet_features(network):
    images = data.emoji()[0][:5]
    pooled = pretrained.efficientnet_features(network, images, batch=2)
    maps = pretrained.efficientnet_features(network, data.to_float(images), pooled=False)
    assert pooled.shape == (5, 1280) and maps.shape == (5, 1280, 7, 7) and not pooled.requires_grad
    assert torch.allclose(pooled, maps.mean((2, 3)), atol=1e-4) and pooled.std() > 0.1
    logits = network(pretrained.efficientnet_input(images))
    assert torch.allclose(network._fc(pooled), logits, atol=1e-3)  # they are what the classifier sees


def check_smollm2():
    tokenizer, model = pretrained.smollm2()
    assert is_frozen(model) and model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


# SmolLM2 is 93 MB to download and 270 MB unpacked: only where a later chapter has fetched it
CHECKS = {"minilm": pretrained.minilm, "efficientnet": pretrained.efficientnet}
if assets.present(assets.ASSETS["smollm2"]):
    CHECKS["smollm2"] = check_smollm2


@pytest.mark.parametrize("name", CHECKS)
def test_works_without_a_network(name, monkeypatch):
    assets.fetch(name)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    CHECKS[name]()


def test_language_model_that_is_not_there(tmp_path):
    with pytest.raises(pretrained.UserError, match="no language model at"):
        pretrained.language_model(tmp_path)
