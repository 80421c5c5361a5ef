"""Latent diffusion, text to image with classifier-free guidance. Rombach et al. 2022, arXiv:2112.10752.

Three networks that are trained apart: a sentence encoder reads the prompt, a U-Net takes noise away from 16 x 16
latents while it looks at the words (cross-attention), a decoder (models/autoencoder.py) paints the latents as 64 x 64
pixels. Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) draws what the words say more than what pictures
look like in general. Sections and equations are the first paper's unless named.

Shapes: B images, D latent channels, h x w latents, L words, E = 384 features of a word.
Differences from the paper: MiniLM, not a transformer of its own, reads the text; v is predicted under the cosine
schedule (see ddpm.py).

    python models/stable_diffuser.py
    python models/stable_diffuser.py --pretrained --prompt "red apple"      # seconds
    python models/stable_diffuser.py --pretrained --prompt "face" --negative "yellow"
    torchrun --nproc_per_node 2 models/stable_diffuser.py                   # gloo on CPUs, nccl on GPUs
    torchrun --nproc_per_node 8 models/stable_diffuser.py --channels 192 384 --batch 256 --steps 50000   # larger: GPUs
"""

import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before a group: its defaults would keep the group for ever
import tyro
from torch.nn.parallel import DistributedDataParallel

from models import autoencoder, ddim, ddpm
from models.batches import shuffled
from models.prompt_alignment import evaluate, guidance_rows
from models.stable_diffuser_flags import check_flags, latent_shape
from models.text_augmentation import augment_text, draw_augmentation
from models.text_encoder import TextEncoder
from models.training_choices import Times, draw_timesteps
from models.training_state import TrainingState
from models.unet import UNet
from utils import checkpoint, data, figures, run

WEIGHTS = Path(__file__).parent / "weights" / "stable_diffuser.safetensors"


@dataclass(frozen=True)
class Config:
    """Train a text-to-image model on emoji and their names, draw prompts, measure."""

    prompt: str = ""  # draw this, eight times; without it, draw known prompts and measure
    negative: str = ""  # and steer away from this
    # classifier-free guidance scale; 1: the prompt as it is, more: the prompt exaggerated
    guidance_scale: Annotated[float, tyro.conf.arg(aliases=["--guidance"])] = 3.0
    sampling_steps: int = 50  # DDIM steps per image
    steps: int = 1150  # training steps
    batch: int = 32  # images per step, all processes together
    lr: float = 2e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    channels: tuple[int, ...] = (64, 128)  # widths of the U-Net, one per resolution
    times: Times = "logit-normal"  # distribution of the training time steps
    drop_text: float = 0.1  # share of captions replaced by the empty one, for guidance
    text_noise: float = (
        0.0  # strength of the noise on the words, in their deviations; long runs: 0.5
    )
    word_dropout: float = 0.0  # share of words hidden from the network; long runs: 0.1
    ema: float = 0.998  # EMA decay: pictures come from an exponential moving average of the weights
    pooled_text: bool = True  # the mean of the words, too, is added to the time step
    autoencoder: str = ""  # weights written by models/autoencoder.py; empty: the shipped ones
    pretrained: bool = False  # start from the shipped weights and skip the training
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/stable_diffuser"  # where the results go


def drop_text(words, mask, empty, empty_mask, dropped):
    """Replace the caption by the empty one where `dropped` (B,) is True. Ho & Salimans 2022, Algorithm 1."""
    words = torch.where(dropped[:, None, None], empty, words)
    mask = torch.where(dropped[:, None], empty_mask, mask)
    return words, mask


def classifier_free_guidance(model, words, mask, empty, empty_mask, guidance_scale):
    """A network (xt, t) -> output that steers away from the empty (or negative) prompt: e + guidance_scale (c - e).

    Ho & Salimans 2022, Eq. 6, whose w is guidance_scale - 1. v is linear in eps, so guiding the one guides the other.
    """

    def network(xt, t):
        if guidance_scale == 1:
            return model(xt, t, words, mask)
        # both halves in one batch: without the prompt and with it
        n = len(xt)
        both_words = torch.cat([empty.expand(n, -1, -1), words])
        both_masks = torch.cat([empty_mask.expand(n, -1), mask])
        # (2 B, D, h, w)
        output = model(torch.cat([xt, xt]), torch.cat([t, t]), both_words, both_masks)
        unconditional, conditional = output.float().chunk(2)
        # from the unconditional answer towards the conditional one, and beyond it
        return unconditional + guidance_scale * (conditional - unconditional)

    return network


def sample(model, schedule, noise, words, mask, empty, empty_mask, guidance_scale=3.0, n=50):
    """Noise (B, D, h, w) and text -> scaled latents, not clipped: DDIM with guidance; yields every step."""
    network = classifier_free_guidance(model, words, mask, empty, empty_mask, guidance_scale)
    yield from ddim.sample(network, schedule, noise, n, "v", clip=False)


def loss(model, schedule, z0, words, mask, t, eps):
    """Eq. 3: the error of the denoiser that reads the text; z0: scaled latents (B, D, h, w)."""
    return ddpm.loss(lambda xt, t: model(xt, t, words, mask), schedule, z0, "v", t, eps)


def train(
    model, ema, optimizer, schedule, latents, words, mask, empty, cfg, start=0, rank=0, world=1
):
    """Steps `start` to cfg.steps; yields the loss of each.

    All processes draw the same random numbers for the whole batch and each takes its part of it; gradients are averaged
    between them (DistributedDataParallel), so they are those of one process.
    """
    device = schedule.beta.device
    numbers = torch.arange(len(latents))
    std = words[mask].std()
    for i, pick in zip(range(start, cfg.steps), shuffled(numbers, cfg.batch, cfg.seed, start)):
        # learning rate of this step: warm-up, then a cosine
        optimizer.param_groups[0]["lr"] = ddpm.learning_rate(cfg, i)
        # all that is random, drawn for the whole batch: time steps, noise, which captions are dropped for guidance
        t = draw_timesteps(cfg.batch, schedule.steps, cfg.times)
        eps = torch.randn(cfg.batch, *latents.shape[1:])
        dropped = torch.rand(cfg.batch) < cfg.drop_text
        # text augmentation: the captions a little different every time
        noise, lost = draw_augmentation(words[pick], std, cfg.text_noise, cfg.word_dropout)
        w, m = augment_text(words[pick], mask[pick], noise, lost)
        # the part of this process
        batch = (latents[pick], w, m, t, eps, dropped)
        z0, w, m, t, eps, dropped = (x[rank::world].to(device) for x in batch)
        w, m = drop_text(w, m, *empty, dropped=dropped)
        # forward pass and loss, matrix products in bf16
        with run.autocast(device):
            value = loss(model, schedule, z0, w, m, t, eps)
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # EMA of the weights; a small decay in the first steps lets it forget its random start
        decay = min(cfg.ema, (1 + i) / (10 + i))
        ddpm.update_ema(ema, model, decay)
        yield value.item()


def processes(device):
    """(rank, world size) under torchrun or torch.distributed.launch, after joining the group; (0, 1) alone."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend)
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def build(channels, latent, pooled_text=False, **_):
    """The U-Net of this chapter: latents folded 2 x 2, cross-attention at every resolution."""
    attention = [True] * len(channels)
    words = dict(context_dim=384, pooled_text=pooled_text)
    return UNet(latent, channels, 1, attention, patch=2, **words)


def load(path, device="cpu"):
    """Weights written by this script -> the U-Net."""
    return checkpoint.load_model(path, build, device)[0]


@dataclass
class Painter:
    """Everything that turns prompts into pictures."""

    model: UNet
    decoder: autoencoder.Autoencoder
    scale: float  # of the latents
    text: TextEncoder
    schedule: ddpm.Schedule

    def draw(self, prompts, noise, guidance_scale=3.0, n=50, negative=""):
        """Prompts, noise (B, D, h, w) -> images (B, 3, H, W) in [-1, 1]."""
        device = self.schedule.beta.device
        text = self.text(list(prompts))
        empty = self.text([negative])
        with run.autocast(device), torch.no_grad():
            network = (self.model, self.schedule)
            chain = sample(*network, noise.to(device), *text, *empty, guidance_scale, n)
            z0 = ddim.last(run.bar(chain, n + 1, name="sample")).float()
        return autoencoder.decode_all(self.decoder, z0 / self.scale)


def main(cfg: Config) -> dict:
    """Train (or load), draw, measure; process 0 writes the weights and the pictures."""
    device = run.device(cfg.device)
    rank, world = processes(device)
    check_flags(cfg, world)
    run.seed(cfg.seed)

    # the two networks that are trained already, and the noise schedule
    coder, scale = autoencoder.load(cfg.autoencoder or autoencoder.WEIGHTS, device)
    text = TextEncoder(device)
    text([cfg.prompt, cfg.negative])  # too long is said now, not after the training
    shape = latent_shape(coder, cfg.channels, device)
    schedule = ddpm.Schedule(kind="cosine").to(device)

    # data: emoji and their names, a tenth of them held out
    folder = run.output(cfg.out, cfg)
    clock = run.Clock()
    images, captions, _ = data.emoji(64)
    held_out = torch.tensor(autoencoder.split(captions))
    metrics = {}

    if cfg.pretrained:
        model = load(WEIGHTS, device)
    else:
        # what the U-Net learns from: latents, scaled to variance 1, and the words of each caption
        latents = autoencoder.encode_all(coder, images[~held_out]) * scale
        words, mask = text([c for c, h in zip(captions, held_out) if not h])
        learn = (latents, words.cpu(), mask.cpu(), text([""]))
        # model, its EMA, optimizer, and all that a resumed run needs to go on bit for bit
        model = build(cfg.channels, shape[0], cfg.pooled_text).to(device)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.01)
        state = TrainingState(folder, cfg, clock, model=model, ema=ema, optimizer=optimizer)
        start = len(state.losses)

        # train; process 0 saves
        shared = DistributedDataParallel(model) if world > 1 else model
        steps = train(shared, ema, optimizer, schedule, *learn, cfg, start, rank, world)
        save = state.save if rank == 0 else None
        for value in run.progress(steps, cfg.steps, start, 500, save):
            state.losses.append(value)
        metrics["final_loss"] = state.final_loss()
        metrics["train_seconds"] = state.clock()
        metrics["processes"] = world

        # the EMA is what is kept and draws
        model = ema
        if rank == 0:
            state.save()
            state.draw_losses("squared error of v")
            meta = asdict(cfg) | {"latent": shape[0]}
            checkpoint.write(folder / "model.safetensors", ema.state_dict(), meta)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return metrics

    # draw the prompt that was asked for
    painter = Painter(model, coder, scale, text, schedule)
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    noise = torch.randn(8, *shape)
    clock = run.Clock()
    if cfg.prompt:
        flags = (cfg.guidance_scale, cfg.sampling_steps, cfg.negative)
        pictures = painter.draw([cfg.prompt] * 8, noise, *flags)
        figures.grid(folder / "prompt.png", pictures, 4, scale=3)
        metrics["sample_seconds"] = clock()
        return run.report(folder, metrics, then=f"open {folder}/prompt.png")

    # or draw known prompts: do the pictures show them, and what does guidance do?
    scores, pictures = evaluate(painter, images, captions, held_out.tolist(), shape, cfg)
    pictures["guidance.png"] = guidance_rows(painter, noise, cfg)
    for name, (rows, titles) in pictures.items():
        figures.rows(folder / name, rows, titles)
    then = f'open {folder}/guidance.png; then add --pretrained --prompt "red apple"'
    return run.report(folder, metrics | scores, then)


if __name__ == "__main__":
    run.cli(main, Config)
