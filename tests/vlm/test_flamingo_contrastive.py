"""vlm/flamingo_contrastive.py: CLIP's loss, what stands at <image>, which parts learn and what they learn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from tests import eyes
from tests.vlm.flamingo_classes import END, IMAGE, classes
from vlm import flamingo_contrastive, flamingo_model
from vlm.flamingo_data import PictureSet

ON = torch.device("cpu")


def tokenizer(text, add_special_tokens):
    """A word is one id; a line ends with 3."""
    ids = [3] if text == "\n" else [20 + int(word[-1]) for word in text.split()]
    return SimpleNamespace(input_ids=ids)


def flamingo(every=1):
    language = eyes.speaker()
    torch.manual_seed(2)
    return flamingo_model.Flamingo(
        language, [IMAGE, END], dim_in=16, every=every, latents=3, latent_width=12
    )


def test_the_loss_is_that_of_clip(parity):
    a, b = (F.normalize(torch.randn(9, 5), dim=-1) for _ in range(2))
    mine = flamingo_contrastive.symmetric_loss(a, b)
    theirs = image_text_contrastive_loss(b @ a.T / flamingo_contrastive.TEMPERATURE)
    parity(
        "Flamingo",
        "flamingo_contrastive.symmetric_loss",
        "transformers image_text_contrastive_loss",
        mine,
        theirs,
    )


def test_what_is_trained_is_what_enters_the_language_model_at_image():
    made = eyes.shake(flamingo(), 0.2)
    seen = []
    block = flamingo_model.decoder_layers(made.language)[0]
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = torch.randn(2, 4, 16)
    made.states(torch.tensor([[1, IMAGE, 7]] * 2), made.resample(features[:, None]))
    at_image = flamingo_contrastive.first_layer(
        made, features, made.get_parameter("new_embeddings.weight")[0]
    )
    torch.testing.assert_close(at_image, seen[0][:, 1])
    word = made.language.get_input_embeddings().weight[[7, 7]]
    torch.testing.assert_close(
        flamingo_contrastive.first_layer(made, features, word), seen[0][:, 2]
    )


def test_words_are_directions_from_their_mean():
    language = eyes.speaker()
    table = language.get_input_embeddings().weight
    space = flamingo_contrastive.WordSpace(language, tokenizer, np.arange(20, 60))
    torch.testing.assert_close(space.mean, table[20:60].mean(0))
    torch.testing.assert_close(space.radius, (table[20:60] - space.mean).norm(dim=1).mean())
    assert torch.equal(space.newline, table[3])
    found = space.names(tokenizer, ["w1 w2", "w5"])
    wanted = torch.stack([table[[21, 22]].mean(0), table[25]]) - space.mean
    torch.testing.assert_close(found, F.normalize(wanted, dim=-1))


def parts_of_loss(made, space, one, other, names, words):
    """The four terms, written out again."""
    image = made.new_embeddings.weight[0]
    a, b = (flamingo_contrastive.first_layer(made, x, image) - space.mean for x in (one, other))
    ua, ub = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    loss = flamingo_contrastive.symmetric_loss
    change = flamingo_contrastive.first_layer(made, one[: len(words)], words) - words
    far = torch.cat([a, b]).norm(dim=1) / space.radius
    return loss(ua, ub), (loss(ua, names) + loss(ub, names)) / 2, ((far - 1) ** 2).mean(), change


def test_the_loss_has_its_four_terms():
    made = eyes.shake(flamingo(), 0.2)
    space = flamingo_contrastive.WordSpace(made.language, tokenizer, np.arange(20, 60))
    one, other = torch.randn(2, 6, 4, 16)
    names = space.names(tokenizer, [f"w{i}" for i in range(6)])
    words = space.table[[30, 31, 32]]
    views, with_names, length, change = parts_of_loss(made, space, one, other, names, words)
    wanted = views + with_names + length + 0.1 * (change**2).sum(-1).mean()
    torch.testing.assert_close(
        flamingo_contrastive.loss(made, one, other, names, space, words), wanted
    )


@pytest.fixture(scope="module")
def trained():
    """Twelve classes whose pictures have a direction in common: 60 steps -> model, parameters before, losses, space,
    pictures, names."""
    torch.manual_seed(5)
    made = flamingo()
    before = {k: p.detach().clone() for k, p in made.named_parameters()}
    known = classes(count=12, each=4)
    kinds = torch.arange(48) % 12
    features = torch.randn(12, 1, 16)[kinds] + 0.3 * torch.randn(48, 4, 16)
    pictures = PictureSet(features, known)
    space = flamingo_contrastive.WordSpace(made.language, tokenizer, np.arange(20, 60))
    names = F.normalize(torch.randn(12, 24), dim=-1)
    cfg = SimpleNamespace(contrastive_steps=60, contrastive_batch=12, lr=3e-3, seed=0)
    losses = list(flamingo_contrastive.train(made, pictures, space, names, cfg, ON))
    return made, before, losses, space, pictures, names


def test_only_the_first_layer_the_resampler_and_the_new_words_learn(trained):
    made, before, *_ = trained
    moved = {k for k, p in made.named_parameters() if not torch.equal(p, before[k])}
    heads = {".".join(k.split(".")[:2]) for k in moved if k.startswith("cross")}
    assert heads == {"cross.0"} and any(k.startswith("resampler") for k in moved)
    assert "new_embeddings.weight" in moved and not any(k.startswith("language") for k in moved)
    assert made.gates()[:, 0].abs().min() > 0 and made.gates()[:, 1].abs().max() == 0


def test_two_pictures_of_a_class_become_one_word_near_its_name(trained):
    made, _, losses, space, pictures, names = trained
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5]) and len(losses) == 60
    with torch.no_grad():
        found = flamingo_contrastive.first_layer(
            made, pictures.features, made.new_embeddings.weight[0]
        )
    found = F.normalize(found - space.mean, dim=-1)
    kinds = torch.arange(48) % 12
    like = found @ found.T - 2 * torch.eye(48)
    assert float((kinds[like.argmax(1)] == kinds).float().mean()) > 0.9
    assert float(((found @ names.T).argmax(1) == kinds).float().mean()) > 0.8


def test_new_words_begin_as_the_mean_word_and_the_end_of_a_line():
    made = flamingo()
    space = flamingo_contrastive.WordSpace(made.language, tokenizer, np.arange(20, 60))
    cfg = SimpleNamespace(contrastive_steps=1, contrastive_batch=12, lr=1e-9, seed=0)
    pictures = PictureSet(torch.randn(48, 4, 16), classes(count=12, each=4))
    list(flamingo_contrastive.train(made, pictures, space, torch.randn(12, 24), cfg, ON))
    wanted = torch.stack([space.mean, space.newline])
    torch.testing.assert_close(made.get_parameter("new_embeddings.weight").detach(), wanted)
