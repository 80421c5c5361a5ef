"""Text augmentation, time steps, EMA and pooled text reach the training of the text-to-image model."""

import copy

import pytest
import torch
from torch import nn

from models import ddpm, stable_diffuser
from models.text_augmentation import augment_text, draw_augmentation
from utils import checkpoint


def test_noise_is_added_and_words_are_hidden():
    words = torch.randn(2, 4, 3)
    noise = torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    dropped = torch.tensor([[False, True, False, False], [False, False, False, True]])
    new, left = augment_text(words, mask, noise, dropped)
    torch.testing.assert_close(new, words + noise)
    assert left.tolist() == [[True, False, True, False], [True, True, False, False]]


def test_first_token_always_stays():
    """A caption of no words at all would be an average of nothing."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    _, left = augment_text(torch.zeros(2, 3, 1), mask, 0, torch.ones(2, 3, dtype=torch.bool))
    assert left.tolist() == [[True, False, False]] * 2
    assert mask.all()


def test_strength_is_one_number_a_caption():
    torch.manual_seed(0)
    words = torch.zeros(4000, 5, 16)
    noise, dropped = draw_augmentation(words, 2.0, 0.5, 0.1)
    assert noise.std() == pytest.approx(1.0, rel=0.05)
    # of one caption: within a normal distribution; between them: strengths are normal, too
    strength = noise.flatten(1).std(1)
    assert strength.min() < 0.02 and strength.max() > 2
    halves = noise[:, :, :8].flatten(1).std(1) / noise[:, :, 8:].flatten(1).std(1)
    assert halves.median() == pytest.approx(1, abs=0.05)
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.01)


def test_without_noise_and_dropout_nothing_changes():
    words = torch.randn(3, 4, 2)
    mask = torch.tensor([[True, True, False, False]] * 3)
    new, left = augment_text(words, mask, *draw_augmentation(words, 1.0, 0.0, 0.0))
    assert new.equal(words) and left.equal(mask)


class Recorder(nn.Module):
    """A network that notes what it is asked."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.asked = []

    def forward(self, zt, t, words, mask):
        self.asked.append((t, words, mask))
        return zt * self.weight


def trained(**flags):
    """What a network was asked in a training of 40 steps; and its EMA."""
    torch.manual_seed(0)
    model = Recorder()
    ema = copy.deepcopy(model).requires_grad_(False)
    words = torch.arange(12.0)[:, None, None].expand(12, 7, 24)
    every = torch.ones(12, 7, dtype=torch.bool)
    empty = torch.full((1, 7, 24), -1.0), every[:1]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = ddpm.Schedule(kind="cosine")
    cfg = stable_diffuser.Config(**(dict(steps=40, batch=4, drop_text=0.0) | flags))
    parts = (torch.randn(12, 4, 8, 8), words, every, empty, cfg)
    list(stable_diffuser.train(model, ema, optimizer, schedule, *parts))
    t, seen, mask = (torch.cat(x) for x in zip(*model.asked, strict=True))
    return t, seen, mask, model, ema


def test_captions_come_a_little_different():
    """In units of the spread of the words, here that of the numbers 0 to 11."""
    _, words, mask, *_ = trained(text_noise=0.5, word_dropout=0.25)
    spread = torch.arange(12.0).repeat_interleave(7 * 24).std()
    # words of one caption are one number here
    assert words.std((1, 2)).square().mean().sqrt() / spread == pytest.approx(0.5, rel=0.25)
    assert 1 - mask[:, 1:].float().mean() == pytest.approx(0.25, abs=0.05)
    assert mask[:, 0].all()
    _, words, mask, *_ = trained(text_noise=0.0, word_dropout=0.0)
    assert (words.std((1, 2)) == 0).all() and mask.all()


def test_empty_caption_has_no_noise():
    """What guidance asks for is the empty caption itself."""
    _, words, mask, *_ = trained(drop_text=0.5, text_noise=0.5, word_dropout=0.5)
    hidden = (words == -1).all((1, 2))
    assert hidden.float().mean() == pytest.approx(0.5, abs=0.15)
    assert mask[hidden].all()


def test_time_steps_have_the_distribution_of_the_flag():
    middle = {}
    for times in ("uniform", "logit-normal"):
        t = trained(times=times, steps=200)[0].float() / 1000
        middle[times] = ((t > 0.25) & (t < 0.75)).float().mean()
    assert middle["uniform"] == pytest.approx(0.5, abs=0.05)
    # the sigmoid of a standard normal: 0.728
    assert middle["logit-normal"] == pytest.approx(0.728, abs=0.05)


def test_decay_of_the_ema_is_the_flag():
    """The EMA forgets its start in the first steps, and keeps up with the weights if its decay is 0."""
    *_, model, ema = trained(ema=0.0)
    assert ema.weight.equal(model.weight)
    *_, model, ema = trained(ema=0.9)
    assert not ema.weight.equal(model.weight)


@pytest.mark.parametrize("pooled", [True, False])
def test_pooled_text_is_written_and_read(tmp_path, pooled):
    """Files without the word in them are of networks without pooled text."""
    model = stable_diffuser.build((32,), 2, pooled)
    assert (model.text_embedding is not None) == pooled
    meta = {"channels": [32], "latent": 2} | ({"pooled_text": True} if pooled else {})
    checkpoint.write(tmp_path / "model.safetensors", model.state_dict(), meta)
    again = stable_diffuser.load(tmp_path / "model.safetensors")
    assert (again.text_embedding is not None) == pooled
