"""finetune/llava.py: the library's loss, what is frozen, two stages, packing, several ranks, resuming."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune import llama2_lora, llava_data
from finetune import llava as teach
from models import llava, llava_io
from tests import llamas
from tests.test_llava import library, prompt
from utils import checkpoint
from utils.run import UserError


def batch(rows=2):
    ids = prompt(16, rows)
    labels = torch.where(torch.arange(ids.shape[1]) > 20, ids, llava_data.IGNORE)
    whole = {"ids": ids, "labels": labels, "mask": torch.ones_like(ids)}
    return whole | {"positions": torch.arange(ids.shape[1]).expand_as(ids)}


def test_the_loss_and_its_gradients_are_those_of_transformers(parity):
    theirs = library()
    model = llava_io.from_transformers(theirs)
    one, pixels = batch(), torch.randn(2, 3, 28, 28)
    learner = teach.Learner(model)
    count = int((one["labels"][:, 1:] != llava_data.IGNORE).sum())
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
    rows = llava_data.fruit("train")[:12]
    rows += [llava_data.row(f"text-{i}", None, [("What is red and grows?", "an apple")]) for i in range(2)]
    (folder / "chat.json").write_text(json.dumps(rows))
    return teach.Config(
        language=llamas.folder(folder / "speaker"), data=str(folder / "chat.json"), precision="fp32", packing=False,
        image_folder=str(llava_data.photos()), views=1, per_device_train_batch_size=4, max_steps=3, num_warmup_steps=1,
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
    model = llava_io.from_transformers(library())
    cfg = teach.Config(train_type=kind, lora_rank=2, align_steps=0)
    teach.freeze(model, cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(teach.groups(model, cfg), 1e-2)
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        teach.Learner(model)(batch(), torch.randn(2, 3, 28, 28)).backward()
        optimizer.step()
    after = model.state_dict()
    assert moved(before, after) == parts
    if kind == "use_lora":
        assert all("lora" in k for k in after if not torch.equal(before[k], after[k]) and k.startswith("language"))
        assert not [n for n in llama2_lora.names(model) if "vision" in n]


def test_new_and_old_parts_have_their_own_rates():
    model = llava_io.from_transformers(library())
    cfg = teach.Config(lora_rank=2, learning_rate=0.1, learning_rate_pretraining_components=0.01)
    teach.freeze(model, cfg)
    new, old = teach.groups(model, cfg)
    assert (new["lr"], old["lr"]) == (0.1, 0.01)
    assert sum(p.numel() for p in new["params"]) == sum(p.numel() for p in model.connector.parameters())


def test_the_first_stage_moves_the_connector_only():
    cfg = teach.Config(align_steps=10, max_steps=30, num_warmup_steps=2)
    factors = [teach.rates(cfg, i) for i in range(30)]
    assert all(old == 0 for _, old in factors[:10]) and all(old == new > 0 for new, old in factors[10:])
    assert factors[0][0] < factors[2][0] and factors[9][0] < 0.1 < factors[12][0]
    assert [teach.rates(replace(cfg, lr_scheduler_type="constant"), i)[0] for i in (0, 5, 20)] == [0.5, 1, 1]


def test_every_conversation_is_drawn_once_an_epoch_whatever_the_number_of_ranks():
    samples = list(range(24))
    for n, size, parts in ((1, 4, 1), (2, 3, 2), (3, 2, 1)):
        cfg = teach.Config(per_device_train_batch_size=size, gradient_accumulation_steps=parts)
        steps = 24 // (n * size * parts)
        seen = [x for s in range(steps) for r in range(n) for part in teach.draw(samples, cfg, s, r, n) for x in part]
        assert sorted(seen) == samples and seen != samples


def test_no_part_mixes_pictures_with_words_and_all_ranks_see_the_same_kind():
    samples = [{"ids": [0] * (5 + i % 7), "images": [i] if i % 3 else []} for i in range(36)]
    for n, size, parts in ((1, 4, 1), (2, 3, 1), (2, 2, 3)):
        cfg = teach.Config(
            per_device_train_batch_size=size, gradient_accumulation_steps=parts, group_by_modality_length=True
        )
        steps, seen = 36 // (n * size * parts), []
        for s in range(steps):
            ranks = [teach.draw(samples, cfg, s, r, n) for r in range(n)]
            for part in zip(*ranks):
                assert len({bool(x["images"]) for batch in part for x in batch}) == 1
            seen += [id(x) for drawn in ranks for batch in drawn for x in batch]
        assert sorted(seen) == sorted(map(id, samples))
    plain = teach.Config(per_device_train_batch_size=6)  # the other way does mix them
    assert any(len({bool(x["images"]) for x in teach.draw(samples, plain, s, 0, 1)[0]}) == 2 for s in range(6))


def losses(cfg):
    return teach.main(cfg)["losses"]


def weights(cfg):
    return checkpoint.read(Path(cfg.out) / "model.safetensors")[0]


def test_packed_equals_unpacked_and_resumed_equals_uninterrupted(lesson, parity, tmp_path):
    plain, packed = (
        replace(lesson, out=str(tmp_path / "a"), save_every=1),
        replace(lesson, out=str(tmp_path / "b"), packing=True),
    )
    first, second = losses(plain), losses(packed)
    assert first[-1] < first[0]
    parity("LLaVA, training", "llava.train, packed", "unpacked, losses of three steps", first, second, 1e-4)
    short = replace(plain, out=str(tmp_path / "c"), max_steps=2, lr_scheduler_type="constant")
    losses(short)
    again = losses(replace(short, max_steps=3, resume=True))
    whole = losses(replace(short, max_steps=3, out=str(tmp_path / "d"), save_every=0))
    assert again == whole
    mine, theirs = weights(short), weights(replace(short, out=str(tmp_path / "d")))
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_two_ranks_are_one_with_twice_the_batch(lesson, parity, tmp_path):
    one = replace(lesson, per_device_train_batch_size=6, out=str(tmp_path / "one"))
    two = replace(lesson, per_device_train_batch_size=3, ranks=2, out=str(tmp_path / "two"))
    parts = replace(one, per_device_train_batch_size=3, gradient_accumulation_steps=2, out=str(tmp_path / "parts"))
    first = losses(one)
    parity("LLaVA, training", "llava.train, 2 ranks", "1 rank, twice the batch", losses(two), first, 1e-4)
    parity("LLaVA, training", "llava.train, 2 parts a step", "1 part, twice the batch", losses(parts), first, 1e-4)
    parity("LLaVA, training", "llava.train, 2 ranks, weights", "1 rank", weights(two), weights(one), 1e-3)


def test_deepspeed_trains_the_same(lesson, parity, tmp_path):
    plain = replace(lesson, out=str(tmp_path / "plain"))
    zero = replace(lesson, out=str(tmp_path / "zero"), zero_stage=2)
    parity(
        "LLaVA, training", "llava.train", "DeepSpeed ZeRO-2, losses of three steps", losses(plain), losses(zero), 1e-3
    )


def test_deepspeed_goes_on_where_it_was(lesson, tmp_path):
    cfg = replace(lesson, zero_stage=2, lr_scheduler_type="constant", save_every=1, out=str(tmp_path / "a"))
    losses(replace(cfg, max_steps=2))
    again, whole = losses(replace(cfg, resume=True)), replace(cfg, save_every=0, out=str(tmp_path / "b"))
    assert again == losses(whole)
    assert all(torch.equal(weights(cfg)[k], x) for k, x in weights(whole).items())
    with pytest.raises(UserError, match="learning_rate"):
        teach.main(replace(cfg, resume=True, learning_rate=0.5))
    damaged = next((tmp_path / "a" / "checkpoints").rglob("*optim_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"123456789")
    with pytest.raises(UserError, match="damaged"):
        teach.main(replace(cfg, resume=True))


def test_a_broken_picture_is_replaced_and_counted(lesson, tmp_path):
    rows, pictures = json.loads(Path(lesson.data).read_text()), tmp_path / "pictures"
    pictures.mkdir()
    for one in rows[:12]:
        (pictures / one["image"]).write_bytes((llava_data.photos() / one["image"]).read_bytes())
    (pictures / rows[3]["image"]).write_bytes(b"no picture")
    mended, broken = llava_data.mend(rows, pictures)
    assert broken == 1 and len(mended) == len(rows) and [a is b for a, b in zip(rows, mended)].count(False) == 1
    assert mended[3]["image"] != rows[3]["image"] and llava_data.mend(rows, pictures) == (mended, broken)
    found = teach.main(
        replace(lesson, image_folder=str(pictures), group_by_modality_length=True, out=str(tmp_path / "o"))
    )
    assert found["broken pictures"] == 1 and len(found["losses"]) == 3
    for path in pictures.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the pictures"):
        llava_data.mend(rows, pictures)


def test_emoji_are_learned_besides(lesson):
    rows, folder = teach.rows_of(teach.Config(emoji=3))
    assert len(rows) == 735 and all((folder / one["image"]).is_file() for one in rows[-3:])
    assert {one["image"][:5] for one in rows[-3:]} == {"emoji"} and not list(folder.glob(".*"))


def test_what_was_written_is_loaded(lesson, tmp_path):
    cfg = replace(lesson, out=str(tmp_path))
    losses(cfg)
    tokenizer, model = llava_io.load(tmp_path / "model.safetensors")
    said = llava.answer(tokenizer, model, torch.zeros(3, 224, 224, dtype=torch.uint8), "What is it?", 3)
    assert isinstance(said, str)


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"max_steps": 0}, "--max_steps"), ({"align_steps": 3}, "--align_steps"), ({"learning_rate": 0.0}, "rates"),
        ({"text_share": 1.0}, "--text_share"), ({"judged": -1}, "below 0"), ({"data": ""}, "--image_folder"),
        ({"data": "none.json"}, "no readable JSON"), ({"connector": "magic"}, "magic"),
        ({"vision": "no/such"}, "no vision encoder"), ({"language": "no/such"}, "no language model"),
        ({"resume": True}, "no checkpoint"), ({"resume": True, "zero_stage": 2}, "no checkpoint"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line_and_nothing_is_written(lesson, tmp_path, flags, says):
    with pytest.raises(UserError, match=says) as found:
        teach.main(replace(lesson, out=str(tmp_path / "new"), **flags))
    assert "\n" not in str(found.value) and not (tmp_path / "new").exists()
