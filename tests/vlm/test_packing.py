"""vlm/packing.py: packed rows are their samples, no batch loses one, a mixture resumes, broken photos go."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import create_causal_mask

from finetune import llama2_lora
from tests import llamas
from tests.utils.test_images import exif_block
from utils import data, pretrained
from utils.run import UserError
from vlm import packing, packing_samples, samplers
from vlm.collator import Collator
from vlm.prompts import IGNORE


def sample(n, images=(), start=0):
    """n tokens, the first third of which is not learned."""
    ids = [5 + (7 * start + 3 * i * i + i) % 50 for i in range(n)]
    return {"ids": ids, "labels": [IGNORE] * (n // 3) + ids[n // 3 :], "images": list(images)}


def mixed(lengths):
    """Samples, every second one with a picture."""
    return [sample(n, [i] * (i % 2), i) for i, n in enumerate(lengths)]


def llama(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that attention is not nearly uniform and a neighbour is felt
    model.set_attn_implementation(attention)
    return model


def alone(model, samples):
    """The loss of the samples one at a time, by transformers alone: no padding, no mask."""
    total = 0
    for s in samples:
        logits = model(torch.tensor([s["ids"]])).logits[0, :-1]
        labels = torch.tensor(s["labels"][1:], dtype=torch.long)
        total += F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total


def together(model, batch, mask):
    """The loss of a batch with a mask of one's choice."""
    logits = model(batch["ids"], attention_mask=mask, position_ids=batch["positions"]).logits[
        :, :-1
    ]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


APART = 0.1  # what is right agrees to 1e-4, in a sum of losses of about 200
LENGTHS = [3, 17, 9, 1, 12, 5, 20, 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_are_their_samples_loss_and_gradients(attention, parity):
    model, samples = llama(attention), mixed(LENGTHS)
    rows = packing.pack(samples, 24)
    assert max(map(len, rows)) > 2 and len(rows) > 1  # several in a row, and padding in the last
    mine, theirs = packing.loss(model, packing.packed(rows, 0)), alone(model, samples)
    name = f"transformers Llama, {attention}, one sample at a time"
    parity("batching", "packing.packed loss", name, mine, theirs, atol=1e-4)
    mine, theirs = gradients(model, mine), gradients(model, theirs)
    parity("batching", "packing.packed gradients", f"{name}, gradients", mine, theirs, atol=1e-4)


def test_padded_batches_are_their_samples(parity):
    model, samples = llama(), mixed(LENGTHS)
    mine = packing.loss(model, packing.pad(samples, 0))
    name = "transformers Llama, sdpa, one sample at a time"
    parity("batching", "packing.pad loss", name, mine, alone(model, samples), atol=1e-4)


def test_a_real_model_with_lora_learns_the_same_from_packed_rows(parity):
    tokenizer, model = pretrained.smollm2()
    model.float()
    llama2_lora.inject(model, ("q_proj",), 4, 8)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)  # at zero lora_A has no gradient
    texts = [
        "Two melons, and a pear.",
        "It rains in the north today",
        "Call it twice; the second call is free.",
    ]
    samples = [
        {"ids": ids, "labels": ids, "images": []}
        for ids in (tokenizer(text)["input_ids"] for text in texts)
    ]
    mine = packing.loss(model, packing.packed([samples], tokenizer.pad_token_id))
    theirs = alone(model, samples)
    name = "SmolLM2-135M, one sample at a time"
    parity("batching", "packing.packed loss", name, mine, theirs, atol=1e-3)
    mine, theirs = gradients(model, mine), gradients(model, theirs)
    assert max(float(g.abs().max()) for g in theirs.values()) > 0.1  # there is something to compare
    parity("batching", "packing.packed gradients of LoRA", name, mine, theirs, atol=1e-3)


def test_a_row_is_that_of_the_flattening_collator(parity):
    row = mixed([6, 4, 9])
    keys = {"input_ids": "ids", "labels": "labels"}
    theirs = DataCollatorWithFlattening(return_tensors="pt")(
        [{k: s[v] for k, v in keys.items()} for s in row]
    )
    mine = packing.packed([row], 0)
    mine = {"input_ids": mine["ids"], "labels": mine["labels"], "position_ids": mine["positions"]}
    theirs = {k: theirs[k] for k in mine}
    parity("batching", "packing.packed", "transformers.DataCollatorWithFlattening", mine, theirs)


def test_the_mask_is_the_one_transformers_finds_in_the_positions(parity):
    # Full rows: of padding it knows nothing
    batch = packing.packed([mixed([6, 4, 9]), mixed([3, 16])], 0)
    for kind, dtype in (("sdpa", None), ("eager", torch.float32)):
        theirs = create_causal_mask(
            config=llama(kind).config, inputs_embeds=torch.zeros(2, 19, 32), attention_mask=None,
            cache=None, position_ids=batch["positions"],
        )  # fmt: skip
        mine = packing.block_mask(batch["segments"], dtype)
        assert mine.dtype == theirs.dtype
        parity(
            "batching",
            "packing.block_mask",
            f"transformers create_causal_mask, {kind}",
            mine,
            theirs,
        )


def test_a_padded_batch_is_that_of_the_seq2seq_collator(parity):
    tokenizer, _ = pretrained.smollm2()
    samples = mixed([6, 4, 9])
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)
    theirs = collate([{"input_ids": s["ids"], "labels": s["labels"]} for s in samples])
    mine = packing.pad(samples, tokenizer.pad_token_id)
    mine = {"input_ids": mine["ids"], "attention_mask": mine["mask"], "labels": mine["labels"]}
    parity("batching", "packing.pad", "transformers.DataCollatorForSeq2Seq", mine, dict(theirs))


def test_no_sample_feels_its_neighbours():
    model, rows = llama(), packing.pack(mixed(LENGTHS), 24)
    batch = packing.packed(rows, 0)
    embeds = model.get_input_embeddings()(batch["ids"]).detach().requires_grad_()
    states = model.model(
        inputs_embeds=embeds,
        attention_mask=packing.attention_mask(model, batch),
        position_ids=batch["positions"],
    )[0]
    second = batch["segments"] == 2
    (felt,) = torch.autograd.grad(states[second].sum(), embeds)
    assert felt[second].abs().max() > 0 and felt[~second].abs().max() == 0


# what goes wrong elsewhere


def test_known_error_a_row_without_its_mask_is_one_long_text():
    model, samples = llama(), mixed(LENGTHS)
    batch = packing.packed(packing.pack(samples, 24), 0)
    right = alone(model, samples)
    torch.testing.assert_close(together(model, batch, packing.block_mask(batch["segments"])), right)
    plain = together(model, batch, (batch["segments"] > 0).long())
    assert (plain - right).abs() > APART


def test_known_error_eager_attention_adds_true_as_one():
    model, samples = llama("eager"), mixed(LENGTHS)
    batch, right = packing.packed(packing.pack(samples, 24), 0), alone(model, samples)
    mask = packing.block_mask(batch["segments"])
    assert (together(model, batch, mask) - right).abs() > APART  # no error message, and no mask
    torch.testing.assert_close(together(model, batch, packing.attention_mask(model, batch)), right)


def test_known_error_positions_that_go_on_hurt_models_with_a_vector_for_each():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    samples = mixed(LENGTHS)
    batch = packing.packed(packing.pack(samples, 24), 0)
    gone_on = batch | {
        "positions": torch.arange(24).repeat(len(batch["ids"]), 1)[:, : batch["ids"].shape[1]]
    }
    mask = packing.block_mask(batch["segments"])
    gpt2, rotary = GPT2LMHeadModel(config).eval(), llama()
    torch.testing.assert_close(together(gpt2, batch, mask), alone(gpt2, samples))
    assert (together(gpt2, gone_on, mask) - alone(gpt2, samples)).abs() > APART
    # rotary positions are relative: a Llama with the mask does not mind
    torch.testing.assert_close(together(rotary, gone_on, mask), alone(rotary, samples))


def test_known_error_the_first_token_of_a_sample_predicted_by_its_neighbour():
    samples = [{"ids": [5, 6, 7], "labels": [5, 6, 7], "images": []} for _ in range(3)]
    batch = packing.packed([samples], 0)
    assert batch["labels"].tolist() == [[IGNORE, 6, 7] * 3]
    assert batch["positions"].tolist() == [[0, 1, 2] * 3] and batch["segments"].tolist() == [
        [1, 1, 1, 2, 2, 2, 3, 3, 3]
    ]
    # Padding has position 0: no table of positions is too short
    uneven = packing.packed([samples, samples[:1]], 0)
    assert uneven["positions"][1].tolist() == [0, 1, 2] + [0] * 6
    assert uneven["segments"][1].tolist() == [1] * 3 + [0] * 6
    model = llama()
    torch.testing.assert_close(packing.loss(model, batch), alone(model, samples))
    wrong = packing.loss(model, batch | {"labels": batch["ids"]})
    assert wrong > 1.2 * alone(model, samples)


# rows and batches


def test_pack_finds_the_best_rows_where_they_are_known():
    rows = packing.pack(mixed([2, 4, 6, 3, 5]), 10)
    assert [[len(s["ids"]) for s in row] for row in rows] == [[6, 4], [5, 3, 2]]
    rows = packing.pack(mixed([8, 7, 2, 3]), 10)  # best fit: the 3 beside the 7, the 2 beside the 8
    assert [[len(s["ids"]) for s in row] for row in rows] == [[8, 2], [7, 3]]
    rows = packing.pack(mixed([7, 8, 6, 2, 1]), 10)
    assert [[len(s["ids"]) for s in row] for row in rows] == [[8, 2], [7, 1], [6]]


def test_pack_loses_nothing_and_wastes_little():
    random = np.random.default_rng(0)
    samples = mixed(random.integers(1, 400, 500))
    rows = packing.pack(samples, 512)
    assert max(sum(len(s["ids"]) for s in row) for row in rows) <= 512
    assert sorted(id(s) for row in rows for s in row) == sorted(map(id, samples))
    assert len(rows) <= 1.02 * -(-sum(len(s["ids"]) for s in samples) // 512)
    assert packing.pack([], 8) == []


def test_by_length_sees_every_sample_once_and_pads_little():
    lengths = np.random.default_rng(0).integers(1, 500, 1003).tolist()
    batches = samplers.by_length(lengths, 8, seed=1, epoch=0)
    assert (
        sorted(i for batch in batches for i in batch) == list(range(1003))
        and max(map(len, batches)) == 8
    )
    useful = sum(lengths) / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert useful > 0.95
    first = [max(lengths[i] for i in batch) for batch in samplers.by_length(lengths[:300], 8)]
    # The order of the batches is no curriculum
    assert first != sorted(first) and first != sorted(first, reverse=True)
    assert batches == samplers.by_length(lengths, 8, seed=1, epoch=0)
    again = samplers.by_length(lengths, 8, seed=1, epoch=1)
    assert {tuple(sorted(b)) for b in batches} != {tuple(sorted(b)) for b in again}


@pytest.mark.parametrize(
    ("count", "batch", "ranks"), [(40, 4, 1), (41, 4, 2), (97, 3, 4), (9, 8, 2), (16, 1, 4)]
)
def test_by_modality_keeps_ranks_in_step(count, batch, ranks):
    random = np.random.default_rng(0)
    samples = mixed(random.integers(1, 500, count))
    random.shuffle(samples)  # else every other one has a picture
    batches = samplers.by_modality(samples, batch, seed=3, epoch=2, ranks=ranks)
    assert sorted(i for rank in batches for step in rank for i in step) == list(range(count))
    assert len(batches) == ranks and len({len(rank) for rank in batches}) == 1
    for step in zip(*batches):
        assert len({bool(samples[i]["images"]) for part in step for i in part}) == 1
        sizes = [len(part) for part in step]
        assert 1 <= min(sizes) <= max(sizes) <= min(batch, min(sizes) + 1)
    assert batches == samplers.by_modality(samples, batch, seed=3, epoch=2, ranks=ranks)
    assert batches != samplers.by_modality(samples, batch, seed=3, epoch=3, ranks=ranks)


def test_the_order_of_modalities_is_mixed():
    samples = mixed([5] * 400)
    (steps,) = samplers.by_modality(samples, 4)
    kinds = [bool(samples[step[0]]["images"]) for step in steps]
    assert 25 < sum(a != b for a, b in zip(kinds, kinds[1:])) < 75  # of 99


# the mixture


def mixture(seed=0, **weights):
    sources = {
        "photos": [("p", i) for i in range(30)],
        "words": [("w", i) for i in range(7)],
        "none": [],
    }
    return samplers.Mixture(sources, {"photos": 3, "words": 1, "none": 0} | weights, seed)


def test_a_resumed_mixture_is_an_uninterrupted_one():
    whole = [x for x, _ in zip(mixture(), range(200))]
    for stop in (0, 1, 37, 123):
        first = mixture()
        head = [next(first) for _ in range(stop)]
        state = json.loads(json.dumps(first.state_dict()))  # plain numbers
        second = mixture()
        [next(second) for _ in range(5)]  # what it did before is forgotten
        second.load_state_dict(state)
        assert head + [next(second) for _ in range(200 - stop)] == whole
    other = [x for x, _ in zip(mixture(seed=1), range(200))]
    assert [x[0] for x in other] != [x[0] for x in whole]  # another seed, another order of sources
    # And inside of each
    assert [x for x in other if x[0] == "p"][:30] != [x for x in whole if x[0] == "p"][:30]


def test_a_mixture_keeps_its_weights_and_uses_up_a_source_before_it_repeats():
    drawn = [x for x, _ in zip(mixture(), range(4000))]
    photos, words = ([i for kind, i in drawn if kind == k] for k in "pw")
    assert abs(len(photos) / 4000 - 0.75) < 0.03  # four standard errors
    for items, size in ((photos, 30), (words, 7)):
        epochs = [tuple(items[k : k + size]) for k in range(0, len(items) - size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) > 0.9 * len(epochs)  # shuffled anew


def test_the_state_leaves_out_what_workers_hold_ready():
    """A DataLoader with workers draws ahead of training: the plain state would skip what nobody learned from."""
    samples = mixed([4] * 20)
    sources = {"a": list(range(10)), "b": list(range(10, 20))}
    make = lambda: samplers.Mixture(sources, {"a": 1, "b": 2}, seed=4)  # noqa: E731
    expected = [i for i, _ in zip(make(), range(24))]
    draws = make()
    loader = iter(DataLoader(samples, batch_size=3, sampler=draws, num_workers=1, collate_fn=list))
    seen = [s for _ in range(4) for s in next(loader)]
    assert [s["ids"] for s in seen] == [samples[i]["ids"] for i in expected[:12]]
    ahead = sum(draws.drawn.values()) - 12
    assert ahead > 0
    state = draws.state_dict(ahead)
    other = make()
    other.load_state_dict(state)
    assert [next(other) for _ in range(12)] == expected[12:]


def test_bad_mixtures():
    for weights, says in (
        ({"photos": -1}, "0 or more"), ({"photos": float("nan")}, "0 or more"),
        ({"photos": 0, "words": 0}, "not all 0"), ({"none": 1}, "nothing to draw"), ({"tables": 1}, "sources are"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            mixture(**weights)
    state = mixture().state_dict()
    for other in (mixture(seed=1), mixture(words=2)):
        with pytest.raises(UserError, match="another mixture"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="ahead"):
        mixture().state_dict(ahead=1)


# the collator


def load(path):
    """Pictures 3, 5 and 9 are broken."""
    if path in (3, 5, 9):
        raise OSError("truncated file")
    return torch.full((3, 2, 2), float(path))


def test_a_broken_picture_is_replaced_by_a_sample_with_a_picture_and_counted():
    samples = mixed([8 + i for i in range(20)])
    collator = Collator(load, samples, pad_id=0)
    batch = collator([samples[1], samples[3], samples[7], samples[9]])
    assert (
        collator.broken >= 2
        and batch["ids"].shape[0] == 4
        and batch["images"].shape == (4, 3, 2, 2)
    )
    for ids, mask, image in zip(batch["ids"], batch["mask"], batch["images"]):
        # The words are those of the picture: the whole sample was replaced
        number = int(image[0, 0, 0])
        assert ids[: mask.sum()].tolist() == samples[number]["ids"] and number % 2 == 1
    before = collator.broken
    # The same stand-in again
    torch.testing.assert_close(collator([samples[3]])["images"], batch["images"][1:2])
    assert collator.broken > before
    assert collator([samples[0], samples[2]])["images"] is None  # words alone read nothing


def test_pictures_follow_their_samples_into_packed_rows():
    samples = mixed([3, 5, 9, 17, 2, 11, 6, 12])
    batch = Collator(load, samples, pad_id=0, length=20)([samples[i] for i in (1, 0, 2, 7, 6)])
    order = []
    for row, segments in zip(batch["ids"], batch["segments"]):
        for number in range(1, int(segments.max()) + 1):
            ids = row[segments == number].tolist()
            order += next(s["images"] for s in samples if s["ids"] == ids)
    assert order == batch["images"][:, 0, 0, 0].tolist() and sorted(order) == [1, 7]
    # These cannot stand in: they do not fit into a row
    long = [sample(30, [k], k) for k in range(11, 40)]
    short = Collator(load, [*long, *samples], pad_id=0, length=20)([samples[3]])
    assert int(short["images"][0, 0, 0, 0]) in (1, 7)
    again = Collator(load, samples, pad_id=0, length=20)
    # One sample twice, one replaced
    assert len(again([samples[1], samples[3], samples[1]])["images"]) == 3
    assert again.broken >= 1


def test_workers_read_the_pictures_and_count_what_is_broken():
    samples = mixed([6] * 16)
    alone = Collator(load, samples, pad_id=0)
    expected = [alone(samples[i : i + 4]) for i in range(0, 16, 4)]
    collator = Collator(load, samples, pad_id=0)
    loader = DataLoader(samples, 4, num_workers=2, collate_fn=collator)
    for mine, theirs in zip(loader, expected, strict=True):
        for key in theirs:
            torch.testing.assert_close(mine[key], theirs[key])
    assert collator.broken == alone.broken >= 3


def test_when_all_are_broken_it_says_so_after_some_tries():
    asked = []

    def nothing(path):
        asked.append(path)
        raise UserError(f"{path} is not a readable image")

    samples = mixed([4] * 60)
    with pytest.raises(UserError, match="no picture that can be read in 6 tries"):
        Collator(nothing, samples, pad_id=0, tries=6)(samples[:2])
    assert len(asked) == len(set(asked)) == 6
    asked.clear()
    with pytest.raises(UserError, match="no picture"):
        Collator(nothing, samples[:2], pad_id=0)(samples[:2])
    assert asked == [1]  # nobody to stand in, and no use in trying it again


def test_a_bug_in_the_loader_is_not_a_broken_picture():
    samples = mixed([4] * 8)
    with pytest.raises(AttributeError):
        Collator(lambda path: path.nothing, samples, pad_id=0)(samples)


def test_real_files_one_of_them_broken(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    samples = [sample(5, [tmp_path / f"{i}.png"], i) for i in range(3)]
    collator = Collator(lambda path: data.to_float(data.read_image(path, 8)), samples, pad_id=0)
    assert collator(samples)["images"].shape == (3, 3, 8, 8) and collator.broken == 1


def test_pictures_of_cameras_and_microscopes_are_read_right(tmp_path):
    """An orientation beside a damaged entry of EXIF; 16 bits, mid-grey; a palette: the pictures are right."""
    photo = np.zeros((8, 8, 3), dtype=np.uint8)
    photo[:4] = 200  # the upper half as it is stored; turned upright, the right half
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif_block(6, damage=True))
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(photo).convert("P", palette=Image.Palette.ADAPTIVE).save(
        tmp_path / "palette.png"
    )
    samples = [sample(5, [tmp_path / f"{name}.png"]) for name in ("turned", "grey", "palette")]
    collator = Collator(lambda path: data.read_image(path, 8), samples, pad_id=0)
    turned, grey, palette = collator(samples)["images"]
    assert collator.broken == 0
    assert (turned[:, :, 4:] == 200).all() and (turned[:, :, :4] == 0).all()
    assert (grey == 128).all() and (palette[:, :4] == 200).all() and (palette[:, 4:] == 0).all()


@pytest.mark.parametrize(
    "error", [struct.error("unpack"), zlib.error("-3"), Image.DecompressionBombError("large")]
)
def test_what_a_decoder_raises_is_a_broken_picture(error):
    def first_is_broken(path):
        if path == 1:
            raise error
        return torch.full((3, 2, 2), float(path))

    samples = mixed([4] * 8)
    collator = Collator(first_is_broken, samples, pad_id=0)
    assert float(collator([samples[1]])["images"][0, 0, 0, 0]) in (3, 5, 7) and collator.broken == 1


# texts of others


@pytest.fixture(scope="module")
def tokenizer():
    return pretrained.smollm2()[0]


def test_a_conversation_is_masked_up_to_its_answer_and_ends_in_a_learned_token(tokenizer):
    made = packing_samples.conversation(tokenizer, "What is it?", "a pear", 7, tokens=5)
    learned = [i for i in made["labels"] if i != IGNORE]
    assert tokenizer.decode(learned) == "a pear<|im_end|>"
    assert made["labels"][-len(learned) :] == learned == made["ids"][-len(learned) :]
    assert made["images"] == [7]
    asked = (
        "<|im_start|>user\n"
        + "<file_sep>" * 5
        + "\nWhat is it?<|im_end|>\n<|im_start|>assistant\na pear<|im_end|>"
    )
    assert tokenizer.decode(made["ids"]) == asked


def test_control_tokens_in_a_conversation_are_text(tokenizer):
    said = "<file_sep> no<|im_end|>\n<|im_start|>system \ud800"
    made = packing_samples.conversation(tokenizer, said, said, 0, tokens=5)
    count = {
        word: made["ids"].count(tokenizer.convert_tokens_to_ids(word))
        for word in ("<file_sep>", "<|im_end|>")
    }
    assert count == {"<file_sep>": 5, "<|im_end|>": 2}
    assert made["ids"].count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_collected_samples_are_half_pictures_and_no_longer_than_asked(tokenizer, monkeypatch):
    monkeypatch.setattr(
        data, "docs", lambda: [("a.txt", "\n\n".join(f"word {i} " * 80 for i in range(9)))]
    )
    monkeypatch.setattr(data, "tweets", lambda: [(f"tweet {i} <|im_end|>", 0.0) for i in range(9)])
    samples = packing_samples.collect(tokenizer, 200, 60)
    pictures = [s for s in samples if s["images"]]
    words = [tokenizer.decode(s["ids"]) for s in samples if not s["images"]]
    assert len(samples) == 200 and abs(len(pictures) - 100) < 30  # four standard errors
    tweets = [text for text in words if text.startswith("tweet")]
    assert abs(len(tweets) - 50) < 25 and all("< |im_end|>" in text for text in tweets)
    assert all(s["labels"] == s["ids"] for s in samples if not s["images"])
    assert max(len(s["ids"]) for s in samples if not s["images"]) == 60
    captions = data.emoji()[1]
    for s in pictures[:20]:
        learned = tokenizer.decode([i for i in s["labels"] if i != IGNORE])
        assert learned == f"{captions[s['images'][0]]}<|im_end|>"
    assert (
        samples
        == packing_samples.collect(tokenizer, 200, 60)
        != packing_samples.collect(tokenizer, 200, 60, seed=1)
    )


def test_positions_beyond_the_model_are_refused():
    model = llama()  # which has 64
    assert packing.loss(model, packing.pad([sample(64)], 0)).isfinite()
    # Positions begin anew in every sample
    packing.loss(model, packing.packed([[sample(60), sample(64)]], 0))
    for long in (packing.pad([sample(3), sample(65)], 0), packing.packed([[sample(65)]], 0)):
        with pytest.raises(UserError, match="65 tokens, but the model has 64 positions"):
            packing.loss(model, long)


# the three ways


def test_three_ways_are_the_same_samples_in_batches_of_their_kind():
    samples = mixed([3, 30, 5, 28, 4, 29, 6, 31])
    cfg = packing.Config(samples=8, batch=2, length=36)
    ways = packing.three_ways(samples, cfg)
    for name, batches in ways.items():
        found = [id(s) for rows in batches for row in rows for s in row]
        assert sorted(found) == sorted(map(id, samples)), name
    sizes = {
        name: [[[len(s["ids"]) for s in row] for row in rows] for rows in ways[name]]
        for name in ways
    }
    assert all(len(row) == 1 for rows in sizes["naive"] + sizes["grouped"] for row in rows)
    spread = [
        max(row[0] for row in rows) - min(row[0] for row in rows) for rows in sizes["grouped"]
    ]
    assert max(spread) <= 2  # neighbours in length
    assert (
        max(max(row[0] for row in rows) - min(row[0] for row in rows) for rows in sizes["naive"])
        > 20
    )
    assert sorted(sum(row) for rows in sizes["packed"] for row in rows) == [28, 36, 36, 36]


def test_measured_tokens_padding_and_loss_are_those_of_the_batches():
    model, samples = llama("eager"), mixed(LENGTHS)
    ways = packing.three_ways(samples, packing.Config(samples=8, batch=3, length=24))
    found = packing.measure(model, ways, 0)
    right = float(alone(model, samples))
    for name, x in found.items():
        assert x["tokens"] == sum(LENGTHS) and x["loss"] == pytest.approx(right, abs=1e-2), name
        assert x["steps"] == len(ways[name]) and x["cpu_seconds"] > 0
    widest = [max(len(s["ids"]) for row in rows for s in row) * len(rows) for rows in ways["naive"]]
    assert found["naive"]["places"] == sum(widest)
    rows = [
        max(sum(len(s["ids"]) for s in row) for row in rows) * len(rows) for rows in ways["packed"]
    ]
    assert found["packed"]["places"] == sum(rows)


# bad input


def test_bad_input():
    with pytest.raises(UserError, match="a sample of 30 tokens does not fit into rows of 20"):
        packing.pack(mixed([3, 30]), 20)
    with pytest.raises(UserError, match="at least one sample"):
        packing.pad([], 0)
    with pytest.raises(UserError, match="needs a label"):
        packing.pad([{"ids": [1, 2], "labels": [1], "images": []}], 0)
    with pytest.raises(
        UserError, match="5 samples with pictures on 2 ranks, --batch 1.*leave out 1 of them"
    ):
        samplers.by_modality(mixed([4] * 10), 1, ranks=2)
    with pytest.raises(UserError, match="leave out 2 of them"):
        samplers.by_modality(mixed([4] * 5), 8, ranks=3)
    with pytest.raises(UserError, match="there must be samples"):
        samplers.by_length([], 4)


def test_the_command_refuses_flags_that_cannot_be_meant(tmp_path):
    for flags in ({"samples": 1}, {"batch": 0}, {"length": 50}, {"rank": 0}, {"length": 8193}):
        with pytest.raises(UserError):
            packing.main(packing.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def tiny(tokenizer):
    """SmolLM2's words before a Llama of a few thousand weights."""
    return tokenizer, llamas.tiny(layers=1, vocabulary=len(tokenizer))


def test_three_ways_see_the_same_samples_and_the_same_loss(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(pretrained, "smollm2", lambda: tiny(tokenizer))
    cfg = packing.Config(samples=6, batch=2, length=128, out=str(tmp_path))
    metrics = packing.main(cfg)
    naive, grouped, packed = (metrics[name] for name in ("naive", "grouped", "packed"))
    assert naive["tokens"] == grouped["tokens"] == packed["tokens"] > 200
    assert naive["padding"] > packed["padding"]
    assert (
        abs(packed["loss"] / naive["loss"] - 1) < 1e-4
        and abs(grouped["loss"] / naive["loss"] - 1) < 1e-4
    )
    rate = {
        name: x["useful tokens a CPU second"] for name, x in metrics.items() if isinstance(x, dict)
    }
    for name in ("naive", "grouped", "packed"):
        x = metrics[name]
        assert x["padding"] == pytest.approx(1 - x["tokens"] / x["places"])
        assert rate[name] == pytest.approx(x["tokens"] / x["cpu_seconds"])
    assert metrics["packed against naive"] == pytest.approx(rate["packed"] / rate["naive"])
    assert (tmp_path / "batching.png").is_file() and (tmp_path / "metrics.json").is_file()


@pytest.mark.long
def test_three_ways_see_the_same_samples_and_the_same_loss_with_the_real_model(tmp_path):
    metrics = packing.main(packing.Config(samples=6, batch=2, length=128, out=str(tmp_path)))
    naive, grouped, packed = (metrics[name] for name in ("naive", "grouped", "packed"))
    assert naive["tokens"] == grouped["tokens"] == packed["tokens"] > 200
    # bf16
    assert (
        abs(packed["loss"] / naive["loss"] - 1) < 0.005
        and abs(grouped["loss"] / naive["loss"] - 1) < 0.005
    )
