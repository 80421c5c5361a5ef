"""Diffusion transformer (DiT): a transformer with adaLN-Zero in the place of the U-Net, conditioned on the class.

Peebles & Xie 2022, arXiv:2212.09748. Cut the noisy image into patches, read them as a sentence, and let the time step
and the class steer every block through its normalisation (adaLN-Zero). Training starts from blocks that do nothing.
Sampling asks twice, with the class and without, and goes further in the direction in which the class points:
classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598). Section and figure numbers are Peebles & Xie's.

Shapes: B images, C channels, H x W pixels, patches of P x P pixels, N = (H/P)(W/P) tokens, D width, K classes.
y (B,) are classes 0..K-1, and K stands for "no class". t is an integer tensor (B,) whose 0 is the paper's t = 1.
Differences from the paper: pixels instead of an autoencoder's latents (`stable_diffuser.py` has those); v under the
cosine schedule as in `ddpm.py`, and no learned variance; 50 DDIM steps instead of 250 DDPM steps; the learning rate
rises and falls.

    python models/dit.py                                  # train, sample, measure: 4.4 min on two CPU cores
    python models/dit.py --pretrained                     # sample from the shipped weights
    python models/dit.py --pretrained --guidance-scale 0 1 8    # 0 ignores the class, 1 is plain, above 1 exaggerates
    python models/dit.py --size S --patch 2 --batch 256 --lr 1e-4 --ema 0.9999 --steps 100000   # DiT-S/2, for a GPU
"""

import copy
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from einops import rearrange
from torch import nn

from models import ddim, ddpm, quality
from models.batches import shuffled
from models.guidance_study import accuracy, draw
from models.training_state import TrainingState
from models.unet import TimeEmbedding, timestep_embedding
from models.unet_attention import Attention
from utils import checkpoint, data, run

WEIGHTS = Path(__file__).parent / "weights" / "dit.safetensors"
SIZES = {  # blocks, width D, heads: Table 1, and one small enough for a laptop
    "tiny": (6, 128, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
SCALES = (1, 1.5, 2, 3, 4, 6)  # of guidance, compared by default


@dataclass(frozen=True)
class Config:
    """Train a class-conditional diffusion transformer on MNIST, sample every digit and measure what guidance does."""

    steps: int = 1000  # training steps
    batch: int = 64  # images per step
    lr: float = 3e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    size: str = "tiny"  # tiny, or the paper's S, B, L, XL
    patch: int = 4  # side of a patch in pixels; half of it is four times the tokens
    # conditioning dropout: share of labels replaced by "no class", which guidance needs
    dropout: float = 0.1
    ema: float = 0.995  # EMA decay: samples come from an exponential moving average of the weights
    # classifier-free guidance scales to compare; 1 is no guidance
    guidance_scale: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--guidance"])] = SCALES
    samples: int = 100  # digits to sample and measure at each guidance scale
    pretrained: bool = False  # start from the shipped weights and skip the training
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 500  # steps between checkpoints
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/dit"  # where the results go


def position_embedding(dim, size):
    """Position embedding: sines and cosines of the column and the row of a token, (size * size, dim). Sec. 3.2."""
    run.check(dim % 4 == 0, f"a width of {dim} is no multiple of 4: sines, cosines, columns, rows")
    frequency = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(size)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=-1).float()  # (size, dim / 2)
    # column first, as in MAE
    column = line.repeat(size, 1)
    row = line.repeat_interleave(size, 0)
    return torch.cat([column, row], dim=-1)


def modulate(x, shift, scale):
    """What adaLN does to normalised tokens: (B, N, D), (B, 1, D), (B, 1, D) -> (B, N, D). Zeros change nothing."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """A transformer block steered by the condition: (B, N, D), (B, D) -> (B, N, D). Fig. 3, adaLN-Zero."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, width // heads, bias=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        # adaLN-Zero: beta, gamma, alpha of attention and MLP, all from the condition
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)[:, None].chunk(6, dim=-1)
        # attention
        y = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1 * self.attention(y)
        # feed-forward network
        y = modulate(self.norm2(x), shift2, scale2)
        return x + gate2 * self.mlp(y)


class DiT(nn.Module):
    """(B, C, H, W), time steps (B,), classes (B,), of which the last is "no class" -> (B, C, H, W). Fig. 3."""

    def __init__(self, depth, width, heads, patch, image=28, channels=1, classes=10):
        super().__init__()
        self.patch = patch
        self.classes = classes
        self.side = image // patch
        self.embed = nn.Linear(channels * patch**2, width)
        # not learned
        self.register_buffer("position", position_embedding(width, self.side), persistent=False)
        self.time = TimeEmbedding(256, width)
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, channels * patch**2)
        self.initialise()

    def initialise(self):
        """As the authors' code: zero gates make a block the identity, a zero head the output zero. Sec. 3.2."""
        # linear layers, then the embeddings of class and time step
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for layer in (self.label, self.time.linear_1, self.time.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        # shifts, scales and gates, and the head
        adaln = [m.adaln[1] for m in self.modules() if isinstance(m, (Block, DiT))]
        for linear in (*adaln, self.head):
            nn.init.zeros_(linear.weight)

    def forward(self, x, t, y):
        # "patchify", Fig. 4
        x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        x = self.embed(x) + self.position  # (B, N, D)
        # the condition: time step and class
        c = self.time(timestep_embedding(t, 256)) + self.label(y)  # (B, D)
        for block in self.blocks:
            x = block(x, c)
        # "linear and reshape": tokens to pixels
        shift, scale = self.adaln(c)[:, None].chunk(2, dim=-1)
        x = self.head(modulate(self.norm(x), shift, scale))  # (B, N, P P C)
        p = self.patch
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=p, q=p)


def drop_labels(y, share, null):
    """Conditioning dropout: this share of the labels becomes the null class, (B,) -> (B,). Ho & Salimans, Alg. 1."""
    return torch.where(torch.rand(y.shape, device=y.device) < share, null, y)


def classifier_free_guidance(model, y, guidance_scale):
    """A network of (xt, t), as every sampler takes it: null + guidance_scale (class - null). Sec. 3.1.

    The paper guides eps. But eps is a number times v plus a number times xt, and the weights 1 - guidance_scale and
    guidance_scale add up to one: guiding v, as here, is guiding eps.
    """
    null = torch.full_like(y, model.classes)

    def guided(xt, t):
        if guidance_scale == 1:
            return model(xt, t, y=y)
        # both halves in one batch, (2 B, C, H, W): the conditional one and the unconditional one
        output = model(torch.cat([xt, xt]), torch.cat([t, t]), y=torch.cat([y, null]))
        conditional, unconditional = output.float().chunk(2)
        # from the unconditional answer towards the conditional one, and beyond it
        return unconditional + guidance_scale * (conditional - unconditional)

    return guided


def train(model, ema, optimizer, schedule, images, labels, cfg, start=0):
    """Steps `start` to cfg.steps of ddpm's Algorithm 1, with labels; yields the loss of each."""
    device = schedule.beta.device
    null = model.classes
    picks = shuffled(torch.arange(len(images)), cfg.batch, cfg.seed, start)
    for i, pick in zip(range(start, cfg.steps), picks):
        # learning rate of this step: warm-up, then a cosine
        optimizer.param_groups[0]["lr"] = ddpm.learning_rate(cfg, i)
        # a batch of images; some of their labels become "no class", for guidance
        x0 = data.to_float(images[pick]).to(device)
        y = drop_labels(labels[pick].to(device), cfg.dropout, null)
        # forward pass and loss, matrix products in bf16
        with run.autocast(device):
            value = ddpm.loss(partial(model, y=y), schedule, x0, "v")
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # EMA of the weights; a small decay in the first steps lets it forget its random start
        decay = min(cfg.ema, (1 + i) / (10 + i))
        ddpm.update_ema(ema, model, decay)
        yield value.item()


def check_network(size, patch):
    """Raises UserError if there is no such network for digits."""
    run.check(size in SIZES, f"there is no --size {size}; there are: {', '.join(SIZES)}")
    divides = patch > 0 and 28 % patch == 0
    run.check(divides, f"--patch {patch} does not divide 28 pixels; use 2, 4, 7 or 14")


def build(size, patch, **_):
    """The network of this chapter, for digits."""
    check_network(size, patch)
    return DiT(*SIZES[size], patch)


def load(path, device="cpu"):
    """Weights written by this script -> (model, schedule, config as a dict), ready to sample."""
    model, meta = checkpoint.load_model(path, build, device)
    return model, ddpm.Schedule(kind="cosine").to(device), meta


def main(cfg: Config) -> dict:
    """Train (or load), sample at every guidance scale, measure; writes the digits, what guidance does, the weights."""
    sizes = (cfg.steps, cfg.batch, cfg.save_every)
    run.check(min(sizes) > 0, "--steps, --batch and --save-every must be at least 1")
    run.check(cfg.samples >= 10, "--samples must be at least 10, one of each digit")
    paces = 0 < cfg.lr < math.inf and 0 <= cfg.ema < 1
    run.check(paces, "--lr must be above 0 and finite, --ema in [0, 1)")
    run.check(0 <= cfg.dropout < 1, "--dropout must be at least 0 and less than 1")
    finite = all(0 <= scale < math.inf for scale in cfg.guidance_scale)
    needed = "--guidance-scale takes one or more scales, finite and not negative"
    run.check(cfg.guidance_scale and finite, needed)
    check_network(cfg.size, cfg.patch)
    run.seed(cfg.seed)
    folder = run.output(cfg.out, cfg)
    device = run.device(cfg.device)
    clock = run.Clock()
    metrics = {}

    if cfg.pretrained:
        model, schedule, _ = load(WEIGHTS, device)
    else:
        # model, its EMA, optimizer without weight decay: Sec. 4
        schedule = ddpm.Schedule(kind="cosine").to(device)
        model = build(**asdict(cfg)).to(device)
        ema = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0)
        # all that a resumed run needs to go on bit for bit
        state = TrainingState(folder, cfg, clock, model=model, ema=ema, optimizer=optimizer)
        start = len(state.losses)

        # train
        steps = train(model, ema, optimizer, schedule, *data.mnist("train"), cfg, start)
        for value in run.progress(steps, cfg.steps, start, cfg.save_every, state.save):
            state.losses.append(value)
        state.save()
        metrics["final_loss"] = state.final_loss()
        metrics["train_seconds"] = state.clock()
        state.draw_losses("squared error of v")

        # the EMA is what is kept and sampled from
        checkpoint.write(folder / "model.safetensors", ema.state_dict(), asdict(cfg))
        model = ema.eval()

    # sample every digit and measure, at each guidance scale from the same noise
    clock = run.Clock()
    classifier = quality.load(device)
    judge = quality.scorer(device)
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    y = torch.arange(cfg.samples) % 10
    noise = torch.randn(cfg.samples, 1, 28, 28)
    digits = {}
    scores = {}
    for scale in cfg.guidance_scale:
        with run.autocast(device):
            network = classifier_free_guidance(model, y.to(device), scale)
            chain = ddim.sample(network, schedule, noise.to(device), 50, "v")
            digits[scale] = ddim.last(run.bar(chain, 51, name=f"sample, guidance {scale:g}")).cpu()
        right = accuracy(classifier, digits[scale], y)
        error = quality.standard_error(right, cfg.samples)
        scores[scale] = {"accuracy": right, "accuracy_error": error} | judge(digits[scale])
        metrics |= {f"guidance {scale:g}: {k}": v for k, v in scores[scale].items()}

    # the best scale has the smallest Frechet distance
    best = min(scores, key=lambda scale: scores[scale]["frechet"])
    metrics["best_guidance"] = best
    metrics["sample_seconds"] = clock()
    draw(folder, digits, y, scores, best)
    return run.report(folder, metrics, then=f"open {folder}/guidance.png")


if __name__ == "__main__":
    run.cli(main, Config)
