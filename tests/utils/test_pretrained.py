"""Pretrained models: the right weights in the right places, told by what they say about things we know."""

import email.message
import json
import shutil
import socket
import time
import urllib.error
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests import fuzz
from utils import assets, data, pretrained
from utils.run import UserError


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
    texts = [
        "a cat sits on the mat",
        "a kitten lies on the carpet",
        "share prices fell sharply",
        "stocks lost value",
    ]
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
    # They are what the classifier sees
    assert torch.allclose(network._fc(pooled), logits, atol=1e-3)


def check_smollm2():
    tokenizer, model = pretrained.smollm2()
    assert is_frozen(model) and model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = [
        {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    ]
    tokens = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)[
        0, tokens["input_ids"].shape[1] :
    ]
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a Llama of two layers, with SmolLM2's tokenizer cut down to bytes: some 60 kB."""
    folder = tmp_path_factory.mktemp("tiny")
    words = {token: i for i, token in enumerate(["<s>", "</s>", *map(chr, range(32, 127))])}
    backend = Tokenizer(WordLevel(words, "<s>"))
    backend.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def change(path, **values):
    content = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")


def test_tokenizer_of_a_language_model_ends_pads_and_knows_the_length(tiny):
    tokenizer, model = pretrained.language_model(tiny)
    assert is_frozen(model) and tokenizer.eos_token == tokenizer.pad_token == "</s>"
    assert tokenizer.model_max_length == pretrained.positions(model) == 64
    assert tokenizer("a" * 99, truncation=True, return_tensors="pt").input_ids.shape[1] == 64


@pytest.mark.parametrize("ends", [1, [1, 0]])
def test_end_token_that_only_the_model_knows(copy, ends):
    change(copy / "tokenizer_config.json", eos_token=None)
    change(copy / "generation_config.json", eos_token_id=ends)
    assert pretrained.language_model(copy)[0].eos_token_id == 1


def test_no_end_token_anywhere_is_refused(copy):
    change(copy / "tokenizer_config.json", eos_token=None)
    for name in ("config", "generation_config"):
        change(copy / f"{name}.json", eos_token_id="nothing")
        path = copy / f"{name}.json"
        # Left out it would be 2
        path.write_text(path.read_text("utf-8").replace('"nothing"', "null"), "utf-8")
    with pytest.raises(UserError, match="no end token; set eos_token"):
        pretrained.language_model(copy)


@pytest.mark.parametrize(
    "layers, reason", [(3, "its file lacks model.layers.2"), (1, "leaves out model.layers.1")]
)
def test_layers_that_config_and_file_do_not_share_are_refused(copy, layers, reason):
    """transformers fills them with random numbers, or leaves them out, and goes on."""
    change(copy / "config.json", num_hidden_layers=layers)
    with pytest.raises(UserError, match=reason):
        pretrained.language_model(copy)


@pytest.mark.parametrize("damage", ["cut", "empty", "pointer", "longer"])
def test_half_downloaded_weights_are_named(copy, damage):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n"
    path.write_bytes(
        {"cut": whole[:-9], "empty": b"", "pointer": pointer, "longer": whole + b"\0"}[damage]
    )
    for check in (pretrained.check_weights, pretrained.language_model):
        with pytest.raises(
            UserError, match="model.safetensors is damaged or only half there; download it again"
        ):
            check(copy)
    path.write_bytes(whole)
    pretrained.check_weights(copy)


def test_a_missing_shard_is_named(copy):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (copy / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(UserError, match="lacks model-00002-of-00002.safetensors"):
        pretrained.language_model(copy)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize(
    "name", ["nonsense-7b", "no/such/folder", "a b", "x\udcff", "nobody/nothing"]
)
def test_a_name_that_is_nowhere_is_one_line_at_once(monkeypatch, capfd, name, offline):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(UserError, match="no language model at '") as error:
        pretrained.language_model(name)
    assert time.monotonic() - start < 10 and "\n" not in str(error.value)
    str(error.value).encode()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "code, line", [(404, "neither a folder nor on the hub"), (503, "answers with error 503")]
)
def test_what_the_hub_answers(monkeypatch, code, line):
    from huggingface_hub import constants

    def answer(*_, **__):
        raise urllib.error.HTTPError("", code, "", email.message.Message(), None)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained.urllib.request, "urlopen", answer)
    with pytest.raises(UserError, match=line):
        pretrained.local_only("nobody/nothing")


def test_fuzz_config_of_a_language_model(copy):
    """A wrong value is refused, or the model still has its two layers and all of its weights."""
    path = copy / "config.json"
    config = json.loads(path.read_text("utf-8"))
    right = sum(p.numel() for p in pretrained.language_model(copy)[1].parameters())
    damaged = [json.dumps(bad).encode() for bad in fuzz.retyped(config, 60)]
    damaged += list(fuzz.damaged(path.read_bytes(), 40))
    for bad in damaged:
        path.write_bytes(bad)
        # with a size left out transformers first makes room for the 4096 of its default
        found = fuzz.reads_or_refuses(lambda: pretrained.language_model(copy), seconds=8)
        if found:
            assert sum(p.numel() for p in found[1].parameters()) == right


def test_fuzz_weights_of_a_folder(copy):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    for bad in fuzz.damaged(whole, 500):
        path.write_bytes(bad)
        fuzz.reads_or_refuses(lambda: pretrained.check_weights(copy))
        if len(bad) != len(whole):
            assert not pretrained.is_whole(path)
