"""QLoRA: frozen weights quantised to 8 or 4 bits, LoRA in 32 beside them. Dettmers et al. 2023, arXiv:2305.14314.

Frozen weights are only read, so they may be stored coarsely: cut each matrix into blocks of 64 numbers, divide a block
by its largest (absmax quantisation), and keep of each quotient the number of the nearest of 16 values. Which values?
Weights are nearly normal, so take quantiles of the normal distribution: NF4, 4-bit NormalFloat. Double quantisation
stores the scales of the blocks in 8 bits. Gradients pass through the coarse weights to the LoRA
corrections, which are exact. Eight bits are older: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) multiplies
integers, and takes the few columns with huge activations out, in full precision. Equation numbers are QLoRA's unless
named.

Shapes: weight (out, in), n numbers, blocks of S = 64, a codebook of 16 values in [-1, 1].
Differences from the papers: 8-bit weights are stored, not multiplied, in training (`int8_matmul` shows the product);
scales of the second quantisation are linear int8, not 8-bit floats; LoRA sits in attention alone, where the paper puts
it in every linear layer and finds that this matters; no paged optimizer.

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
import torch.nn.functional as F
from torch import nn

from finetune import (
    adapters,
    llama2_full,
    llama2_lora,
    lora_inject,
    peak_memory,
    peft_io,
    sentiment,
    task_setup,
)
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


def nf4():
    """NF4, 4-bit NormalFloat: 16 quantiles of the normal distribution, scaled into [-1, 1]. Sec. 3; values of App. E.

    Eq. 4 has as many values above as below, and no zero, which padding needs. So the authors take two sets, 2^(k-1) + 1
    values from zero up and 2^(k-1) from zero down, and of the two zeros one.
    """
    # (1 - 1/30 + 1 - 1/32) / 2: the quantile of the outermost value, as bitsandbytes has it
    end = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([below, above.new_zeros(1), above]).sort().values
    return (values / values.max()).float()


def fp4():
    """Sign, two bits of exponent, one of mantissa (E2M1), over 6: the values are denser near zero."""
    positive = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    return torch.cat([-positive.flip(0), positive])


def int4():
    """Fifteen equal steps, and one value twice: what 4 bits are without a thought."""
    return (torch.arange(-7, 9) / 7).clamp(max=1)


CODEBOOKS = {"nf4": nf4, "fp4": fp4, "int4": int4}


def absmax(x, dim):
    """Eight-bit integers and one scale a row: x ~ codes * scale. LLM.int8(), Eq. 1."""
    scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round().to(torch.int8), scale


def quantize(weight, values, block=64):
    """-> code of each number (n,) uint8, largest of each block (n / block,). Eq. 1, with the values of a codebook."""
    # Blocks of numbers, the last one padded, each divided by its largest.
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    top = blocks.abs().amax(1, keepdim=True)
    quotients = blocks / top.clamp(min=1e-12)
    # The nearest value: between which two middles does the quotient lie?
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(quotients, middles).to(torch.uint8)
    return codes.flatten(), top.flatten()


def dequantize(packed, top, values, shape):
    """Two codes a byte (n / 2,), the largest of each block -> weight of this shape, in the type of `values`.

    A byte is one of 256 pairs of codes: a table of the pairs answers both at once.
    """
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)  # (256, 2)
    x = F.embedding(packed.int(), pairs).view(len(top), -1) * top.to(values.dtype)[:, None]
    return x.flatten()[: shape[0] * shape[1]].view(shape)


def pack(codes):
    """Two codes a byte: (n,) -> (n / 2,)."""
    return codes[::2] << 4 | codes[1::2]


def double_quantize(top, block=256):
    """Double quantisation: the scales of the blocks, their mean subtracted, in 8 bits each, one scale for 256. Sec. 3.

    -> codes, scale, mean
    """
    mean = top.mean()
    x = F.pad(top - mean, (0, -len(top) % block)).view(-1, block)
    codes, scale = absmax(x, 1)
    return codes.flatten()[: len(top)], scale.flatten(), mean


def double_dequantize(codes, scale, mean, block=256):
    """What double quantisation left of the scales of the blocks: (n / S,)."""
    scales = scale.repeat_interleave(block)[: len(codes)]
    return codes.float() * scales + mean


class QuantizedLinearFunction(torch.autograd.Function):
    """x W^T with a quantised W: dequantised when needed and forgotten, again in the backward pass. Eq. 5 and 6.

    The gradient of x is exact for the dequantised W, and W has none: nothing is estimated here.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer  # the codes, not the matrix: kept, it would take 16 bits a weight
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(grad.dtype), None


class QuantLinear(nn.Module):
    """A frozen, quantised linear layer: int8 with absmax by rows, or 4 bits with a codebook such as NF4.

    `weight` is what the bits stand for, dequantised on every call.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, base, bits=4, codebook="nf4", block=64, double=True):
        super().__init__()
        self.shape = tuple(base.weight.shape)
        self.bits = bits
        self.bias = base.bias
        self.in_features = base.in_features
        self.out_features = base.out_features
        if bits == 8:
            # LLM.int8(): one scale a row.
            codes, scale = absmax(base.weight.detach().float(), 1)
            parts = {"codes": codes, "scale": scale}
        else:
            # QLoRA: one scale a block, two codes a byte.
            values = CODEBOOKS[codebook]().to(base.weight.device)
            codes, top = quantize(base.weight, values, block)
            parts = {"codes": pack(codes), "values": values}
            # Double quantisation: the scales in 8 bits, too.
            if double:
                top_codes, top_scale, top_mean = double_quantize(top)
                parts |= {"top_codes": top_codes, "top_scale": top_scale, "top_mean": top_mean}
            else:
                parts["top"] = top
        for name, x in parts.items():
            self.register_buffer(name, x)

    def dequantize(self, dtype=torch.float32):
        if self.bits == 8:
            return self.codes.to(dtype) * self.scale.to(dtype)
        return dequantize(self.codes, self.block_scales(), self.values.to(dtype), self.shape)

    def block_scales(self):
        """The largest number of each block: (n / S,), after double quantisation dequantised."""
        if hasattr(self, "top"):
            return self.top
        return double_dequantize(self.top_codes, self.top_scale, self.top_mean)

    @property
    def weight(self):
        return self.dequantize()

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = QuantizedLinearFunction.apply(x, self)
        return y if self.bias is None else y + self.bias

    def bits_each(self):
        """Bits that a weight really takes, scales included."""
        stored = sum(8 * b.nbytes for n, b in self.named_buffers() if n != "values")
        return stored / (self.shape[0] * self.shape[1])


def body(model):
    """The linear layers but the head: that shares its weights with the embedding, and answers are read from it."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def cast(model, dtype):
    """Change the type of the weights, in place; not of buffers: the angles of the rotations must stay exact."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def store(model, bits, codebook="nf4", block=64, double=True, make=QuantLinear):
    """Keep every linear layer but the head in `bits`, in place -> the model, frozen; 16 and 32 change the type."""
    run.check(
        body(model), "this model has no linear layer besides its head: nothing to store in few bits"
    )
    model.requires_grad_(False)
    if bits >= 16:
        return cast(model, torch.float32 if bits == 32 else torch.bfloat16)
    for name, layer in body(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(layer, bits, codebook, block, double))
    return model


def by_bitsandbytes(base, bits, codebook, block, double):
    """The same layer by the bitsandbytes library; its eight bits multiply integers, as `int8_matmul` does."""
    import bitsandbytes as bnb

    size, weight = (
        (base.in_features, base.out_features, base.bias is not None),
        base.weight.detach(),
    )
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
        # Else gradients are wrong after a pass without them (0.50 on a CPU)
        layer.support_avx512bf16_for_cpu = False
    layer.bias = base.bias
    return layer.to(weight.device)


def int8_matmul(x, codes, scale, threshold=6.0):
    """x W^T in integers: (N, in), codes (out, in), scale (out, 1) -> (N, out). LLM.int8(), Eq. 8.

    Columns of x with a number above the threshold are multiplied in full precision: one of them would cost all others
    their digits.
    """
    large = (x.abs() > threshold).any(0)
    exact = x[:, large] @ (codes[:, large] * scale).T
    rows, row_scale = absmax(x[:, ~large], 1)
    product = torch._int_mm(rows, codes[:, ~large].T.contiguous())
    return product * row_scale * scale.T + exact


def errors(weights, block=64):
    """Root mean square error of real weights, relative to theirs, in each kind of storage: {name: (bits, error)}."""
    kinds = {"int8, a row": (8, "", 0, False), **{c: (4, c, block, False) for c in CODEBOOKS}}
    kinds |= {f"nf4, double, blocks of {b}": (4, "nf4", b, True) for b in (32, 64, 256)}
    found = {}
    for name, (bits, codebook, size, double) in kinds.items():
        layers = [QuantLinear(w, bits, codebook, size, double) for w in weights]
        square = sum(
            float((q.weight - w.weight.float()).square().sum()) for q, w in zip(layers, weights)
        )
        whole = sum(float(w.weight.float().square().sum()) for w in weights)
        found[name] = sum(q.bits_each() for q in layers) / len(layers), (square / whole) ** 0.5
    return found


def draw(path, weight, block=64):
    """Real weights, each divided by the largest of its block, and the values that 4 bits leave of them."""
    import matplotlib.pyplot as plt

    x = weight.detach().float().flatten()
    x = (x[: len(x) // block * block].view(-1, block)).cpu()
    x = (x / x.abs().amax(1, keepdim=True)).flatten()
    figure, axes = plt.subplots(1, len(CODEBOOKS), figsize=(10, 2.4), sharey=True)
    for axis, (name, make) in zip(axes, CODEBOOKS.items()):
        axis.hist(x, bins=201, color="lightsteelblue")
        for value in make():
            axis.axvline(float(value), color="black", linewidth=0.8)
        axis.set(title=name, xlabel="weight / largest of its block", yticks=[])
    return figures.close(figure, path)


def underflow(gradients, scale):
    """What fp16 makes of gradients that were multiplied by `scale`: the fractions that are zero, and infinite.

    Micikevicius et al. 2017, arXiv:1710.03740, Sec. 3.2: below 6e-8 fp16 has nothing, so the loss is multiplied by a
    number, its gradients with it, and they are divided by it again in fp32. bf16 reaches as far down as fp32.
    """
    x = torch.cat([g.float().flatten() for g in gradients])
    half = (x[x != 0] * scale).half()
    return float((half == 0).float().mean()), float(half.isinf().float().mean())


def gradients(bench, cfg, layers) -> Any:
    """The gradients of some weights for one batch, in fp32."""
    for layer in layers:
        layer.float().requires_grad_(True)
    batch = task_setup.draw(bench.tokenizer, bench.parts["train"], cfg, 0)
    with run.autocast(bench.device):
        llama2_full.loss(
            sentiment.network(bench.model), *(x.to(bench.device) for x in batch)
        ).backward()
    return [layer.weight.grad for layer in layers]


def dequantize_seconds(model):
    """Seconds to make every weight of the model once; a training step does it twice."""
    layers, start = [m for m in model.modules() if isinstance(m, QuantLinear)], time.perf_counter()
    for layer in layers:
        layer.dequantize(torch.bfloat16)
    return time.perf_counter() - start


def main(cfg: Config) -> dict:
    """Store the model in few bits, inject LoRA, train, score; write the adapter in PEFT's layout."""
    run.check(cfg.bits < 16 or cfg.backend == "ours", "--backend bitsandbytes stores 8 or 4 bits")
    run.check(cfg.block > 0 and cfg.block % 2 == 0, "--block must be even")
    theirs = cfg.backend == "ours" or (
        cfg.block in (64, 128, 256, 512, 1024, 2048, 4096) and cfg.codebook != "int4"
    )
    run.check(theirs, "bitsandbytes has nf4 and fp4, and blocks of 64, 128, ... 4096")
    lora = llama2_lora.Config(rank=cfg.rank, alpha=cfg.alpha, targets=cfg.targets)
    bench = task_setup.start(cfg, lambda model: llama2_lora.allow(model, lora))
    model = bench.model
    metrics = {}
    # What quantisation costs: errors of real weights, and what fp16 would lose of real gradients.
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
    # Quantise the frozen weights.
    make = QuantLinear if cfg.backend == "ours" else by_bitsandbytes
    store(model, cfg.bits, cfg.codebook, cfg.block, cfg.double, make)
    metrics["weights_MiB"] = (
        peak_memory.storage_bytes([*model.parameters(), *model.buffers()]) / 2**20
    )
    if cfg.bits < 16 and cfg.backend == "ours":
        dequantize_seconds(model)  # the first time is slow
        metrics["dequantize_seconds"] = dequantize_seconds(model)
    # Train LoRA beside them.
    lora_inject.inject(model, cfg.targets, cfg.rank, cfg.alpha)
    metrics |= llama2_full.experiment(cfg, bench, sentiment.network(model), model)
    base = adapters.base_of(model)
    peft_io.save(model, bench.folder / "adapter", lora, base)
    print(adapters.usage(bench.folder / "adapter", base))
    metrics["checkpoint_MiB"] = llama2_full.size(bench.folder / "adapter")
    return run.report(bench.folder, metrics, then="python finetune/compare.py")


if __name__ == "__main__":
    run.cli(main, Config)
