"""vlm/train.py: the library's loss, what is frozen, two stages, packing, several ranks, resuming."""

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from finetune import llama2_lora
from tests import eyes, llamas
from tests.vlm.test_llava import library, prompt
from training import ranks
from utils import checkpoint
from utils.run import UserError
from vlm import (
    checkpoints,
    connector,
    conversations,
    data,
    engines,
    evaluate,
    fruit_photos,
    llava,
    llava_parts,
    llava_transformers,
    packing,
    probe,
    prompts,
    tower,
    train_data,
    train_evaluation,
    trainable,
)
from vlm import train as teach
from vlm.config import DeepSpeedConfig
from vlm.train_config import Config, changed


def run_flags(**values):
    """The flags of a run, some of them given."""
    return changed(Config(), **values)


def batch(rows=2):
    ids = prompt(16, rows)
    labels = torch.where(torch.arange(ids.shape[1]) > 20, ids, prompts.IGNORE)
    whole = {"ids": ids, "labels": labels, "mask": torch.ones_like(ids)}
    return whole | {"positions": torch.arange(ids.shape[1]).expand_as(ids)}


def test_the_loss_and_its_gradients_are_those_of_transformers(parity):
    theirs = library()
    model = llava.assemble(llava_transformers.from_transformers(theirs))
    one, pixels = batch(), torch.randn(2, 3, 28, 28)
    learner = teach.Learner(model)
    count = int((one["labels"][:, 1:] != prompts.IGNORE).sum())
    mine = learner(one, pixels) / count
    other = theirs(input_ids=one["ids"], pixel_values=pixels, labels=one["labels"]).loss
    name = "transformers.LlavaForConditionalGeneration"
    parity("LLaVA, training", "llava.Learner / tokens", f"{name} loss", mine, other)
    mine.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    names = {id(p): n for n, p in theirs.named_parameters()}
    ours = {names[id(p)]: ours[n] for n, p in model.named_parameters() if n in ours}
    theirs.zero_grad()
    other = theirs(input_ids=one["ids"], pixel_values=pixels, labels=one["labels"]).loss
    other.backward()
    them = {n: p.grad for n, p in theirs.named_parameters() if n in ours}
    parity("LLaVA, training", "llava.Learner gradients", f"{name} gradients", ours, them)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """Twelve photos of fruit, two rows without a picture, a tiny language model -> flags of a run."""
    folder = tmp_path_factory.mktemp("lesson")
    rows = data.fruit("train")[:12]
    rows += [
        conversations.row(f"text-{i}", None, [("What is red and grows?", "an apple")])
        for i in range(2)
    ]
    (folder / "chat.json").write_text(json.dumps(rows))
    return run_flags(
        text_name_or_path=llamas.folder(folder / "speaker"),
        data_path=str(folder / "chat.json"), precision="fp32", packing=False,
        image_folder=str(data.photos()), views=1, batch_size=4, steps=3, warmup_steps=1,
        out=str(folder / "out"),
    )  # fmt: skip


def moved(before, after):
    return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "kind, parts",
    [
        ("projector", {"connector"}), ("use_lora", {"connector", "language"}),
        ("freeze_vision", {"connector", "language"}), ("none", {"connector", "language", "vision"}),
    ],
)  # fmt: skip
def test_what_moves_is_what_was_asked_for(kind, parts):
    """One step on a tiny model: LoRA does not leak into the tower, and nothing that is frozen moves."""
    model = llava.assemble(llava_transformers.from_transformers(library()))
    cfg = run_flags(train_type=kind, r=2, align_steps=0)
    trainable.set_trainable(model, cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trainable.param_groups(model, cfg), 1e-2)
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        teach.Learner(model)(batch(), torch.randn(2, 3, 28, 28)).backward()
        optimizer.step()
    after = model.state_dict()
    assert moved(before, after) == parts
    if kind == "use_lora":
        assert all(
            "lora" in k
            for k in after
            if not torch.equal(before[k], after[k]) and k.startswith("language")
        )
        assert not [n for n in llama2_lora.names(model) if "vision" in n]


@pytest.mark.parametrize(
    "kind, freeze, parts",
    [
        ("none", ("language",), {"connector", "vision"}),
        ("none", ("language", "connector"), {"vision"}),
        ("use_lora", ("connector",), {"language"}),
        ("none", ("language[.]", "vision.*layers.0[.]"), {"connector", "vision"}),
    ],
)
def test_frozen_parts_do_not_move(kind, freeze, parts):
    """By name, or by a regular expression that begins with a part."""
    model = llava.assemble(llava_transformers.from_transformers(library()))
    cfg = run_flags(train_type=kind, freeze=freeze, r=2)
    trainable.set_trainable(model, cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trainable.param_groups(model, cfg), 1e-2)
    for _ in range(2):
        teach.Learner(model)(batch(), torch.randn(2, 3, 28, 28)).backward()
        optimizer.step()
    after = model.state_dict()
    assert moved(before, after) == parts
    if "vision.*layers.0[.]" in freeze:
        changed_layers = {k for k in after if not torch.equal(before[k], after[k])}
        assert not [k for k in changed_layers if "layers.0." in k]
        assert [k for k in changed_layers if "layers.1." in k]


@pytest.mark.parametrize(
    "kind, freeze, says",
    [
        ("use_lora", ("audio",), "audio: nothing that learns"),
        ("use_lora", ("vision",), "vision: nothing that learns"),
        ("use_lora", ("layers",), "layers: nothing that learns"),
        ("use_lora", ("(",), "no regular expression"),
        ("projector", ("connector",), "nothing to learn"),
        ("none", ("vision",), "freeze_vision"),
    ],
)
def test_what_cannot_be_frozen_is_one_line(kind, freeze, says):
    model = llava.assemble(llava_transformers.from_transformers(library()))
    with pytest.raises(UserError, match=says):
        trainable.set_trainable(model, run_flags(train_type=kind, freeze=freeze))


def test_new_and_old_parts_have_their_own_rates():
    model = llava.assemble(llava_transformers.from_transformers(library()))
    cfg = run_flags(r=2, lr=0.1, lr_pretrained=0.01)
    trainable.set_trainable(model, cfg)
    new, old = trainable.param_groups(model, cfg)
    assert (new["lr"], old["lr"]) == (0.1, 0.01)
    assert sum(p.numel() for p in new["params"]) == sum(
        p.numel() for p in model.connector.parameters()
    )


def test_the_first_stage_moves_the_connector_only():
    cfg = run_flags(align_steps=10, steps=30, warmup_steps=2)
    factors = [trainable.lr_multipliers(cfg.train, i) for i in range(30)]
    assert all(old == 0 for _, old in factors[:10]) and all(
        old == new > 0 for new, old in factors[10:]
    )
    assert factors[0][0] < factors[2][0] and factors[9][0] < 0.1 < factors[12][0]
    assert [
        trainable.lr_multipliers(changed(cfg, lr_scheduler_type="constant").train, i)[0]
        for i in (0, 5, 20)
    ] == [
        0.5,
        1,
        1,
    ]


def test_every_conversation_is_drawn_once_an_epoch_whatever_the_number_of_ranks():
    samples = list(range(24))
    for n, size, parts in ((1, 4, 1), (2, 3, 2), (3, 2, 1)):
        cfg = run_flags(batch_size=size, gradient_accumulation_steps=parts)
        steps = 24 // (n * size * parts)
        seen = [
            x
            for s in range(steps)
            for r in range(n)
            for part in train_data.step_batches(samples, cfg, s, r, n)
            for x in part
        ]
        assert sorted(seen) == samples and seen != samples
        # the next epoch has another order
        later = [
            x
            for s in range(steps, 2 * steps)
            for r in range(n)
            for part in train_data.step_batches(samples, cfg, s, r, n)
            for x in part
        ]
        assert sorted(later) == samples and later != seen


def test_no_part_mixes_pictures_with_words_and_all_ranks_see_the_same_kind():
    samples = [{"ids": [0] * (5 + i % 7), "images": [i] if i % 3 else []} for i in range(36)]
    for n, size, parts in ((1, 4, 1), (2, 3, 1), (2, 2, 3)):
        cfg = run_flags(
            batch_size=size,
            gradient_accumulation_steps=parts,
            group_by_modality_length=True,
        )
        steps, seen = 36 // (n * size * parts), []
        for s in range(steps):
            ranks = [train_data.step_batches(samples, cfg, s, r, n) for r in range(n)]
            for part in zip(*ranks):
                assert len({bool(x["images"]) for batch in part for x in batch}) == 1
            seen += [id(x) for drawn in ranks for batch in drawn for x in batch]
        assert sorted(seen) == sorted(map(id, samples))
    plain = run_flags(batch_size=6)  # the other way does mix them
    assert any(
        len({bool(x["images"]) for x in train_data.step_batches(samples, plain, s, 0, 1)[0]}) == 2
        for s in range(6)
    )


def losses(cfg):
    return teach.main(cfg)["losses"]


def weights(cfg):
    return checkpoint.read(Path(cfg.out) / "model.safetensors")[0]


# a model of a few thousand weights and a step whose answer is known


def small(kind="llama"):
    """A vision tower, a matrix, a language model, all of large random weights: a wrong neighbour is felt."""
    torch.manual_seed(4)
    vision_tower, join = tower.VisionTower(eyes.tower()), connector.build("linear", 16, 24)
    model = llava.Llava(vision_tower, join, eyes.speaker(kind), 99)
    eyes.shake(model, 0.2)
    model.language.set_attn_implementation("eager")
    return model.eval()


def talks(count=5):
    """Conversations of several lengths, each about a picture of its own; the last one is words alone."""
    made = []
    for i in range(count):
        picture = [99] * 16 if i < count - 1 else []
        ids = [5 + i, *picture, *(10 + (7 * i + k) % 80 for k in range(4 + 3 * i))]
        labels = [prompts.IGNORE] * (len(picture) + 3) + ids[len(picture) + 3 :]
        made.append({"ids": ids, "labels": labels, "images": [i] if picture else []})
    return made


def pictures(count=5, views=1):
    return torch.randn(views, count, 16, 16, generator=torch.Generator().manual_seed(1))


def one_by_one(model, samples, photos):
    """The summed loss of each sample alone, with its own picture."""
    summed = 0
    for s in samples:
        features = photos(s["images"], np.random.default_rng(0)) if s["images"] else None
        summed = summed + teach.Learner(model)(packing.pad([s], 0), features)
    return summed


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_collated_conversations_keep_their_pictures_and_see_no_other(kind, packing):
    """gpt2 has a vector for each position: positions that run on would be felt, too."""
    model, samples, photos = small(kind), talks(), train_data.Photos([], pictures())
    cfg = run_flags(packing=packing)
    random = np.random.default_rng(0)
    with torch.no_grad():
        batch, seen = train_data.collate(samples, cfg, model, 0, photos, random)
        assert len(batch["ids"]) == (1 if packing else 5) and len(seen) == 4
        value = teach.Learner(model)(batch, seen)
        torch.testing.assert_close(value, one_by_one(model, samples, photos), atol=1e-2, rtol=1e-4)


def test_positions_beyond_the_model_are_refused_in_rows_and_rectangles():
    model, photos = small("gpt2"), train_data.Photos([], pictures())
    long = {"ids": [5] * 300, "labels": [5] * 300, "images": []}
    for in_rows in (True, False):
        with pytest.raises(UserError, match="300 tokens, but the model has 256 positions"):
            train_data.collate(
                [long], run_flags(packing=in_rows), model, 0, photos, np.random.default_rng(0)
            )


class Recorder:
    """An optimizer that only remembers what it was given: rates and gradients of every step."""

    def __init__(self, groups):
        self.param_groups, self.rates, self.gradients = groups, [], []

    def step(self):
        self.rates.append([group["lr"] for group in self.param_groups])
        self.gradients.append(
            [p.grad.clone() for group in self.param_groups for p in group["params"]]
        )

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def steps(cfg, kind=engines.Plain, start=0, views=1, samples=None):
    """Train `small` with an optimizer that moves nothing -> losses, the recorder, the model."""
    model = small()
    trainable.set_trainable(model, cfg)
    photos = train_data.Photos([], pictures(views=views))
    on = torch.device("cpu")
    engine = kind(teach.Learner(model), cfg, on)
    engine.optimizer = Recorder(trainable.param_groups(model, cfg))
    source = SimpleNamespace(samples=samples or talks(), photos=photos, model=model, pad=0)
    source.rank, source.ranks = ranks.rank_and_world_size()
    batches = train_data.read_batches(source, cfg, start)
    return list(teach.train(engine, batches, cfg, on, start)), engine.optimizer, model


def still(**flags):
    usual = {
        "precision": "fp32",
        "batch_size": 5,
        "r": 2,
        "warmup_steps": 0,
    }
    return run_flags(**usual | flags)


@pytest.fixture
def unclipped(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda _, norm: asked.append(norm))
    return asked


def tokens_of(samples):
    """Supervised tokens, a first token is none."""
    return sum(label != prompts.IGNORE for s in samples for label in s["labels"][1:])


def expected(cfg):
    """The gradient of the mean over all tokens of all samples, without the loop."""
    model = small()
    trainable.set_trainable(model, cfg)
    samples, groups = talks(), trainable.param_groups(model, cfg)
    value = one_by_one(model, samples, train_data.Photos([], pictures())) / tokens_of(samples)
    value.backward()
    parameters = [p for group in groups for p in group["params"]]
    return value.item(), [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def close(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["projector", "use_lora", "freeze_vision"])
def test_a_step_has_the_gradient_of_the_mean_over_all_tokens(kind, unclipped):
    cfg = still(train_type=kind, steps=1)
    value, gradients = expected(cfg)
    for part in (cfg, changed(cfg, batch_size=1, gradient_accumulation_steps=5)):
        losses, recorder, _ = steps(part)
        assert losses[0] == pytest.approx(value, rel=1e-4)
        close(recorder.gradients[0], gradients)
    assert unclipped == [1.0, 1.0]


def test_every_step_begins_with_gradients_of_zero(unclipped):
    """Weights that do not move and the same conversations: the second gradient is the first one, not twice that."""
    _, recorder, _ = steps(still(train_type="projector", steps=2))
    close(recorder.gradients[1], recorder.gradients[0])


def test_gradients_of_ranks_are_summed_once(unclipped, monkeypatch):
    """Two ranks that read the same: twice the sum over twice the tokens is the gradient of one."""
    cfg = still(train_type="projector", steps=1, batch_size=5)
    value, gradients = expected(cfg)
    monkeypatch.setattr(teach.ranks, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(teach, "total", lambda *values: [2 * v for v in values])
    monkeypatch.setattr(engines.dist, "all_reduce", lambda x: x.mul_(2))
    monkeypatch.setattr(train_data, "step_batches", lambda samples, *rest: [samples])
    losses, recorder, _ = steps(cfg)
    assert losses[0] == pytest.approx(value, rel=1e-4)
    close(recorder.gradients[0], gradients)


def test_deepspeed_is_given_what_it_divides_by(monkeypatch):
    """An engine divides by parts and ranks: what is left is the mean over all tokens of all ranks."""

    class Fake:
        def __init__(self, learner):
            self.learner = learner

        def __call__(self, *batch):
            return self.learner(*batch)

        def backward(self, value):
            (value / 5 / 2).backward()

        def step(self):
            found.append([p.grad.clone() for p in self.learner.parameters() if p.grad is not None])

    def around(learner, cfg, on):
        made = engines.Plain(learner, cfg, on)
        made.engine = Fake(learner)
        made.__class__ = engines.DeepSpeed
        return made

    found = []
    cfg = still(train_type="projector", steps=1, batch_size=1, gradient_accumulation_steps=5)
    _, gradients = expected(cfg)
    monkeypatch.setattr(teach.ranks, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(teach, "total", lambda *values: [2 * v for v in values])
    monkeypatch.setattr(train_data, "step_batches", lambda samples, *rest: [[s] for s in samples])
    losses, recorder, _ = steps(cfg, around)
    assert len(found) == 5 and not recorder.rates  # the engine steps
    close(found[-1], [g / 2 for g in gradients])  # the other rank brings the other half
    assert losses[0] == pytest.approx(expected(cfg)[0], rel=1e-4)


def test_large_gradients_are_clipped_to_one():
    cfg = still(train_type="freeze_vision", steps=1)
    _, gradients = expected(cfg)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 1.5
    _, recorder, _ = steps(cfg)
    close(recorder.gradients[0], [g / norm for g in gradients])


def test_rates_reach_the_optimizer_by_step_and_group():
    cfg = still(
        steps=4, align_steps=2, lr=0.1, lr_pretrained=0.01,
        lr_scheduler_type="linear",
    )  # fmt: skip
    _, recorder, _ = steps(cfg)
    assert np.allclose(recorder.rates, [[0.1, 0], [0.05, 0], [0.1, 0.01], [0.05, 0.005]])


def test_views_are_drawn_anew_every_step_and_a_resumed_run_draws_the_same():
    cfg = still(train_type="projector", steps=6)
    whole, _, _ = steps(cfg, views=8)
    assert len(set(whole)) == 6  # the same five conversations; nothing moves but the views
    assert steps(cfg, views=8, start=4)[0] == whole[4:]
    assert len({round(x, 4) for x in steps(cfg, views=1)[0]}) == 1


def test_photos_are_those_that_are_asked_for():
    numbers = torch.arange(3 * 5).view(3, 5, 1, 1) * torch.ones(1, 1, 2, 4)
    found = train_data.Photos([], numbers.bfloat16())([4, 0, 4, 2], np.random.default_rng(0))
    assert found.shape == (4, 2, 4) and found.dtype == torch.float32
    assert [int(x) % 5 for x in found[:, 0, 0]] == [4, 0, 4, 2]
    assert (
        len(
            {
                int(x) // 5
                for x in train_data.Photos([], numbers)([1] * 30, np.random.default_rng(0))[:, 0, 0]
            }
        )
        == 3
    )


def test_a_tower_that_learns_sees_pixels(tmp_path):
    for i, grey in enumerate((0, 255, 128)):
        Image.new("L", (4, 4), grey).save(tmp_path / f"{i}.png")
    vision_tower = tower.VisionTower(eyes.tower())
    photos = train_data.Photos([tmp_path / f"{i}.png" for i in range(3)], vision_tower=vision_tower)
    found = photos([2, 0, 1], np.random.default_rng(0))
    assert found.shape == (3, 3, 28, 28)
    right = vision_tower.pixels(
        torch.tensor([128, 0, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 28, 28)
    )
    torch.testing.assert_close(found, right)
    model = small()
    trainable.set_trainable(model, still(train_type="none"))
    teach.Learner(model)(packing.pad(talks()[2:3], 0), found[:1]).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.vision.parameters())


@pytest.mark.parametrize("kind", ["projector", "use_lora"])
def test_a_step_of_words_alone_moves_no_connector(kind):
    words = [s for s in talks() if not s["images"]]
    losses, recorder, model = steps(still(train_type=kind, steps=2), samples=words)
    count = len(list(model.connector.parameters()))
    assert len(losses) == 2 and all(not g.any() for g in recorder.gradients[1][:count])
    others = recorder.gradients[1][count:]
    assert len(others) == (28 if kind == "use_lora" else 0) and (
        not others or any(g.any() for g in others)
    )


def test_adapters_are_scaled_in_training_as_in_the_file():
    """What restore adds to the matrices, W + scale B A, gives the logits of the model that learned."""
    cfg, model = still(r=4), small()
    trainable.set_trainable(model, cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    ids = torch.arange(3, 60)[None]
    learned = model.language(ids).logits
    tensors = {
        k.removeprefix("lora."): v
        for k, v in checkpoints.tensors(model).items()
        if k.startswith("lora.")
    }
    fresh = small().language
    assert not torch.allclose(fresh(ids).logits, learned, atol=0.1)
    llava_parts.merge_lora(fresh, tensors, checkpoints.about(cfg)["scale"])
    torch.testing.assert_close(fresh(ids).logits, learned, atol=1e-4, rtol=1e-4)
    layer = model.language.get_submodule(llama2_lora.names(model.language)[0])
    assert layer.scale == 2.0  # alpha is twice the rank, whatever the rank


def test_deepspeed_leaves_a_frozen_tower_as_it_is(monkeypatch):
    """DeepSpeed casts parameters and no buffers; batch norms that got one and not the other cannot be asked again."""

    class Casting:
        def initialize(self, model, optimizer, config):
            for p in model.parameters():
                p.data = p.data.bfloat16()
            return [SimpleNamespace(optimizer=optimizer)]

    monkeypatch.setattr(engines.zero_config, "read", lambda cfg: {})
    monkeypatch.setattr(engines.zero_config, "quiet", Casting)
    on = torch.device("cpu")

    def begin(kind):
        vision_tower = tower.load("efficientnet")
        model = llava.Llava(vision_tower, connector.build("linear", 1280, 24), eyes.speaker(), 99)
        cfg = still(train_type=kind, precision="bf16", deepspeed=DeepSpeedConfig(2))
        trainable.set_trainable(model, cfg)
        return cfg, model, vision_tower

    cfg, model, vision_tower = begin("projector")
    image = torch.full((1, 3, 224, 224), 100, dtype=torch.uint8)
    before = vision_tower(vision_tower.pixels(image))
    engines.build(teach.Learner(model), cfg, on)
    assert torch.equal(vision_tower(vision_tower.pixels(image)), before)
    assert {p.dtype for p in model.connector.parameters()} == {torch.bfloat16}
    cfg, model, _ = begin("none")
    with pytest.raises(UserError, match="--train_type none.*--precision fp32"):
        engines.build(teach.Learner(model), cfg, on)


# whole runs


def test_what_is_prepared_is_what_the_flags_say(lesson):
    cfg = changed(lesson, text_share=0.5, gradient_checkpointing=True, views=2, connector="pool1")
    tokenizer, model, source = teach.prepare(cfg, torch.device("cpu"))
    samples, photos, counts = source.samples, source.photos, source.counts()
    rows = conversations.read(cfg.data.paths[0], cfg.data.image_folder)
    assert (
        model.language.is_gradient_checkpointing
        and model.count == 1
        and photos.features.shape[:2] == (2, 12)
    )
    assert counts == {
        "broken pictures": 0,
        "conversations shortened": 0,
        "conversations left out": 0,
    }
    for one, made in zip(rows, samples):
        assert [photos.paths[i].name for i in made["images"]] == (
            [one["image"]] if "image" in one else []
        )
    learned = [tokenizer.decode(s["ids"]) for s in samples[14:]]
    judged = evaluate.paragraphs(40)
    assert len(learned) == 14
    # None of those it is judged by
    assert not any(page.startswith(text[:60]) for text in learned for page in judged)


def test_answers_are_scored_on_other_pages_and_beside_an_untrained_model(
    lesson, monkeypatch, tmp_path
):
    tokenizer, model, *_ = teach.prepare(changed(lesson, text_share=0.0), torch.device("cpu"))
    seen, read = {}, []

    def text_loss(_, language, pages):
        read.append((language is model.language, pages))
        return float(language is model.language)

    def judge(_, judged, features, fruit, chosen):
        seen["features"] = features
        return {"14 kinds": 0.5}, ["pear"] * len(chosen), None

    monkeypatch.setattr(evaluate, "text_loss", text_loss)
    monkeypatch.setattr(evaluate, "evaluate_photos", judge)
    monkeypatch.setattr(
        probe, "yardsticks", lambda vision_tower, fruit, learn, chosen: {"yard": [learn, chosen]}
    )
    monkeypatch.setattr(
        tower, "vision_features", lambda vision_tower, images: torch.ones(len(images), 49, 1280)
    )
    monkeypatch.setattr(fruit_photos, "draw", lambda *about: None)
    fruit = data.data.groceries(224)
    found = train_evaluation.evaluate_run(changed(lesson, judged=3), tokenizer, model, tmp_path)
    assert found["text loss"] == {"after": 1.0, "before": 0.0}
    assert read == [(learned, evaluate.paragraphs(3)) for learned in (True, False)]
    learn, chosen = found["yard"]
    assert {fruit.split[i] for i in chosen} == {"test"} and "test" not in {
        fruit.split[i] for i in learn
    }
    assert seen["features"].eq(1).all()
    with torch.no_grad():
        for p in model.vision.parameters():
            p.mul_(1.01)
    train_evaluation.evaluate_run(
        changed(lesson, judged=3, train_type="none"), tokenizer, model, tmp_path
    )
    with torch.no_grad():
        right = model.vision(model.vision.pixels(fruit.images[chosen]))
    # Asked anew, after it has learned
    torch.testing.assert_close(seen["features"], right, atol=1e-3, rtol=1e-3)


def test_packed_equals_unpacked_and_resumed_equals_uninterrupted(lesson, parity, tmp_path):
    plain, packed = (
        changed(lesson, out=str(tmp_path / "a"), save_steps=1),
        changed(lesson, out=str(tmp_path / "b"), packing=True),
    )
    first, second = losses(plain), losses(packed)
    assert first[-1] < first[0]
    parity(
        "LLaVA, training",
        "llava.train, packed",
        "unpacked, losses of three steps",
        first,
        second,
        1e-4,
    )
    short = changed(plain, out=str(tmp_path / "c"), steps=2, lr_scheduler_type="constant")
    losses(short)
    again = losses(changed(short, steps=3, resume=True))
    whole = losses(changed(short, steps=3, out=str(tmp_path / "d"), save_steps=0))
    assert again == whole
    mine, theirs = weights(short), weights(changed(short, out=str(tmp_path / "d")))
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_a_rate_of_zero_freezes_what_was_trained_before(lesson, tmp_path):
    flags = {"train_type": "freeze_vision", "lr_pretrained": 0.0}
    frozen = changed(lesson, out=str(tmp_path / "frozen"), **flags)
    projector = changed(lesson, out=str(tmp_path / "projector"), train_type="projector")
    assert losses(frozen) == losses(projector)
    assert weights(frozen).keys() == weights(projector).keys() and all(
        "connector" in k for k in weights(frozen)
    )
    decayed = changed(projector, out=str(tmp_path / "decayed"), weight_decay=0.5)
    losses(decayed)
    assert any(not torch.equal(weights(decayed)[k], x) for k, x in weights(projector).items())


def test_conversations_longer_than_the_model_reads_are_counted_in_one_line(
    lesson, tmp_path, capsys
):
    rows = conversations.read(lesson.data.paths[0], lesson.data.image_folder)
    talk = [("What?", "a pear"), ("Tell more", "very " * 200)]
    long = conversations.row("long", rows[0]["image"], talk)
    endless = conversations.row("endless", None, talk[1:])
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([*rows[:2], long, endless]), "utf-8")
    found = teach.main(
        changed(lesson, data_path=str(path), out=str(tmp_path / "out"), steps=1, text_share=0.0)
    )
    assert found["conversations shortened"] == found["conversations left out"] == 1
    line = (
        "longer than the model's positions: 1 conversations lost turns at their end, 1 are left out"
    )
    assert line in capsys.readouterr().out


@pytest.mark.long
def test_two_ranks_are_one_with_twice_the_batch(lesson, parity, tmp_path):
    one = changed(lesson, batch_size=6, out=str(tmp_path / "one"))
    two = changed(lesson, batch_size=3, ranks=2, out=str(tmp_path / "two"))
    parts = changed(
        one,
        batch_size=3,
        gradient_accumulation_steps=2,
        out=str(tmp_path / "parts"),
    )
    first = losses(one)
    parity(
        "LLaVA, training",
        "llava.train, 2 ranks",
        "1 rank, twice the batch",
        losses(two),
        first,
        1e-4,
    )
    parity(
        "LLaVA, training",
        "llava.train, 2 parts a step",
        "1 part, twice the batch",
        losses(parts),
        first,
        1e-4,
    )
    parity(
        "LLaVA, training",
        "llava.train, 2 ranks, weights",
        "1 rank",
        weights(two),
        weights(one),
        1e-3,
    )


def zero_runs(cfg):
    """In one process under DeepSpeed: a run, one in two pieces, one in one piece; what other or damaged ones say."""
    plain, pieces, whole = (changed(cfg, out=f"{cfg.out}/{name}") for name in ("zero", "a", "b"))
    constant = {"lr_scheduler_type": "constant"}
    pieces, whole = changed(pieces, **constant, save_steps=1), changed(whole, **constant)
    found = {"zero": teach.worker(plain)["losses"], "words": teach.worker(changed(
        plain, data_path=f"{cfg.out}/words.json", train_type="projector", steps=2, text_share=0.0, out=f"{cfg.out}/w"
    ))["losses"]}  # fmt: skip
    teach.worker(changed(pieces, steps=2))
    resumed = changed(pieces, resume=True)
    found["again"], found["whole"] = (teach.worker(run)["losses"] for run in (resumed, whole))
    nothing = changed(resumed, out=f"{cfg.out}/nothing")
    for name, run in (
        ("none", nothing),
        ("other", changed(resumed, lr=0.5)),
        ("damaged", resumed),
    ):
        if name == "damaged":
            file = next(Path(pieces.out, "checkpoints").rglob("*optim_states.pt"))
            file.write_bytes(file.read_bytes()[:-9] + b"123456789")
        try:
            teach.worker(run)
        except UserError as error:
            found[name] = str(error)
    return found


@pytest.mark.long
def test_deepspeed_trains_the_same_and_goes_on_where_it_was(lesson, parity, tmp_path):
    plain = changed(lesson, out=str(tmp_path / "plain"))
    words = [
        conversations.row(f"text-{i}", None, [("What is red and grows?", "an apple")])
        for i in range(8)
    ]
    (tmp_path / "words.json").write_text(json.dumps(words), "utf-8")
    cfg = changed(lesson, deepspeed=DeepSpeedConfig(2), out=str(tmp_path))
    (found,) = ranks.launch(zero_runs, cfg, 1)
    parity(
        "LLaVA, training",
        "llava.train",
        "DeepSpeed ZeRO-2, losses of three steps",
        losses(plain),
        found["zero"],
        1e-3,
    )
    assert len(found["words"]) == 2  # no picture in a step, and nothing but the connector to learn
    assert found["again"] == found["whole"]
    mine, theirs = (
        weights(changed(cfg, out=str(tmp_path / "a"))),
        weights(changed(cfg, out=str(tmp_path / "b"))),
    )
    assert all(torch.equal(mine[k], x) for k, x in theirs.items())
    assert "--lr" in found["other"] and "damaged" in found["damaged"]
    assert "no checkpoint" in found["none"] and not (tmp_path / "nothing").exists()


def test_a_broken_picture_is_replaced_and_counted(lesson, tmp_path):
    rows, pictures = json.loads(Path(lesson.data.paths[0]).read_text()), tmp_path / "pictures"
    pictures.mkdir()
    for one in rows[:12]:
        (pictures / one["image"]).write_bytes((data.photos() / one["image"]).read_bytes())
    (pictures / rows[3]["image"]).write_bytes(b"no picture")
    mended, broken = conversations.replace_undecodable(rows, pictures)
    assert (
        broken == 1
        and len(mended) == len(rows)
        and [a is b for a, b in zip(rows, mended)].count(False) == 1
    )
    assert mended[3]["image"] != rows[3]["image"] and conversations.replace_undecodable(
        rows, pictures
    ) == (mended, broken)
    found = teach.main(
        changed(
            lesson,
            image_folder=str(pictures),
            group_by_modality_length=True,
            out=str(tmp_path / "o"),
        )
    )
    assert found["broken pictures"] == 1 and len(found["losses"]) == 3
    for path in pictures.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the pictures"):
        conversations.replace_undecodable(rows, pictures)


def test_emoji_are_learned_besides(lesson):
    rows, folder, _ = train_data.read_rows(run_flags(emoji=3))
    assert len(rows) == 735 and all((folder / one["image"]).is_file() for one in rows[-3:])
    assert {one["image"][:5] for one in rows[-3:]} == {"emoji"} and not list(folder.glob(".*"))


def test_the_printed_next_command_runs_from_another_folder(lesson, tmp_path, monkeypatch, capsys):
    """The language model was named by a relative path; the file names it so that it loads from everywhere."""
    monkeypatch.chdir(Path(lesson.model.text_name_or_path).parent)
    cfg = changed(
        lesson,
        text_name_or_path=Path(lesson.model.text_name_or_path).name,
        out=str(tmp_path / "out"),
        train_type="projector",
    )
    losses(cfg)
    command = re.search(r"next: (.*)", capsys.readouterr().out)[1]
    Image.new("RGB", (40, 40), "red").save(tmp_path / "PHOTO.png")
    monkeypatch.chdir(tmp_path)
    words = [w.replace("PHOTO", "PHOTO.png") for w in shlex.split(command)]
    assert words[:2] == ["python", "vlm/llava.py"] and os.path.isabs(
        words[words.index("--model") + 1]
    )
    asked = tyro.cli(
        llava.Config, args=[*words[2:], "--max_new_tokens", "2", "--out", str(tmp_path / "answers")]
    )
    assert llava.main(asked)["tokens_of_a_photo"] == 9
    _, model = llava.load(tmp_path / "out" / "model.safetensors")
    learned = weights(cfg)["connector.mlp.0.weight"].float()
    assert torch.equal(model.connector.mlp[0].weight, learned)


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"steps": 0}, "--steps"), ({"align_steps": 3}, "--align_steps"),
        ({"lr": 0.0}, "--lr must"),
        ({"lr_pretrained": -1.0}, "0 or more"), ({"model_max_length": 129}, "128 positions"),
        ({"model_max_length": 5}, "no conversation fits into 5"),
        ({"text_share": 1.0}, "--text_share"), ({"judged": -1}, "below 0"), ({"data_path": ""}, "--image_folder"),
        ({"data_path": "none.json"}, "cannot read none.json"), ({"connector": "magic"}, "magic"),
        ({"vision_name_or_path": "no/such"}, "no vision encoder"),
        ({"text_name_or_path": "no/such"}, "no language model"),
        ({"resume": True}, "no checkpoint"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line_and_nothing_is_written(lesson, tmp_path, flags, says):
    with pytest.raises(UserError, match=says) as found:
        teach.main(changed(lesson, out=str(tmp_path / "new"), **flags))
    assert "\n" not in str(found.value) and not (tmp_path / "new").exists()
