"""The wiring of papers/: which photos teach and which are judged, which weights, labels, flags and features go where.

The equations are proven in test_vit, test_mae and test_clip. Here the parts are replaced by ones that write down what
they were given, so that no test needs a training.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from papers import (
    attention_rollout,
    clip,
    clip_evaluation,
    contrastive_loss,
    mae,
    mae_claims,
    mae_evaluation,
    mae_figures,
    photos,
    vit,
)
from utils import data

KINDS = 14


def fruit_of(size=32):
    """28 photos, each of one grey that tells its number; the first half teaches, kinds 0 to 13 in both halves."""
    grey = torch.arange(2 * KINDS, dtype=torch.uint8)[:, None, None, None] * 8
    fine = torch.arange(2 * KINDS) % KINDS
    split = ["train"] * 10 + ["val"] * 4 + ["test"] * KINDS
    names = [f"kind {k}" for k in range(KINDS)]
    groups = [f"group {g}" for g in range(5)]
    return data.Groceries(
        grey.expand(-1, 3, size, size).contiguous(), fine % 5, fine, split, groups, names
    )


def numbers(images):
    """Which photos these are, of uint8 or float images."""
    x = images if images.dtype == torch.uint8 else data.to_uint8(images)
    return (x[:, 0, 0, 0] // 8).tolist()


LEARN, JUDGE = list(range(KINDS)), list(range(KINDS, 2 * KINDS))


@pytest.fixture
def fruit(monkeypatch):
    """The fake photos, wherever a script asks for them; nothing is drawn."""
    found = fruit_of()
    monkeypatch.setattr(data, "groceries", lambda size=224: fruit_of(max(32, size)))
    for name in ("curves", "rows", "bars"):
        monkeypatch.setattr(f"utils.figures.{name}", lambda *_, **__: None)
    return found


# --- photos


def test_split_and_majority_and_groups(fruit):
    learn, judge = photos.split(fruit)
    assert learn.tolist() == LEARN and judge.tolist() == JUDGE
    # 3 is learned; 5 would be hindsight
    skewed = fruit._replace(fine=torch.tensor([3] * 14 + [5] * 10 + [3] * 4))
    assert photos.majority(skewed, learn, judge)["14 kinds"] == pytest.approx(4 / KINDS)
    right = F.one_hot(fruit.fine[judge], KINDS) * 9.0
    assert photos.accuracies(right, fruit, judge) == {"14 kinds": 1.0, "5 groups": 1.0}
    assert photos.accuracies(right.roll(1, 0), fruit, judge)["14 kinds"] == 0


def test_a_probe_learns_from_those_it_may_learn_from(fruit, monkeypatch):
    learn, judge = photos.split(fruit)
    asked = []

    def probe(x, y, learn, judge):
        asked.append((y.tolist(), learn.tolist(), judge.tolist()))
        return F.one_hot(y[judge], KINDS)

    monkeypatch.setattr(photos, "probe", probe)
    assert photos.probed(torch.zeros(28, 2), fruit, learn, judge) == {
        "14 kinds": 1.0,
        "5 groups": 1.0,
    }
    assert asked == [(fruit.fine.tolist(), LEARN, JUDGE), (fruit.coarse.tolist(), LEARN, JUDGE)]


def test_probe_standardises_by_those_it_learns_from():
    """A feature whose scale differs between the halves; the answer follows from the first half's scale alone."""
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    y = (x[:, 0] > 0).long()
    shifted = x * torch.tensor([1e3, 1, 1]) + torch.tensor([5e3, 0, 0])
    learn, judge = torch.arange(40), torch.arange(40, 60)
    torch.manual_seed(1)
    plain = photos.probe(x, y, learn, judge)
    torch.manual_seed(1)
    moved = photos.probe(shifted, y, learn, judge)
    torch.testing.assert_close(plain, moved, atol=0.05, rtol=0.01)
    assert (moved.argmax(-1) == y[judge]).float().mean() > 0.9


# --- vit


def recorded_training(monkeypatch, module, losses=2):
    """Replace `module.train`; the list that comes back holds (images, labels, flags, weights at the start) of each."""
    seen: list[Any] = []

    def train(model, images, *rest):
        labels, cfg = rest if len(rest) == 2 else (None, rest[0])
        start = {k: v.detach().clone() for k, v in model.state_dict().items()}
        seen.append(
            {"images": images, "labels": labels, "cfg": cfg, "start": start, "model": model}
        )
        yield from [1.0] * losses

    monkeypatch.setattr(module, "train", train)
    return seen


@pytest.fixture
def vit_run(fruit, monkeypatch, tmp_path):
    """What vit.main gave to its parts."""
    made: dict[str, Any] = {
        "trained": recorded_training(monkeypatch, vit),
        "judged": [],
        "looked": [],
    }

    def predict(model, images, size):
        made["judged"].append((model, numbers(images), size, model.training))
        return F.one_hot(torch.arange(KINDS), KINDS).float() * 9

    def rollout_map(model, x):
        made["looked"].append(model)
        return torch.zeros(len(x), 8, 8)

    monkeypatch.setattr(vit, "predict", predict)
    monkeypatch.setattr(vit, "rollout_map", rollout_map)
    monkeypatch.setattr(
        vit, "draw", lambda path, images, seen: made.update(shown=numbers(images), seen=seen)
    )
    made["metrics"] = vit.main(vit.Config(out=str(tmp_path / "out"), steps=2))
    return made


def test_vit_learns_from_one_half_and_is_judged_by_the_other(vit_run):
    assert len(vit_run["trained"]) == len(vit_run["judged"]) == len(vit_run["looked"]) == 4
    for run_ in vit_run["trained"]:
        assert numbers(run_["images"]) == LEARN and run_["labels"].tolist() == list(range(KINDS))
    for trained, looked, (model, judged, size, training) in zip(
        vit_run["trained"], vit_run["looked"], vit_run["judged"]
    ):
        assert (
            model is trained["model"] is looked and judged == JUDGE and size == 64 and not training
        )
    assert set(vit_run["shown"]) <= set(JUDGE)
    assert vit_run["metrics"]["cls from MAE"] == {"14 kinds": 1.0, "5 groups": 1.0}


def test_vit_begins_from_nothing_or_from_the_weights_of_the_mae(vit_run):
    names = ["cls from nothing", "mean from nothing", "cls from MAE", "mean from MAE"]
    assert list(vit_run["seen"]) == names
    starts = [x["start"]["blocks.0.attention.qkv.weight"] for x in vit_run["trained"]]
    weights = vit.checkpoint.read(vit.WEIGHTS)[0]["blocks.0.attention.qkv.weight"].float()
    # The same seed
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], weights)
    assert torch.equal(starts[2], weights) and torch.equal(starts[3], weights)
    assert [x["model"].pool for x in vit_run["trained"]] == ["cls", "mean", "cls", "mean"]
    assert all((x["start"]["head.weight"] == 0).all() for x in vit_run["trained"])


class Watched(torch.nn.Module):
    """Writes down what it is shown; its answer depends on one number, so that it can be trained."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(KINDS))
        self.shown = []

    def forward(self, x, ratio=None, noise=None):
        self.shown.append(x.detach())
        return self.bias.expand(len(x), -1)


def paces(monkeypatch):
    """The learning rates that AdamW steps with."""
    rates, step = [], torch.optim.AdamW.step

    def watched(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return rates


def test_vit_train_pairs_photo_and_label_crops_and_paces(fruit, monkeypatch):
    model, asked, right = Watched(), [], []
    whole = photos.crops
    monkeypatch.setattr(
        photos,
        "crops",
        lambda x, size, smallest: (asked.append(smallest), whole(x, size, smallest))[1],
    )
    loss = F.cross_entropy
    monkeypatch.setattr(
        vit.F, "cross_entropy", lambda x, y, **k: (right.append((y, k)), loss(x, y, **k))[1]
    )
    rates = paces(monkeypatch)
    list(vit.train(model, fruit.images, fruit.fine, vit.Config(steps=8, batch=6, image_size=16)))
    assert asked == [0.35] * 8 and model.training
    for x, (y, options) in zip(model.shown, right):
        assert x.shape == (6, 3, 16, 16) and options == {"label_smoothing": 0.1}
        assert [n % KINDS for n in numbers(x)] == y.tolist()  # a crop of one grey is that grey
    assert (
        max(rates) == pytest.approx(1e-3, rel=0.1)
        and rates[0] < 1e-4
        and rates[-1] < 0.2 * max(rates)
    )


def test_vit_predict_shows_the_whole_photo_and_its_mirror():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    model = Watched()
    vit.predict(model, images, 16)
    expected = F.interpolate(data.to_float(images), size=(16, 16), mode="area")
    torch.testing.assert_close(model.shown[0], expected)
    torch.testing.assert_close(model.shown[1], expected.flip(-1))
    model.forward = lambda x: x.flatten(1)[:, :KINDS]  # type: ignore[method-assign]
    both = (expected.flatten(1) + expected.flip(-1).flatten(1))[:, :KINDS]
    torch.testing.assert_close(vit.predict(model, images, 16), both)


def test_rollout_multiplies_later_blocks_from_the_left():
    """Block 1: token 1 reads token 0. Block 2: token 2 reads token 1. So token 2 has heard of token 0, by half of a
    half; multiplied the other way it has not."""
    eye = torch.eye(3)
    first, second = eye.clone(), eye.clone()
    first[1], second[2] = eye[0], eye[1]
    total = attention_rollout.rollout(torch.stack([first, second])[None, :, None])[0]
    assert total[2].tolist() == [0.25, 0.25, 0.5] and total[1].tolist() == [0.5, 0.5, 0]


def test_rollout_takes_the_mean_of_the_heads():
    maps = torch.stack([torch.eye(2), torch.eye(2).flip(0)])[None, None]  # (1, 1, two heads, 2, 2)
    assert attention_rollout.rollout(maps)[0].tolist() == [[0.75, 0.25], [0.25, 0.75]]


# --- mae


def test_nothing_hidden_is_a_loss_of_zero():
    model = mae.MAE(16, 4, width=32, depth=1, heads=4, decoder=(16, 1, 2))
    loss, pred, mask = model(torch.randn(2, 3, 16, 16), 0)
    assert loss == 0 and pred.isfinite().all() and mask.sum() == 0


def test_build_reads_every_flag():
    plain, other = mae.build(16, 8), mae.build(32, 4, decoder="heavy", norm_pix=True)
    assert not plain.norm_pix and other.norm_pix and other.grid == (8, 8) and other.patch == 4
    assert plain.mask_token.shape[-1] == 64 and len(plain.decoder_blocks) == 2
    assert other.mask_token.shape[-1] == 128 and len(other.decoder_blocks) == 6


class Draws(torch.nn.Module):
    """In place of an MAE: writes down the photos and the ratio."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))
        self.fixed = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.shown = []

    def forward(self, x, ratio=0.75, noise=None):
        self.shown.append((x, ratio))
        return (self.w * x.mean()).square(), None, None


def test_mae_train_crops_hides_what_is_asked_and_paces(fruit, monkeypatch):
    model, rates = Draws(), paces(monkeypatch)
    whole, asked = photos.crops, []
    monkeypatch.setattr(photos, "crops", lambda x, size: (asked.append(size), whole(x, size))[1])
    list(mae.train(model, fruit.images, mae.Config(steps=10, batch=6, image_size=16, ratio=0.4)))
    assert asked == [16] * 10 and all(
        r == 0.4 and x.shape == (6, 3, 16, 16) for x, r in model.shown
    )
    # Drawn by lot from all of them
    assert len({n for x, _ in model.shown for n in numbers(x)}) > 10
    assert (
        max(rates) == pytest.approx(2e-3, rel=0.1)
        and rates[0] < 2e-4
        and rates[-1] < 0.2 * max(rates)
    )


@pytest.fixture
def tuning(fruit, monkeypatch):
    """mae_evaluation.fine_tune with recorded parts: (start of the training, what was judged)."""
    trained, judged = recorded_training(monkeypatch, vit, losses=3), []

    def predict(model, images, size):
        judged.append((model, numbers(images), size))
        return F.one_hot(torch.arange(KINDS), KINDS).float() * 9

    monkeypatch.setattr(vit, "predict", predict)
    return trained, judged


def test_fine_tuning_begins_from_the_encoder_and_the_other_from_nothing(fruit, tuning):
    trained, judged = tuning
    learn, judge = photos.split(fruit)
    encoder, cfg = mae.build(64, 8), mae.Config(tune=3)
    with torch.no_grad():
        encoder.embed.projection.weight.fill_(0.5)
    row = mae_evaluation.fine_tune(encoder.state_dict(), cfg, fruit, learn, judge)
    mae_evaluation.fine_tune(None, cfg, fruit, learn, judge)
    weights = [x["start"]["embed.projection.weight"] for x in trained]
    assert (weights[0] == 0.5).all() and (weights[1] != 0.5).all()
    assert torch.equal(trained[0]["start"]["position"], encoder.position)
    for x, (model, photos_, size) in zip(trained, judged):
        assert numbers(x["images"]) == LEARN and x["labels"].tolist() == list(range(KINDS))
        assert (
            photos_ == JUDGE
            and size == 64
            and model is x["model"]
            and model.pool == "mean"
            and not model.training
        )
        assert x["cfg"].steps == 3 and x["cfg"].image_size == 64
    assert row == {"14 kinds": 1.0, "5 groups": 1.0}


def test_every_row_is_of_the_encoder_that_it_names(fruit, monkeypatch):
    encoder, cfg = mae.build(64, 8), mae.Config(tune=1)
    asked, starts = {}, {}
    learn, judge = photos.split(fruit)
    monkeypatch.setattr(photos, "imagenet", lambda images, device: torch.full((28, 2), 7.0))
    monkeypatch.setattr(
        mae_evaluation,
        "features",
        lambda model, images, size: torch.full((28, 2), float(model is encoder)),
    )

    def probed(x, fruit, learn, judge):
        assert learn.tolist() == LEARN and judge.tolist() == JUDGE
        return x

    def tuned(start, *_):
        starts[len(starts)] = start
        return "nothing" if start is None else "encoder"

    monkeypatch.setattr(photos, "probed", probed)
    monkeypatch.setattr(mae_evaluation, "fine_tune", tuned)
    asked = mae_evaluation.evaluate(encoder, mae.build, cfg, fruit, learn, judge)
    assert (asked["probe of this encoder"] == 1).all() and (
        asked["probe of an untrained encoder"] == 0
    ).all()
    assert (asked["probe of ImageNet features"] == 7).all() and asked["probe of pixels"].shape == (
        28,
        3 * 32 * 32,
    )
    assert asked["trained from nothing"] == "nothing" and asked["fine-tuned"] == "encoder"
    assert "fine-tuned" not in mae_evaluation.evaluate(
        encoder, mae.build, replace(cfg, tune=0), fruit, learn, judge
    )


def test_mae_main_learns_from_one_half_and_draws_the_other(fruit, monkeypatch, tmp_path):
    made: dict[str, Any] = {}
    trained = recorded_training(monkeypatch, mae)
    monkeypatch.setattr(mae, "evaluate", lambda *args: made.update(judged=args) or {})
    monkeypatch.setattr(
        mae, "pictures", lambda model, images, cfg, folder: made.update(drawn=(model, images, cfg))
    )
    cfg = mae.Config(out=str(tmp_path), ratio=0.5, steps=2)
    mae.main(cfg)
    assert numbers(trained[0]["images"]) == LEARN and trained[0]["cfg"].ratio == 0.5
    model, images, _ = made["drawn"]
    assert set(numbers(images)) <= set(JUDGE) and model is trained[0]["model"] is made["judged"][0]
    assert (
        not model.training
        and made["judged"][4].tolist() == LEARN
        and made["judged"][5].tolist() == JUDGE
    )
    saved, meta = mae.load(tmp_path / "model.safetensors")
    assert torch.equal(saved.to_pixels.weight, model.to_pixels.weight) and meta["ratio"] == 0.5
    mae.main(replace(cfg, pretrained=True))
    shipped, _ = mae.load(mae.WEIGHTS)
    assert len(trained) == 1 and torch.equal(
        made["judged"][0].to_pixels.weight, shipped.to_pixels.weight
    )


def test_pictures_are_drawn_at_the_ratio_asked_for(monkeypatch, tmp_path):
    asked, drawn = [], []
    monkeypatch.setattr(
        mae_figures,
        "draw",
        lambda model, x, ratio, noise: (asked.append(ratio), [x, x + 1, x + 2])[1],
    )
    monkeypatch.setattr("utils.figures.rows", lambda path, named, **_: drawn.append(named))
    mae_figures.pictures(
        mae.build(16, 8),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        mae.Config(image_size=16, ratio=0.6),
        tmp_path,
    )
    assert asked == [0.6, *mae_figures.RATIOS]
    x = drawn[0]["photo"]
    assert torch.equal(drawn[0]["drawn"], x + 1) and torch.equal(drawn[0]["pasted"], x + 2)
    assert torch.equal(drawn[1]["75%, pasted"], x + 2) and torch.equal(drawn[1]["75%, hidden"], x)


# --- the claims


def test_variants_differ_from_plain_in_the_one_thing_they_name():
    found = mae_claims.variants(mae_claims.Config(steps=7, batch=5, seed=3))
    _, plain = found["plain"]
    assert (plain.steps, plain.batch, plain.seed, plain.ratio) == (7, 5, 3, 0.75)
    changed = {}
    for name, (kind, flags) in found.items():
        fields = vars(flags)
        changed[name] = {k: v for k, v in fields.items() if v != getattr(plain, k)}
        assert (kind is mae_claims.MaskTokensInEncoder) == (name == "hidden words in the encoder")
    assert changed == {
        "ratio 0.25": {"ratio": 0.25}, "ratio 0.5": {"ratio": 0.5}, "plain": {}, "ratio 0.9": {"ratio": 0.9},
        "heavy decoder": {"decoder": "heavy"}, "normalised pixels": {"norm_pix": True},
        "hidden words in the encoder": {},
    }  # fmt: skip
    heavy = mae_claims.network(mae.MAE, replace(plain, decoder="heavy", norm_pix=True))
    assert len(heavy.decoder_blocks) == 6 and heavy.norm_pix


def test_worth_probes_the_encoder_that_it_trained(fruit, monkeypatch):
    trained, probed = recorded_training(monkeypatch, mae, losses=2), []
    monkeypatch.setattr(
        mae_claims, "features", lambda model, images, size: probed.append((model, numbers(images)))
    )
    monkeypatch.setattr(
        photos, "probed", lambda x, fruit, learn, judge: {"14 kinds": 0.5, "5 groups": 1.0}
    )
    learn, judge = photos.split(fruit)
    _, row = mae_claims.worth(
        mae.MAE, mae.Config(steps=2), fruit, learn, judge, torch.device("cpu")
    )
    assert numbers(trained[0]["images"]) == LEARN and probed == [
        (trained[0]["model"], LEARN + JUDGE)
    ]
    assert row["standard error"] == pytest.approx((0.25 / KINDS) ** 0.5)


def test_speed_is_the_time_of_everything_over_the_time_of_the_rest(monkeypatch):
    """A clock that ticks with the number of patches read: at a ratio of 0.5 the encoder is twice as fast."""
    now = [0.0]

    class Counts(mae.MAE):
        def forward_encoder(self, x, ratio, noise=None):
            now[0] += 1 - ratio
            return self.cls.expand(1, 1, -1), None, None

        def forward(self, imgs, ratio=0.75, noise=None):
            now[0] += 1 - ratio + 1  # the decoder reads all
            return None, self.cls.expand(1, 1, -1), None

    monkeypatch.setattr(
        mae, "build", lambda image, patch, decoder: Counts(16, 8, width=32, depth=1, heads=4)
    )
    monkeypatch.setattr(mae_claims, "clock", lambda device: now[0])
    found = mae_claims.speed(mae_claims.Config(batch=1, repeat=1), torch.device("cpu"))
    assert found["encoder"]["0.5"] == pytest.approx(2) and found["encoder"][
        "0.75"
    ] == pytest.approx(4)
    assert found["heavy decoder"]["0.5"] == pytest.approx(2 / 1.5)


# --- clip


def unit(n, d, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_clip_loss_asks_in_both_directions():
    z, t = torch.tensor([[1.0, 0], [0.6, 0.8]]), torch.tensor([[1.0, 0], [0, 1.0]])
    cosines = 3.0 * t @ z.T
    texts = -cosines.log_softmax(1).diagonal().mean()
    pictures = -cosines.log_softmax(0).diagonal().mean()
    assert abs(texts - pictures) > 0.01
    torch.testing.assert_close(contrastive_loss.clip_loss(z, t, 3.0), (texts + pictures) / 2)


def test_recall_says_who_looks_for_whom():
    z = torch.tensor([[1.0, 0], [0.9, 0.1]])
    t = torch.tensor([[1.0, 0], [1.0, 0]])  # both texts find picture 0 first; each picture ties
    found = clip_evaluation.recall(z, t, (1,))
    assert (
        found["text finds picture"]["recall@1"] == 0.5
        and found["picture finds text"]["recall@1"] == 1
    )


def test_a_class_is_a_vector_of_unit_length_over_all_templates():
    """The sentences of "wide" lie far apart, so their mean is short; a picture halfway between is as near to both."""
    sentences = {"wide": torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]]),
                 "tight": torch.tensor([[0.0, 0, 1]] * 4)}  # fmt: skip
    asked = []

    def encode(texts):
        asked.extend(texts)
        return sentences["wide" if "wide" in texts[0] else "tight"]

    z = F.normalize(torch.tensor([[0.5, 0.5, 0.5**0.5]]), dim=-1)
    logits = clip_evaluation.zero_shot(z, ["wide", "tight"], encode)
    torch.testing.assert_close(logits[0, 0], logits[0, 1])
    assert (
        asked == [s.format(name) for name in ("wide", "tight") for s in clip_evaluation.TEMPLATES]
        and len(clip_evaluation.TEMPLATES) == 4
    )


def test_towers_standardise_drop_while_training_only_and_begin_at_the_temperature():
    torch.manual_seed(0)
    x = torch.randn(50, 6) * 3 + 5
    towers = clip.Towers(x.mean(0), x.std(0), 4, 3, 0.2)
    assert towers.scale().item() == pytest.approx(5) and not torch.equal(
        towers.encode_image(x), towers.encode_image(x)
    )
    towers.eval()
    expected = F.normalize(towers.image((x - x.mean(0)) / x.std(0)), dim=-1)
    torch.testing.assert_close(towers.encode_image(x), expected)
    torch.testing.assert_close(towers.encode_text(unit(5, 4)).norm(dim=-1), torch.ones(5))


def test_clip_trains_pairs_that_belong_together_and_paces(monkeypatch):
    """Row i of both sides is i: whatever is drawn, the pair is one."""
    pairs, rates = [], paces(monkeypatch)
    loss = contrastive_loss.clip_loss
    monkeypatch.setattr(clip, "clip_loss", lambda z, t, s: (pairs.append((z, t)), loss(z, t, s))[1])
    towers = clip.Towers(torch.zeros(20), torch.ones(20), 20, 20, 0.07)
    with torch.no_grad():
        towers.image.weight.copy_(torch.eye(20))
        towers.image.bias.zero_()
        towers.text.weight.copy_(torch.eye(20))
    monkeypatch.setattr(clip, "HIDE", 0.0)
    towers.requires_grad_(False)
    towers.log_scale.requires_grad_(True)
    list(clip.train(towers, None, torch.eye(20), torch.eye(20), clip.Config(steps=6, batch=8)))
    drawn = [z.argmax(-1).tolist() for z, _ in pairs]
    assert all(z.argmax(-1).tolist() == t.argmax(-1).tolist() for z, t in pairs)
    # Without repeats, by lot
    assert all(len(set(d)) == 8 for d in drawn) and len({i for d in drawn for i in d}) > 12
    assert (
        rates[0] == pytest.approx(1e-3)
        and rates == sorted(rates, reverse=True)
        and rates[-1] < 2e-4
    )


def test_a_reader_learns_fifty_times_slower(monkeypatch):
    groups = []
    made = torch.optim.AdamW

    def watched(params, lr):
        groups.extend({**group} for group in params)
        return made(params, lr)

    monkeypatch.setattr(torch.optim, "AdamW", watched)

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(9, 4)

        def forward(self, ids):
            return self.table(ids).mean(1)

    reader = Reader()
    towers = clip.Towers(torch.zeros(3), torch.ones(3), 4, 2, 0.07)
    list(
        clip.train(
            towers,
            reader,
            torch.randn(6, 3),
            torch.randint(9, (6, 2)),
            clip.Config(steps=1, batch=4),
        )
    )
    own, slow = groups
    assert slow["lr"] == pytest.approx(1e-3 / 50) and slow["params"][0] is reader.table.weight
    assert own["weight_decay"] == 0.1 and len(own["params"]) == len(list(towers.parameters()))


def test_fit_seeds_and_standardises_by_what_it_learns_from():
    x, t = torch.randn(30, 5) * 4 + 2, unit(30, 384)
    cfg = clip.Config(steps=2, batch=8, width=4)
    towers, losses = clip.fit(x, t, cfg)
    torch.testing.assert_close(towers.mean, x.mean(0))
    torch.testing.assert_close(towers.spread, x.std(0) + 1e-6)
    assert (
        clip.fit(x, t, cfg)[1] == losses != clip.fit(x, t, replace(cfg, seed=1))[1]
        and not towers.training
    )


def test_sweeps_change_one_thing_and_are_judged_by_the_held_out(monkeypatch):
    asked, judged = [], []
    x, t = torch.arange(40.0)[:, None], torch.arange(40.0)[:, None] + 100
    learn = torch.arange(40) % 4 != 0

    class Same:
        def encode_image(self, x):
            return x

        encode_text = encode_image

    monkeypatch.setattr(
        clip, "fit", lambda x, t, cfg, *_: (asked.append((x, t, cfg)), (Same(), []))[1]
    )
    monkeypatch.setattr(
        clip,
        "recall",
        lambda z, t: (judged.append((z, t)), {"text finds picture": {"recall@1": 0.5}})[1],
    )
    cfg = clip.Config(steps=300, batch=512)
    rows = clip.sweeps(x, t, learn, cfg)
    assert all(torch.equal(a, x[learn]) and torch.equal(b, t[learn]) for a, b, _ in asked)
    assert all(torch.equal(a, x[~learn]) and torch.equal(b, t[~learn]) for a, b in judged)
    fixed, batches = [c for *_, c in asked[:5]], [c for *_, c in asked[5:]]
    assert [c.temperature for c in fixed] == list(rows["temperature"]) and not any(
        c.learn_temperature for c in fixed
    )
    assert [c.batch for c in batches] == list(rows["batch"]) == [32, 128, 512]
    assert {c.batch * c.steps for c in batches} == {300 * 512} and all(
        c.learn_temperature for c in batches
    )  # equal pairs


@pytest.fixture
def clip_run(fruit, monkeypatch, tmp_path):
    """What clip.main gave to its parts: pictures and captions tell their number."""
    captions = [f"thing {i}" for i in range(60)]
    made: dict[str, Any] = {"fits": [], "recalls": []}
    images = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(data, "emoji", lambda size=64: (images, captions, captions))
    monkeypatch.setattr(clip.pretrained, "minilm", lambda device: (None, None))
    monkeypatch.setattr(clip.pretrained, "embed", lambda texts, *_: unit(len(texts), 384))
    monkeypatch.setattr(clip, "matrix", lambda *args: made.update(matrix=args))
    monkeypatch.setattr(
        clip,
        "image_features",
        lambda images, tower, device: (made.update(tower=tower), torch.randn(60, 6))[1],
    )
    monkeypatch.setattr(clip, "classify", lambda towers, *_: made.update(classified=towers) or {})
    fit, recall = clip.fit, clip_evaluation.recall

    def watched_fit(x, t, cfg, *rest):
        result = fit(x, t, cfg, *rest)
        made["fits"].append((x, t, result[0]))
        return result

    monkeypatch.setattr(clip, "fit", watched_fit)
    monkeypatch.setattr(
        clip, "recall", lambda z, t: (made["recalls"].append((z, t)), recall(z, t))[1]
    )
    made["learn"] = ~clip.held_out(captions)
    made["metrics"] = clip.main(
        clip.Config(steps=2, batch=8, width=4, sweep=False, out=str(tmp_path))
    )
    made["saved"] = clip.checkpoint.read(tmp_path / "space.safetensors")[0]
    return made


def test_clip_learns_from_four_fifths_and_is_asked_about_the_rest(clip_run):
    held = int((~clip_run["learn"]).sum())
    assert 3 < held < 25  # one in five
    (x, t, towers), (z, words) = clip_run["fits"][0], clip_run["recalls"][0]
    assert len(x) == len(t) == 60 - held and len(z) == len(words) == held
    assert (
        clip_run["metrics"]["pairs held out"] == held
        and clip_run["metrics"]["chance"]["recall@1"] == 1 / held
    )
    assert clip_run["classified"] is towers and torch.equal(
        clip_run["saved"]["W"], towers.image.weight.T
    )
    torch.testing.assert_close(words, towers.encode_text(unit(60, 384)[~clip_run["learn"]]))
    assert clip_run["metrics"]["temperature at the end"] == pytest.approx(0.07, rel=0.1)


def test_classify_judges_the_held_out_photos_by_their_own_kind(fruit, monkeypatch):
    """Features are the kind, and so are the vectors of the names: all right on 14 kinds."""
    monkeypatch.setattr(
        clip_evaluation,
        "image_features",
        lambda images, tower, device: torch.arange(28.0)[:, None],
    )
    names = {}

    class Towers:
        def encode_image(self, x):
            assert x[:, 0].tolist() == JUDGE
            return F.one_hot(x[:, 0].long() % KINDS, KINDS).float()

        def encode_text(self, x):
            return x

    def embed(texts):
        number = int(texts[0].rpartition("kind ")[2].split()[0]) if "kind" in texts[0] else 0
        names[number] = texts
        return F.one_hot(torch.tensor([number] * len(texts)), KINDS).float()

    row = clip_evaluation.classify(Towers(), embed, clip.Config(), torch.device("cpu"))
    assert row["zero-shot photos"]["14 kinds"] == 1.0 and row["by chance"]["14 kinds"] == 1 / 14
    assert "kind 3 group 3" in names[3][0]  # the group is named where the kind does not
