"""deploy/serve.py --int4 and --int8: answers are those of greedy decoding with the same layers."""

import copy
from types import SimpleNamespace

import pytest
import torch

from deploy import decode, kv_cache, low_bit, quantized_model, serve
from deploy.caches import StaticCache
from deploy.int8_linear import Int8Linear, int8_layers
from deploy.low_bit_fused import FusedLayer, bytes_held, fused
from deploy.low_bit_layers import FEW, Int4Int8Linear, int4_layers
from tests import llamas
from tests.deploy.test_low_bit_layers import tiny
from utils.run import UserError

ASK = "What is the capital of France?"


def greedy(llama, tokenizer, new):
    """Our own greedy decoding of the question, without a server -> ids."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": ASK}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert ids.shape[1] > FEW  # so that the prompt is read in int8
    return kv_cache.generate(llama, ids, new, StaticCache(llama, ids.shape[1] + new))[0]


@pytest.fixture
def engines(monkeypatch):
    """The engines that the server makes."""
    made = []
    whole = serve.Engine

    def engine(*arguments):
        made.append(whole(*arguments))
        return made[-1]

    monkeypatch.setattr(serve, "Engine", engine)
    return made


@pytest.fixture
def model(monkeypatch):
    """A tiny random Llama whose widths are multiples of 32, in place of SmolLM2."""
    made = tiny(vocabulary=len(llamas.tokenizer()))
    made.config.max_position_embeddings = 256
    for name, p in made.model.layers.named_parameters():
        p.data *= 1 if "norm" in name else 8
    tokenizer = llamas.tokenizer()
    monkeypatch.setattr(decode, "load", lambda *_: (tokenizer, copy.deepcopy(made)))
    return made


@pytest.mark.parametrize(
    "flag, layers, kind",
    [
        ("int4", lambda model: int4_layers(model, prefill_int8=True), Int4Int8Linear),
        ("int8", int8_layers, Int8Linear),
    ],
)
def test_answers_are_those_of_greedy_decoding(
    flag, layers, kind, model, engines, tmp_path, capsys, parity
):
    about = {flag: True, "model": "some/llama", "prompt": ASK, "out": str(tmp_path)}
    found = serve.main(serve.Config(port=0, once=True, **about))
    # `layers` works in place
    llama = fused(layers(model))
    assert found["weights, MB"] == bytes_held(model, llama) / 1e6
    wanted = greedy(llama, llamas.tokenizer(), 32)
    text = llamas.tokenizer().decode(wanted)
    assert serve.clean(text) in capsys.readouterr().out
    (engine,) = engines
    layer = engine.llama.layers[0]
    assert isinstance(layer, FusedLayer) and type(layer.qkv) is type(layer.down) is kind
    assert len(set(wanted.tolist())) > 5
    # the same tokens straight from the engine of the server
    ids = llamas.tokenizer().apply_chat_template(
        [{"role": "user", "content": ASK}], add_generation_prompt=True, return_dict=False
    )
    mine = torch.tensor(engine.generate([ids], 32)[0])
    parity("Server", f"serve.py --{flag}", "low_bit's greedy decoding", mine, wanted, 0)


@pytest.mark.long
def test_smollm2_in_int4_keeps_the_codes_of_its_file_and_answers(engines, tmp_path, capsys):
    found = serve.main(serve.Config(port=0, once=True, int4=True, out=str(tmp_path)))
    assert "Paris" in capsys.readouterr().out and found["new tokens"] < 32
    tokenizer, model = decode.load("smollm2", "cpu")
    llama = fused(low_bit.int4_smollm2(model, prefill_int8=True))
    grids = [x.get_submodule("layers.3.qkv.int4").grid for x in (engines[0].llama, llama)]
    assert torch.equal(*grids)
    wanted = greedy(llama, tokenizer, found["new tokens"])
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": ASK}], add_generation_prompt=True, return_dict=False
    )
    assert engines[0].generate([ids], len(wanted))[0] == wanted.tolist()


def test_smollm2_is_told_from_other_models(monkeypatch):
    """It alone lies there in codes."""
    made = []
    for name in ("int4_smollm2", "int4_layers"):
        call = lambda model, prefill_int8, name=name: made.append((name, prefill_int8))  # noqa: E731
        monkeypatch.setattr(serve, name, call)
    for name in ("smollm2", "a/folder"):
        serve.low_bit(tiny(), serve.Config(model=name, int4=True))
    assert made == [("int4_smollm2", True), ("int4_layers", True)]
    plain = tiny()
    assert serve.low_bit(plain, serve.Config()) is plain
    assert type(plain.lm_head) is torch.nn.Linear


def test_flags_that_make_no_sense(monkeypatch):
    with pytest.raises(UserError, match="one of them"):
        serve.low_bit(tiny(), serve.Config(int4=True, int8=True))
    elsewhere = SimpleNamespace(device=torch.device("meta"))
    with pytest.raises(UserError, match="--device cpu"):
        serve.low_bit(elsewhere, serve.Config(int4=True))
    monkeypatch.setattr(quantized_model, "is_ours", lambda folder: True)
    for flag in ("int4", "int8"):
        with pytest.raises(UserError, match="quantised already"):
            serve.load(serve.Config(**{flag: True}))
