"""Pretraining: n-grams are probabilities, FLOPs are PyTorch's, two ranks learn what one does, runs can be resumed."""

import math
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from training import flops, ngram, pretrain_model, pretrain_text, ranks
from training import pretrain_tiny_llama as tiny
from training.lr_schedule import learning_rate
from utils import checkpoint, data, run

CPU = torch.device("cpu")
PAGES = [(path, text[:3000]) for path, text in data.docs()[::12]]


@pytest.fixture(autouse=True)
def few_pages(monkeypatch):
    monkeypatch.setattr(data, "docs", lambda: PAGES)


def config(folder, **more):
    flags = dict(
        steps=6,
        batch=4,
        length=16,
        vocabulary=400,
        width=64,
        layers=1,
        order=2,
        save_every=3,
        bf16=False,
    )
    return tiny.Config(**flags | {"out": str(folder)} | more)


def cosine(cfg, step):
    """The schedule of the paper, with a warm-up of a twentieth."""
    return learning_rate(step, cfg.steps, cfg.lr, warmup=cfg.steps // 20, decay="cosine")


def weights(folder):
    return checkpoint.read(folder / "state.safetensors")[0]


def of_model(state):
    return {k: v for k, v in state.items() if k.startswith("state.model.")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: folder}: a run of one process, the same broken off after half and resumed, and the same on two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "docs", lambda: PAGES)
        folders = {k: tmp_path_factory.mktemp(k) for k in ("whole", "resumed", "two", "moved")}
        metrics = tiny.main(config(folders["whole"]))
        for name in ("resumed", "moved"):
            with pytest.raises(KeyboardInterrupt):
                broken_off(config(folders[name]))
        tiny.main(config(folders["resumed"], resume=True))
        run.output(folders["two"], cfg := config(folders["two"]))
        pretrain_text.tokens(cfg)
    given = config(folders["two"]), config(folders["moved"], resume=True)
    found = ranks.launch(on_two_ranks, given, 2, timeout=timedelta(seconds=60))
    return SimpleNamespace(
        **folders, ranks=found, loss=metrics["final_loss"], bits=metrics["bits_per_byte"]
    )


def broken_off(cfg):
    """Stops as if it were killed right after its first checkpoint."""
    real = checkpoint.save_state

    def save_and_stop(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_state", save_and_stop)
        tiny.main(cfg)


def on_two_ranks(given):
    """A run from the start, one from the middle, and the mean gradient of one batch by us and by DDP."""
    fresh, resumed = given
    whole = tiny.worker(fresh)
    found = {
        "loss": whole["losses"],
        "scores": whole["scores"],
        "resumed": tiny.worker(resumed)["losses"],
    }
    ids, _ = pretrain_text.tokens(fresh)
    pieces = pretrain_text.draw(ids["learn"], fresh, 0).chunk(2)[dist.get_rank()]
    for name in ("ours", "ddp"):
        model = pretrain_model.llama(fresh)
        network = DistributedDataParallel(model) if name == "ddp" else model
        pretrain_model.losses(network, pieces).mean().backward()
        if name == "ours":
            tiny.average([p.grad for p in model.parameters()])
        found[name] = {k: p.grad.tolist() for k, p in model.named_parameters()}
    return found


def test_two_ranks_average_as_ddp_does(runs, parity):
    for found in runs.ranks:
        ours, theirs = ({k: torch.tensor(v) for k, v in found[x].items()} for x in ("ours", "ddp"))
        parity(
            "Pretraining", "average, gradients", "DistributedDataParallel", ours, theirs, atol=1e-6
        )


def test_two_ranks_learn_what_one_does(runs):
    one, two = of_model(weights(runs.whole)), of_model(weights(runs.two))
    for k in one:
        torch.testing.assert_close(two[k], one[k], atol=1e-5, rtol=0)
    assert runs.ranks[0]["loss"] == runs.ranks[1]["loss"]
    assert np.mean(runs.ranks[0]["loss"]) == pytest.approx(runs.loss, abs=1e-5)
    assert all(found["scores"][-1][1] == pytest.approx(runs.bits, abs=1e-5) for found in runs.ranks)


def test_pages_to_learn_are_what_is_read(runs):
    """The loss of the first step is that of the untrained model on the pieces of step 0, of pages that are learned."""
    ids, _ = pretrain_text.tokens(cfg := config(runs.whole))
    value = (
        pretrain_model.losses(pretrain_model.llama(cfg), pretrain_text.draw(ids["learn"], cfg, 0))
        .mean()
        .item()
    )
    assert runs.ranks[0]["loss"][0] == pytest.approx(value, abs=1e-5)


def test_tokenizer_is_trained_without_held_out_pages(tmp_path, monkeypatch):
    real, seen = pretrain_text.learn_tokens, []
    monkeypatch.setattr(
        pretrain_text, "learn_tokens", lambda texts, size: seen.append(texts) or real(texts, size)
    )
    pretrain_text.tokens(config(tmp_path))
    assert seen == [pretrain_text.split(PAGES)[0]]


class Watched(torch.optim.SGD):
    """Notes what it is given at each step, and stands still."""

    def step(self, closure=None):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        self.seen.append((self.param_groups[0]["lr"], torch.cat(grads).norm().item()))


def test_gradients_are_clipped_and_rates_are_those_of_the_schedule(tmp_path):
    cfg = config(tmp_path, steps=40)
    model, ids = pretrain_model.llama(cfg), torch.randint(1, 400, (999,))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # a gradient longer than 1
    optimizer = Watched(model.parameters(), 1.0)
    optimizer.seen = []
    losses = tiny.train(model, optimizer, ids, cfg, CPU, start=10)
    value = next(losses)
    rate, length = optimizer.seen[0]
    assert rate == cosine(cfg, 10) < cfg.lr and length == pytest.approx(1.0, abs=1e-3)
    alone = pretrain_model.losses(model, pretrain_text.draw(ids, cfg, 10)).mean()
    gradient = torch.autograd.grad(alone, list(model.parameters()))
    assert alone.item() == pytest.approx(value, abs=1e-5)
    assert torch.cat([g.flatten() for g in gradient]).norm() > 1.5
    next(losses)
    assert optimizer.seen[1][0] == cosine(cfg, 11) and optimizer.seen[1][1] <= 1.001


def test_a_run_broken_off_and_resumed_is_the_whole_run_bit_for_bit(runs):
    whole, resumed = weights(runs.whole), weights(runs.resumed)
    assert whole.keys() == resumed.keys() and len(of_model(whole)) > 5
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_it_resumes_on_another_number_of_ranks(runs):
    one, two = of_model(weights(runs.whole)), of_model(weights(runs.moved))
    for k in one:
        torch.testing.assert_close(two[k], one[k], atol=1e-5, rtol=0)


def test_the_folder_is_an_ordinary_model(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        kind.from_pretrained(runs.whole / "model") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    state = of_model(weights(runs.whole))
    for name, p in model.state_dict().items():
        assert torch.equal(p, state[f"state.model.{name}"])
    ids = tokenizer(text := "How do I paginate?\n\n   • a → b")["input_ids"]
    assert (
        tokenizer.decode(ids) == text
        and ids == pretrain_text.tokens(config(runs.whole))[1][0].encode(text).ids
    )
    for name in ("bits.png", "samples.txt", "metrics.json", "config.json"):
        assert (runs.whole / name).stat().st_size > 0


def test_it_learns(tmp_path):
    found = tiny.worker(config(tmp_path, steps=60, lr=1e-2, save_every=0))
    assert found["losses"][0] == pytest.approx(math.log(400), abs=0.2)
    assert np.mean(found["losses"][-10:]) < 0.85 * found["losses"][0]
    assert found["scores"][-1][1] < found["scores"][0][1]
    assert [i for i, _ in found["scores"]] == [1, 3, 7, 15, 30, 60]


def by_hand(text, order, context, byte):
    """Interpolated Kneser-Ney of one text straight from its definition, with dictionaries."""
    padded = bytes(order) + text
    grams = [
        Counter(padded[i - k : i + 1] for i in range(order, len(padded))) for k in range(order + 1)
    ]

    def p(k):
        if k < 0:
            return 1 / 256
        counts = grams[k] if k == order else Counter(g[1:] for g in grams[k + 1])
        discount = (c := Counter(counts.values()))[1] / (c[1] + 2 * c[2])
        here = {g[-1]: n for g, n in counts.items() if g[:-1] == context[len(context) - k :]}
        if not here:
            return p(k - 1)
        return (max(here.get(byte, 0) - discount, 0) + discount * len(here) * p(k - 1)) / sum(
            here.values()
        )

    return p(order)


TEXT = "the theme of these models: them, then themes; a model, a mode, another one\n"


@pytest.mark.parametrize("order", [0, 1, 3])
def test_ngrams_are_kneser_ney(order):
    grams = ngram.windows([" themy model"], order)
    ours = ngram.KneserNey([TEXT], order).probability(grams, order)
    text = bytes(order) + b" themy model"
    theirs = [
        by_hand(TEXT.encode(), order, text[i : i + order], text[i + order])
        for i in range(len(grams))
    ]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_probabilities_sum_to_one():
    learn, held = pretrain_text.split(PAGES)
    ngrams = ngram.KneserNey(learn, 7)
    last = np.arange(256, dtype=np.uint64)
    # Also contexts never seen
    for gram in [*ngram.windows(held, 7)[::500], np.uint64(0), np.uint64(2**64 - 1)]:
        for order in range(8):
            p = ngrams.probability((gram & ~np.uint64(255)) | last, order)
            assert p.min() > 0 and p.sum() == pytest.approx(1, abs=1e-9)


def test_a_longer_ngram_of_the_same_counts_is_better_on_what_it_has_read():
    learn, _ = pretrain_text.split(PAGES)
    ngrams = ngram.KneserNey(learn, 4)
    bits = [ngrams.bits(learn, k) for k in range(5)]
    assert bits == sorted(bits, reverse=True) and bits[0] < 8


def test_pages_held_out_are_not_learned():
    learn, held = pretrain_text.split(
        pages := [(f"{p}/{i}", f"{p}{i}") for p in ("django", "celery") for i in range(400)]
    )
    assert sorted(learn + held) == sorted(t for _, t in pages) and not set(learn) & set(held)
    assert len(held) == pytest.approx(25, abs=15)
    assert pretrain_text.split(pages[::-1])[1] == held[::-1]  # the path alone decides


def test_tokens_are_lossless_and_the_same_again():
    texts = [text for _, text in PAGES]
    a, b = (pretrain_text.learn_tokens(texts, 500) for _ in range(2))
    assert (
        a.to_str() == b.to_str()
        and a.get_vocab_size() == 500
        and a.token_to_id(pretrain_text.END) == 0
    )
    assert all(a.decode(a.encode(t).ids) == t for t in [*texts, "never seen: \t日本 \x7f"])
    every_byte = pretrain_text.learn_tokens(texts, 257)
    assert len(every_byte.encode("Größe\n").ids) == len("Größe\n".encode())


@pytest.mark.parametrize("rows,length", [(1, 16), (3, 40)])
def test_flops_are_those_that_torch_counts(rows, length, parity):
    model = pretrain_model.llama(tiny.Config(width=128, vocabulary=300))
    pieces = torch.randint(300, (rows, length + 1))
    with FlopCounterMode(display=False) as forward:
        pretrain_model.losses(model, pieces)
    parity(
        "Pretraining",
        "forward_flops",
        "FlopCounterMode",
        flops.forward_flops(model.config, rows, length) / 1.0,
        forward.get_total_flops() / 1.0,
    )
    ours = flops.flops_per_token(model, length) * rows * length
    assert (
        ours
        == flops.counted_flops(model, pieces)
        == 3 * flops.forward_flops(model.config, rows, length)
    )


def test_losses_are_the_library_s(parity):
    model = pretrain_model.llama(tiny.Config(width=64, vocabulary=300))
    pieces = torch.randint(300, (2, 17))
    theirs = model(input_ids=pieces, labels=pieces).loss
    parity(
        "Pretraining",
        "losses, mean",
        "LlamaForCausalLM",
        pretrain_model.losses(model, pieces).mean(),
        theirs,
    )


@pytest.mark.parametrize("length", [8, 9, 64])
def test_bits_count_every_token_once(length):
    """A model that knows nothing: log2 V bits for each token but the end tokens, however the text is cut."""
    cfg = tiny.Config(length=length, bf16=False)
    for m in (2, 7, 8, 9, 40, 41, 130):
        ids = torch.cat([torch.tensor([0]), torch.randint(1, 30, (m - 1,))])
        ids[m // 2] = 0  # another page

        def blind(input_ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 32))

        assert tiny.bits_per_byte(blind, ids, 10, cfg, CPU) == pytest.approx(
            5 * int((ids != 0).sum()) / 10
        )


def test_learning_rate_is_the_library_s_cosine(parity):
    from transformers import get_cosine_schedule_with_warmup

    cfg = tiny.Config(steps=100, lr=1.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 5, 100)
    theirs = []
    for _ in range(100):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = [cosine(cfg, i) for i in range(100)]
    parity(
        "Pretraining",
        "learning_rate, after warm-up",
        "get_cosine_schedule_with_warmup",
        ours[5:],
        theirs[5:],
    )
    # Ours does not waste the first step on zero
    assert ours[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_only_matrices_decay():
    model = pretrain_model.llama(tiny.Config(width=64, vocabulary=300))
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = pretrain_model.adamw(model, tiny.Config(lr=0.1, decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[k] * (0.95 if p.dim() > 1 else 1.0))


def test_a_step_is_the_same_text_for_any_number_of_ranks():
    cfg, ids = tiny.Config(batch=8), torch.arange(1000)
    assert torch.equal(pretrain_text.draw(ids, cfg, 3), pretrain_text.draw(ids, cfg, 3))
    assert not torch.equal(pretrain_text.draw(ids, cfg, 3), pretrain_text.draw(ids, cfg, 4))
    last = torch.cat([pretrain_text.draw(ids, replace(cfg, seed=s), 0) for s in range(400)]).max()
    assert last == 999  # the end of the text is within reach, and nothing beyond


@pytest.mark.parametrize(
    "flags,message",
    [
        ({"steps": 0}, "--steps"), ({"lr": 0.0}, "--lr"), ({"length": 1}, "--length"), ({"width": 100}, "--width"),
        ({"vocabulary": 256}, "--vocabulary"), ({"order": 8}, "--order"), ({"resume": True}, "no checkpoint"),
    ],
)  # fmt: skip
def test_bad_input(flags, message, tmp_path):
    with pytest.raises(run.UserError, match=message):
        tiny.main(config(tmp_path / "new", **flags))
    assert not (tmp_path / "new").exists()


def test_a_batch_that_cannot_be_dealt_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(run.UserError, match="--batch 4 cannot be dealt out"):
        tiny.main(config(tmp_path / "new"))


def test_a_resumed_run_keeps_its_flags(runs):
    with pytest.raises(run.UserError, match="--lr"):
        tiny.main(config(runs.whole, resume=True, lr=1e-4))
