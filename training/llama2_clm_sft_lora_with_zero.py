"""Supervised fine-tuning of a causal LM with LoRA, sharded by DeepSpeed's ZeRO.

The model learns to answer questions about three software manuals. Only the answers are learned, and
the token that ends them; questions that were held out tell whether it helped. One file for laptop
and cluster, for ZeRO's stages 0 to 3. ZeRO: Rajbhandari et al. 2019, arXiv:1910.02054. LoRA: Hu et
al. 2021, arXiv:2106.09685, here by the PEFT library. Offloading: Ren et al. 2021, arXiv:2101.06840.
What ZeRO does is written out in training/zero.py; here others do it.

Shapes: B texts that a rank reads at a time, L tokens, V words of the vocabulary; N ranks, A such parts before a step.

    deepspeed --num_gpus 1 training/llama2_clm_sft_lora_with_zero.py       # also where there is no GPU
    deepspeed --num_gpus 2 training/llama2_clm_sft_lora_with_zero.py --zero-stage 3
    torchrun --nproc_per_node 2 training/llama2_clm_sft_lora_with_zero.py
    python training/llama2_clm_sft_lora_with_zero.py --ranks 2
    deepspeed training/llama2_clm_sft_lora_with_zero.py --model meta-llama/Llama-2-7b-chat-hf --zero-stage 3
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from training import engine_memory, faq, manifest, ranks, sft, zero_config
from training.lr_schedule import learning_rate
from utils import checkpoint, run


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


def build_engine(model, cfg, config):
    """DeepSpeed's engine around model and AdamW.

    It casts, shards, sums parts, averages over ranks, clips and steps.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.lr, weight_decay=0.0)
    engine = zero_config.quiet().initialize(model=model, optimizer=optimizer, config=config)[0]
    for state in optimizer.state.values():
        # Stage 0 in bf16 has made a step of zeros, and would begin AdamW's count at 1
        state["step"].zero_()
    _, n = ranks.rank_and_world_size()
    assert engine.train_batch_size() == cfg.batch * cfg.accumulation * n
    return engine


def train(engine, rows, cfg, ending, start=0):
    """Steps `start` to cfg.steps; yields the loss of each, a mean over the tokens of all ranks."""
    _, n = ranks.rank_and_world_size()
    for step in range(start, cfg.steps):
        # Learning rate of this step
        rate = learning_rate(step, cfg.steps, cfg.lr, warmup=cfg.steps // 10, decay="linear")
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        parts, tokens = faq.draw(rows, cfg, step, ending)
        # The engine divides by A and by N
        weight = cfg.accumulation * n / tokens
        total = 0.0
        for part in parts:
            value = sft.loss(engine, *part)
            engine.backward(weight * value)
            engine.step()  # the optimizer moves after the last part only
            total += value.item()
        yield sft.add(total)[0] / tokens


def trained_weights(engine):
    """{name: tensor} on the first rank; ZeRO-3: each is gathered from its slices, one by one."""
    import deepspeed

    rank, _ = ranks.rank_and_world_size()
    state = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([p]):
            if rank == 0:
                state[name] = p.detach().cpu().clone()
    return state


def save(engine, cfg, config, so_far):
    """A checkpoint of this step: DeepSpeed's files, each rank's numbers and random state."""
    rank, n = ranks.rank_and_world_size()

    def put(folder):
        what = {"save_latest": False, "exclude_frozen_parameters": cfg.method == "lora"}
        engine.save_checkpoint(folder.parent, folder.name, **what)
        flags = asdict(cfg) | {"ranks": n}
        own = folder / f"rank{rank}.safetensors"
        checkpoint.save_state(own, config=flags, deepspeed=config, **so_far)

    manifest.save(Path(cfg.out) / "checkpoints", len(so_far["losses"]), put)


def summary_writer(cfg, start):
    """TensorBoard's writer of the first rank with --tensorboard; else None."""
    rank, _ = ranks.rank_and_world_size()
    if not cfg.tensorboard or rank > 0:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(Path(cfg.out) / "tensorboard", purge_step=start + 1)


def worker(cfg):
    """What every rank does -> its numbers."""
    rank, n = ranks.rank_and_world_size()
    folder = Path(cfg.out)
    # Configuration, model, data, engine
    config = zero_config.read(cfg)
    tokenizer, model = sft.prepare(cfg)
    ending = tokenizer.eos_token_id
    learn, held_out = faq.conversations(tokenizer, cfg.length)
    engine = build_engine(model, cfg, config)
    if rank == 0:
        parts = f"{cfg.batch} x {cfg.accumulation} x {n} ranks"
        texts = f"{engine.train_batch_size()} texts a step = {parts}"
        print(f"ZeRO-{engine.zero_optimization_stage()}: {texts}")
    # The last checkpoint, or a new run with its score before training
    if cfg.resume:
        last, so_far = sft.last_checkpoint(cfg, config)
        engine.load_checkpoint(last.parent, last.name, load_module_strict=cfg.method == "full")
    else:
        if rank == 0:
            run.output(cfg.out, cfg)
        so_far = {"losses": [], "before": sft.score(engine, held_out, cfg.batch, ending)}

    def save_step():
        save(engine, cfg, config, so_far)

    # Train
    losses = so_far["losses"]
    start = len(losses)
    clock = time.perf_counter()
    board = summary_writer(cfg, start)
    steps = train(engine, learn, cfg, ending, start)
    for value in run.progress(steps, cfg.steps, start, cfg.save_every, save_step):
        losses.append(value)
        if board:
            board.add_scalar("loss", value, len(losses))
            board.flush()
    seconds = (time.perf_counter() - clock) / max(1, cfg.steps - start)
    if cfg.save_every:
        save_step()
    # Score, then write the adapter or the model
    after = sft.score(engine, held_out, cfg.batch, ending)
    trained = trained_weights(engine)
    numbers = sum(x.numel() for x in trained.values())
    if rank == 0:
        target = folder / ("adapter" if cfg.method == "lora" else "model")
        network: Any = engine.module
        network.save_pretrained(target, state_dict=trained)
        checkpoint.shared_mode(target)
        tokenizer.save_pretrained(target)
        run.write_json(folder / "config.json", asdict(cfg))
    # What this rank holds
    trained.clear()  # copies, which are not to be counted
    part = faq.draw(learn, cfg, 0, ending)[0][0]
    held = engine_memory.footprint(engine, part)
    engine.destroy()
    found = {"trained": numbers, "seconds_per_step": seconds, "after": after, "held": held}
    return found | so_far


def main(cfg: Config) -> dict:
    """Train, score held-out questions before and after, write adapter or model and report."""
    sft.check_flags(cfg)
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    engine_memory.draw(Path(cfg.out) / "held.png", [r["held"] for r in found])
    return sft.summary(cfg, found, "python training/accelerate_train.py")


if __name__ == "__main__":
    run.cli(main, Config)
