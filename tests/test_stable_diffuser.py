"""Text to image: the sampler equals StableDiffusionPipeline; two processes train as one; guidance has known answers."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from models import autoencoder, ddim, ddpm, stable_diffuser
from models.unet import UNet
from tests.conftest import ROOT
from tests.test_ddpm import command
from utils import data


def parts():
    """A tiny U-Net and autoencoder of ours, and the same weights in diffusers' classes."""
    unet = UNet(4, (16, 32), 1, (True, True), context_dim=24, head_dim=16).eval()
    their_unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, cross_attention_dim=24, attention_head_dim=(1, 2),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    ).eval()  # fmt: skip
    their_unet.load_state_dict(unet.state_dict())
    coder = autoencoder.Autoencoder((8, 16), latent=4).eval()
    their_coder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=8, scaling_factor=0.3,
    ).eval()  # fmt: skip
    their_coder.load_state_dict(coder.state_dict())
    return unet, coder, their_unet, their_coder


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampler_equals_stable_diffusion_pipeline(parity, scale):
    unet, coder, their_unet, their_coder = parts()
    scheduler = DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
        clip_sample=False, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)  # see test_ddpm.pair
    pipe = StableDiffusionPipeline(
        vae=their_coder, unet=their_unet, scheduler=scheduler, text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    words, empty, noise = torch.randn(2, 7, 24), torch.randn(1, 7, 24), torch.randn(2, 4, 8, 8)
    theirs = pipe(
        prompt_embeds=words, negative_prompt_embeds=empty.expand(2, -1, -1), latents=noise.clone(),
        guidance_scale=scale, num_inference_steps=10, output_type="pt", height=16, width=16,
    ).images  # fmt: skip
    every = torch.ones(2, 7, dtype=torch.bool)
    schedule = ddpm.Schedule(kind="cosine")
    z0 = ddim.last(stable_diffuser.sample(unet, schedule, noise, words, every, empty, every[:1], scale, 10))
    ours = ((coder.decode(z0 / 0.3) + 1) / 2).clamp(0, 1)
    names = "stable_diffuser.sample, decode", "diffusers.StableDiffusionPipeline"
    parity("Text to image", *names, ours, theirs, atol=1e-4)


def test_guidance_has_three_known_scales():
    """Scale 0 forgets the prompt, scale 1 is the prompt alone, and in between it is linear."""
    unet = parts()[0]
    xt, t, words, empty = torch.randn(2, 4, 8, 8), torch.tensor([5, 800]), torch.randn(2, 7, 24), torch.randn(1, 7, 24)
    every = torch.ones(2, 7, dtype=torch.bool)
    at = {s: stable_diffuser.guided(unet, words, every, empty, every[:1], s)(xt, t) for s in (0, 1, 0.5)}
    torch.testing.assert_close(at[0], unet(xt, t, empty.expand(2, -1, -1), every), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at[1], unet(xt, t, words, every))
    torch.testing.assert_close(at[0.5], (at[0] + at[1]) / 2, atol=1e-5, rtol=1e-5)


def test_dropped_captions_become_the_empty_one():
    words, mask = torch.randn(4, 7, 24), torch.ones(4, 7, dtype=torch.bool)
    empty, empty_mask = torch.zeros(1, 7, 24), torch.arange(7)[None] < 2
    w, m = stable_diffuser.drop_text(words, mask, empty, empty_mask, torch.tensor([True, False, False, True]))
    assert (w[0] == 0).all() and (w[3] == 0).all() and torch.equal(w[1:3], words[1:3])
    assert m.sum(1).tolist() == [2, 7, 7, 2]


def test_latents_go_through_their_scale():
    """Forgetting the scale is a known mistake: a painter with another scale must paint another picture."""
    unet, coder, *_ = parts()
    text = lambda prompts: (torch.ones(len(prompts), 7, 24), torch.ones(len(prompts), 7, dtype=torch.bool))  # noqa: E731
    painters = [stable_diffuser.Painter(unet, coder, s, text, ddpm.Schedule(kind="cosine")) for s in (1.0, 0.2)]
    noise = torch.ones(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        *_, z0 = stable_diffuser.sample(unet, painters[0].schedule, noise, *text(["x"]), *text([""]), 3.0, 2)
    for p in painters:
        torch.testing.assert_close(p.draw(["x"], noise, n=2), autoencoder.decode_all(coder, z0.float() / p.scale))


class Recorder(torch.nn.Module):
    """A network that notes what it is asked."""

    def __init__(self):
        super().__init__()
        self.weight, self.asked, self.masks = torch.nn.Parameter(torch.zeros(1)), [], []

    def forward(self, xt, t, words, mask):
        self.asked.append(words[:, 0, 0].long().tolist())
        self.masks.append(mask)
        return xt * self.weight


def asked(rank, world, drop=0.0, steps=3):
    """Which captions the steps of one process learn from: [[numbers] of each step]."""
    model, n = Recorder(), 12
    words = torch.arange(n).float()[:, None, None].expand(n, 7, 24)
    cfg = stable_diffuser.Config(steps=steps, batch=4, drop_text=drop)
    torch.manual_seed(0)
    every = torch.ones(n, 7, dtype=torch.bool)
    empty = torch.full((1, 7, 24), -1.0), every[:1]
    rest = torch.optim.SGD(model.parameters(), 0.1), ddpm.Schedule(kind="cosine"), torch.randn(n, 4, 8, 8), words, every
    list(
        stable_diffuser.train(
            model, copy.deepcopy(model).requires_grad_(False), *rest, empty, cfg, rank=rank, world=world
        )
    )
    return model.asked


def test_two_processes_share_each_batch_and_no_picture_is_learned_twice():
    whole, first, second = asked(0, 1), asked(0, 2), asked(1, 2)
    for batch, a, b in zip(whole, first, second):
        assert len(a) == len(b) == 2 and sorted(a + b) == sorted(batch) and len(set(batch)) == 4


def test_training_hides_captions():
    """In half of the draws here; the empty caption's features are -1."""
    drawn = [i for batch in asked(0, 1, drop=0.5, steps=50) for i in batch]
    assert 0.3 < drawn.count(-1) / len(drawn) < 0.7 and -1 not in [i for batch in asked(0, 1) for i in batch]


def test_evaluate_finds_pictures_that_are_what_they_should_be():
    """A painter that knows the true pictures, and paints the colour words plainly, gets full marks."""
    images, captions, _ = data.emoji(64)
    images, captions = images[:40], captions[:40]
    colours = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, 0.04, 1), "yellow": (1, 0.68, -1)}

    class Knows:
        def draw(self, prompts, *_):
            plain = [torch.tensor(colours.get(p.split()[0], (0, 0, 0))).float() for p in prompts]
            plain = [c[:, None, None].expand(3, 64, 64) for c in plain]
            true = {c: data.to_float(x[None])[0] for c, x in zip(captions, images)}
            return torch.stack([true.get(p, c) for p, c in zip(prompts, plain)])

    held_out = [i % 4 == 0 for i in range(40)]
    scores, pictures = stable_diffuser.evaluate(
        Knows(), images, captions, held_out, (4, 16, 16), stable_diffuser.Config(), 10
    )
    assert scores["seen_top1"] == scores["seen_top10"] == scores["colours_right"] == 1
    assert scores["held_out_similarity"] > 0.99 > scores["random_similarity"]
    assert scores["held_out_closer_than_random"] == 1 and len(pictures["colours.png"][0]["heart"]) == 4
    names = {"".join(c.split()): i for i, c in enumerate(captions)}  # a title is a caption, in lines
    for name in ("seen.png", "held_out.png"):
        rows, titles = pictures[name]
        numbers = [names["".join(title.split())] for title in titles]
        assert torch.equal(rows["true"], data.to_float(images[numbers]))
        assert max(len(line) for title in titles for line in title.splitlines()) <= 12


TINY = "--steps 3 --batch 4 --channels 32 32 --sampling-steps 2 --prompt x".split()
LAUNCH = {
    "torch.distributed.launch": ["-m", "torch.distributed.launch", "--nproc_per_node", "1"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"],
}


@pytest.mark.parametrize("launcher", LAUNCH)
def test_launchers_give_the_weights_of_one_process(launcher, tmp_path):
    """The gradient of two processes, each with half of the batch, is that of one: so are the weights after 3 steps."""
    alone = command(*TINY, "--out", str(tmp_path / "one"), script="stable_diffuser")
    assert alone.returncode == 0, alone.stderr
    args = [sys.executable, *LAUNCH[launcher], "models/stable_diffuser.py", *TINY, "--out", str(tmp_path / "many")]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from utils import checkpoint

    a, b = (checkpoint.read(tmp_path / x / "model.safetensors")[0] for x in ("one", "many"))
    # bf16 sums in another order; and where a gradient is noise, Adam's first steps make a whole step of its sign
    error = max(float((a[k] - b[k]).abs().mean()) for k in a)
    assert error < 2e-5, error
    losses = [json.loads((tmp_path / x / "metrics.json").read_text())["final_loss"] for x in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_gradients_of_two_halves_are_those_of_the_whole():
    """What DistributedDataParallel does, by hand, in fp32: the mean of the ranks' gradients is the batch's gradient."""
    unet, schedule = parts()[0], ddpm.Schedule(kind="cosine")
    z0, words, mask = torch.randn(4, 4, 8, 8), torch.randn(4, 7, 24), torch.ones(4, 7, dtype=torch.bool)
    t, eps = torch.randint(1000, (4,)), torch.randn(4, 4, 8, 8)

    def gradient(part):
        unet.zero_grad()
        stable_diffuser.loss(unet, schedule, *(x[part] for x in (z0, words, mask, t, eps))).backward()
        return torch.cat([p.grad.flatten() for p in unet.parameters()])

    whole, first, second = gradient(slice(None)), gradient(slice(0, None, 2)), gradient(slice(1, None, 2))
    torch.testing.assert_close((first + second) / 2, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "args, word",
    [
        (["--steps", "0"], "--steps"),
        (["--channels", "40"], "--channels"),
        (["--drop-text", "2"], "--drop-text"),
        (["--sampling-steps", "2000"], "--sampling-steps"),
        (["--pretrained", "--autoencoder", "other"], "--autoencoder"),
        (["--negative", "x"], "--prompt"),
        (["--autoencoder", "nowhere.safetensors"], "nowhere"),
    ],
)
def test_bad_input(args, word, tmp_path):
    done = command(*args, "--out", str(tmp_path / "x"), script="stable_diffuser")
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr, done.stderr
