"""MMDiT against cross-attention: two text-to-image transformers of equal FLOPs on emoji, trained by flow matching.

Esser et al. 2024, arXiv:2403.03206 (Stable Diffusion 3). The networks are in `mmdit_network.py`: one lets image and
words attend to each other with weights of their own, the other lets the image look at words that stay what they are.
Both get the same latents, captions, batches, noises and times, and nearly the same number of FLOPs for a picture.
Judged are the loss on captions never trained on, picture by picture, and what the pictures show.

Shapes: B images, C latent channels of 16 x 16, L words of E = 384 features. t = 0 is noise, 1 the latents (`flow.py`).
Differences from the paper: 64 x 64 emoji, small networks, MiniLM as the only text encoder.

    python models/mmdit.py                      # both networks, pictures, losses: 6.7 CPU minutes
    python models/mmdit.py --networks mmdit --prompt "red apple"
    python models/mmdit.py --depth 24 --width 1536 --heads 24 --batch 256 --steps 100000     # larger, for a GPU
"""

import copy
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch

from models import autoencoder, flow
from models.batches import shuffled
from models.ddim import last
from models.ddpm import update_ema
from models.guidance_study import check_guidance_scale
from models.mmdit_network import CrossDiT, MMDiT, forward_gflops
from models.prompt_alignment import (
    emoji_features,
    mean_and_error,
    picture_features,
    retrieval_rank,
    some,
)
from models.stable_diffuser import classifier_free_guidance, drop_text
from models.text_encoder import TextEncoder
from models.vae import learning_rate
from utils import checkpoint, data, figures, run

NETWORKS = {"mmdit": MMDiT, "cross": CrossDiT}
PROMPTS = ("red apple", "blue heart", "cat face", "crying face", "flag: japan", "umbrella")


@dataclass(frozen=True)
class Config:
    """Train text-to-image transformers on emoji and their names, and compare them."""

    networks: tuple[Literal["mmdit", "cross"], ...] = ("mmdit", "cross")  # one after the other
    prompt: str = ""  # draw this, too
    steps: int = 1200  # training steps of each
    batch: int = 32  # images per step
    lr: float = 1e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    depth: int = 6  # blocks
    width: int = 128  # of a token
    heads: int = 4  # of attention
    drop_text: float = 0.1  # share of captions replaced by the empty one, for guidance
    ema: float = 0.995  # EMA decay: samples come from an exponential moving average of the weights
    guidance_scale: float = 3.0  # classifier-free guidance; 1 is none
    sampling_steps: int = 20  # Euler steps of a picture
    judged: int = 50  # captions of each kind to draw and judge
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/mmdit"  # where the results go


@dataclass
class Captioned:
    """Latents (N, C, h, w), scaled to variance one, with words (N, L, E) and mask (N, L) of their captions."""

    latents: torch.Tensor
    words: torch.Tensor
    mask: torch.Tensor

    def __len__(self):
        return len(self.latents)

    def at(self, pick, device):
        """Those of some numbers, on the device."""
        return tuple(x[pick].to(device) for x in (self.latents, self.words, self.mask))


def build(network, channels, side, depth, width, heads, **_):
    """One of the two networks."""
    return NETWORKS[network](channels, side, depth, width, heads)


def train(model, ema, optimizer, learn, empty, cfg):
    """Flow matching on latents that are told their captions; yields the loss of each step."""
    device = next(model.parameters()).device
    for i, pick in zip(range(cfg.steps), shuffled(torch.arange(len(learn)), cfg.batch, cfg.seed)):
        # learning rate of this step: warm-up, then a cosine
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, i)
        # latents, captions of which some are dropped, noises, logit-normal times
        x1, words, mask = learn.at(pick, device)
        dropped = torch.rand(len(pick)) < cfg.drop_text
        words, mask = drop_text(words, mask, *empty, dropped=dropped.to(device))
        x0 = torch.randn(x1.shape).to(device)
        t = flow.draw_times(len(x1), "logit-normal").to(device)
        # forward pass and loss, matrix products in bf16
        with run.autocast(device):
            value = flow.loss(partial(model, words=words, mask=mask), x0, x1, t)
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # EMA of the weights; a small decay in the first steps lets it forget its random start
        update_ema(ema, model, min(cfg.ema, (1 + i) / (10 + i)))
        yield value.item()


@torch.no_grad()
def losses(model, held, times=8, batch=64):
    """The loss of each picture, the mean over equally spaced times, with the same noises in every call: (N,)."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    found = []
    for pick in torch.arange(len(held)).split(batch):
        x1, words, mask = held.at(pick, device)
        total = 0
        for k in range(times):
            x0 = torch.randn(x1.shape, generator=generator).to(device)
            t = torch.full((len(pick),), (k + 0.5) / times, device=device)
            with run.autocast(device):
                answer = flow.predict(
                    partial(model, words=words, mask=mask), flow.interpolate(x0, x1, t), t
                )
            total = total + (answer - flow.velocity(x0, x1)).square().flatten(1).mean(1)
        found.append(total / times)
    return torch.cat(found).cpu()


class Painter:
    """Turns captions into pictures, with guidance, from noises (N, C, h, w)."""

    def __init__(self, coder, scale, text, cfg):
        self.coder = coder
        self.scale = scale
        self.text = text
        self.cfg = cfg

    def draw(self, model, captions, noise):
        """-> (N, 3, H, W) in [-1, 1]."""
        device = next(model.parameters()).device
        words, mask = self.text(list(captions))
        empty, empty_mask = self.text([""])
        text = (words, mask, empty, empty_mask)
        network = classifier_free_guidance(model, *text, self.cfg.guidance_scale)
        with run.autocast(device):
            chain = flow.sample(network, noise.to(device), self.cfg.sampling_steps)
            latents = last(run.bar(chain, self.cfg.sampling_steps + 1, name="sample"))
        return autoencoder.decode_all(self.coder, latents.float() / self.scale)


def alignment(painter, model, images, captions, seen, unseen, noise):
    """Do pictures show their captions? Those of the training and held-out ones -> metrics, pictures of both."""
    features = emoji_features(images)
    metrics = {}
    pictures = {}
    for name, numbers in (("seen", seen), ("held_out", unseen)):
        pictures[name] = painter.draw(model, [captions[i] for i in numbers], noise[: len(numbers)])
        rank = retrieval_rank(picture_features(pictures[name]), features, numbers)
        metrics[f"{name}_top10"] = float((rank < 10).float().mean())
        metrics[f"{name}_median_rank"] = float(rank.float().median())
    return metrics, pictures


def check_config(cfg):
    """Raises UserError for flags with which nothing can be trained or drawn."""
    sizes = (cfg.steps, cfg.batch, cfg.depth, cfg.heads, cfg.sampling_steps)
    least = "--steps, --batch, --depth, --heads and --sampling-steps must be at least 1"
    run.check(min(sizes) > 0, least)
    run.check(cfg.width > 0 and cfg.width % 4 == 0, "--width must be a multiple of 4")
    run.check(
        cfg.width % cfg.heads == 0, f"--width {cfg.width} cannot be cut into {cfg.heads} heads"
    )
    run.check(cfg.networks and len(set(cfg.networks)) == len(cfg.networks), "--networks: each once")
    paces = 0 < cfg.lr < math.inf and 0 <= cfg.ema < 1
    run.check(paces, "--lr must be above 0 and finite, --ema in [0, 1)")
    run.check(0 <= cfg.drop_text <= 1, "--drop-text is a share: it must be in [0, 1]")
    check_guidance_scale(cfg.guidance_scale)
    run.check(cfg.judged >= 12, "--judged must be at least 12, as many as the figure shows")


def main(cfg: Config) -> dict:
    """Train each network from the same seed; compare losses and pictures; writes weights and figures."""
    check_config(cfg)
    device = run.device(cfg.device)
    folder = run.output(cfg.out, cfg)
    text = TextEncoder(device)
    text([cfg.prompt])  # too long is said now, not after the training

    # latents and words of all emoji, a tenth of them held out
    coder, scale = autoencoder.load(autoencoder.WEIGHTS, device)
    images, captions, _ = data.emoji(64)
    held_out = torch.tensor(autoencoder.split(captions))
    latents = autoencoder.encode_all(coder, images) * scale
    words, mask = text(captions)
    everything = Captioned(latents.cpu(), words.cpu(), mask.cpu())
    learn = Captioned(*everything.at(~held_out, "cpu"))
    held = Captioned(*everything.at(held_out, "cpu"))
    painter = Painter(coder, scale, text, cfg)
    seen = some((~held_out).nonzero()[:, 0], cfg.judged)
    unseen = some(held_out.nonzero()[:, 0], cfg.judged)
    channels, side = latents.shape[1], latents.shape[2]

    metrics = {}
    each = {}
    rows = {}
    prompts = [*PROMPTS, cfg.prompt] if cfg.prompt else PROMPTS
    for name in cfg.networks:
        # the same seed, batches, noises and times for each
        run.seed(cfg.seed)
        meta = asdict(cfg) | {"network": name, "channels": channels, "side": side}
        model = build(**meta).to(device)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.01)
        clock = run.Clock()
        steps = train(model, ema, optimizer, learn, text([""]), cfg)
        curve = list(run.progress(steps, cfg.steps))
        row = {"gflops": forward_gflops(ema, channels, side)}
        row["parameters"] = sum(p.numel() for p in ema.parameters())
        row["train_seconds"] = clock()
        row["final_loss"] = sum(curve[-100:]) / len(curve[-100:])
        checkpoint.write(folder / f"{name}.safetensors", ema.state_dict(), meta)

        # losses on held-out captions; pictures of captions from both sides
        each[name] = losses(ema, held)
        row["held_out_loss"], row["held_out_loss_error"] = mean_and_error(each[name])
        noise = torch.randn(cfg.judged, channels, side, side)
        scores, pictures = alignment(painter, ema, images, captions, seen, unseen, noise)
        rows[f"{name}: seen"] = pictures["seen"][:6]
        rows[f"{name}: held out"] = pictures["held_out"][:6]
        rows[f"{name}: prompts"] = painter.draw(ema, prompts, noise[: len(prompts)])
        metrics[name] = row | scores
    rows["true: seen"] = data.to_float(images[seen[:6]])
    rows["true: held out"] = data.to_float(images[unseen[:6]])

    # the difference, picture by picture: positive if the first network has the larger loss
    if len(each) == 2:
        first, second = each.values()
        metrics["difference"], metrics["difference_error"] = mean_and_error(first - second)
    figures.rows(folder / "pictures.png", rows)
    return run.report(folder, metrics, then=f"open {folder}/pictures.png")


if __name__ == "__main__":
    run.cli(main, Config)
