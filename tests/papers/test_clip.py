"""papers/clip.py: the loss is the libraries', a batch in pieces is the whole batch, and names become a classifier."""

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import MultipleNegativesSymmetricRankingLoss
from torch import nn
from transformers import CLIPConfig, CLIPModel

from papers import clip, clip_evaluation, contrastive_loss
from rag import image_projection
from utils.run import UserError


def unit(n, d, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_loss_and_its_gradients_are_those_of_clip_model(parity):
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(text_config=small | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49},
                        vision_config=small | {"image_size": 8, "patch_size": 4}, projection_dim=12)  # fmt: skip
    model = CLIPModel(config).eval()
    ids = torch.randint(1, 48, (5, 6))
    found = model(input_ids=ids, pixel_values=torch.randn(5, 3, 8, 8), return_loss=True)
    z, t = found.image_embeds, found.text_embeds
    theirs = torch.autograd.grad(found.loss, [z, t, model.logit_scale], retain_graph=True)
    mine = contrastive_loss.clip_loss(z, t, model.logit_scale.exp())
    ours = torch.autograd.grad(mine, [z, t, model.logit_scale])
    parity("CLIP", "contrastive_loss.clip_loss", "transformers.CLIPModel", mine, found.loss)
    parity(
        "CLIP",
        "contrastive_loss.clip_loss gradients",
        "transformers.CLIPModel gradients",
        ours,
        theirs,
    )


class Given(nn.Module):
    """A sentence-transformer whose sentences are rows of a table."""

    def forward(self, features):
        return features


def test_the_loss_is_that_of_sentence_transformers(parity):
    # It makes unit vectors itself
    z, t = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    theirs = MultipleNegativesSymmetricRankingLoss(Given(), scale=14.0)
    found = theirs([{"sentence_embedding": t}, {"sentence_embedding": z}], None)
    mine = contrastive_loss.clip_loss(F.normalize(z, dim=-1), F.normalize(t, dim=-1), 14.0)
    parity(
        "CLIP",
        "contrastive_loss.clip_loss",
        "sentence-transformers MultipleNegativesSymmetricRankingLoss",
        mine,
        found,
    )
    parity("CLIP", "contrastive_loss.clip_loss gradients", "sentence-transformers gradients",
           torch.autograd.grad(mine, [z, t]), torch.autograd.grad(found, [z, t]))  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 4, 12])
def test_a_batch_in_pieces_is_the_whole_batch(chunk, parity):
    torch.manual_seed(0)
    towers = clip.Towers(torch.zeros(10), torch.ones(10), 7, 5, 0.07).eval()
    x, t = torch.randn(12, 10), torch.randn(12, 7)

    def gradients():
        found = {n: p.grad.clone() for n, p in towers.named_parameters()}
        towers.zero_grad()
        return found

    whole = contrastive_loss.clip_loss(
        towers.encode_image(x), towers.encode_text(t), towers.scale()
    )
    whole.backward()
    theirs = gradients()
    loss = contrastive_loss.cached_backward(
        (towers.encode_image, towers.encode_text), (x, t), towers.scale(), chunk
    )
    name = f"own contrastive_loss.clip_loss, the whole batch, pieces of {chunk}"
    parity("CLIP", "contrastive_loss.cached_backward", name, [loss, gradients()], [whole, theirs])


def test_pieces_on_their_own_are_another_loss():
    """What plain gradient accumulation does: fewer negatives. It is not the big batch."""
    z, t = unit(12, 8, 0), unit(12, 8, 1)
    pieces = [contrastive_loss.clip_loss(a, b, 10.0) for a, b in zip(z.split(4), t.split(4))]
    assert abs(torch.stack(pieces).mean() - contrastive_loss.clip_loss(z, t, 10.0)) > 0.3


def test_what_is_dropped_in_the_first_pass_is_dropped_in_the_second():
    torch.manual_seed(0)
    seen = []
    tower = nn.Linear(6, 4)

    def encode(x):
        x = F.dropout(x, 0.5)
        seen.append(x)
        return F.normalize(tower(x), dim=-1)

    before = torch.randn(8, 6)
    contrastive_loss.cached_backward(
        (encode, tower_text := nn.Linear(6, 4)), (before, before), torch.tensor(5.0), 4
    )
    assert tower_text.weight.grad is not None
    assert (
        torch.equal(seen[0], seen[2])
        and torch.equal(seen[1], seen[3])
        and not torch.equal(seen[0], seen[1])
    )


def test_the_scale_stops_at_a_hundred():
    towers = clip.Towers(torch.zeros(2), torch.ones(2), 2, 2, 0.001)
    assert towers.scale() == 100
    assert abs(clip.Towers(torch.zeros(2), torch.ones(2), 2, 2, 0.07).scale() - 1 / 0.07) < 1e-4


def test_recall_of_known_places():
    z = torch.eye(4)
    assert clip_evaluation.recall(z, z, (1,))["text finds picture"]["recall@1"] == 1
    t = torch.eye(4)[[1, 0, 2, 3]]
    found = clip_evaluation.recall(z, t, (1, 2))
    assert found["text finds picture"]["recall@1"] == found["picture finds text"]["recall@1"] == 0.5


def test_zero_shot_finds_the_class_of_its_sentences():
    names = ["apple", "pear"]
    encode = lambda texts: torch.stack([torch.eye(2)[int("pear" in t)] for t in texts])  # noqa: E731
    z = torch.eye(2)[[1, 0, 1]]
    assert clip_evaluation.zero_shot(z, names, encode).argmax(-1).tolist() == [1, 0, 1]


def test_it_learns_what_is_linear():
    torch.manual_seed(0)
    x = torch.randn(300, 20)
    t = F.normalize(F.pad(x @ torch.randn(20, 8), (0, 376)), dim=-1)
    cfg = clip.Config(steps=150, batch=128, width=16, lr=5e-3)
    towers, losses = clip.fit(x[:250], t[:250], cfg)
    with torch.no_grad():
        found = clip_evaluation.recall(towers.encode_image(x[250:]), towers.encode_text(t[250:]))
    assert losses[-1] < 0.5 * losses[0] and found["text finds picture"]["recall@5"] > 0.5


def test_the_reader_is_the_encoder_of_the_project():
    from utils import pretrained

    reader, texts = clip.Reader("cpu").eval(), ["red apple", "flag: japan"]
    theirs = pretrained.embed(texts, *pretrained.minilm())
    torch.testing.assert_close(reader(reader.ids(texts)), theirs, atol=1e-5, rtol=0)


def test_a_reader_learns_too():
    torch.manual_seed(0)
    reader = clip.Reader("cpu")
    before = reader.model.embeddings.word_embeddings.weight.detach().clone()
    ids = reader.ids(["red apple", "green pear", "dog", "cat"])
    clip.fit(torch.randn(4, 6), ids, clip.Config(steps=1, batch=4, width=4, chunk=2), reader)
    assert not torch.equal(reader.model.embeddings.word_embeddings.weight, before)


def test_the_retriever_of_pictures_reads_what_was_saved(tmp_path):
    torch.manual_seed(0)
    x, t = torch.randn(30, 1280), unit(30, 384)
    cfg = clip.Config(steps=3, batch=16)
    towers, _ = clip.fit(x, t, cfg)
    clip.save(towers, tmp_path, cfg)
    space = image_projection.load_space(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            image_projection.project(space, x), towers.encode_image(x), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            image_projection.project_text(space, t), towers.encode_text(t), atol=1e-6, rtol=0
        )


def test_a_space_of_another_tower_is_refused(tmp_path):
    towers, _ = clip.fit(
        torch.randn(9, 128), unit(9, 384), cfg := clip.Config(tower="mae", steps=1, batch=4)
    )
    clip.save(towers, tmp_path, cfg)
    with pytest.raises(UserError, match="mae"):
        image_projection.load_space(tmp_path)
    with pytest.raises(UserError):
        image_projection.load_space(tmp_path / "none")


@pytest.mark.parametrize(
    "flags", [{"steps": 0}, {"batch": 1}, {"temperature": 0}, {"chunk": -1}, {"lr": 0}]
)
def test_bad_flags(flags, tmp_path):
    with pytest.raises(UserError):
        clip.main(clip.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "flags, says",
    [({"temperature": float("inf")}, "--temperature"), ({"temperature": 1e-3}, "--temperature"),
     ({"batch": 100_000}, "--batch"), ({"lr": float("inf")}, "--lr")],
)  # fmt: skip
def test_what_would_fail_late_is_refused_early(tmp_path, flags, says):
    with pytest.raises(UserError, match=says):
        clip.main(clip.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_fifth_is_held_out():
    from utils import data

    out = clip.held_out(data.emoji(72)[1])
    assert int(out.sum()) == 413 and len(out) == 1913


def test_a_temperature_moves_only_if_it_may():
    torch.manual_seed(0)
    x, t = torch.randn(40, 16), torch.nn.functional.normalize(torch.randn(40, 384), dim=-1)
    for learns in (True, False):
        towers, _ = clip.fit(
            x, t, clip.Config(steps=3, batch=20, learn_temperature=learns), None, "train"
        )
        assert (abs(towers.scale().item() - 1 / clip.Config().temperature) > 1e-4) == learns
