"""Image-to-image equals StableDiffusionImg2ImgPipeline; masks, pictures and flags reach what draws; bad input."""

import json

import pytest
import torch
from PIL import Image

from models import autoencoder, ddim, ddpm, edit, edit_study, stable_diffuser
from tests.models.test_ddpm import command, one_line
from tests.models.test_stable_diffuser import ours, parts, words_of
from utils import data, figures


def img2img(unet, coder):
    """diffusers' pipeline, with the schedule of ours."""
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    scheduler = DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
        clip_sample=False, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    pipe = StableDiffusionImg2ImgPipeline(
        vae=coder, unet=unet, scheduler=scheduler, text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
def test_sdedit_equals_img2img_pipeline(parity, strength):
    unet, _, their_unet, their_coder = parts()
    pipe = img2img(their_unet, their_coder)
    words, empty, z0 = torch.randn(2, 7, 24), torch.randn(1, 7, 24), torch.randn(2, 4, 8, 8)
    theirs = pipe(
        prompt_embeds=words, negative_prompt_embeds=empty.expand(2, -1, -1), image=z0,
        strength=strength, guidance_scale=3.0, num_inference_steps=10, output_type="latent",
        generator=torch.Generator().manual_seed(3),
    )[0]  # fmt: skip
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(3))
    every = torch.ones(2, 7, dtype=torch.bool)
    asked = (words, every, empty, every[:1], 3.0)
    network = stable_diffuser.classifier_free_guidance(unet, *asked)
    schedule = ddpm.Schedule(kind="cosine")
    mine = ddim.last(edit.sdedit(network, schedule, z0, noise, 10, strength))
    names = "edit.sdedit", "diffusers.StableDiffusionImg2ImgPipeline"
    parity("Image-to-image", *names, mine, theirs, atol=1e-4)


def test_timesteps_equal_img2img_pipeline(parity):
    pipe = img2img(None, None)
    schedule = ddpm.Schedule(kind="cosine")
    for n, strength in ((50, 0.58), (50, 0.6), (7, 0.5), (10, 0.05), (20, 1.0)):
        pipe.scheduler.set_timesteps(n)
        theirs, count = pipe.get_timesteps(n, strength, "cpu")
        mine = edit.img2img_timesteps(schedule, n, strength)
        assert len(mine) == count
        if count:
            names = "edit.img2img_timesteps", "StableDiffusionImg2ImgPipeline.get_timesteps"
            parity("Image-to-image", *names, mine, theirs)


def test_strength_zero_is_the_picture_and_one_forgets_it():
    schedule = ddpm.Schedule(kind="cosine")
    z0, other, noise = torch.randn(3, 2, 4, 8, 8)

    def drawn(z, strength):
        return ddim.last(edit.sdedit(lambda x, t: -0.9 * x, schedule, z, noise, 10, strength))

    assert torch.equal(drawn(z0, 0.0), z0)
    torch.testing.assert_close(drawn(z0, 1.0), drawn(other, 1.0), atol=0.01, rtol=0.01)
    assert not torch.allclose(drawn(z0, 0.5), drawn(other, 0.5), atol=0.3)


def test_every_step_is_yielded():
    schedule = ddpm.Schedule(kind="cosine")
    z0, noise = torch.randn(2, 1, 4, 8, 8)
    chain = list(edit.sdedit(lambda x, t: x, schedule, z0, noise, 10, 0.4))
    assert len(chain) == 5
    expected = ddpm.add_noise(schedule, z0, torch.tensor([399]), noise)
    torch.testing.assert_close(chain[0], expected)


@pytest.fixture
def tiny():
    """A painter with random weights, whose words are the lengths of the captions."""
    unet, coder = ours()
    return stable_diffuser.Painter(unet, coder, 0.5, words_of, ddpm.Schedule(kind="cosine"))


@pytest.mark.parametrize("masked", [False, True])
def test_flags_and_latents_reach_the_sampler(tiny, monkeypatch, masked):
    """Latents by their scale, in and out; the negative prompt in the place of the empty one."""
    asked = []
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    noise = torch.randn(2, 4, 8, 8)
    z1 = torch.randn(2, 4, 8, 8)

    def sampler(network, schedule, z0, *args, **more):
        asked.append((network, z0, *args, more))
        yield 99 * z1
        yield z1

    def guidance(model, words, mask, empty, empty_mask, scale):
        asked.append((model, words, mask, empty, empty_mask, scale))
        return "guided"

    monkeypatch.setattr(edit, "inpaint" if masked else "sdedit", sampler)
    monkeypatch.setattr(stable_diffuser, "classifier_free_guidance", guidance)
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    mask[..., 8:] = True
    given = dict(negative="no", guidance_scale=2.5, sampling_steps=8, strength=0.25)
    cfg = edit.Config(**given, resamples=3, jump_length=2, eta=0.5)
    drawn = edit.edit(tiny, images, ["a", "four"], noise, cfg, mask if masked else None)
    torch.testing.assert_close(drawn, autoencoder.decode_all(tiny.decoder, z1 / 0.5))
    (model, words, _, empty, empty_mask, scale), (network, z0, *args, more) = asked
    assert model is tiny.model and scale == 2.5 and network == "guided"
    assert words[:, 0, 0].tolist() == [1, 4] and empty[:, 0, 0].tolist() == [2]
    assert empty_mask.sum() == 2
    torch.testing.assert_close(z0, autoencoder.encode_all(tiny.decoder, images) * 0.5)
    if not masked:
        assert args[0] is noise and args[1:] == [8, 0.25]
        return
    inside, eps, *walk = args
    assert torch.equal(inside, mask[..., ::2, ::2]) and eps is noise
    assert walk == [8, 2, 3] and more == {"eta": 0.5}


def test_overlay_puts_the_pixels_back(tiny):
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    mask[..., 8:] = True
    drawn = []
    for overlay in (False, True):
        torch.manual_seed(1)
        noise = torch.randn(2, 4, 8, 8)
        cfg = edit.Config(sampling_steps=2, resamples=1, negative="no", overlay=overlay)
        drawn.append(edit.edit(tiny, images, ["a", "b"], noise, cfg, mask))
    without, over = drawn
    assert torch.equal(over[..., :8], data.to_float(images)[..., :8])
    assert torch.equal(over[..., 8:], without[..., 8:])
    assert not torch.equal(over[..., :8], without[..., :8])


def test_masks_and_pictures_of_a_reader(tmp_path):
    """Any size, transparent, wide: the middle square of both, so that they stay one above the other."""
    picture = Image.new("RGBA", (300, 100), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (100, 0, 150, 100))
    picture.save(tmp_path / "a.png")
    white = Image.new("L", (300, 100), 0)
    white.paste(255, (150, 0, 200, 100))
    white.save(tmp_path / "m.png")
    cfg = edit.Config(image=str(tmp_path / "a.png"), mask=str(tmp_path / "m.png"))
    image, mask = edit.read_picture(cfg), edit.read_mask(cfg)
    assert image.shape == (3, 64, 64) and mask.shape == (1, 1, 64, 64)
    assert image[:, 32, 8].tolist() == [255, 0, 0] and (image[:, 32, 56] == 255).all()
    assert torch.equal(mask, edit.part_mask("right"))
    # a named emoji, and what a word redraws
    images, captions, _ = data.emoji(64)
    assert torch.equal(
        edit.read_picture(edit.Config(source="Red Heart")), images[captions.index("red heart")]
    )
    for name, share in (("left", 0.5), ("top", 0.5), ("bottom", 0.5), ("middle", 0.25)):
        assert float(edit.part_mask(name).float().mean()) == share
    assert edit.part_mask("left")[0, 0, 0, 0] and edit.part_mask("top")[0, 0, 0, 63]
    assert edit.part_mask("bottom")[0, 0, 63, 0]


def test_main_measures_what_it_draws(monkeypatch, tmp_path):
    """The drawn pictures, given, mask and prompt; the error is that outside the mask."""
    seen = {}

    def fake(painter, images, prompts, noise, cfg, mask=None):
        seen["edit"] = (images, prompts, noise, mask)
        drawn = data.to_float(images).clone()
        drawn[..., 32:] = 0.0
        return drawn + 0.1

    def rows(path, named, titles):
        seen["rows"] = named, titles

    monkeypatch.setattr(edit, "edit", fake)
    monkeypatch.setattr(figures, "rows", rows)
    cfg = edit.Config(mask="right", prompt="sun", source="red heart", out=str(tmp_path))
    metrics = edit.main(cfg)
    images, prompts, noise, mask = seen["edit"]
    assert prompts == ["sun"] * 8 and noise.shape == (8, 4, 16, 16) and len(images) == 8
    assert not torch.equal(noise[0], noise[1])
    assert metrics["kept_error"] == pytest.approx(12.75, abs=0.01)
    assert 0 < metrics["autoencoder_error"] < 5 < metrics["seam"] - metrics["autoencoder_seam"]
    before, after = seen["rows"][0].values()
    assert seen["rows"][1] == ["given", "autoencoder", "mask"] and len(after) == 8
    assert torch.equal(before[0], data.to_float(images[0])) and (before[2][..., 32:] == 0).all()
    # without a mask every pixel counts
    metrics = edit.main(edit.Config(source="red heart", out=str(tmp_path)))
    assert seen["edit"][3] is None and metrics["kept_error"] > 30 and "seam" not in metrics


def test_command(tmp_path):
    flags = "--mask right --sampling-steps 2 --prompt apple --overlay".split()
    done = command(*flags, "--out", str(tmp_path), script="edit")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "edited.png").stat().st_size > 0
    assert json.loads((tmp_path / "metrics.json").read_text())["kept_error"] == 0


@pytest.mark.parametrize(
    "args, word",
    [
        (["--prompt", " "], "--prompt"),
        (["--strength", "1.5"], "--strength"),
        (["--strength", "nan"], "--strength"),
        (["--sampling-steps", "0"], "--sampling-steps"),
        (["--resamples", "0"], "--resamples"),
        (["--eta", "2"], "--eta"),
        (["--guidance-scale", "inf"], "--guidance-scale"),
        (["--negative", "x", "--guidance", "1"], "--guidance"),
        (["--overlay"], "--mask"),
        (["--source", "red hearts"], "red hearts"),
        (["--source", "heart"], "red heart"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--mask", "nowhere.png"], "nowhere.png"),
        (["--image", "wide.png", "--mask", "black.png"], "one size"),
        (["--mask", "black.png"], "no white pixel"),
        (["--prompt", "a " * 15], "15 tokens"),
    ],
)
def test_bad_input(args, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (32, 32)).save("black.png")
    Image.new("L", (64, 32)).save("wide.png")
    assert word in one_line(edit, [*args, "--out", "x"], monkeypatch, capsys)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "args", [["--count", "1"], ["--strengths", "2"], ["--sampling-steps", "0"]]
)
def test_study_bad_input(args, tmp_path, monkeypatch, capsys):
    assert args[0] in one_line(edit_study, [*args, "--out", str(tmp_path)], monkeypatch, capsys)
