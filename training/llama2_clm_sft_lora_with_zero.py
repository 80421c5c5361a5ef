"""Supervised fine-tuning of a causal language model with LoRA, the whole run sharded by DeepSpeed's ZeRO.

The model learns to answer questions about three software manuals. Only the answers are learned, and the token that ends
them; questions that were held out tell whether it helped. One file for laptop and cluster, for ZeRO's stages 0 to 3.
ZeRO: Rajbhandari et al. 2019, arXiv:1910.02054. LoRA: Hu et al. 2021, arXiv:2106.09685, here by the PEFT library.
Offloading: Ren et al. 2021, arXiv:2101.06840. What ZeRO does is written out in training/zero.py; here others do it.

Shapes: B texts that a rank reads at a time, L tokens, V words of the vocabulary; N ranks, A such parts before a step.

    deepspeed --num_gpus 1 training/llama2_clm_sft_lora_with_zero.py       # also where there is no GPU
    deepspeed --num_gpus 2 training/llama2_clm_sft_lora_with_zero.py --zero-stage 3
    torchrun --nproc_per_node 2 training/llama2_clm_sft_lora_with_zero.py
    python training/llama2_clm_sft_lora_with_zero.py --ranks 2
    deepspeed training/llama2_clm_sft_lora_with_zero.py --model meta-llama/Llama-2-7b-chat-hf --zero-stage 3
"""

import gc
import math
import time
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from training import faq, manifest, ranks, zero_config
from utils import checkpoint, figures, pretrained, run


@dataclass(frozen=True)
class Config:
    """Fine-tune a chat model on questions and answers, with LoRA and ZeRO."""

    # smollm2, a local folder, or a hub id; its tokenizer has a chat template
    model: str = "smollm2"
    # what moves: adapters, or every weight (then --lr 2e-5)
    method: Literal["lora", "full"] = "lora"
    lora_rank: int = 8  # r, columns of an adapter
    # shard nothing; the optimizer; gradients, too; weights, too
    zero_stage: Literal[0, 1, 2, 3] = 2
    # into the CPU's memory: nothing; optimizer; both
    offload: Literal["none", "optimizer", "parameters"] = "none"
    config: str = ""  # a DeepSpeed configuration of your own; its stage counts, not --zero-stage
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"  # of weights and gradients; fp16 is refused
    batch: int = 4  # B, texts that a rank reads at a time
    accumulation: int = 1  # A, such parts before a step
    length: int = 192  # longest text, in tokens
    checkpointing: bool = False  # keep no activations, compute them again
    lr: float = 1e-3  # peak learning rate: up in a line over a tenth of the steps, down to zero
    steps: int = 50  # training steps
    save_every: int = 0  # steps between checkpoints; 0: none
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    tensorboard: bool = False  # write event files, too
    ranks: int = 1  # N, processes, where neither deepspeed nor torchrun starts them
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/llama2_clm_sft_lora_with_zero"  # where the results go


def prepare(cfg):
    """-> tokenizer, model: a frozen one with adapters, or one of which all moves; in the precision asked for."""
    tokenizer, model = (
        pretrained.smollm2() if cfg.model == "smollm2" else pretrained.language_model(cfg.model)
    )
    table = getattr(model.config, "max_position_embeddings", None) or cfg.length
    run.check(
        cfg.length <= table, f"--length {cfg.length}: --model knows {table} positions, and no more"
    )
    run.check(
        tokenizer.eos_token_id is not None,
        "the tokenizer of --model has no end token: name one made for chat",
    )
    model = model.to(torch.float32 if cfg.precision == "fp32" else torch.bfloat16)
    if not torch.cuda.is_available():
        # On texts as short as these faster than the fused kernel
        model.set_attn_implementation("eager")
    run.seed(cfg.seed)
    if cfg.method == "lora":
        from peft import LoraConfig, get_peft_model

        # PEFT still uses that name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
        r = cfg.lora_rank  # all-linear: every matrix of every layer, not the head
        lora = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules="all-linear")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        model.peft_config["default"].base_model_name_or_path = base_of(model)
    else:
        model.requires_grad_(True)
    if cfg.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return tokenizer, model.train()


def base_of(model):
    """The name under which the base of an adapter loads again, from any folder: a hub id, or a whole path."""
    name = model.config.name_or_path
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def usage(cfg):
    """Three lines of Python that load what the run has written."""
    library, kind, name = "transformers", "AutoModelForCausalLM", "model"
    if cfg.method == "lora":
        library, kind, name = "peft", "AutoPeftModelForCausalLM", "adapter"
    target = Path(cfg.out).resolve() / name
    return (
        f"from {library} import {kind}; from transformers import AutoTokenizer\n"
        f"model = {kind}.from_pretrained({str(target)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(target)!r})"
    )


def loss(model, ids, mask, labels):
    """Sum of -log p(token | all before it) over the tokens to learn: (B, L) -> ().

    The sum: of a mean for each part, a token of a short part would weigh more than one of a long part.
    """
    on = next(model.parameters()).device
    ids, mask, labels = ids.to(on), mask.to(on), labels[:, 1:].to(on)
    # (B, L-1, V)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    learned = labels != faq.IGNORE
    return F.cross_entropy(logits[learned].float(), labels[learned], reduction="sum")


def add(*values):
    """Numbers, each summed over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=ranks.device())
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def score(model, rows, batch, ending):
    """Mean of -log p over the tokens of held-out answers. Every rank takes as many turns: in ZeRO-3 all must join."""
    n, rank = dist.get_world_size(), dist.get_rank()
    rows = sorted(rows, key=lambda row: len(row[0]))  # alike ones together: less padding
    parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    total = tokens = 0.0
    model.eval()
    for i in range(rank, n * math.ceil(len(parts) / n), n):
        value = loss(model, *faq.pad(parts[i % len(parts)], ending)).item()
        if i < len(parts):
            total, tokens = (
                total + value,
                tokens + sum(faq.learned(labels) for _, labels in parts[i]),
            )
    model.train()
    total, tokens = add(total, tokens)
    return total / tokens


def learning_rate(cfg, step):
    """Up in a line over the first tenth of the steps, then down in a line to zero."""
    warm = max(1, cfg.steps // 10)
    return cfg.lr * min((step + 1) / warm, (cfg.steps - step) / max(1, cfg.steps - warm))


def engine_of(model, cfg, config):
    """DeepSpeed's engine around model and AdamW: it casts, shards, sums parts, averages over ranks, clips and steps."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], cfg.lr, weight_decay=0.0
    )
    engine = zero_config.quiet().initialize(model=model, optimizer=optimizer, config=config)[0]
    for state in optimizer.state.values():
        # Stage 0 in bf16 has made a step of zeros, and would begin AdamW's count at 1
        state["step"].zero_()
    assert engine.train_batch_size() == cfg.batch * cfg.accumulation * dist.get_world_size()
    return engine


def train(engine, rows, cfg, ending, start=0):
    """Steps `start` to cfg.steps; yields the loss of each, a mean over the tokens that all ranks saw."""
    for step in range(start, cfg.steps):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        parts, tokens = faq.draw(rows, cfg, step, ending)
        # The engine divides by A and by N
        weight = cfg.accumulation * dist.get_world_size() / tokens
        total = 0.0
        for part in parts:
            value = loss(engine, *part)
            engine.backward(weight * value)
            engine.step()  # the optimizer moves after the last part only
            total += value.item()
        yield add(total)[0] / tokens


def account(engine, part):
    """MiB on this rank's device between two parts of a batch: {"weights", "optimizer", "gradients", "gathered"}.

    Gradients: with DeepSpeed's buckets and all that is left. Gathered: weights that are there at the fullest moment of
    a forward pass; ZeRO-3 brings whole ones together before they are used.
    """
    params, most = list(engine.module.parameters()), []

    def weights():
        both = [x for p in params for x in (p.data, getattr(p, "ds_tensor", None))]
        return [x for x in both if x is not None]

    leaves = [m for m in engine.module.modules() if not list(m.children())]
    hooks = [
        m.register_forward_pre_hook(lambda *_: most.append(ranks.held(*weights()))) for m in leaves
    ]
    # More is to come: stage 1 keeps whole gradients, stage 2 a share
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(loss(engine, *part))
    _ = [hook.remove() for hook in hooks]
    states = getattr(engine.optimizer, "optimizer", engine.optimizer).state.items()
    kept = [x for p, state in states for x in (p, *state.values()) if isinstance(x, torch.Tensor)]
    gc.collect()
    _ = [p.grad for p in params]  # what Python never saw is not found below
    alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    groups = [
        [x for x in group if x.device.type == engine.device.type]
        for group in (weights(), kept, alive)
    ]
    sums = [ranks.held(*(x for group in groups[:i] for x in group)) / 2**20 for i in range(4)]
    return dict(zip(("weights", "optimizer", "gradients"), np.diff(sums).tolist())) | {
        "gathered": max(most) / 2**20
    }


def whole(engine):
    """What was trained, {name: tensor} on the first rank. In ZeRO-3 each rank has but a slice of it: one by one."""
    import deepspeed

    state = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            with deepspeed.zero.GatheredParameters([p]):
                if dist.get_rank() == 0:
                    state[name] = p.detach().cpu().clone()
    return state


def save(engine, cfg, config, so_far):
    """A checkpoint of this step: DeepSpeed's files, and from each rank our numbers and its random state."""

    def put(folder):
        what = {"save_latest": False, "exclude_frozen_parameters": cfg.method == "lora"}
        engine.save_checkpoint(folder.parent, folder.name, **what)
        flags = asdict(cfg) | {"ranks": dist.get_world_size()}
        checkpoint.save_state(
            folder / f"rank{dist.get_rank()}.safetensors", config=flags, deepspeed=config, **so_far
        )

    manifest.save(Path(cfg.out) / "checkpoints", len(so_far["losses"]), put)


def newest(cfg, config=None):
    """-> folder of the last whole checkpoint, its losses and its score before training; sets the random state.

    Raises UserError: there is none, it is damaged, it was made with other flags or by more or fewer ranks.
    """
    folder = manifest.load(Path(cfg.out) / "checkpoints")
    wrote, n = len(list(folder.glob("rank*.safetensors"))), dist.get_world_size()
    run.check(wrote == n, f"--resume: {folder} was written by {wrote} ranks, here are {n}")
    state = checkpoint.load_state(folder / f"rank{dist.get_rank()}.safetensors")
    run.same_flags(replace(cfg, ranks=n), state["config"], folder)
    run.check(
        state["deepspeed"] == config,
        f"--resume: {folder} was made with another configuration of DeepSpeed",
    )
    return folder, {"losses": state["losses"], "before": state["before"]}


def picture(path, held):
    """Who holds what, between two parts of a batch."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(2.5 + len(held), 3))
    bottom = np.zeros(len(held))
    for name in ("weights", "gradients", "optimizer"):
        size = np.array([h[name] for h in held])
        axes.bar([f"rank {i}" for i in range(len(held))], size, 0.6, bottom, label=name)
        bottom += size
    axes.set(ylabel="MiB", ylim=(0, 1.4 * bottom.max()))
    axes.legend(fontsize=8, frameon=False)
    return figures.close(figure, path)


def worker(cfg):
    """What every rank does -> its numbers."""
    config, folder, first = zero_config.read(cfg), Path(cfg.out), dist.get_rank() == 0
    tokenizer, model = prepare(cfg)
    ending, (learn, held_out) = tokenizer.eos_token_id, faq.conversations(tokenizer, cfg.length)
    engine = engine_of(model, cfg, config)
    if first:
        parts = f"{cfg.batch} x {cfg.accumulation} x {dist.get_world_size()} ranks"
        print(
            f"ZeRO-{engine.zero_optimization_stage()}: {engine.train_batch_size()} texts a step = {parts}"
        )
    if cfg.resume:
        last, so_far = newest(cfg, config)
        engine.load_checkpoint(last.parent, last.name, load_module_strict=cfg.method == "full")
    else:
        _ = first and run.output(cfg.out, cfg)
        so_far = {"losses": [], "before": score(engine, held_out, cfg.batch, ending)}
    losses, start, clock, board = so_far["losses"], len(so_far["losses"]), time.perf_counter(), None
    if cfg.tensorboard and first:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
    steps = train(engine, learn, cfg, ending, start)
    for value in run.progress(
        steps, cfg.steps, start, cfg.save_every, lambda: save(engine, cfg, config, so_far)
    ):
        losses.append(value)
        if board:
            board.add_scalar("loss", value, len(losses))
            board.flush()
    seconds = (time.perf_counter() - clock) / max(1, cfg.steps - start)
    if cfg.save_every:
        save(engine, cfg, config, so_far)
    after, trained = score(engine, held_out, cfg.batch, ending), whole(engine)
    if first:
        target = folder / ("adapter" if cfg.method == "lora" else "model")
        network: Any = engine.module
        network.save_pretrained(target, state_dict=trained)
        tokenizer.save_pretrained(target)
        run.write_json(folder / "config.json", asdict(cfg))
    numbers = {
        "trained": sum(x.numel() for x in trained.values()),
        "seconds_per_step": seconds,
        "after": after,
    }
    trained.clear()  # copies, which are not to be counted
    held = account(engine, faq.draw(learn, cfg, 0, ending)[0][0])
    engine.destroy()
    return numbers | so_far | {"held": held}


def sane(cfg):
    """Raises UserError for flags that make no sense, before anything is loaded."""
    above = min(cfg.batch, cfg.accumulation, cfg.steps, cfg.lora_rank, cfg.length - 1, cfg.lr) > 0
    run.check(
        above,
        "--batch, --accumulation, --steps, --lora-rank and --lr must be above 0, --length above 1",
    )
    run.check(cfg.seed >= 0 and cfg.save_every >= 0, "--seed and --save-every must be 0 or more")
    run.check(
        cfg.precision != "fp16",
        "--precision fp16 is refused: its range is too small for training; take bf16",
    )
    run.check(
        find_spec("tensorboard") or not getattr(cfg, "tensorboard", 0),
        "--tensorboard: pip install tensorboard",
    )


def summary(cfg, found, then):
    """What the ranks found -> the metrics of the run, written and printed; the losses in a file of their own."""
    r = found[0]
    metrics: dict[str, Any] = {
        "trained": r["trained"],
        "texts_per_step": cfg.batch * cfg.accumulation * len(found),
    }
    metrics |= {
        "seconds_per_step": r["seconds_per_step"],
        "final_loss": float(np.mean(r["losses"][-10:])),
    }
    scores = {"before": r["before"], "after": r["after"]}
    metrics |= {
        "held-out loss": scores,
        "held-out perplexity": {k: math.exp(v) for k, v in scores.items()},
    }
    metrics |= {f"MiB on rank {i}": r["held"] for i, r in enumerate(found)}
    run.write_json(Path(cfg.out) / "losses.json", r["losses"])
    figures.curves(
        Path(cfg.out) / "loss.png", {"loss": r["losses"]}, "step", "-log p(token of an answer)"
    )
    result = run.report(Path(cfg.out), metrics, then) | {"losses": r["losses"]}
    print(f"use it:\n{usage(cfg)}")
    return result


def main(cfg: Config) -> dict:
    """Train, score held-out questions before and after, write adapter or model, say what every rank holds."""
    sane(cfg)
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    picture(Path(cfg.out) / "held.png", [r["held"] for r in found])
    return summary(cfg, found, "python training/accelerate_train.py")


if __name__ == "__main__":
    run.cli(main, Config)
