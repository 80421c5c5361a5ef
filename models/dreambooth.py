"""DreamBooth with LoRA: five pictures teach a text-to-image model one new thing, under a word that meant nothing.

Ruiz et al. 2022, arXiv:2208.12242; LoRA is Hu et al. 2021, arXiv:2106.09685. The pictures get the prompt "zwx alien":
a rare word, and the class of the thing. Trained on them alone the model forgets what else an alien may be: every alien
becomes this one (language drift). So each step also sees pictures that the model itself drew for "alien" before the
training: prior preservation. Only LoRA matrices in the attention of the U-Net learn, a tenth as many as its weights.
Equation numbers are Ruiz et al.'s.

Shapes: B pictures, D latent channels of 16 x 16, L words of E = 384 features, F = 1280 features of EfficientNet.
Differences from the paper: LoRA instead of all weights; the text encoder stays frozen; emoji of 64 x 64.

    python models/dreambooth.py              # with and without prior preservation: 1.2 CPU minutes
    python models/dreambooth.py --data FOLDER --thing "zwx mug" --category mug      # pictures of your own
"""

import copy
import math
from dataclasses import dataclass

import torch

from models import autoencoder, mascot, stable_diffuser
from models.ddpm import Schedule
from models.guidance_study import check_guidance_scale
from models.prompt_alignment import cosine_similarity, mean_and_error, picture_features
from models.text_encoder import TextEncoder
from models.unet_lora import add_lora, lora_state
from utils import checkpoint, data, figures, run

# what the model knew before, and should still know
OTHERS = ("red apple", "cat face", "blue heart", "umbrella", "evergreen tree", "crying face")


@dataclass(frozen=True)
class Config:
    """Teach a text-to-image model one thing from a few pictures, with and without prior preservation."""

    data: str = ""  # folder with a few pictures of one thing; empty: five of a mascot that is drawn
    thing: str = "zwx alien"  # prompt of the pictures: a rare word, and the class
    category: str = "alien"  # the class alone, whose pictures should stay what they are
    prior_weights: tuple[float, ...] = (1.0, 0.0)  # of prior preservation, lambda: a run each
    prior: int = 24  # pictures that the model draws of the class before the training
    steps: int = 400  # training steps
    batch: int = 5  # pictures of the thing per step, and as many of the class
    lr: float = 2e-3  # learning rate, constant
    rank: int = 32  # of LoRA; its alpha is the same
    guidance_scale: float = 3.0  # of the pictures that are drawn
    sampling_steps: int = 25  # DDIM steps of a picture
    judged: int = 12  # pictures of each prompt to judge
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/dreambooth"  # where the results go


def loss(model, schedule, thing, category, prior_weight):
    """Error on the thing, and prior_weight times that on the class: Eq. 2. Each: (latents, words, mask, t, eps)."""
    error = stable_diffuser.loss(model, schedule, *thing)
    if prior_weight > 0:
        error = error + prior_weight * stable_diffuser.loss(model, schedule, *category)
    return error


def batch_of(n, schedule, latents, text):
    """n latents at random, all with one caption, each with a time step and a noise of its own."""
    device = latents.device
    words, mask = text
    z0 = latents[torch.randint(len(latents), (n,)).to(device)]
    t = torch.randint(schedule.steps, (n,)).to(device)
    eps = torch.randn(z0.shape).to(device)
    return z0, words.expand(n, -1, -1), mask.expand(n, -1), t, eps


def train(model, schedule, thing, category, cfg, prior_weight):
    """Steps on the thing and on the class, each (latents, text); only what has a gradient learns; yields the loss."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, cfg.lr, weight_decay=0.0)
    device = schedule.beta.device
    for _ in range(cfg.steps):
        # the thing under its rare word, the class under its own
        new = batch_of(cfg.batch, schedule, *thing)
        old = batch_of(cfg.batch, schedule, *category)
        with run.autocast(device):
            value = loss(model, schedule, new, old, prior_weight)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        yield value.item()


def similarity(a, b):
    """Mean cosine of each picture with all of another set, features (N, F), (M, F) -> (N,)."""
    return (a @ b.T).mean(1)


def draw_all(painter, noise, cfg):
    """Pictures of the thing, its class and other prompts, from the same noises: {name: (N, 3, H, W)}."""
    flags = (cfg.guidance_scale, cfg.sampling_steps)
    n = len(noise)
    others = [OTHERS[i % len(OTHERS)] for i in range(n)]
    prompts = {"thing": [cfg.thing] * n, "category": [cfg.category] * n, "others": others}
    return {name: painter.draw(asked, noise, *flags) for name, asked in prompts.items()}


def measure(pictures, before, given):
    """What was learned and what was lost; pictures and before: features by name, given (M, F): those of the thing."""
    values = {
        "thing_similarity": similarity(pictures["thing"], given),
        "category_similarity": similarity(pictures["category"], given),
        # with the picture from the same noise before: 1 is no change
        "category_unchanged": cosine_similarity(before["category"], pictures["category"]),
        "others_unchanged": cosine_similarity(before["others"], pictures["others"]),
    }
    row = {}
    for name, value in values.items():
        row[name], row[f"{name}_error"] = mean_and_error(value)
    return row


def check_config(cfg):
    """Raises UserError for flags with which nothing can be taught."""
    sizes = (cfg.steps, cfg.batch, cfg.prior, cfg.rank, cfg.sampling_steps)
    least = "--steps, --batch, --prior, --rank and --sampling-steps must be at least 1"
    run.check(min(sizes) > 0, least)
    run.check(0 < cfg.lr < math.inf, "--lr must be above 0 and finite")
    weights = cfg.prior_weights and all(0 <= w < math.inf for w in cfg.prior_weights)
    run.check(weights, "--prior-weights must be one or more numbers, finite and not negative")
    once = len(set(cfg.prior_weights)) == len(cfg.prior_weights)
    run.check(once, "--prior-weights names a number twice")
    check_guidance_scale(cfg.guidance_scale)
    run.check(cfg.judged >= 6, "--judged must be at least 6, as many as the figure shows")
    named = cfg.thing.strip() and cfg.category.strip()
    run.check(named, "--thing and --category must not be blank: they are the prompts")
    run.check(cfg.thing != cfg.category, "--thing needs a word that --category does not have")


def main(cfg: Config) -> dict:
    """Draw, train a LoRA for each weight of the prior, draw again from the same noises, measure both."""
    check_config(cfg)
    device = run.device(cfg.device)
    text = TextEncoder(device)
    prompts = text([cfg.thing, cfg.category])  # too long is said now, not after the training
    images = data.image_folder(cfg.data, 64) if cfg.data else mascot.pictures()
    folder = run.output(cfg.out, cfg)
    run.seed(cfg.seed)

    # the model that knows nothing of the thing, and its latents
    coder, scale = autoencoder.load(autoencoder.WEIGHTS, device)
    frozen = stable_diffuser.load(stable_diffuser.WEIGHTS, device)
    schedule = Schedule(kind="cosine").to(device)
    painter = stable_diffuser.Painter(frozen, coder, scale, text, schedule)
    latents = autoencoder.encode_all(coder, images) * scale
    thing = (latents, tuple(part[:1] for part in prompts))

    # pictures of the class as it draws them now: the prior
    noise = torch.randn(cfg.prior, *latents.shape[1:])
    flags = (cfg.guidance_scale, cfg.sampling_steps)
    drawn = painter.draw([cfg.category] * cfg.prior, noise, *flags)
    prior = autoencoder.encode_all(coder, data.to_uint8(drawn)) * scale
    category = (prior, tuple(part[1:] for part in prompts))

    # before
    noise = torch.randn(cfg.judged, *latents.shape[1:])
    given = picture_features(images)
    pictures = draw_all(painter, noise, cfg)
    before = {name: picture_features(x) for name, x in pictures.items()}
    metrics = {
        "given_similarity": float(similarity(given, given).mean()),
        "before": measure(before, before, given),
    }
    rows = {"given": data.to_float(images[:6])}
    rows |= {f"before: {name}": x[:6] for name, x in pictures.items()}

    # a LoRA for each weight of the prior
    for weight in cfg.prior_weights:
        run.seed(cfg.seed)
        model = copy.deepcopy(frozen)
        add_lora(model, cfg.rank, cfg.rank)
        model.to(device)
        clock = run.Clock()
        steps = train(model, schedule, thing, category, cfg, weight)
        losses = list(run.progress(steps, cfg.steps))
        seconds = clock()
        # draw again
        painter = stable_diffuser.Painter(model.eval(), coder, scale, text, schedule)
        pictures = draw_all(painter, noise, cfg)
        after = {name: picture_features(x) for name, x in pictures.items()}
        row = measure(after, before, given) | {"train_seconds": seconds}
        row["final_loss"] = sum(losses[-20:]) / len(losses[-20:])
        row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        metrics[f"prior {weight:g}"] = row
        rows |= {f"prior {weight:g}: {name}": x[:6] for name, x in pictures.items()}
        meta = {"rank": cfg.rank, "thing": cfg.thing}
        checkpoint.write(folder / f"lora_{weight:g}.safetensors", lora_state(model), meta)
    figures.rows(folder / "pictures.png", rows)
    return run.report(folder, metrics, then=f"open {folder}/pictures.png")


if __name__ == "__main__":
    run.cli(main, Config)
