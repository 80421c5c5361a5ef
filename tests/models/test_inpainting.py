"""RePaint: steps and walk equal diffusers' RePaintScheduler; the known part is kept; resampling in closed form."""

import pytest
import torch
import torch.nn.functional as F

from models import ddim, ddpm, inpainting


def repaint(eta=0.0, n=1000, schedule=None):
    """diffusers' scheduler, its table in double precision as ours."""
    from diffusers import RePaintScheduler

    theirs = RePaintScheduler(1000, eta=eta, clip_sample=False)
    schedule = schedule or ddpm.Schedule(kind="cosine")
    theirs.alphas_cumprod = schedule.alpha_bar.double()
    theirs.betas = schedule.beta.double()
    theirs.set_timesteps(n)
    return theirs


def halves(batch=2):
    """A mask of 8 x 8 latents, True on the right."""
    mask = torch.zeros(batch, 1, 8, 8, dtype=torch.bool)
    mask[..., 4:] = True
    return mask


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("t", [899, 499, 99])
def test_step_equals_repaint_scheduler(parity, eta, t):
    """One step of ten, trailing; from 99 to the clean image the known part has no noise."""
    schedule = ddpm.Schedule(kind="cosine")
    schedule.sqrt_alpha_bar = schedule.alpha_bar.double().sqrt()
    schedule.sqrt_one_minus_alpha_bar = (1 - schedule.alpha_bar.double()).sqrt()
    xt, eps, z0 = torch.randn(3, 2, 4, 8, 8)
    noise = torch.randn(xt.shape, generator=torch.Generator().manual_seed(3))
    theirs = repaint(eta, 10, schedule).step(
        eps, t, xt, z0, (~halves()).float(), torch.Generator().manual_seed(3)
    )
    # at t = 99 the next step is the clean image, -1
    t_prev = t - 100
    args = (t, t_prev, "eps", eta, noise)
    unknown = inpainting.denoise(lambda xt, t: eps, schedule, xt, *args)
    known = inpainting.noise_to(schedule, z0, t_prev, noise)
    mine = inpainting.merge(halves(), unknown, known)
    names = f"inpainting.denoise, noise_to, merge, eta {eta:g}", "diffusers.RePaintScheduler.step"
    parity("Inpainting", *names, mine, theirs[0])


@pytest.mark.parametrize("n, jump, resamples", [(50, 5, 5), (50, 10, 10), (10, 3, 2), (7, 20, 4)])
def test_walk_equals_repaint_scheduler(parity, n, jump, resamples):
    theirs = repaint()
    theirs.set_timesteps(n, jump, resamples)
    expected = theirs.timesteps // (1000 // n)
    mine = torch.tensor(inpainting.resampling_levels(n, jump, resamples))
    names = "inpainting.resampling_levels", "diffusers.RePaintScheduler.set_timesteps"
    parity("Inpainting", *names, mine, expected)


def test_walk_by_hand():
    assert inpainting.resampling_levels(4, 2, 1) == [3, 2, 1, 0]
    # the last place from which one may jump is n - jump - 1: nothing is noised above the start
    assert inpainting.resampling_levels(5, 2, 2) == [4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0]


def test_undo_step_equals_repaint_scheduler(parity):
    schedule = ddpm.Schedule(kind="cosine")
    x = torch.randn(2, 4, 8, 8)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    theirs = repaint(schedule=schedule).undo_step(x, 500, torch.Generator().manual_seed(3))
    mine = inpainting.undo_step(schedule, x, 499, 500, noise)
    parity("Inpainting", "inpainting.undo_step", "RePaintScheduler.undo_step", mine, theirs)


def test_a_long_undo_step_is_many_short_ones():
    """Signal: the product of the roots; variance: what the short steps add up to. From the clean image, too."""
    schedule = ddpm.Schedule(kind="cosine")
    for start in (299, -1):
        x = torch.ones(1, 1, 1, 1)
        signal, variance = x, torch.zeros(1, 1, 1, 1)
        for t in range(start, 399):
            signal = inpainting.undo_step(schedule, signal, t, t + 1, torch.zeros(1))
            beta = float(schedule.beta[t + 1])
            variance = (1 - beta) * variance + beta
        long_signal = inpainting.undo_step(schedule, x, start, 399, torch.zeros(1))
        noisy = inpainting.undo_step(schedule, x, start, 399, torch.ones(1))
        torch.testing.assert_close(long_signal, signal)
        torch.testing.assert_close((noisy - long_signal) ** 2, variance)


def test_noise_to_is_the_forward_process_and_minus_one_is_clean():
    schedule = ddpm.Schedule(kind="cosine")
    z0, eps = torch.randn(2, 2, 4, 8, 8)
    expected = ddpm.add_noise(schedule, z0, torch.tensor([300, 300]), eps)
    torch.testing.assert_close(inpainting.noise_to(schedule, z0, 300, eps), expected)
    assert torch.equal(inpainting.noise_to(schedule, z0, -1, eps), z0)


def test_latent_mask_is_that_of_the_library_and_loses_no_thin_line():
    """diffusers takes the nearest pixel; a line between these is lost there."""
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 32:] = True
    nearest = F.interpolate(mask.float(), (16, 16)) > 0
    assert torch.equal(inpainting.latent_mask(mask, (16, 16)), nearest)
    mask.zero_()[..., 30] = True
    assert not F.interpolate(mask.float(), (16, 16)).any()
    found = inpainting.latent_mask(mask, (16, 16))
    assert found[..., 7].all() and found.sum() == 16


@pytest.mark.parametrize("resamples, eta", [(1, 0.0), (3, 0.0), (2, 1.0)])
def test_the_known_part_comes_back_exactly(resamples, eta):
    """Whatever the network says; and where the mask is True, the picture says nothing."""
    schedule = ddpm.Schedule(kind="cosine")
    z0, other, noise = torch.randn(3, 2, 4, 8, 8)
    mask = halves()
    other = torch.where(mask, other, z0)
    drawn = []
    for z in (z0, other):
        torch.manual_seed(5)
        args = (mask, noise, 10, 2, resamples, "eps", eta)
        drawn.append(ddim.last(inpainting.inpaint(lambda x, t: 0.9 * x, schedule, z, *args)))
        assert torch.equal(drawn[-1][~mask.expand_as(z)], z0[~mask.expand_as(z)])
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], z0)


def test_walk_yields_every_move_from_the_noise_on():
    schedule = ddpm.Schedule(kind="cosine")
    z0, noise = torch.randn(2, 1, 4, 8, 8)
    asked = []

    def network(xt, t):
        asked.append(int(t[0]))
        return xt

    chain = list(inpainting.inpaint(network, schedule, z0, halves(1), noise, 5, 2, 2, "eps"))
    assert torch.equal(chain[0], noise) and len(chain) == 14
    # trailing steps: 999, 799 ...; two steps again after each jump
    assert asked == [999, 799, 599, 799, 599, 399, 199, 399, 199]


def test_the_known_part_has_the_noise_of_the_step_that_was_reached():
    """Not that of the step before, and not none: a network trained on noise sees edges in a clean part."""
    schedule = ddpm.Schedule(kind="cosine")
    z0, noise = torch.full((1, 4, 64, 64), 2.0), torch.randn(1, 4, 64, 64)
    nothing = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    chain = list(inpainting.inpaint(lambda x, t: x, schedule, z0, nothing, noise, 4, 9, 1, "eps"))
    for xt, t in zip(chain[1:], (749, 499, 249), strict=False):
        alpha_bar = schedule.alpha_bar[t]
        assert float(xt.mean()) == pytest.approx(2 * float(alpha_bar.sqrt()), abs=0.05)
        assert float(xt.std()) == pytest.approx(float((1 - alpha_bar).sqrt()), abs=0.02)
    assert torch.equal(chain[-1], z0)


class Twins:
    """The best denoiser of two pixels that are equal, each N(0, 1): their mean is what it goes by."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, xt, t):
        alpha_bar = self.schedule.alpha_bar[t][:, None, None, None]
        x0 = alpha_bar.sqrt() * xt.sum(3, keepdim=True) / (1 + alpha_bar)
        return (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()


def test_resampling_brings_the_drawn_part_to_the_known_one():
    """The drawn pixel should equal the known one: its error falls."""
    schedule = ddpm.Schedule(kind="cosine")
    z0 = torch.randn(2000, 1, 1, 1).expand(-1, -1, 1, 2)
    mask = torch.tensor([[[[False, True]]]]).expand(2000, -1, -1, -1)
    noise = torch.randn(2000, 1, 1, 2)
    errors = []
    for resamples in (1, 3):
        args = (mask, noise, 20, 2, resamples, "eps")
        drawn = ddim.last(inpainting.inpaint(Twins(schedule), schedule, z0, *args))
        errors.append(float((drawn - z0)[..., 1].abs().mean()))
    assert errors[0] > 2 * errors[1] and errors[1] < 0.1, errors


def test_seam_and_pixel_error_by_hand():
    """A step of 20 at the border of the mask, of 100 elsewhere."""
    row = torch.tensor([0.0, 100.0, 120.0, 20.0]) / 127.5 - 1
    images = row.expand(1, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2:] = True
    assert float(inpainting.seam(images, mask)) == pytest.approx(20)
    assert float(inpainting.seam(images.mT, mask.mT)) == pytest.approx(20)
    assert inpainting.pixel_error(images, torch.full_like(images, -1), mask) == pytest.approx(70)
