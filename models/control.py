"""ControlNet: a trained text-to-image model learns to follow edges. Zhang, Rao & Agrawala 2023, arXiv:2302.05543.

The U-Net stays as it is, frozen. A copy of its encoder half reads the same latents, the prompt, and a map of edges
besides; what it sees is added to the activations that the decoder half reads, through 1 x 1 convolutions that start at
zero (models/controlnet.py). So the first step of the training is the U-Net itself, and nothing that it knows is spoiled
while the copy learns. Equation numbers are the paper's.

Shapes: B pictures, D latent channels, h x w latents, H x W pixels, L words.
Differences from the paper: 2.7 M parameters, some minutes on 1726 emoji; edges by our own Canny detector; all captions
are dropped in training (half in the paper), because the frozen model knows these pictures by their names and would need
no edges; noisy steps are trained on more often, as in T2I-Adapter (Mou et al. 2023, arXiv:2302.08453).

    python models/control.py                                             # train, draw, measure: 2.7 CPU minutes
    python models/control.py --weights outputs/control/model.safetensors --prompt "red heart" --image a.png
"""

import math
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import tyro

from models import autoencoder, ddpm, stable_diffuser
from models.batches import shuffled
from models.control_score import draw, evaluate, lines
from models.controlnet import ControlNet, controlled
from models.edges import canny, f1
from models.edit import load_painter
from models.prompt_alignment import some
from models.text_encoder import TextEncoder
from utils import checkpoint, data, figures, run


@dataclass(frozen=True)
class Config:
    """Train a ControlNet for edges beside the shipped text-to-image model, draw, measure."""

    prompt: str = ""  # draw this, eight times, along the edges of --image
    image: str = ""  # the picture whose edges are taken; without it, held-out emoji and measures
    weights: str = ""  # a ControlNet trained before; skips the training
    steps: int = 700  # training steps
    batch: int = 16  # pictures per step
    lr: float = 2e-3  # peak learning rate: 100 steps of warm-up, then a cosine to zero
    drop_text: float = 1.0  # share of captions replaced by the empty one: edges must do alone
    control_scale: float = 1.0  # what the control's residuals are multiplied by; 0: without control
    guidance_scale: Annotated[float, tyro.conf.arg(aliases=["--guidance"])] = 3.0  # of the prompt
    sampling_steps: int = 25  # DDIM steps per picture
    count: int = 40  # held-out emoji to draw and measure
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/control"  # where the results go


def cubic_timesteps(schedule, n, device):
    """n random steps, noisy ones more often: t = (1 - u^3) T with u uniform: (n,). Mou et al. 2023, Sec. 3.4."""
    share = 1 - torch.rand(n, device=device) ** 3
    return (share * schedule.steps).long().clamp(max=schedule.steps - 1)


def train(unet, control, optimizer, schedule, latents, edges, words, mask, empty, cfg):
    """cfg.steps steps of the denoising loss of stable_diffuser.py, under control; yields the loss of each. Eq. 5."""
    device = schedule.beta.device
    numbers = torch.arange(len(latents))
    for i, pick in zip(range(cfg.steps), shuffled(numbers, cfg.batch, cfg.seed)):
        optimizer.param_groups[0]["lr"] = ddpm.learning_rate(cfg, i)
        # latents, noisy steps more often; captions dropped
        z0 = latents[pick].to(device)
        t = cubic_timesteps(schedule, cfg.batch, device)
        eps = torch.randn_like(z0)
        dropped = (torch.rand(cfg.batch) < cfg.drop_text).to(device)
        w, m = words[pick].to(device), mask[pick].to(device)
        w, m = stable_diffuser.drop_text(w, m, *empty, dropped=dropped)
        # forward pass and loss, matrix products in bf16
        with run.autocast(device):
            network = controlled(unet, control, edges[pick].to(device).float())
            value = stable_diffuser.loss(network, schedule, z0, w, m, t, eps)
        # backward pass, through the frozen decoder half into the control
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        yield value.item()


def train_control(painter, images, captions, cfg, metrics):
    """Train a ControlNet on these emoji -> it, and the loss of each step."""
    device = painter.schedule.beta.device
    clock = run.Clock()
    # what it learns from: scaled latents, edges, the words of each caption
    latents = autoencoder.encode_all(painter.decoder, images) * painter.scale
    edges = torch.cat([canny(data.to_float(part)) for part in images.split(64)])
    words, mask = painter.text(captions)
    learn = (latents, edges, words.cpu(), mask.cpu(), painter.text([""]))
    control = ControlNet(painter.model).to(device)
    optimizer = torch.optim.AdamW(control.parameters(), cfg.lr, weight_decay=0.01)
    steps = train(painter.model, control, optimizer, painter.schedule, *learn, cfg)
    losses = list(run.progress(steps, cfg.steps))
    metrics["final_loss"] = sum(losses[-100:]) / len(losses[-100:])
    metrics["train_seconds"] = clock()
    return control.eval().requires_grad_(False), losses


def check_flags(cfg):
    """Raises UserError for flags that make no sense, alone or together."""
    sizes = (cfg.steps, cfg.batch, cfg.sampling_steps, cfg.count)
    run.check(min(sizes) > 0, "--steps, --batch, --sampling-steps and --count must be at least 1")
    run.check(cfg.sampling_steps <= 1000, "--sampling-steps: the schedule has 1000 and no more")
    run.check(0 < cfg.lr < math.inf, "--lr must be above 0 and finite")
    run.check(0 <= cfg.drop_text <= 1, "--drop-text is a share: it must be in [0, 1]")
    scales = (cfg.control_scale, cfg.guidance_scale)
    finite = all(0 <= scale < math.inf for scale in scales)
    run.check(finite, "--control-scale and --guidance-scale must be finite and not negative")
    both = bool(cfg.prompt.strip()) == bool(cfg.image)
    run.check(both, "--prompt and --image go together: what to draw, and along whose edges")


def main(cfg: Config) -> dict:
    """Train (or load), then draw one prompt along the edges of one picture, or held-out emoji and measure."""
    check_flags(cfg)
    run.seed(cfg.seed)
    device = run.device(cfg.device)
    given = data.to_float(data.read_image(cfg.image, 64))[None] if cfg.image else None
    text = TextEncoder(device)
    text([cfg.prompt])  # too long is said now, not after the training
    painter = load_painter(device, text)
    unet = painter.model

    def build(**_):
        return ControlNet(unet)

    control = checkpoint.load_model(cfg.weights, build, device)[0] if cfg.weights else None
    folder = run.output(cfg.out, cfg)
    metrics = {"parameters": sum(p.numel() for p in ControlNet(unet).parameters())}
    images, captions, _ = data.emoji(64)
    held_out = torch.tensor(autoencoder.split(captions))
    if control is None:
        known = [caption for caption, hidden in zip(captions, held_out) if not hidden]
        control, losses = train_control(painter, images[~held_out], known, cfg, metrics)
        checkpoint.write(folder / "model.safetensors", control.state_dict(), asdict(cfg))
        curve = {"loss": losses}
        figures.curves(folder / "loss.png", curve, "step", "squared error of v", smooth=50)

    def network(edges, scale):
        return controlled(unet, control, edges.to(device), scale)

    # one prompt along the edges of one picture
    if given is not None:
        noise = torch.randn(8, 4, 16, 16)
        edges = canny(given)
        drawn = draw(
            painter, network(edges.float(), cfg.control_scale), [cfg.prompt] * 8, noise, cfg
        )
        metrics["edge_f1"] = float(f1(canny(drawn), edges.expand(8, -1, -1, -1)).mean())
        rows = {"given": torch.cat([given, lines(edges)]), "drawn": drawn}
        figures.rows(folder / "prompt.png", rows)
        return run.report(folder, metrics, then=f"open {folder}/prompt.png")

    # held-out emoji: do pictures follow the edges?
    pick = some(held_out.nonzero()[:, 0], cfg.count)
    noise = torch.randn(len(pick), 4, 16, 16)
    scores, rows, titles = evaluate(painter, network, images, captions, pick, noise, cfg)
    shown = {name: pictures[:10] for name, pictures in rows.items()}
    figures.rows(folder / "control.png", shown, titles[:10])
    weights = cfg.weights or f"{folder}/model.safetensors"
    again = f'python models/control.py --weights {weights} --prompt "red heart" --image a.png'
    then = f"open {folder}/control.png; then {again}"
    return run.report(folder, metrics | scores, then)


if __name__ == "__main__":
    run.cli(main, Config)
