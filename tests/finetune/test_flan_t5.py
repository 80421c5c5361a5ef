"""finetune/flan_t5.py: labels shifted as T5 shifts them, LoRA as PEFT's, int8 as bitsandbytes'; bytes and files."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from finetune import flan_t5, lora_inject, peft_io
from finetune.llama2_qlora import by_bitsandbytes
from finetune.quantization import QuantLinear
from finetune.sentiment import IGNORE
from tests.conftest import gradients
from utils import run

PAIRS = [
    ("title: how to ask a question about it", "Asking"),
    ("title: it is", "What it is not"),
] * 3


def tiny() -> Any:
    torch.manual_seed(0)
    config: Any = T5Config(
        vocab_size=120, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config).eval()


def pairs_of(seed=0):
    """ids, mask, labels of three pairs, filled up on the right."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 120, (3, 9))
    mask = (torch.arange(9) < torch.tensor([9, 6, 4])[:, None]).long()
    labels = torch.randint(3, 120, (3, 5))
    labels[1, 3:] = IGNORE
    return ids.masked_fill(mask == 0, 0), mask, labels


def test_labels_are_shifted_and_judged_as_t5_does_it(parity):
    model = tiny()
    ids, mask, labels = pairs_of()
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id
    mine = flan_t5.shift_right(labels, start, pad)
    parity("T5", "flan_t5.shift_right", "T5 _shift_right", mine, model._shift_right(labels), 0)
    ours = flan_t5.loss(model, ids, mask, labels)
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    parity("T5", "flan_t5.loss", "T5ForConditionalGeneration", ours, theirs)
    found = gradients(model, ours)
    other = gradients(model, model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    parity("T5", "flan_t5.loss, gradients", "T5ForConditionalGeneration", found, other, atol=1e-4)


def test_padding_changes_nothing():
    """Of the source by the mask, of the target because it is ignored."""
    model = tiny()
    ids, mask, labels = pairs_of()
    before = flan_t5.loss(model, ids, mask, labels)
    more_ids = torch.cat([ids, torch.full((3, 4), 77)], dim=1)
    more_mask = torch.cat([mask, torch.zeros(3, 4, dtype=torch.long)], dim=1)
    more_labels = torch.cat([labels, torch.full((3, 2), IGNORE)], dim=1)
    torch.testing.assert_close(flan_t5.loss(model, more_ids, more_mask, more_labels), before)
    assert flan_t5.loss(model, more_ids, torch.ones_like(more_mask), more_labels) != before


def test_lora_equals_peft_and_its_files_are_read_there(tmp_path, parity):
    from peft import PeftModel

    model = tiny()
    names = lora_inject.inject(model, ("q", "v"), 4, 8.0)
    # self-attention of the encoder; self- and cross-attention of the decoder
    assert len(names) == 2 * 2 * (1 + 2)
    for p in flan_t5.llama2_full.trainable_parameters(model):
        nn.init.normal_(p, std=0.2)
    lora = flan_t5.llama2_lora.Config(rank=4, alpha=8.0, targets=("q", "v"))
    peft_io.save(model, tmp_path, lora, task_type="SEQ_2_SEQ_LM")
    theirs = PeftModel.from_pretrained(tiny(), str(tmp_path), is_trainable=True).eval()
    ids, mask, labels = pairs_of()
    mine = flan_t5.loss(model, ids, mask, labels)
    other = flan_t5.loss(theirs, ids, mask, labels)
    parity("T5", "lora_inject.inject, T5", "peft lora", mine, other)
    ours = [g for _, g in sorted(gradients(model, mine).items())]
    found = [g for _, g in sorted(gradients(theirs, other).items())]
    parity("T5", "lora_inject.inject, T5, gradients", "peft lora", ours, found, atol=1e-4)


def test_int8_is_that_of_bitsandbytes(parity):
    """The same codes, but for a quotient that fp16 rounds otherwise; they round the input, too."""
    from bitsandbytes import functional as bnb

    base = nn.Linear(64, 48, bias=False)
    base.weight.data = base.weight.data.half().float()
    ours = flan_t5.Int8Linear(base, 8)
    codes, _, _ = bnb.int8_vectorwise_quant(base.weight.detach().half())
    differ = ours.codes != codes
    assert differ.float().mean() < 0.001 and (ours.codes.int() - codes.int()).abs().max() <= 1
    # a matrix on the grid: nothing is rounded
    grid = torch.randint(-127, 128, (48, 64)).float() / 512
    grid[:, 0] = 127 / 512
    base.weight.data = grid
    codes, top, _ = bnb.int8_vectorwise_quant(grid.half())
    mine = flan_t5.Int8Linear(base, 8).dequantize()
    name = "bitsandbytes int8_vectorwise_quant"
    parity("T5", "flan_t5.Int8Linear", name, mine, codes.float() * top[:, None] / 127)
    x = torch.randn(40, 64)
    wanted = x @ grid.T
    for layer in (flan_t5.Int8Linear(base, 8), by_bitsandbytes(base, 8, "", 0, False)):
        assert (layer(x) - wanted).norm() < 0.02 * wanted.norm()


def test_the_type_of_a_weight_is_asked_without_dequantising(monkeypatch):
    """T5 looks at `wo.weight` at every pass: int8 leaves its input in bf16."""
    model = tiny()
    cfg = flan_t5.Config(int8=True, rank=2)
    flan_t5.adapt(model, cfg)
    calls = []
    whole = QuantLinear.dequantize
    monkeypatch.setattr(
        QuantLinear, "dequantize", lambda self, dtype: calls.append(dtype) or whole(self, dtype)
    )
    with torch.no_grad(), run.autocast(torch.device("cpu")):
        flan_t5.loss(model, *pairs_of())
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(calls) == len(layers) == 2 * 7 + 2 * 11
    assert set(calls) == {torch.bfloat16}


@pytest.mark.parametrize("backend", ["ours", "bitsandbytes"])
def test_int8_stores_all_linear_layers_but_the_head_and_trains_lora_alone(backend):
    model = tiny()
    flan_t5.adapt(model, flan_t5.Config(int8=True, backend=backend, rank=2))
    plain = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert plain == ["lm_head"]
    kind = flan_t5.Int8Linear if backend == "ours" else "Linear8bitLt"
    block = model.decoder.block[1]
    for layer in (block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v.base):
        assert type(layer) is kind or type(layer).__name__ == kind
    assert model.shared.weight.dtype == torch.bfloat16
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    ids, mask, labels = pairs_of()
    flan_t5.loss(model, ids, mask, labels).backward()
    b = block.layer[0].SelfAttention.q.lora_B
    assert b.grad is not None and b.grad.abs().sum() > 0


def test_a_plain_run_keeps_linear_layers_in_bf16():
    model = tiny()
    flan_t5.adapt(model, flan_t5.Config(rank=2, targets=("k",)))
    assert model.encoder.block[0].layer[0].SelfAttention.k.base.weight.dtype == torch.bfloat16
    assert type(model.encoder.block[0].layer[0].SelfAttention.q) is nn.Linear


def test_pairs_are_headings_and_their_first_paragraphs():
    pairs = flan_t5.titled_paragraphs()
    assert len(pairs) > 4000
    assert ("title: Django supports MariaDB 10.5 and higher.", "MariaDB notes") in pairs
    assert all("\n" not in part for pair in pairs for part in pair)


def test_batches_are_drawn_by_seed_and_step_and_padding_is_ignored():
    tokenizer = flan_t5.train_tokenizer([text for pair in PAIRS for text in pair], 60)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    cfg = flan_t5.Config(batch=16, source=8, target=5)
    ids, mask, labels = flan_t5.make_batch(tokenizer, PAIRS, cfg, 3)
    assert ids.shape[1] <= 8 and labels.shape[1] <= 5
    assert (ids[mask == 0] == 0).all() and (labels != 0).all()
    # the end is a target, too
    for row in labels:
        kept = row[row != IGNORE]
        assert len(kept) == 5 or kept[-1] == 1
    again = flan_t5.make_batch(tokenizer, PAIRS, cfg, 3)
    assert all(torch.equal(a, b) for a, b in zip((ids, mask, labels), again))
    other = flan_t5.make_batch(tokenizer, PAIRS, replace(cfg, seed=1), 3)
    later = flan_t5.make_batch(tokenizer, PAIRS, cfg, 4)
    assert all(not torch.equal(ids, found[0]) for found in (other, later))
    assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith("title:")


def test_the_random_model_has_the_shape_of_flan_t5_small():
    with torch.device("meta"):
        model = flan_t5.random_t5()
    assert sum(p.numel() for p in model.parameters()) == 76_961_152
    assert model.lm_head.weight is not model.shared.weight


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    tiny().save_pretrained(path)
    texts = [text for pair in PAIRS for text in pair]
    flan_t5.train_tokenizer(texts, 60).save_pretrained(path)
    return str(path)


def small(folder, path, **more):
    sizes = {"steps": 2, "batch": 2, "pairs": 16, "rank": 2}
    return flan_t5.Config(model=folder, out=str(path / "out"), **sizes | more)


def test_three_ways_are_compared(folder, tmp_path):
    found = flan_t5.main(small(folder, tmp_path, compare=True))
    names = ["bf16", "int8, ours", "int8, bitsandbytes"]
    assert list(found) == names
    held = [found[name]["weights, MiB"] for name in names]
    assert held[1] < held[0] and held[2] < held[0]
    for name in names:
        row = found[name]
        # eight steps an epoch
        assert row["minutes an epoch"] == pytest.approx(8 * row["seconds a step"] / 60)
        assert row["tensors, MiB"] > row["weights, MiB"] and 0 < row["loss"] < 10
    assert (tmp_path / "out/metrics.json").is_file()


def test_a_run_writes_an_adapter_that_this_chapter_loads(folder, tmp_path):
    found = flan_t5.main(small(folder, tmp_path, int8=True))
    assert set(found) == {"int8, ours", "process, MiB"}
    names = peft_io.load(tiny(), tmp_path / "out/adapter")
    assert len(names) == 12


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"batch": 0}, "start at 1"),
        ({"steps": 0}, "start at 1"),
        ({"lr": 0.0}, "--lr"),
        ({"backend": "bitsandbytes"}, "add --int8"),
        ({"compare": True, "resume": True}, "--resume"),
        ({"targets": ("w",)}, "names no linear layer"),
        ({"model": "no/such"}, "no encoder-decoder at"),
        ({"model": "nowhere at all"}, "neither a folder"),
    ],
)
def test_bad_flags_are_refused(flags, says, folder, tmp_path):
    with pytest.raises(run.UserError, match=says):
        flan_t5.main(replace(small(folder, tmp_path), **flags))


def test_a_folder_with_another_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', "utf-8")
    with pytest.raises(run.UserError, match="no encoder-decoder at") as error:
        flan_t5.main(flan_t5.Config(model=str(tmp_path), out=str(tmp_path / "out")))
    assert "\n" not in str(error.value)
