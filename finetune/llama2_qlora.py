"""QLoRA: frozen weights quantised to 8 or 4 bits, LoRA in 32 beside them. Dettmers et al. 2023,
arXiv:2305.14314.

Frozen weights are only read, so they may be stored coarsely: cut each matrix into blocks of 64
numbers, divide a block by its largest (absmax quantisation), and keep of each quotient the number
of the nearest of 16 values. Which values? Weights are nearly normal, so take quantiles of the
normal distribution: NF4, 4-bit NormalFloat. Double quantisation stores the scales of the blocks in
8 bits. Gradients pass through the coarse weights to the LoRA corrections, which are exact. Eight
bits are older: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) multiplies integers, and takes
the few columns with huge activations out, in full precision. All of that is in quantization.py;
here a model is stored so, and LoRA trained beside it.

Shapes: weight (out, in), blocks of S = 64.
Differences from the papers: those of quantization.py; LoRA sits in attention alone, where the paper
puts it in every linear layer and finds that this matters; no paged optimizer.

    python finetune/llama2_qlora.py                   # --bits 4
    python finetune/llama2_qlora.py --bits 8          # 32, 16, 8 or 4
    python finetune/llama2_qlora.py --codebook fp4
    python finetune/llama2_qlora.py --backend bitsandbytes
    python finetune/llama2_qlora.py --model meta-llama/Llama-2-7b-hf     # larger, for a GPU
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from finetune import adapters, llama2_full, llama2_lora, peft_io, sentiment, task_setup
from finetune.lora_inject import inject, replace_module
from finetune.peak_memory import storage_bytes
from finetune.quantization import CODEBOOKS, QuantLinear
from utils import figures, run


@dataclass(frozen=True)
class Config(task_setup.Training):
    """Adapt a language model whose frozen weights are stored in few bits, and score it."""

    lr: float = 1e-3  # peak learning rate
    steps: int = 80  # training steps; making the weights takes a part of each
    # of a frozen weight: fp32, bf16, absmax int8, or a codebook of 16 values
    bits: Literal[32, 16, 8, 4] = 4
    codebook: Literal["nf4", "fp4", "int4"] = "nf4"  # the 16 values of 4 bits
    block: int = 64  # S, numbers that share a scale, with 4 bits
    double: bool = True  # double quantisation: quantise the scales of 4 bits, too
    rank: int = 8  # r of LoRA
    alpha: float = 16.0  # updates are multiplied by alpha / r
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # where LoRA goes
    backend: Literal["ours", "bitsandbytes"] = "ours"  # who stores the weights in 8 or 4 bits
    out: str = "outputs/llama2_qlora"  # where the results go


def body(model):
    """The linear layers but the head: that shares its weights with the embedding, and answers are
    read from it.
    """
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def cast(model, dtype):
    """Change the type of the weights, in place; buffers, such as rotary angles, stay exact."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def store(model, bits, codebook="nf4", block=64, double=True, make=QuantLinear):
    """Keep every linear layer but the head in `bits`, in place -> the model, frozen; 16 and 32
    change the type.
    """
    layers = body(model)
    run.check(layers, "this model has no linear layer besides its head: nothing to quantise")
    # frozen; 32 and 16 bits are a type
    model.requires_grad_(False)
    if bits >= 16:
        return cast(model, torch.float32 if bits == 32 else torch.bfloat16)
    # each layer gives its place to a quantised one
    for name, layer in layers.items():
        quantised = make(layer, bits, codebook, block, double)
        replace_module(model, name, quantised)
    return model


def by_bitsandbytes(base, bits, codebook, block, double):
    """The same layer by bitsandbytes; its eight bits multiply integers, as `int8_matmul` does."""
    import bitsandbytes as bnb

    size = (base.in_features, base.out_features, base.bias is not None)
    weight = base.weight.detach()
    # LLM.int8(), or QLoRA
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
        parameter: Any = bnb.nn.Int8Params  # made by __new__, which a type checker does not see
        layer.weight = parameter(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            *size, torch.bfloat16, compress_statistics=double, quant_type=codebook
        )
        settings = dict(quant_type=codebook, compress_statistics=double, blocksize=block)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **settings)
        # else gradients are wrong after a pass without them (0.50 on a CPU)
        layer.support_avx512bf16_for_cpu = False
    layer.bias = base.bias
    return layer.to(weight.device)


def errors(weights, block=64):
    """Relative root mean square error of weights, by kind of storage: {name: (bits, error)}."""
    # name: bits, codebook, block, double quantisation
    kinds = {"int8, a row": (8, "", 0, False)}
    for codebook in CODEBOOKS:
        kinds[codebook] = (4, codebook, block, False)
    for size in (32, 64, 256):
        kinds[f"nf4, double, blocks of {size}"] = (4, "nf4", size, True)
    found = {}
    norm = sum(float(w.weight.float().square().sum()) for w in weights)
    for name, (bits, codebook, size, double) in kinds.items():
        # quantise every weight so; squares of what is lost
        layers = [QuantLinear(w, bits, codebook, size, double) for w in weights]
        square = 0.0
        for layer, base in zip(layers, weights):
            square += float((layer.weight - base.weight.float()).square().sum())
        mean_bits = sum(layer.bits_each() for layer in layers) / len(layers)
        found[name] = mean_bits, (square / norm) ** 0.5
    return found


def draw(path, weight, block=64):
    """Histogram of real weights, each divided by the largest of its block, and the values that 4
    bits leave of them.
    """
    import matplotlib.pyplot as plt

    # quotients of whole blocks
    x = weight.detach().float().flatten()
    blocks = x[: len(x) // block * block].view(-1, block).cpu()
    x = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
    # beneath the values of each codebook
    figure, axes = plt.subplots(1, len(CODEBOOKS), figsize=(10, 2.4), sharey=True)
    for axis, (name, make) in zip(axes, CODEBOOKS.items()):
        axis.hist(x, bins=201, color="lightsteelblue")
        for value in make():
            axis.axvline(float(value), color="black", linewidth=0.8)
        axis.set(title=name, xlabel="weight / largest of its block", yticks=[])
    return figures.close(figure, path)


def underflow(gradients, scale):
    """What fp16 makes of gradients that were multiplied by `scale`: the fractions that are zero,
    and infinite.

    Micikevicius et al. 2017, arXiv:1710.03740, Sec. 3.2: below 6e-8 fp16 has nothing, so the loss
    is multiplied by a number, its gradients with it, and they are divided by it again in fp32. bf16
    reaches as far down as fp32.
    """
    x = torch.cat([g.float().flatten() for g in gradients])
    half = (x[x != 0] * scale).half()
    return float((half == 0).float().mean()), float(half.isinf().float().mean())


def gradients(bench, cfg, layers) -> Any:
    """The gradients of some weights for one batch, in fp32."""
    # these weights alone
    for layer in layers:
        layer.float().requires_grad_(True)
    # the first batch of the training
    batch = task_setup.draw(bench.tokenizer, bench.parts["train"], cfg, 0)
    network = sentiment.network(bench.model)
    with run.autocast(bench.device):
        loss = llama2_full.loss(network, *(x.to(bench.device) for x in batch))
    loss.backward()
    return [layer.weight.grad for layer in layers]


def dequantize_seconds(model):
    """Seconds to make every weight of the model once; a training step does it twice."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    start = time.perf_counter()
    for layer in layers:
        layer.dequantize(torch.bfloat16)
    return time.perf_counter() - start


def main(cfg: Config) -> dict:
    """Store the model in few bits, inject LoRA, train, score; write the adapter in PEFT's layout."""
    run.check(cfg.bits < 16 or cfg.backend == "ours", "--backend bitsandbytes stores 8 or 4 bits")
    run.check(cfg.block > 0 and cfg.block % 2 == 0, "--block must be even")
    if cfg.backend == "bitsandbytes":
        known = cfg.block in (64, 128, 256, 512, 1024, 2048, 4096) and cfg.codebook != "int4"
        run.check(known, "bitsandbytes has nf4 and fp4, and blocks of 64, 128, ... 4096")
    lora = llama2_lora.Config(rank=cfg.rank, alpha=cfg.alpha, targets=cfg.targets)
    bench = task_setup.start(cfg, lambda model: llama2_lora.allow(model, lora))
    model = bench.model
    metrics = {}
    # what quantisation costs: errors of real weights, and what fp16 would lose of real gradients
    if cfg.bits < 16:
        some = list(body(model).values())[:14]  # of the first two layers
        table = errors(some, cfg.block)
        draw(bench.folder / "values.png", some[0].weight, cfg.block)
        metrics |= {name: {"bits": bits, "error": error} for name, (bits, error) in table.items()}
        grads = gradients(bench, cfg, some)
        for scale in (1, 2**10, 2**20, 2**30):
            zero, infinite = underflow(grads, scale)
            metrics[f"fp16 gradients x {scale:,}"] = {"zero": zero, "infinite": infinite}
        zero, infinite = underflow([g.square() for g in grads], 1)  # the second moment of AdamW
        metrics["fp16 squared gradients"] = {"zero": zero, "infinite": infinite}
        cast(model, torch.bfloat16).zero_grad()
    # quantise the frozen weights
    make = QuantLinear if cfg.backend == "ours" else by_bitsandbytes
    store(model, cfg.bits, cfg.codebook, cfg.block, cfg.double, make)
    metrics["weights_MiB"] = storage_bytes([*model.parameters(), *model.buffers()]) / 2**20
    if cfg.bits < 16 and cfg.backend == "ours":
        dequantize_seconds(model)  # the first time is slow
        metrics["dequantize_seconds"] = dequantize_seconds(model)
    # train LoRA beside them
    inject(model, cfg.targets, cfg.rank, cfg.alpha)
    metrics |= llama2_full.experiment(cfg, bench, sentiment.network(model), model)
    base = adapters.base_of(model)
    peft_io.save(model, bench.folder / "adapter", lora, base)
    print(adapters.usage(bench.folder / "adapter", base))
    metrics["checkpoint_MiB"] = llama2_full.size(bench.folder / "adapter")
    return run.report(bench.folder, metrics, then="python finetune/compare.py")


if __name__ == "__main__":
    run.cli(main, Config)
