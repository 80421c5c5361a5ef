"""Consistency distillation: the exact function of a Gaussian, what is asked in training, sampling in few calls."""

import math

import pytest
import torch

from models import ddim, ddpm, distill, gaussian_ode
from tests.models.test_ddpm import OneWeight
from utils import data

TOPIC = "Consistency distillation"


def lam_of(schedule, t):
    """lambda of one step; -1 is the clean image."""
    if t < 0:
        return math.inf
    return float((schedule.sqrt_alpha_bar[t] / schedule.sqrt_one_minus_alpha_bar[t]).log())


class Oracle:
    """The eps that makes `consistency` exact for Gaussian data: of a point of a path the path's end."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, xt, t):
        lam = lam_of(self.schedule, int(t[0]))
        x0 = gaussian_ode.exact(xt, lam, math.inf)
        alpha = self.schedule.sqrt_alpha_bar[t[0]]
        sigma = self.schedule.sqrt_one_minus_alpha_bar[t[0]]
        return (xt - alpha * x0) / sigma


class Denoiser(Oracle):
    """The eps of the best denoiser of the same data: the teacher."""

    def __call__(self, xt, t):
        lam = lam_of(self.schedule, int(t[0]))
        alpha = self.schedule.sqrt_alpha_bar[t[0]]
        sigma = self.schedule.sqrt_one_minus_alpha_bar[t[0]]
        return (xt - alpha * gaussian_ode.denoise(xt, lam)) / sigma


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_consistency_at_the_clean_image_is_the_image(predict):
    """The boundary condition, whatever the network says."""
    xt = torch.randn(3, 1, 4, 4)
    t = torch.tensor([-1, -1, 700])
    found = distill.consistency(OneWeight(), ddpm.Schedule(), xt, t, predict)
    assert torch.equal(found[:2], xt[:2]) and not torch.equal(found[2], xt[2])


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_consistency_is_the_data_prediction(parity, predict):
    """With the meaning of each kind of answer as diffusers reads it."""
    import diffusers

    kinds = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    theirs = diffusers.DDPMScheduler(1000, prediction_type=kinds[predict], clip_sample=False)
    xt = torch.randn(2, 1, 4, 4)
    t = torch.tensor([300, 300])
    mine = distill.consistency(OneWeight(0.7), ddpm.Schedule(), xt, t, predict)
    output = torch.full_like(xt, 0.7)
    other = theirs.step(output, 300, xt).pred_original_sample
    counterpart = "diffusers pred_original_sample"
    parity(TOPIC, f"distill.consistency, {predict}", counterpart, mine, other)


def test_teacher_step(parity):
    """A step of diffusers' DDIM, each image at a level of its own."""
    import diffusers

    theirs = diffusers.DDIMScheduler(1000, timestep_spacing="trailing", set_alpha_to_one=True)
    theirs.set_timesteps(4)
    model = ddpm.build((8,), 1).eval()
    xt = torch.randn(4, 1, 28, 28)
    grid = torch.tensor([999, 749, 499, 249, -1])
    t, s = grid[:-1], grid[1:]
    mine = distill.teacher_step(model, ddpm.Schedule(), xt, t, s)
    with torch.no_grad():
        output = model(xt, t)
    other = []
    for x, y, time in zip(xt, output, t):
        found = theirs.step(y[None], int(time), x[None], use_clipped_model_output=True)
        other.append(found.prev_sample[0])
    other = torch.stack(other)
    counterpart = "diffusers.DDIMScheduler.step"
    parity(TOPIC, "distill.teacher_step", counterpart, mine, other, atol=1e-4)


@pytest.mark.parametrize("apart", [1e-4, 1.0])
def test_pseudo_huber(parity, apart):
    """Of images that are far apart, and so near that it is a square: there c counts."""
    b = torch.randn(5, 1, 28, 28)
    a = (b + apart * torch.randn_like(b)).requires_grad_()
    c = 0.00054 * 28
    mine = distill.pseudo_huber(a, b)
    # torch's smooth function of one number, of the norm: sqrt(d^2 + c^2) - c
    other = torch.stack([torch.hypot((x - y).norm(), torch.tensor(c)) - c for x, y in zip(a, b)])
    slopes = [torch.autograd.grad(y, a)[0] for y in (mine, other.mean())]
    both = [mine, slopes[0]], [other.mean(), slopes[1]]
    parity(TOPIC, "distill.pseudo_huber, gradient", "torch.hypot of torch.norm", *both)
    assert distill.pseudo_huber(b, b) < 1e-8


def test_the_exact_consistency_function_has_no_loss_under_exact_steps():
    """Two points of one path: the loss is zero; of the teacher's Euler steps it is small if they are."""
    schedule = ddpm.Schedule()
    oracle = Oracle(schedule)
    teacher = Denoiser(schedule)
    x0 = gaussian_ode.MEAN + gaussian_ode.STD * torch.randn(200, 1, 2, 2)
    values = []
    for s in (599, 300):
        t = torch.full((200,), 600)
        xt = ddpm.add_noise(schedule, x0, t, torch.randn_like(x0))
        exact = gaussian_ode.exact(xt, lam_of(schedule, 600), lam_of(schedule, s)).float()
        below = torch.full((200,), s)
        assert distill.loss(oracle, oracle, schedule, xt, t, exact, below) < 1e-4
        euler = distill.teacher_step(teacher, schedule, xt, t, below)
        values.append(float(distill.loss(oracle, oracle, schedule, xt, t, euler, below)))
    assert values[0] < 0.02 < values[1]


def test_loss_trains_the_student_alone():
    """No gradient reaches the target network, and the target is asked at xs and s."""
    student = OneWeight(0.5)
    target = OneWeight(0.2)
    xt = torch.randn(2, 1, 4, 4)
    xs = torch.randn(2, 1, 4, 4)
    t, s = torch.tensor([900, 500]), torch.tensor([500, -1])
    schedule = ddpm.Schedule()
    value = distill.loss(student, target, schedule, xt, t, xs, s, "x0")
    value.backward()
    assert student.weight.grad is not None and target.weight.grad is None
    goal = torch.stack([torch.full((1, 4, 4), 0.2), xs[1]])
    expected = distill.pseudo_huber(torch.full_like(xt, 0.5), goal)
    assert value.item() == pytest.approx(float(expected), rel=1e-4)


def test_training_by_hand():
    """Student at 1, target at 0: gradient, clipping, rate and EMA of every step; the teacher stays as it was."""
    cfg = distill.Config(steps=5, batch=4, levels=1, lr=0.2, ema=0.15)
    white = torch.full((8, 1, 4, 4), 255, dtype=torch.uint8)
    student, target = OneWeight(-0.5), OneWeight(-0.5).requires_grad_(False)
    teacher = OneWeight(0.25).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=123.0)
    schedule = ddpm.Schedule()
    steps = distill.train(student, target, teacher, optimizer, schedule, white, cfg, "x0")
    weight = average = -0.5
    for i, value in enumerate(steps):
        # with one level the teacher's step ends in its answer, 0.25: the clean image, no network of the target
        c = 0.00054 * 4
        distance = 4 * abs(weight - 0.25)
        assert value == pytest.approx(math.hypot(distance, c) - c, rel=1e-3)
        # the gradient is 4 towards it, cut at 1
        weight += distill.learning_rate(cfg, i) if weight < 0.25 else -distill.learning_rate(cfg, i)
        decay = min(0.15, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * weight
        assert student.weight.item() == pytest.approx(weight, rel=1e-4)
        assert target.weight.item() == pytest.approx(average, rel=1e-4)
    assert teacher.weight.item() == 0.25


def test_learning_rate():
    cfg = distill.Config(steps=100, lr=2.0)
    assert distill.learning_rate(cfg, 0) == pytest.approx(0.1)
    assert distill.learning_rate(cfg, 50) == pytest.approx(1.0)
    assert distill.learning_rate(cfg, 99) == pytest.approx(0.02)


def test_training_asks_teacher_and_target_where_it_should():
    """The teacher and the student at xt, the target at what the teacher made of it, one level on."""
    asked = {}

    class Listening(OneWeight):
        def __init__(self, name):
            super().__init__(0.3)
            self.name = name

        def forward(self, xt, t):
            asked.setdefault(self.name, []).append((xt.detach().clone(), t))
            return super().forward(xt)

    student, target, teacher = (Listening(name) for name in ("student", "target", "teacher"))
    cfg = distill.Config(steps=6, batch=16, levels=4)
    images = data.mnist("test")[0][:32]
    optimizer = torch.optim.SGD(student.parameters())
    schedule = ddpm.Schedule()
    target.requires_grad_(False)
    list(distill.train(student, target, teacher, optimizer, schedule, images, cfg, "x0"))
    below = {999: 749, 749: 499, 499: 249, 249: 0}
    levels = set()
    for (x, t), (y, u), (z, s) in zip(asked["teacher"], asked["student"], asked["target"]):
        assert torch.equal(x, y) and torch.equal(t, u)
        assert [below[int(a)] for a in t] == s.tolist()
        levels |= set(t.tolist())
        s = torch.where(t == 249, -1, s)
        expected = distill.teacher_step(OneWeight(0.3), schedule, x, t, s, "x0")
        torch.testing.assert_close(z, expected, atol=0.01, rtol=0.01)
        # and xt is a digit with the noise of its level: at 249 mostly black
        assert x.shape == (16, 1, 28, 28)
    assert levels == {999, 749, 499, 249} and len(asked["teacher"]) == 6


def test_sample_in_few_calls():
    """The answer; then noise again, to the level of the next call, and the answer to that."""
    schedule = ddpm.Schedule()
    asked = []

    def model(xt, t):
        asked.append((xt, int(t[0])))
        return torch.full_like(xt, 0.1 * len(asked) if len(asked) < 3 else 7.0)

    noise = torch.randn(200, 1, 4, 4)
    chain = list(distill.sample(model, schedule, noise, 3, "x0"))
    assert [t for _, t in asked] == ddim.timesteps(schedule, 3).tolist()
    assert torch.equal(asked[0][0], noise) and torch.equal(chain[0], noise)
    assert [round(float(x.mean()), 3) for x in chain[1:]] == [0.1, 0.2, 1.0]  # clipped
    for (xt, t), before in zip(asked[1:], (0.1, 0.2)):
        mean = schedule.sqrt_alpha_bar[t] * before
        assert float(xt.mean()) == pytest.approx(float(mean), abs=0.06)
        assert float(xt.std()) == pytest.approx(
            float(schedule.sqrt_one_minus_alpha_bar[t]), abs=0.06
        )
        # new noise each time
        assert abs(float(torch.corrcoef(torch.stack([xt.flatten(), noise.flatten()]))[0, 1])) < 0.1
    free = ddim.last(distill.sample(model, schedule, noise, 1, "x0", clip=False))
    assert float(free.mean()) == pytest.approx(7.0)


def test_sampling_a_gaussian_gives_it_back():
    """The exact function, in one call and in four: mean and deviation of the data."""
    schedule = ddpm.Schedule()
    noise = torch.randn(4000, 1, 1, 1)
    for n in (1, 4):
        x = ddim.last(distill.sample(Oracle(schedule), schedule, noise, n, clip=False))
        assert float(x.mean()) == pytest.approx(gaussian_ode.MEAN, abs=0.03)
        assert float(x.std()) == pytest.approx(gaussian_ode.STD, rel=0.04)
