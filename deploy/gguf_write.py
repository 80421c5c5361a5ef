"""GGUF: one's own Llama, with its tokenizer, as the file that llama.cpp reads; in F16, Q8_0 or Q4_1.

A GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) holds metadata, the tokenizer and
the weights, row after row. In Q8_0 and Q4_1 each block of 32 numbers of a row has a scale in float16, and
Q4_1 a minimum, too. Names are those of llama.cpp, and rows of queries and keys change places: it rotates
neighbours of a head (Su et al. 2021, arXiv:2104.09864, Eq. 34), transformers the first half against
the second.

Shapes: weight (out, in), n blocks of 32 numbers, H heads of D numbers.

    python deploy/gguf_write.py                                   # SmolLM2 in Q8_0, read back and compared
    python deploy/gguf_write.py --kind q4_1 --model outputs/llama2_lora/merged
    python deploy/gguf_write.py --adapter outputs/llama2_lora     # a PEFT folder, merged first
"""

import io
import os
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from deploy import decode, kv_cache, llama_cpp_times
from deploy.caches import StaticCache
from deploy.gguf_metadata import add_config, add_tokenizer, check_config
from deploy.llama import Llama
from utils import run
from utils.run import UserError, check

BLOCK = 32
NEW = 32  # tokens that are compared with llama.cpp's


@dataclass(frozen=True)
class Config:
    """Write a Llama as a GGUF file, read it back and compare."""

    model: str = "smollm2"  # or a local folder, or a hub id
    adapter: str = ""  # PEFT folder of a LoRA, merged into the weights first
    kind: Literal["f16", "q8_0", "q4_1"] = "q8_0"  # type of the linear layers
    pre: str = "smollm"  # how the tokenizer cuts text before BPE, by llama.cpp's name
    check: bool = True  # read the file with transformers and compare logits
    text: str = "The capital of France is Paris, and that of Italy is"  # for this comparison
    llama_cpp: str = ""  # a Python that has llama-cpp-python: does it go on with the text as we do?
    out: str = "outputs/gguf_write"


def q8_0(blocks):
    """Q8_0: d = max |x| / 127, q = round(x / d), half away from 0. Blocks (n,32) float32 -> bytes (n,34): d in float16,
    then q in int8.
    """
    # a scale for each block; one of zeros has none
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    ratio = np.divide(blocks, d, out=np.zeros_like(blocks), where=d > 0)
    q = np.copysign(np.floor(np.abs(ratio) + np.float32(0.5)), ratio).astype(np.int8)
    return np.concatenate([d.astype(np.float16).view(np.uint8), q.view(np.uint8)], axis=1)


def q4_1(blocks):
    """Q4_1: m = min x, d = (max x - m) / 15, q = round((x - m) / d). Blocks (n,32) float32 -> bytes (n,20): d and m
    in float16, then numbers i and i + 16 in the low and high half of byte i.
    """
    m = blocks.min(axis=1, keepdims=True)
    d = (blocks.max(axis=1, keepdims=True) - m) / np.float32(15)
    ratio = np.divide(blocks - m, d, out=np.zeros_like(blocks), where=d > 0)
    q = np.floor(ratio + np.float32(0.5)).clip(0, 15).astype(np.uint8)
    # two codes a byte
    packed = q[:, :16] | (q[:, 16:] << 4)
    head = [x.astype(np.float16).view(np.uint8) for x in (d, m)]
    return np.concatenate([*head, packed], axis=1)


def encode(weight, kind):
    """Weight (out,in) float32 -> (array, GGUF type). Rows that are no whole blocks become F16, vectors stay F32."""
    from gguf import GGMLQuantizationType as Type

    if weight.ndim == 1:
        return weight, Type.F32
    if kind == "f16" or weight.shape[1] % BLOCK:
        return weight.astype(np.float16), Type.F16
    quantise = {"q8_0": q8_0, "q4_1": q4_1}[kind]
    # blocks run along the inputs of a row
    coded = quantise(weight.reshape(-1, BLOCK))
    return coded.reshape(len(weight), -1), Type[kind.upper()]


def interleave(weight, heads):
    """Rows of queries or keys (H D, in): i and i + D/2 of each head, which transformers rotates as one point, become
    neighbours 2 i and 2 i + 1.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tensors(model):
    """Llama of transformers -> yields (name of llama.cpp, array float32), queries and keys with neighbours."""
    config = model.config

    def numbers(module):
        return module.weight.detach().float().cpu().numpy()

    yield "token_embd.weight", numbers(model.model.embed_tokens)
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            array = numbers(layer.get_submodule(ours))
            if theirs == "attn_q":
                array = interleave(array, config.num_attention_heads)
            if theirs == "attn_k":
                array = interleave(array, config.num_key_value_heads)
            yield f"blk.{number}.{theirs}.weight", array
    yield "output_norm.weight", numbers(model.model.norm)
    # a tied head is not stored twice
    if not config.tie_word_embeddings:
        yield "output.weight", numbers(model.lm_head)


def write(model, tokenizer, path, kind="q8_0", pre="smollm"):
    """Write a Llama and its byte-level BPE tokenizer, whole or not at all -> path.

    With q4_1 embeddings and head have Q8_0, as llama.cpp does it. Raises UserError for another
    architecture or tokenizer, or if the file cannot be written.
    """
    import gguf

    check(kind in ("f16", "q8_0", "q4_1"), f"--kind {kind}: there are f16, q8_0, q4_1")
    check_config(model.config)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # sizes and tokenizer, then the weights, under a temporary name
        writer = gguf.GGUFWriter(temporary, "llama")
        add_config(writer, model.config, path.stem, kind)
        add_tokenizer(writer, tokenizer, model.config.vocab_size, pre)
        for name, array in tensors(model):
            is_table = name in ("token_embd.weight", "output.weight")
            finer = "q8_0" if kind == "q4_1" and is_table else kind
            coded, about = encode(array, finer)
            writer.add_tensor(name, coded, raw_dtype=about)
        # on the disk; one rename makes it visible
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None
    return path


def read(path):
    """GGUF file -> {name: array float32}, dequantised by the gguf package. Raises UserError if it is none."""
    import gguf

    check(Path(path).is_file(), f"no GGUF file at {path}")
    try:
        found = gguf.GGUFReader(path).tensors
        return {x.name: gguf.dequantize(x.data, x.tensor_type) for x in found}
    # cut short or damaged: the reader raises what comes
    except Exception as error:
        raise UserError(f"{path} is no whole GGUF file: {error}") from None


def load(path):
    """GGUF file -> Llama of transformers, float32. It dequantises and puts queries and keys back."""
    from transformers import AutoModelForCausalLM

    path = Path(path)
    about = {"gguf_file": path.name, "local_files_only": True, "dtype": torch.float32}
    # its bars
    with redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(path.parent, **about).eval()


def merged(model, folder):
    """A PEFT folder merged into the weights of a model -> model. Raises UserError for what is no such folder."""
    from peft import PeftModel

    check((Path(folder) / "adapter_config.json").is_file(), f"--adapter {folder}: no PEFT folder")
    try:
        # `load` has frozen the model; a merge needs no gradient either
        return PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--adapter {folder} does not fit this model: {reason}") from None


def main(cfg: Config) -> dict:
    """Write the file; errors of the weights, and of logits as transformers reads the file."""
    if cfg.llama_cpp:
        llama_cpp_times.smollm2(cfg.llama_cpp)  # is there such a Python?
    tokenizer, model = decode.load(cfg.model, "cpu")
    model = model.float()
    if cfg.adapter:
        model = merged(model, cfg.adapter)
    check_config(model.config)
    folder = run.output(cfg.out, cfg)
    # the file
    path = write(model, tokenizer, folder / f"model-{cfg.kind}.gguf", cfg.kind, cfg.pre)
    # weights as they come back
    kept = read(path)
    wanted = dict(tensors(model))
    square = sum(float(np.square(kept[name] - x).sum()) for name, x in wanted.items())
    size = sum(float(np.square(x).sum()) for x in wanted.values())
    count = sum(x.size for x in wanted.values())
    metrics = {
        "tensors": len(wanted),
        "MB": path.stat().st_size / 1e6,
        "bits a weight": 8 * path.stat().st_size / count,
        "relative error of weights": (square / size) ** 0.5,
    }
    ids = tokenizer(cfg.text, return_tensors="pt").input_ids
    # greedy tokens of llama.cpp and of the model, up to the first that differs
    if cfg.llama_cpp:
        with llama_cpp_times.started(cfg.llama_cpp, ids.shape[1] + NEW, path) as ask:
            theirs = ask(ids[0].tolist(), NEW)["tokens"]
        cache = StaticCache(Llama(model), ids.shape[1] + NEW)
        ours = kv_cache.generate(Llama(model), ids, NEW, cache)[0].tolist()
        same = [a == b for a, b in zip(ours, theirs)]
        metrics[f"tokens as in llama.cpp, of {NEW}"] = [*same, False].index(False)
    # logits, as transformers reads the file
    if cfg.check:
        with torch.no_grad():
            off = load(path)(ids).logits - model(ids).logits
        metrics["largest difference of logits"] = float(off.abs().max())
        metrics["root mean square difference"] = float(off.square().mean().sqrt())
    return run.report(folder, metrics, then=f"llama-cli -m {path} -p 'Hello'")


if __name__ == "__main__":
    run.cli(main, Config)
