"""Engines of vlm/train.py: who shards the model, adds up the gradients of all ranks, and steps.

Each has the same four methods, and makes the same step: the gradient of the mean loss over the
supervised tokens of all parts on all ranks. Plain: one all-reduce behind the backward pass. DDP (Li
et al. 2020, arXiv:2006.15704): buckets are sent while the backward pass goes on. FSDP2 (Zhao et al.
2023, arXiv:2304.11277): weights, gradients and optimizer states sharded. DeepSpeed: ZeRO 0 to 3
(Rajbhandari et al. 2020, arXiv:1910.02054). accelerate: DDP, started its way.

A frozen vision tower is in none of them: its features are computed once, before.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from training import ranks, zero_config
from utils.run import check
from vlm.train_config import engine_name
from vlm.trainable import param_groups


def autocast(cfg, on):
    """Matrix products in bf16 or fp16; the rest in the type of its weights."""
    if cfg.train.precision == "fp32":
        return nullcontext()
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(on.type, types[cfg.train.precision])


def adamw(groups, cfg):
    """AdamW with the flags' betas and weight decay."""
    return torch.optim.AdamW(groups, betas=cfg.train.betas, weight_decay=cfg.train.weight_decay)


class Plain:
    """One process, or several that add up their gradients once a step."""

    def __init__(self, learner, cfg, on):
        self.learner = learner
        self.cfg = cfg
        self.on = on
        self.optimizer = adamw(param_groups(learner.model, cfg), cfg)
        # loss scaling: in fp16 a gradient below 6e-8 is zero
        self.scaler = torch.amp.GradScaler(on.type, enabled=cfg.train.precision == "fp16")
        _, self.world_size = ranks.rank_and_world_size()

    def part(self, last):
        """Around forward and backward pass of one part; the last one of a step sends gradients."""
        return nullcontext()

    def loss(self, batch, features):
        """Forward pass: the summed loss of a part."""
        with autocast(self.cfg, self.on):
            return self.learner(batch, features)

    def backward(self, value):
        """Add the gradients of a value to those that are there."""
        self.scaler.scale(value).backward()

    def reduce(self):
        """All-reduce: the sum of gradients over ranks; one without photos has none for the tower."""
        for p in self.learned():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.world_size > 1:
                dist.all_reduce(p.grad)

    def learned(self):
        """Parameters that learn."""
        return [p for p in self.learner.parameters() if p.requires_grad]

    def step(self):
        """Gradient clipping, then a step of the optimizer."""
        self.reduce()
        self.scaler.unscale_(self.optimizer)
        if self.cfg.train.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.learned(), self.cfg.train.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def has_unused(cfg):
    """A tower that learns has layers behind the one that is read: they get no gradient."""
    return cfg.train.train_type == "none"


class DDP(Plain):
    """PyTorch's DistributedDataParallel: gradients are averaged bucket by bucket, during the backward pass."""

    def __init__(self, learner, cfg, on):
        super().__init__(learner, cfg, on)
        self.wrapped: Any = None
        if dist.is_initialized():
            wrap = torch.nn.parallel.DistributedDataParallel
            more = {"forward_sync_buffers": False, "find_unused_parameters": has_unused(cfg)}
            self.wrapped = wrap(learner, **more)

    def part(self, last):
        return nullcontext() if last or self.wrapped is None else self.wrapped.no_sync()

    def loss(self, batch, features):
        with autocast(self.cfg, self.on):
            return (self.wrapped or self.learner)(batch, features)

    def backward(self, value):
        # it divides by the number of ranks, and value is a part of the mean over all of them
        self.scaler.scale(value * self.world_size).backward()

    def reduce(self):
        """Nothing: the backward pass has done it."""


class FSDP(Plain):
    """FSDP2: every class of --fsdp.transformer_cls is sharded, gathered and given back by itself."""

    def __init__(self, learner, cfg, on):
        check(dist.is_initialized(), "--fsdp shards over ranks: use torchrun, or --ranks 2")
        shard(learner, cfg)
        super().__init__(learner, cfg, on)

    def part(self, last):
        self.learner.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, value):
        # it divides by the number of ranks, and value is a part of the mean over all of them
        self.scaler.scale(value * self.world_size).backward()

    def reduce(self):
        """Nothing: gradients were reduce-scattered in the backward pass."""


def shard_classes(learner, cfg):
    """Names of the classes that are sharded one by one: those of the flag, or each model's own layers.

    Raises UserError for a class that the model has not.
    """
    there = {type(m).__name__ for m in learner.modules()}
    missing = sorted(set(cfg.fsdp.transformer_cls) - there)
    check(not missing, f"--fsdp.transformer_cls: the model has no {', '.join(missing)}")
    if cfg.fsdp.transformer_cls:
        return set(cfg.fsdp.transformer_cls)
    found = {"PerceiverLayer"}
    for module in learner.modules():
        found |= set(getattr(module, "_no_split_modules", None) or ())
    return found & there


def shard(learner, cfg):
    """Shard the layers one by one, and the rest at the root: embedding, head (often tied to it), connector."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device().type, (dist.get_world_size(),))
    more: dict[str, Any] = {"mesh": mesh}
    if cfg.fsdp.precision == "bf16":
        more["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if cfg.fsdp.offload:
        check(
            mesh.device_type == "cuda", "--fsdp.offload: the shards are in the host's memory anyway"
        )
        more["offload_policy"] = CPUOffloadPolicy()
    names = shard_classes(learner, cfg)
    for module in [m for m in learner.modules() if type(m).__name__ in names]:
        fully_shard(module, **more)
    return fully_shard(learner, **more)


class DeepSpeed(Plain):
    """DeepSpeed's engine, as training/configs/zero*.json says: it shards, adds up, averages and steps.

    It casts every parameter to --precision and no buffer, and batch norms need both alike: a tower that learns and has
    batch norms is refused in bf16.
    """

    def __init__(self, learner, cfg, on):
        alike = cfg.train.precision == "fp32"
        has_batch_norm = any(isinstance(m, torch.nn.BatchNorm2d) for m in learner.modules())
        check(
            alike or not has_batch_norm,
            "--train_type none: under DeepSpeed this tower learns in --precision fp32 only",
        )
        flags = SimpleNamespace(
            zero_stage=cfg.deepspeed.stage,
            config=cfg.deepspeed.config,
            offload=cfg.deepspeed.offload,
            precision=cfg.train.precision,
            batch=cfg.train.batch_size,
            accumulation=cfg.train.gradient_accumulation_steps,
        )
        config = zero_config.read(flags)
        config["gradient_clipping"] = cfg.train.grad_clip
        super().__init__(learner, cfg, on)
        start = zero_config.quiet().initialize
        self.engine = start(model=learner, optimizer=self.optimizer, config=config)[0]
        self.optimizer = self.engine.optimizer

    def loss(self, batch, features):
        with autocast(self.cfg, self.on):
            return self.engine(batch, features)

    def backward(self, value):
        # it divides by parts and ranks, and steps behind the last part
        parts = self.cfg.train.gradient_accumulation_steps
        self.engine.backward(value * parts * self.world_size)
        self.engine.step()

    def step(self):
        """Nothing: the backward pass of the last part has done it."""


class Accelerate(Plain):
    """Hugging Face's accelerate: DDP and mixed precision by `prepare`."""

    def __init__(self, learner, cfg, on):
        from training.accelerate_train import build_accelerator

        super().__init__(learner, cfg, on)
        flags = SimpleNamespace(precision=cfg.train.precision, accumulation=1)
        self.accelerator = build_accelerator(flags, find_unused=has_unused(cfg))
        self.wrapped, self.optimizer = self.accelerator.prepare(learner, self.optimizer)

    def part(self, last):
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def loss(self, batch, features):
        return self.wrapped(batch, features)

    def backward(self, value):
        # DDP divides by the number of ranks
        self.accelerator.backward(value * self.world_size)

    def step(self):
        if self.cfg.train.grad_clip:
            self.accelerator.clip_grad_norm_(self.learned(), self.cfg.train.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


ENGINES = {
    "plain": Plain,
    "ddp": DDP,
    "fsdp": FSDP,
    "deepspeed": DeepSpeed,
    "accelerate": Accelerate,
}


def build(learner, cfg, on) -> Any:
    """The engine that the flags name, around the learner."""
    return ENGINES[engine_name(cfg)](learner, cfg, on)
