"""FlashAttention-2 and PagedAttention in Triton, measured: differences to torch, bytes, registers, times on a GPU.

Dao et al. 2022, arXiv:2205.14135 (FlashAttention: tiles, and how many bytes they save, Theorem 2); Dao 2023,
arXiv:2307.08691 (FlashAttention-2); Kwon et al. 2023, arXiv:2309.06180 (PagedAttention). The kernels are in
triton_flash.py, triton_flash_backward.py and triton_paged.py. Everything but the times is found without a GPU:
they run in Triton's interpreter, and are compiled for GPUs that are not here (triton_offline.py).

Shapes: B sequences, H heads of queries, K heads of keys and values; T queries, S keys of D numbers.

    pip install 'triton>=3.6'                                    # Linux; not among the requirements
    python deploy/triton_attention.py                            # a CPU minute; with a GPU it measures times, too
    python deploy/triton_attention.py --head-dim 64 --length 16384
    python deploy/triton_attention.py --no-others --arch 80      # for an A100 only, the tiles that are used
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from deploy import triton_attention_costs, triton_attention_figure, triton_offline
from deploy.llama import attention
from deploy.triton_attention_costs import Shape
from utils import run
from utils.run import check

SMALL = {"B": 1, "H": 2, "K": 1, "T": 150, "S": 150}  # in the interpreter: no tile is full
GB = 1e9


@dataclass(frozen=True)
class Config:
    """What attention without stored scores saves: bytes, memory; what it needs: registers, shared memory."""

    batch: int = 1
    heads: int = 32  # of queries
    kv_heads: int = 8  # of keys and values
    head_dim: int = 128  # or 64
    length: int = 4096  # queries and keys; tokens in the cache of a decoding step
    causal: bool = True
    sequences: int = 16  # that a decoding step answers at once
    block_size: int = 16  # tokens of a block of the cache
    others: bool = True  # compile with other tiles, too, for comparison
    arch: tuple[int, ...] = triton_offline.ARCHITECTURES  # 80: A100, 86 and 89, 90: H100
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/triton_attention"


def check_flags(cfg):
    """Raises UserError for sizes that no kernel takes."""
    sizes = (cfg.batch, cfg.heads, cfg.kv_heads, cfg.length, cfg.sequences, cfg.block_size)
    check(min(sizes) > 0, "sizes must be at least 1")
    check(cfg.head_dim in (64, 128), f"--head-dim {cfg.head_dim}: these kernels know 64 and 128")
    fits = cfg.heads % cfg.kv_heads == 0
    check(fits, f"--heads {cfg.heads} is no multiple of --kv-heads {cfg.kv_heads}")
    unknown = set(cfg.arch) - {80, 86, 89, 90}
    check(not unknown, f"--arch {' '.join(map(str, sorted(unknown)))}: there are 80, 86, 89, 90")


def eager(q, k, v, is_causal):
    """softmax(q k^T / sqrt(D)) v in four steps, whose scores are stored. Shapes as `flash_attention`."""
    G = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(G, 1)
    v = v.repeat_interleave(G, 1)
    s = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if is_causal:
        hidden = torch.ones(s.shape[2:], dtype=torch.bool, device=s.device)
        s = s.masked_fill(hidden.triu(1 + s.shape[3] - s.shape[2]), -torch.inf)
    return s.softmax(-1) @ v


def tensors(shape, device, dtype):
    """Random q (B,H,T,D), k and v (B,K,S,D), with gradients."""
    sizes = [(shape.B, shape.H, shape.T, shape.D)] + 2 * [(shape.B, shape.K, shape.S, shape.D)]
    return [torch.randn(x, device=device, dtype=dtype, requires_grad=True) for x in sizes]


def differences(D, on):
    """{"out", "dq", "dk", "dv": largest difference to torch} of a small ragged shape.

    float32 in the interpreter; bf16 on a GPU, against torch in float64.
    """
    from deploy.triton_flash import flash_attention

    dtype = torch.float32 if on.type == "cpu" else torch.bfloat16
    q, k, v = tensors(Shape(**SMALL, D=D), on, dtype)
    weight = torch.randn_like(q)
    out = flash_attention(q, k, v, is_causal=True)
    wide = [x.double() for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    mine = [out.detach(), *torch.autograd.grad(out, (q, k, v), weight)]
    theirs = [wanted.detach(), *torch.autograd.grad(wanted, (q, k, v), weight.double())]
    pairs = zip(("out", "dq", "dk", "dv"), mine, theirs)
    return {name: float((a.double() - b.double()).abs().max()) for name, a, b in pairs}


def kept(function, shape):
    """Bytes of all tensors that autograd keeps for the backward pass of an attention, in float32."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, k, v = tensors(shape, "cpu", torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(q, k, v, is_causal=shape.causal)
    return sum(storages.values())


def byte_rows(shape, cfg):
    """Bytes of one forward pass, of forward and backward, of what is kept, and of a decoding step, in GB."""
    from deploy.triton_tiles import TILES

    costs = triton_attention_costs
    tiles = {name: by_size[shape.D][:2] for name, by_size in TILES.items()}
    programs = costs.forward_bytes(shape, tiles["forward"])
    stored = costs.eager_bytes(shape)
    decode = costs.decode_bytes(cfg.sequences * [cfg.length], shape.K, shape.H // shape.K, shape.D)
    return {
        "forward, GB": {
            "eager": stored / GB,
            "flash, programs": programs / GB,
            "flash, least": costs.least_bytes(shape) / GB,
            "eager / programs": stored / programs,
        },
        "backward, GB": {
            "flash, programs": costs.backward_bytes(shape, tiles["dq"], tiles["dkdv"]) / GB
        },
        "kept for backward, GB": {
            "eager": costs.kept_bytes(shape, flash=False) / GB,
            "flash": costs.kept_bytes(shape, flash=True) / GB,
        },
        "decoding step, a layer, GB": {name: count / GB for name, count in decode.items()},
    }


def milliseconds(shape, cfg, on):
    """{"flash, forward": median ms, ...} in bf16 on a GPU, of attention and of a decoding step."""
    from deploy.triton_flash import flash_attention
    from deploy.triton_paged import paged_attention

    q, k, v = tensors(shape, on, torch.bfloat16)
    weight = torch.randn_like(q)

    def library(q, k, v, is_causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    found = {}
    for name, function in {"flash": flash_attention, "torch": library, "eager": eager}.items():

        def forward(function=function):
            return function(q, k, v, is_causal=shape.causal)

        def both(forward=forward):
            torch.autograd.grad(forward(), (q, k, v), weight)

        found[f"{name}, forward"] = triton_offline.milliseconds(forward)
        found[f"{name}, forward and backward"] = triton_offline.milliseconds(both)
    # a decoding step: every sequence has a table of its own
    W = -(-cfg.length // cfg.block_size)
    blocks = (cfg.sequences * W, cfg.block_size, shape.K, shape.D)
    keys, values = torch.randn(2, *blocks, device=on, dtype=torch.bfloat16)
    tables = torch.randperm(blocks[0], device=on).view(cfg.sequences, W)
    lengths = torch.full((cfg.sequences,), cfg.length, device=on)
    query = torch.randn(cfg.sequences, shape.H, shape.D, device=on, dtype=torch.bfloat16)

    def gathered():
        k, v = (x[tables].flatten(1, 2).transpose(1, 2) for x in (keys, values))
        return attention(query[:, :, None], k, v)

    def paged():
        return paged_attention(query, keys, values, tables, lengths)

    found["decoding step, gathered"] = triton_offline.milliseconds(gathered)
    found["decoding step, paged"] = triton_offline.milliseconds(paged)
    return found


def main(cfg: Config) -> dict:
    """Compare, count, compile, and time where there is a GPU."""
    check_flags(cfg)
    on = run.device(cfg.device)
    triton_offline.prepare(on)
    # kernels are imported now: before `prepare` Triton might be missing
    from deploy.triton_attention_builds import flash_builds, paged_build
    from deploy.triton_builds import compiled
    from deploy.triton_flash import flash_attention

    folder = run.output(cfg.out, cfg)
    run.seed(cfg.seed)
    heads = {"B": cfg.batch, "H": cfg.heads, "K": cfg.kv_heads, "D": cfg.head_dim}
    shape = Shape(**heads, T=cfg.length, S=cfg.length, causal=cfg.causal)
    where = "interpreter, float32" if on.type == "cpu" else "bf16"
    metrics = {f"differences, {where}": differences(cfg.head_dim, on)}
    metrics |= byte_rows(shape, cfg)
    # what autograd keeps, measured on a small shape
    small = Shape(**SMALL, D=cfg.head_dim, number=4)
    if on.type == "cpu":
        measured = {"eager": kept(eager, small), "flash": kept(flash_attention, small)}
        measured["flash, predicted"] = triton_attention_costs.kept_bytes(small, flash=True)
        metrics["kept, measured, small, bytes"] = measured
    # what a thread and a block need
    G = cfg.heads // cfg.kv_heads
    chosen = flash_builds(cfg.head_dim, G, cfg.causal, cfg.others)
    chosen.append(paged_build(cfg.head_dim, cfg.kv_heads, G, cfg.block_size))
    for name, by_arch in compiled(chosen, cfg.arch).items():
        for arch, found in by_arch.items():
            del found["ptx"]
            metrics[f"{name}, sm_{arch}"] = found
    metrics["on a GPU, ms"] = triton_offline.NOT_MEASURED
    if on.type == "cuda":
        metrics["on a GPU, ms"] = milliseconds(shape, cfg, on)
    triton_attention_figure.draw(folder / "triton_attention.png", shape)
    return run.report(folder, metrics, then=f"open {folder}/triton_attention.png")


if __name__ == "__main__":
    run.cli(main, Config)
