"""Text to image: the sampler equals StableDiffusionPipeline; two processes train as one; guidance has known answers."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from models import autoencoder, ddim, ddpm, prompt_alignment, stable_diffuser
from models.unet import UNet
from tests.conftest import ROOT
from tests.models.test_ddpm import OneWeight, command, followed, one_line, only_noise, part_of, same
from utils import checkpoint, data, figures
from utils.run import UserError


def ours():
    """A tiny U-Net and a tiny autoencoder."""
    unet = UNet(4, (16, 32), 1, (True, True), context_dim=24, head_dim=16).eval()
    return unet, autoencoder.Autoencoder((8, 16), latent=4).eval()


def parts():
    """These, and the same weights in diffusers' classes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, coder = ours()
    their_unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, cross_attention_dim=24, attention_head_dim=(1, 2),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    ).eval()  # fmt: skip
    their_unet.load_state_dict(unet.state_dict())
    their_coder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=8, scaling_factor=0.3,
    ).eval()  # fmt: skip
    their_coder.load_state_dict(coder.state_dict())
    return unet, coder, their_unet, their_coder


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampler_equals_stable_diffusion_pipeline(parity, scale):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

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
    z0 = ddim.last(
        stable_diffuser.sample(unet, schedule, noise, words, every, empty, every[:1], scale, 10)
    )
    mine = ((coder.decode(z0 / 0.3) + 1) / 2).clamp(0, 1)
    names = "stable_diffuser.sample, decode", "diffusers.StableDiffusionPipeline"
    parity("Text to image", *names, mine, theirs, atol=1e-4)


def test_guidance_has_three_known_scales():
    """Scale 0 forgets the prompt, scale 1 is the prompt alone, and in between it is linear."""
    unet = ours()[0]
    xt, t, words, empty = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([5, 800]),
        torch.randn(2, 7, 24),
        torch.randn(1, 7, 24),
    )
    every = torch.ones(2, 7, dtype=torch.bool)
    at = {
        s: stable_diffuser.classifier_free_guidance(unet, words, every, empty, every[:1], s)(xt, t)
        for s in (0, 1, 0.5)
    }
    torch.testing.assert_close(
        at[0], unet(xt, t, empty.expand(2, -1, -1), every), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(at[1], unet(xt, t, words, every))
    torch.testing.assert_close(at[0.5], (at[0] + at[1]) / 2, atol=1e-5, rtol=1e-5)


def test_dropped_captions_become_the_empty_one():
    words, mask = torch.randn(4, 7, 24), torch.ones(4, 7, dtype=torch.bool)
    empty, empty_mask = torch.zeros(1, 7, 24), torch.arange(7)[None] < 2
    w, m = stable_diffuser.drop_text(
        words, mask, empty, empty_mask, torch.tensor([True, False, False, True])
    )
    assert (w[0] == 0).all() and (w[3] == 0).all() and torch.equal(w[1:3], words[1:3])
    assert m.sum(1).tolist() == [2, 7, 7, 2]


def test_latents_go_through_their_scale():
    """Forgetting the scale is a known mistake: a painter with another scale must paint another picture."""
    unet, coder = ours()

    def text(prompts):
        return torch.ones(len(prompts), 7, 24), torch.ones(len(prompts), 7, dtype=torch.bool)

    painters = [
        stable_diffuser.Painter(unet, coder, s, text, ddpm.Schedule(kind="cosine"))
        for s in (1.0, 0.2)
    ]
    noise = torch.ones(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        *_, z0 = stable_diffuser.sample(
            unet, painters[0].schedule, noise, *text(["x"]), *text([""]), 3.0, 2
        )
    for p in painters:
        torch.testing.assert_close(
            p.draw(["x"], noise, n=2), autoencoder.decode_all(coder, z0.float() / p.scale)
        )


def words_of(captions):
    """A text encoder for tests: every feature is the length of the caption, and so is the number of its words."""
    lengths = torch.tensor([len(c) for c in captions])
    return lengths.float()[:, None, None].expand(-1, 7, 24), torch.arange(7) < lengths[:, None]


@pytest.mark.parametrize("negative", ["", "no"])
def test_draw_steers_away_from_the_negative_prompt(monkeypatch, negative):
    """It takes the place of the empty one; guidance and steps reach the sampler, and the last latents the decoder."""
    coder, asked = ours()[1], []

    def sample(model, schedule, noise, words, mask, empty, empty_mask, scale, n):
        asked.append((noise, words, mask, empty, empty_mask, scale, n))
        yield torch.full_like(noise, 9.0)
        yield noise

    monkeypatch.setattr(stable_diffuser, "sample", sample)
    painter = stable_diffuser.Painter(OneWeight(), coder, 0.5, words_of, ddpm.Schedule())
    noise = torch.randn(2, 4, 8, 8)
    drawn = painter.draw(["a", "four"], noise, 2.5, 11, negative)
    found, words, mask, empty, empty_mask, scale, n = asked[0]
    assert torch.equal(found, noise) and (scale, n) == (2.5, 11)
    assert words[:, 0, 0].tolist() == [1, 4] and mask.sum(1).tolist() == [1, 4]
    assert empty[:, 0, 0].tolist() == [len(negative)] and empty_mask.sum(1).tolist() == [
        len(negative)
    ]
    torch.testing.assert_close(drawn, autoencoder.decode_all(coder, noise / 0.5))


def test_training_by_hand():
    """Rate, zeroed gradients, clipping and EMA of every step; v is -z0 where the schedule is only noise."""
    cfg = stable_diffuser.Config(steps=6, batch=4, lr=40.0)
    latents, (words, mask) = torch.full((8, 4, 2, 2), 1.5), words_of(["a"] * 8)
    rest = only_noise(), latents, words, mask, words_of([""]), cfg
    followed(lambda *parts: stable_diffuser.train(*parts, *rest), -1.5, cfg, 0.998)


def test_network_is_asked_for_v():
    """As `sample` reads it: with only noise left, eps is the noise, x0 the latent, and v minus the latent."""
    z0, (words, mask) = torch.randn(3, 4, 2, 2), words_of(["a"] * 3)
    value = stable_diffuser.loss(
        OneWeight(), only_noise(), z0, words, mask, torch.tensor([1, 2, 3]), torch.randn(3, 4, 2, 2)
    )
    torch.testing.assert_close(value, (3 + z0).square().mean())


def test_pictures_keep_their_captions_and_hidden_ones_lose_their_mask():
    """Latent, words and number of words are one number here; half of the captions become the empty one, whole."""
    numbers = torch.arange(1, 7)
    words, mask = words_of(["x" * int(n) for n in numbers])
    empty = torch.full((1, 7, 24), -1.0), torch.ones(1, 7, dtype=torch.bool)
    schedule, seen = ddpm.Schedule(), []
    # Zt is z0
    schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar = torch.ones(1000), torch.zeros(1000)
    model = OneWeight()

    def forward(zt, t, words, mask):
        seen.append((zt[:, 0, 0, 0], words[:, 0, 0], mask.sum(1)))
        return model.weight.expand_as(zt)

    model.forward = forward
    latents = numbers.float()[:, None, None, None].expand(-1, 4, 2, 2)
    plain = dict(text_noise=0.0, word_dropout=0.0)
    cfg = stable_diffuser.Config(steps=100, batch=6, drop_text=0.5, **plain)
    rest = (
        OneWeight().requires_grad_(False),
        torch.optim.SGD(model.parameters()),
        schedule,
        latents,
        words,
        mask,
        empty,
    )
    list(stable_diffuser.train(model, *rest, cfg))
    z, w, m = (torch.cat(x) for x in zip(*seen))
    hidden = w == -1
    assert torch.equal(w[~hidden], z[~hidden]) and torch.equal(m[~hidden], z[~hidden].long())
    assert (m[hidden] == 7).all() and 0.4 < hidden.float().mean() < 0.6


@pytest.fixture(scope="module")
def encoder():
    return stable_diffuser.TextEncoder()


def test_prompts_are_whole_or_refused(encoder):
    """Up to 14 tokens beside the two marks; a control token is read as letters, and half a character as unknown."""
    words, mask = encoder(["red apple", ""])
    assert words.shape == (2, 16, 384) and mask.sum(1).tolist() == [4, 2]
    assert encoder(["a " * 14])[1].all()
    with pytest.raises(UserError, match="15 tokens .* 14"):
        encoder(["red apple", "a " * 15])
    assert encoder(["[SEP]"])[1].sum() > 3 and encoder(["\udcff"])[1].any()
    plain = encoder.tokenizer(
        ["red apple"], padding="max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        torch.testing.assert_close(
            words[:1], encoder.model(**plain).last_hidden_state, atol=1e-5, rtol=1e-5
        )


class Studio:
    """Forty emoji, a tiny autoencoder and a text encoder for tests, in place of the real ones."""

    def __init__(self, monkeypatch):
        images, captions, names = data.emoji(64)
        self.images, self.captions = images[:40], captions[:40]
        self.coder, self.scale, self.drawn, self.painters, self.trained = (
            autoencoder.Autoencoder((8, 8, 8), 2).eval(),
            0.25,
            [],
            [],
            [],
        )
        monkeypatch.setattr(data, "emoji", lambda size: (self.images, self.captions, names[:40]))
        monkeypatch.setattr(autoencoder, "load", lambda path, device: (self.coder, self.scale))
        monkeypatch.setattr(stable_diffuser, "TextEncoder", lambda device: self.words)
        monkeypatch.setattr(
            stable_diffuser, "evaluate", lambda *args: self.painters.append(args) or ({}, {})
        )
        for name in ("grid", "rows", "curves"):
            monkeypatch.setattr(figures, name, lambda *_, **__: None)
        studio, train = self, stable_diffuser.train

        def draw(painter, prompts, noise, guidance=3.0, n=50, negative=""):
            studio.painters.append((painter,))
            studio.drawn.append((list(prompts), noise, guidance, n, negative))
            return torch.zeros(len(prompts), 3, 64, 64)

        def watched(model, ema, optimizer, schedule, latents, words, mask, empty, *rest):
            self.trained.append((latents, words, mask, empty))
            yield from train(model, ema, optimizer, schedule, latents, words, mask, empty, *rest)

        monkeypatch.setattr(stable_diffuser.Painter, "draw", draw)
        monkeypatch.setattr(stable_diffuser, "train", watched)

    def words(self, captions):
        lengths = torch.tensor([len(c) for c in captions])
        return lengths.float()[:, None, None].expand(-1, 3, 384) / 100, torch.ones(
            len(captions), 3, dtype=torch.bool
        )


def test_main_trains_on_scaled_latents_and_paints_with_the_ema(monkeypatch, tmp_path):
    """Without the held-out pictures, each beside its caption; the written weights are those that paint."""
    studio = Studio(monkeypatch)
    flags = dict(channels=(32,), lr=0.1, sampling_steps=7, guidance_scale=2.5)
    stable_diffuser.main(stable_diffuser.Config(steps=2, batch=4, **flags, out=str(tmp_path)))
    held_out = torch.tensor(autoencoder.split(studio.captions))
    latents, words, mask, empty = studio.trained[0]
    torch.testing.assert_close(
        latents, autoencoder.encode_all(studio.coder, studio.images[~held_out]) * 0.25
    )
    known, known_mask = studio.words([c for c, h in zip(studio.captions, held_out) if not h])
    assert (
        torch.equal(words, known)
        and torch.equal(mask, known_mask)
        and torch.equal(empty[0], studio.words([""])[0])
    )
    painter, images, captions, hidden, shape, *_ = studio.painters[0]
    written = checkpoint.read(tmp_path / "model.safetensors")[0]
    state = checkpoint.read(tmp_path / "state.safetensors")[0]
    assert same(written, painter.model.state_dict()) and same(written, part_of(state, "ema"))
    assert not same(written, part_of(state, "model"))
    assert painter.scale == 0.25 and painter.decoder is studio.coder and hidden == held_out.tolist()
    assert torch.equal(painter.schedule.alpha_bar, ddpm.Schedule(kind="cosine").alpha_bar)
    scales = [scale for _, _, scale, n, _ in studio.drawn if n == 7]
    assert scales == [1.0, 2.0, 3.0, 5.0, 8.0] and all(
        torch.equal(d[1], studio.drawn[0][1]) for d in studio.drawn
    )
    monkeypatch.setattr(stable_diffuser, "WEIGHTS", tmp_path / "model.safetensors")
    again = stable_diffuser.Config(
        pretrained=True, prompt="red apple", negative="no", **flags, out=str(tmp_path / "b")
    )
    stable_diffuser.main(again)
    prompts, noise, guidance, n, negative = studio.drawn[-1]
    assert prompts == ["red apple"] * 8 and noise.shape == (8, 2, 16, 16)
    assert (guidance, n, negative) == (2.5, 7, "no") and same(
        written, studio.painters[-1][0].model.state_dict()
    )


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
    plain = dict(text_noise=0.0, word_dropout=0.0)
    cfg = stable_diffuser.Config(steps=steps, batch=4, drop_text=drop, **plain)
    torch.manual_seed(0)
    every = torch.ones(n, 7, dtype=torch.bool)
    empty = torch.full((1, 7, 24), -1.0), every[:1]
    rest = (
        torch.optim.SGD(model.parameters(), 0.1),
        ddpm.Schedule(kind="cosine"),
        torch.randn(n, 4, 8, 8),
        words,
        every,
    )
    list(
        stable_diffuser.train(
            model,
            copy.deepcopy(model).requires_grad_(False),
            *rest,
            empty,
            cfg,
            rank=rank,
            world=world,
        )
    )
    return model.asked


def test_latents_too_small_for_the_widths_are_refused(tmp_path, monkeypatch, capsys):
    """An autoencoder of six widths leaves 2 x 2 latents, one place when folded: nothing to halve."""
    coder, path = autoencoder.Autoencoder((8,) * 6, 2), tmp_path / "coder.safetensors"
    meta = {"channels": [8] * 6, "latent": 2, "scale": 1.0}
    checkpoint.write(path, coder.state_dict(), meta)
    printed = one_line(
        stable_diffuser,
        ["--autoencoder", str(path), "--out", str(tmp_path / "x")],
        monkeypatch,
        capsys,
    )
    assert "2 x 2" in printed and not (tmp_path / "x").exists()


def test_two_processes_share_each_batch_and_no_picture_is_learned_twice():
    whole, first, second = asked(0, 1), asked(0, 2), asked(1, 2)
    for batch, a, b in zip(whole, first, second):
        assert len(a) == len(b) == 2 and sorted(a + b) == sorted(batch) and len(set(batch)) == 4


def test_training_hides_captions():
    """In half of the draws here; the empty caption's features are -1."""
    drawn = [i for batch in asked(0, 1, drop=0.5, steps=50) for i in batch]
    assert 0.3 < drawn.count(-1) / len(drawn) < 0.7 and -1 not in [
        i for batch in asked(0, 1) for i in batch
    ]


def test_evaluate_finds_pictures_that_are_what_they_should_be():
    """A painter that knows the true pictures, and paints the colour words plainly, gets full marks."""
    images, captions, _ = data.emoji(64)
    images, captions = images[:24], captions[:24]
    colours = {
        "red": (1, -1, -1),
        "green": (-1, 1, -1),
        "blue": (-1, 0.04, 1),
        "yellow": (1, 0.68, -1),
    }

    class Knows:
        def draw(self, prompts, *_):
            plain = [torch.tensor(colours.get(p.split()[0], (0, 0, 0))).float() for p in prompts]
            plain = [c[:, None, None].expand(3, 64, 64) for c in plain]
            true = {c: data.to_float(x[None])[0] for c, x in zip(captions, images)}
            return torch.stack([true.get(p, c) for p, c in zip(prompts, plain)])

    held_out = [i % 4 == 0 for i in range(24)]
    scores, pictures = prompt_alignment.evaluate(
        Knows(), images, captions, held_out, (4, 16, 16), stable_diffuser.Config(), 6
    )
    assert scores["seen_top1"] == scores["seen_top10"] == scores["colours_right"] == 1
    assert scores["held_out_top1"] == scores["held_out_top10"] == 1
    assert scores["held_out_similarity"] > 0.99 > scores["random_similarity"]
    assert (
        scores["held_out_closer_than_random"] == 1 and len(pictures["colours.png"][0]["heart"]) == 4
    )
    # a title is a caption, in lines
    names = {"".join(c.split()): i for i, c in enumerate(captions)}
    for name in ("seen.png", "held_out.png"):
        rows, titles = pictures[name]
        numbers = [names["".join(title.split())] for title in titles]
        assert torch.equal(rows["true"], data.to_float(images[numbers]))
        assert all(held_out[i] == (name == "held_out.png") for i in numbers)
        assert max(len(line) for title in titles for line in title.splitlines()) <= 12


def test_held_out_captions_are_judged_by_their_own_pictures():
    """A painter that knows the emoji of the training and paints the rest black: nothing held out is found."""
    images, captions, _ = data.emoji(64)
    images, captions = images[:24], captions[:24]
    held_out = [i % 4 == 0 for i in range(24)]
    known = {c: data.to_float(x[None])[0] for c, x, h in zip(captions, images, held_out) if not h}

    class Knows:
        def draw(self, prompts, *_):
            return torch.stack([known.get(p, torch.full((3, 64, 64), -1.0)) for p in prompts])

    cfg = stable_diffuser.Config()
    scores, _ = prompt_alignment.evaluate(Knows(), images, captions, held_out, (4, 16, 16), cfg, 6)
    assert scores["seen_top1"] == 1
    assert scores["held_out_top1"] < 0.5


def test_features_of_other_pictures_are_not_taken_from_the_cache(monkeypatch, tmp_path):
    """As many pictures, but others: each set has an entry of its own."""
    monkeypatch.setattr(prompt_alignment.assets, "cache", lambda: tmp_path)
    monkeypatch.setattr(
        prompt_alignment, "picture_features", lambda images: images.float().mean((2, 3))
    )
    a, b = torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.ones(3, 3, 4, 4, dtype=torch.uint8)
    assert (prompt_alignment.emoji_features(a) == 0).all() and (
        prompt_alignment.emoji_features(b) == 1
    ).all()
    monkeypatch.setattr(prompt_alignment, "picture_features", None)
    assert (prompt_alignment.emoji_features(a) == 0).all()


TINY = "--steps 3 --batch 4 --channels 32 32 --sampling-steps 2 --prompt x".split()
FEW = """
from models import stable_diffuser
from utils import data, run

images, captions, names = data.emoji(64)
data.emoji = lambda size: (images[:24], captions[:24], names[:24])
if __name__ == "__main__":
    run.cli(stable_diffuser.main, stable_diffuser.Config)
"""
LAUNCH = {
    "alone": [],
    "torch.distributed.launch": [
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node",
        "1",
        "--master_port",
        "29612",
    ],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"],
}


@pytest.mark.long
def test_launchers_give_the_weights_of_one_process(tmp_path):
    """The gradient of two processes, each with half of the batch, is that of one: so are the weights after 3 steps.

    On 24 emoji, which makes no difference to who learns from what.
    """
    (tmp_path / "few.py").write_text(FEW, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name, launcher in LAUNCH.items():
        args = [
            sys.executable,
            *launcher,
            str(tmp_path / "few.py"),
            *TINY,
            "--out",
            str(tmp_path / name),
        ]
        done = subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    losses = {
        x: json.loads((tmp_path / x / "metrics.json").read_text())["final_loss"] for x in LAUNCH
    }
    weights = {x: checkpoint.read(tmp_path / x / "model.safetensors")[0] for x in LAUNCH}
    for name in ("torch.distributed.launch", "torchrun"):
        # bf16 sums in another order; and where a gradient is noise, Adam's first steps make a whole step of its sign
        error = max(
            float((weights["alone"][k] - weights[name][k]).abs().mean()) for k in weights[name]
        )
        assert error < 2e-5, error
        assert losses["alone"] == pytest.approx(losses[name], rel=0.2)


def test_command(tmp_path):
    """The only run of the script as a reader's, with the shipped weights."""
    flags = "--pretrained --prompt apple --negative blue --sampling-steps 2".split()
    done = command(*flags, "--out", str(tmp_path), script="stable_diffuser")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "prompt.png").stat().st_size > 0 and "prompt.png" in done.stdout


def test_gradients_of_two_halves_are_those_of_the_whole():
    """What DistributedDataParallel does, by hand, in fp32: the mean of the ranks' gradients is the batch's gradient."""
    unet, schedule = ours()[0], ddpm.Schedule(kind="cosine")
    z0, words, mask = (
        torch.randn(4, 4, 8, 8),
        torch.randn(4, 7, 24),
        torch.ones(4, 7, dtype=torch.bool),
    )
    t, eps = torch.randint(1000, (4,)), torch.randn(4, 4, 8, 8)

    def gradient(part):
        unet.zero_grad()
        stable_diffuser.loss(
            unet, schedule, *(x[part] for x in (z0, words, mask, t, eps))
        ).backward()
        return torch.cat([p.grad.flatten() for p in unet.parameters()])

    whole, first, second = (
        gradient(slice(None)),
        gradient(slice(0, None, 2)),
        gradient(slice(1, None, 2)),
    )
    torch.testing.assert_close((first + second) / 2, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "args, word",
    [
        (["--steps", "0"], "--steps"),
        (["--channels", "40"], "--channels"),
        (["--drop-text", "2"], "--drop-text"),
        (["--word-dropout", "-0.1"], "--word-dropout"),
        (["--text-noise", "nan"], "--text-noise"),
        (["--text-noise", "-1"], "--text-noise"),
        (["--ema", "1"], "--ema"),
        (["--sampling-steps", "2000"], "--sampling-steps"),
        (["--pretrained", "--autoencoder", "other"], "--autoencoder"),
        (["--negative", "x"], "--prompt"),
        (["--prompt", "x", "--negative", "y", "--guidance", "1"], "--guidance"),
        (["--prompt", "x", "--negative", "y", "--guidance", "0"], "--guidance"),
        (["--guidance-scale", "nan"], "--guidance"),
        (["--guidance-scale", "inf"], "--guidance-scale"),
        (["--guidance", "inf"], "--guidance-scale"),  # the flag's old name
        (["--prompt", "  "], "--prompt"),
        (["--prompt", "\udcff"], "UTF-8"),
        (["--prompt", "a " * 15], "15 tokens"),
        (["--lr", "inf"], "--lr"),
        (["--channels"], "channels"),
        (["--channels", *["32"] * 5], "--channels"),
        (["--autoencoder", "nowhere.safetensors"], "nowhere"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    assert word in one_line(
        stable_diffuser, [*args, "--out", str(tmp_path / "x")], monkeypatch, capsys
    )
    assert not (tmp_path / "x").exists()
