"""Image-to-image (SDEdit) and inpainting (RePaint): a trained text-to-image model changes a picture that exists.

Image-to-image: Meng et al. 2021, arXiv:2108.01073. Add noise to the picture, not until nothing is left but up to a
step t0, and denoise from there under another prompt: what survives the noise stays. Inpainting (Lugmayr et al. 2022,
arXiv:2201.09865) is in models/inpainting.py. Nothing is trained.

Shapes: B pictures, D latent channels, h x w latents, H x W pixels, n steps; a mask is True where pixels are redrawn.
Differences from the paper: DDIM steps, in the latents of models/autoencoder.py, with text and guidance; the paper works
in pixels.

    python models/edit.py --source "red heart" --prompt "blue heart"
    python models/edit.py --source "grinning face" --mask bottom --prompt "crying face"
    python models/edit.py --image a.png --mask m.png --prompt "sun"     # yours; white in the mask: redraw
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from models import autoencoder, ddim, ddpm, stable_diffuser
from models.guidance_study import check_guidance_scale
from models.inpainting import (
    denoise,
    inpaint,
    latent_mask,
    merge,
    noise_to,
    pixel_error,
    resampling_levels,
    seam,
)
from models.text_encoder import TextEncoder
from utils import data, figures, run
from utils.images import open_image
from utils.text import printable

# rows and columns of 64 that a word redraws
PARTS = {
    "left": (slice(0, 64), slice(0, 32)),
    "right": (slice(0, 64), slice(32, 64)),
    "top": (slice(0, 32), slice(0, 64)),
    "bottom": (slice(32, 64), slice(0, 64)),
    "middle": (slice(16, 48), slice(16, 48)),
}


@dataclass(frozen=True)
class Config:
    """Change a picture by a prompt, as a whole (image-to-image) or inside a mask (inpainting)."""

    prompt: str = "blue heart"  # what to draw
    source: str = "red heart"  # name of the emoji that is changed, if there is no --image
    image: str = ""  # a picture of your own: its middle square, 64 x 64, on white where transparent
    mask: str = ""  # what is redrawn: a picture, white there; or left, right, top, bottom, middle
    strength: float = 0.9  # image-to-image: share of the steps taken; 0: the picture, 1: new
    negative: str = ""  # steer away from this
    # classifier-free guidance scale; 1: the prompt as it is, more: the prompt exaggerated
    guidance_scale: Annotated[float, tyro.conf.arg(aliases=["--guidance"])] = 3.0
    sampling_steps: int = 50  # DDIM steps
    resamples: int = 5  # inpainting: how often each stretch of steps is walked; 1: no resampling
    jump_length: int = 5  # inpainting: steps of a stretch
    eta: float = 0.0  # inpainting: noise of a step; 0: none (DDIM), 1: as much as DDPM
    overlay: bool = False  # put the original pixels back outside the mask
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/edit"  # where the results go


def img2img_timesteps(schedule, n, strength):
    """The last of n DDIM steps, from t0 = the first of them to the clean image: (k,), k = n strength, rounded down."""
    count = int(n * strength)
    return ddim.timesteps(schedule, n)[n - count :]


@torch.no_grad()
def sdedit(network, schedule, z0, noise, n, strength, predict="v"):
    """Image-to-image: latents z0 (B, D, h, w) and noise -> changed latents; yields every step. Meng et al., Alg. 1."""
    steps = [*img2img_timesteps(schedule, n, strength).tolist(), -1]
    # perturb the picture up to t0: details drown, the layout and the large colours do not
    xt = noise_to(schedule, z0, steps[0], noise)
    yield xt
    # and denoise it from there
    for t, t_prev in zip(steps[:-1], steps[1:], strict=True):
        xt = denoise(network, schedule, xt, t, t_prev, predict)
        yield xt


def load_painter(device="cpu", text=None):
    """The shipped text-to-image model with all its parts."""
    coder, scale = autoencoder.load(autoencoder.WEIGHTS, device)
    model = stable_diffuser.load(stable_diffuser.WEIGHTS, device)
    schedule = ddpm.Schedule(kind="cosine").to(device)
    text = text or TextEncoder(device)
    return stable_diffuser.Painter(model, coder, scale, text, schedule)


def edit(painter, images, prompts, noise, cfg, mask=None):
    """uint8 (B, 3, H, W), B prompts, noise (B, D, h, w) -> images (B, 3, H, W) in [-1, 1].

    Inpainting where the mask, bool (B, 1, H, W), is True; image-to-image without one.
    """
    device = noise.device
    z0 = (autoencoder.encode_all(painter.decoder, images) * painter.scale).to(device)
    text = painter.text(list(prompts))
    empty = painter.text([cfg.negative])  # takes the place of the empty prompt
    with run.autocast(device), torch.no_grad():
        asked = (*text, *empty, cfg.guidance_scale)
        network = stable_diffuser.classifier_free_guidance(painter.model, *asked)
        parts = (network, painter.schedule, z0)
        if mask is None:
            chain = sdedit(*parts, noise, cfg.sampling_steps, cfg.strength)
            total = int(cfg.sampling_steps * cfg.strength) + 1
        else:
            inside = latent_mask(mask, z0.shape[2:]).to(device)
            walk = (cfg.sampling_steps, cfg.jump_length, cfg.resamples)
            chain = inpaint(*parts, inside, noise, *walk, eta=cfg.eta)
            total = len(resampling_levels(*walk)) + 1
        z0 = ddim.last(run.bar(chain, total, name="edit", delay=2)).float()
    drawn = autoencoder.decode_all(painter.decoder, z0 / painter.scale)
    return merge(mask, drawn, data.to_float(images)) if cfg.overlay and mask is not None else drawn


def part_mask(name):
    """The mask of a word of PARTS: bool (1, 1, 64, 64)."""
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    rows, columns = PARTS[name]
    mask[:, :, rows, columns] = True
    return mask


def read_mask(cfg):
    """The mask of --mask: bool (1, 1, 64, 64). Raises UserError if its size is not --image's, or it redraws nothing."""
    if cfg.mask in PARTS:
        return part_mask(cfg.mask)
    picture = open_image(cfg.mask)
    if cfg.image:
        size = open_image(cfg.image).size
        wrong = f"--mask is {picture.size[0]} x {picture.size[1]} and --image {size[0]} x {size[1]}"
        run.check(picture.size == size, f"{wrong}: they must be of one size")
    # white where it is redrawn
    mask = (data.square(picture, 64).float().mean(0) > 127.5)[None, None]
    run.check(mask.any(), f"{cfg.mask} has no white pixel, so nothing is redrawn: paint some")
    return mask


def read_picture(cfg):
    """The picture that is changed, uint8 (3, 64, 64): --image, or the emoji named --source."""
    if cfg.image:
        return data.read_image(cfg.image, 64)
    images, captions, _ = data.emoji(64)
    name = cfg.source.lower()
    near = sorted((caption for caption in captions if name and name in caption), key=len)
    hint = f"; there are: {', '.join(near[:3])}" if near else "; see data.emoji, or give an --image"
    run.check(name in captions, f'no emoji is named "{printable(cfg.source)}"{hint}')
    return images[captions.index(name)]


def check_flags(cfg):
    """Raises UserError for flags that make no sense, alone or together."""
    run.check(cfg.prompt.strip(), "--prompt is blank: name what to draw")
    run.check(0 <= cfg.strength <= 1, "--strength is a share of the steps: it must be in [0, 1]")
    run.check(
        1 <= cfg.sampling_steps <= 1000, "--sampling-steps must be from 1 to 1000, the schedule's"
    )
    sizes = min(cfg.resamples, cfg.jump_length)
    run.check(sizes > 0, "--resamples and --jump-length must be at least 1")
    run.check(0 <= cfg.eta <= 1, "--eta must be in [0, 1]")
    check_guidance_scale(cfg.guidance_scale, cfg.negative)
    run.check(cfg.mask or not cfg.overlay, "--overlay needs a --mask: it says what is put back")


def main(cfg: Config) -> dict:
    """Change one picture, eight times; writes edited.png and how far it is from what was given."""
    check_flags(cfg)
    run.seed(cfg.seed)
    device = run.device(cfg.device)
    images = read_picture(cfg).expand(8, -1, -1, -1)
    mask = read_mask(cfg).expand(8, -1, -1, -1) if cfg.mask else None
    text = TextEncoder(device)
    text([cfg.prompt, cfg.negative])  # too long is said now
    folder = run.output(cfg.out, cfg)
    painter = load_painter(device, text)

    # eight noises, eight pictures
    latents = autoencoder.encode_all(painter.decoder, images[:1])
    noise = torch.randn(8, *latents.shape[1:]).to(device)
    clock = run.Clock()
    drawn = edit(painter, images, [cfg.prompt] * 8, noise, cfg, mask)
    metrics = {"seconds": clock()}

    # what was given, and what the autoencoder alone makes of it
    given = data.to_float(images)
    again = autoencoder.decode_all(painter.decoder, latents).expand_as(given)
    kept = torch.ones_like(given[:, :1], dtype=torch.bool) if mask is None else ~mask
    metrics["kept_error"] = pixel_error(drawn, given, kept)
    metrics["autoencoder_error"] = pixel_error(again, given, kept)
    shown = [given[:1], again[:1]]
    titles = ["given", "autoencoder"]
    if mask is not None:
        metrics["seam"] = float(seam(drawn, mask).mean())
        metrics["autoencoder_seam"] = float(seam(again, mask).mean())
        # grey is redrawn
        shown.append(torch.where(mask[:1], 0.0, given[:1]))
        titles.append("mask")
    rows = {"before": torch.cat(shown), "after": drawn}
    figures.rows(folder / "edited.png", rows, titles)
    return run.report(folder, metrics, then=f"open {folder}/edited.png")


if __name__ == "__main__":
    run.cli(main, Config)
