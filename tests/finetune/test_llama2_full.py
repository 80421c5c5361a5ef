"""finetune/llama2_full.py: the loop learns and resumes bit for bit, memory is counted, all methods run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune import (
    llama2_full,
    llama2_hard_prompt,
    llama2_lora,
    llama2_prefix,
    llama2_prompt,
    llama2_ptune,
    llama2_ptune_v2,
    llama2_qlora,
    peak_memory,
    peft_io,
    sentiment,
    sentiment_data,
    task_setup,
)
from tests.finetune.test_sentiment import Letters
from tests.llamas import batch, folder, tiny
from utils import pretrained, run

SCRIPTS = (
    llama2_full,
    llama2_lora,
    llama2_prompt,
    llama2_ptune,
    llama2_prefix,
    llama2_ptune_v2,
    llama2_qlora,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts whose last word says the label."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    random = np.random.default_rng(0)
    words = ["river", "stone", "house", "paper", "train"]
    rows = []
    for i in range(300):
        label = i % 2
        text = " ".join(random.choice(words, 3)) + f" {i} " + ("awful", "lovely")[label]
        rows.append(json.dumps({"text": text, "label": ("negative", "positive")[label]}))
    path.write_text("\n".join(rows))
    return str(path)


def settings(script, model, data, out, **kw):
    return replace(
        script.Config(),
        model=model,
        data=data,
        out=str(out),
        **{"steps": 3, "batch": 4, "texts": 8} | kw,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__.split(".")[1])
def test_every_method_runs_and_writes_what_it_promises(
    script, model, data, tmp_path, monkeypatch, capsys
):
    """And the three lines of Python that it prints give the model that was trained."""
    real, found = llama2_full.experiment, {}

    def spy(cfg, bench, network, *rest):
        found.update(network=network, model=bench.model)
        return real(cfg, bench, network, *rest)

    monkeypatch.setattr(llama2_full, "experiment", spy)
    kw = {"targets": ("q_proj",)} if hasattr(script.Config, "targets") else {}
    kw |= {"block": 16} if script is llama2_qlora else {}
    metrics = script.main(settings(script, model, data, tmp_path, lr=1e-2, **kw))
    names = {p.name for p in tmp_path.iterdir()}
    weights = "model" if script is llama2_full else "adapter"
    assert {"config.json", "metrics.json", "loss.png", weights} <= names
    assert metrics["trained"] > 0 and metrics["checkpoint_MiB"] > 0 and metrics["tensor_MiB"] > 0
    assert (
        0
        <= metrics["likelihood"]["low"]
        <= metrics["likelihood"]["accuracy"]
        <= metrics["likelihood"]["high"]
        <= 1
    )
    if script is llama2_full:
        return
    printed = capsys.readouterr().out
    scope = {}
    exec("\n".join(printed[printed.index("from peft import") :].splitlines()[:3]), scope)
    ids = scope["tokenizer"]("Tweet: a lovely day", return_tensors="pt")["input_ids"]
    # PEFT answers for soft words, too
    theirs = scope["model"].float().eval()(input_ids=ids).logits[:, -ids.shape[1] :]
    if script is not llama2_qlora:  # whose base was in 4 bits when it was trained
        found["model"].float().eval()
        ours = found["network"](ids, torch.ones_like(ids, dtype=torch.bool))
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-3)
    _, base = pretrained.language_model(model)
    assert not torch.allclose(base.float()(input_ids=ids).logits, theirs, atol=1e-3)


@pytest.mark.parametrize(
    "script", (llama2_lora, llama2_prompt, llama2_prefix), ids=lambda s: s.__name__.split(".")[1]
)
def test_peft_in_our_place_has_the_same_number_of_weights(
    script, model, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(Path(model).parent)
    kw = {"targets": ("q_proj",)} if script is llama2_lora else {}
    ours, theirs = (
        script.main(
            settings(script, Path(model).name, data, tmp_path / backend, backend=backend, **kw)
        )
        for backend in ("ours", "peft")
    )
    assert ours["trained"] == theirs["trained"]
    files = [
        {p.name for p in (tmp_path / b / "adapter").glob("adapter_*")} for b in ("ours", "peft")
    ]
    assert files[0] == files[1] == {"adapter_config.json", "adapter_model.safetensors"}
    for backend in ("ours", "peft"):
        config = json.loads((tmp_path / backend / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == model  # a folder, by its whole path


def test_it_learns(model, data, tmp_path):
    metrics = llama2_full.main(
        settings(llama2_full, model, data, tmp_path, steps=60, batch=8, lr=2e-2, texts=0)
    )
    assert metrics["final_loss"] < 0.5 and metrics["likelihood"]["accuracy"] > 0.9
    assert metrics["generated"]["accuracy"] > 0.9


def test_a_merged_model_is_an_ordinary_folder(model, data, tmp_path):
    cfg = settings(
        llama2_lora,
        model,
        data,
        tmp_path,
        steps=5,
        lr=1e-1,
        targets=("q_proj", "down_proj"),
        merge=True,
    )
    llama2_lora.main(cfg)
    _, merged = pretrained.language_model(tmp_path / "merged")
    _, adapted = pretrained.language_model(model)
    _, base = pretrained.language_model(model)
    peft_io.load(adapted, tmp_path / "adapter")
    ids, mask = batch()
    a, b, c = (sentiment.network(m.float())(ids, mask)[mask] for m in (merged, adapted, base))
    assert (a - b).norm() < 0.02 * (b - c).norm()  # the folder is in bf16


def test_resume_is_bit_exact(model, data, tmp_path):
    """Six steps; and six steps killed after a checkpoint at the third."""
    cfg = settings(
        llama2_lora, model, data, tmp_path / "whole", steps=6, save_every=3, targets=("q_proj",)
    )
    whole = llama2_lora.main(cfg)
    cfg = replace(cfg, out=str(tmp_path / "broken"))
    real, calls = llama2_full.loss, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama2_full, "loss", dies)
        with pytest.raises(KeyboardInterrupt):
            llama2_lora.main(cfg)
    again = llama2_lora.main(replace(cfg, resume=True))
    assert again["final_loss"] == whole["final_loss"]
    a, b = (
        load_file(tmp_path / n / "adapter" / "adapter_model.safetensors")
        for n in ("whole", "broken")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_head_alone_is_untied_and_nothing_else_moves():
    model = llama2_full.choose(tiny().to(torch.bfloat16).requires_grad_(False), "head")
    moving = [n for n, p in model.named_parameters() if p.requires_grad]
    assert moving == ["lm_head.weight"] and model.lm_head.weight.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(model.lm_head.weight, model.model.embed_tokens.weight.float())


def test_the_head_answers_the_same_for_some_positions_as_for_all():
    model = tiny()
    ids = torch.randint(2, 120, (3, 9))
    network, mask = sentiment.network(model), torch.ones(3, 9, dtype=torch.bool)
    torch.testing.assert_close(network(ids, mask, 2), network(ids, mask)[:, -2:])


def test_texts_of_a_step_have_like_lengths():
    pairs = sorted(((("x" * (1 + i % 50)), i % 2) for i in range(1000)), key=lambda p: len(p[0]))
    cfg, texts = llama2_full.Config(batch=4), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentiment, "batch", lambda tokenizer, cfg, chosen: texts.append(chosen))
        for i in range(300):
            task_setup.draw(None, pairs, cfg, i)
    lengths = [[len(t) for t, _ in chosen] for chosen in texts]
    assert max(max(x) - min(x) for x in lengths) <= 4 and {n for x in lengths for n in x} == set(
        range(1, 51)
    )


def test_peak_counts_weights_gradients_optimizer_and_activations():
    """A network so plain that every byte is known: y = W x, loss = sum y^2."""
    layer = torch.nn.Linear(1000, 500, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    x = torch.randn(1, 1000)

    def step():
        layer(x).square().sum().backward()
        optimizer.step()

    step()  # so that AdamW has its two moments
    in_weights = peak_memory.peak(layer, optimizer, step) / (4 * 500_000)
    # weight, gradient, two moments, and AdamW's two temporaries
    assert in_weights == pytest.approx(6, abs=0.01)


def test_learning_rate_rises_and_falls():
    cfg = llama2_full.Config(steps=100, lr=1.0)
    rates = [llama2_full.learning_rate(cfg, i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 == rates[9] and 0 < rates[-1] < 0.02


def test_hard_prompts_run(model, data, tmp_path):
    cfg = replace(
        llama2_hard_prompt.Config(),
        model=model,
        data=data,
        texts=6,
        out=str(tmp_path),
        shots=(0, 2),
    )
    metrics = llama2_hard_prompt.main(cfg)
    assert len(metrics) == 2 * 3 + 3 * 2 + 2 and (tmp_path / "wordings.png").is_file()


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"model": "no/such/model"}, {"targets": ("x",)}],
)
def test_bad_input(change, model, data, tmp_path):
    cfg = replace(settings(llama2_lora, model, data, tmp_path / "x", targets=("q_proj",)), **change)
    with pytest.raises(run.UserError):
        llama2_lora.main(cfg)
    assert not (tmp_path / "x").exists()


def test_scores_do_not_depend_on_the_batch(model):
    tokenizer, network = pretrained.language_model(model)
    network = sentiment.network(network)
    questions = ["a lovely day", "no", "this train is late, and the next one as well"]
    device = torch.device("cpu")
    answers = sentiment.answers(tokenizer, sentiment_data.Task(words=(" a", " b")))
    one, many = (
        sentiment.likelihood(network, tokenizer, questions, answers, device, n) for n in (1, 3)
    )
    torch.testing.assert_close(one, many, atol=0.05, rtol=0)


def test_what_is_trained_on_is_never_scored_and_the_last_look_moves_nothing(
    model, data, tmp_path, monkeypatch
):
    seen, judged, weights = set(), [], []
    real_batch, real_peak = sentiment.batch, llama2_full.peak

    def spy_batch(tokenizer, cfg, pairs):
        seen.update(pairs)
        return real_batch(tokenizer, cfg, pairs)

    def spy_peak(moving, optimizer, step):
        assert moving.training
        before = [p.clone() for p in llama2_full.trainable_parameters(moving)]
        size = real_peak(moving, optimizer, step)
        weights.append(
            all(torch.equal(a, b) for a, b in zip(before, llama2_full.trainable_parameters(moving)))
        )
        monkeypatch.setattr(
            sentiment, "evaluate", lambda *args: judged.append((moving.training, args[3])) or {}
        )
        return size

    monkeypatch.setattr(sentiment, "batch", spy_batch)
    monkeypatch.setattr(llama2_full, "peak", spy_peak)
    monkeypatch.setattr(llama2_full, "size", lambda folder: 1.0)
    cfg = settings(llama2_lora, model, data, tmp_path, split="valid", texts=5, targets=("q_proj",))
    llama2_lora.main(cfg)
    parts = sentiment_data.load(cfg)
    assert seen <= set(parts["train"]) and len(seen) > 4
    assert judged == [(False, parts["valid"][:5])] and weights == [True]


def test_groups_keep_their_proportion_and_follow_the_schedule(monkeypatch):
    cfg, rates = llama2_full.Config(steps=10, lr=0.5), []
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [llama2_full.param_group(weights[:1], 1.0), llama2_full.param_group(weights[1:], 16.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)

    def spy(loss, optimizer, batch, device):
        rates.append([g["lr"] for g in optimizer.param_groups])
        return torch.zeros(())

    monkeypatch.setattr(llama2_full, "step", spy)
    assert len(list(llama2_full.train(None, range(3, 10), optimizer, cfg, None, start=3))) == 7
    want = [llama2_full.learning_rate(cfg, i) for i in range(3, 10)]
    assert rates == [[r, 16 * r] for r in want]


def test_the_loop_knows_no_task():
    """A regression of its own: batches of two tensors and a loss of them, no tokens and no network."""
    cfg = llama2_full.Config(steps=50, lr=0.3)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([llama2_full.param_group([weight], 1.0)], lr=1.0)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(cfg.steps, 8, 2, generator=random)
    y = x @ torch.tensor([2.0, -1.0])
    loss = lambda x, y: (x @ weight - y).square().mean()  # noqa: E731
    losses = list(llama2_full.train(loss, zip(x, y), optimizer, cfg, torch.device("cpu")))
    assert len(losses) == cfg.steps and losses[-1] < 0.02 * losses[0]


def test_a_step_is_at_most_of_length_one_and_leaves_no_gradient():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss = lambda x: (weight * x).sum()  # noqa: E731
    x = torch.tensor([3.0, 0, 4, 0])
    llama2_full.step(loss, optimizer, [x], torch.device("cpu"))
    torch.testing.assert_close(weight.detach(), -x / 5, atol=1e-4, rtol=1e-4)
    assert weight.grad is None
    llama2_full.step(loss, optimizer, [x / 100], torch.device("cpu"))  # shorter than one: as it is
    torch.testing.assert_close(weight.detach(), -x / 5 - x / 100, atol=1e-4, rtol=1e-4)


def test_texts_of_a_step_depend_on_the_seed_and_the_step(monkeypatch):
    pairs = [(f"text {i}", i % 2) for i in range(400)]
    monkeypatch.setattr(sentiment, "batch", lambda tokenizer, cfg, chosen: chosen)
    draw = lambda seed, i: task_setup.draw(None, pairs, llama2_full.Config(batch=4, seed=seed), i)  # noqa: E731
    assert draw(0, 1) == draw(0, 1)
    assert len({tuple(draw(seed, i)) for seed in (0, 1) for i in (0, 1)}) == 4


def test_a_model_that_cannot_be_asked_is_refused_before_anything_is_written():
    from transformers import BloomConfig, BloomForCausalLM

    model, words = tiny(), Letters()
    cfg = llama2_full.Config(pattern="x{text}y", words=("no", "yes"))
    task_setup.check_model(model, words, cfg, 128 - 64 - 2 - 4)
    with pytest.raises(run.UserError, match="129 positions, this model has 128"):
        task_setup.check_model(model, words, cfg, 128 - 64 - 2 - 4 + 1)
    with pytest.raises(run.UserError, match="bloom take no position_ids"):
        bloom = BloomForCausalLM(BloomConfig(vocab_size=120, hidden_size=32, n_layer=1, n_head=4))
        task_setup.check_model(bloom, words, cfg)
    for end, message in (
        (None, "no end token"),
        (120, "the number 120, and the model knows 120 words"),
    ):
        words.eos_token_id = end
        with pytest.raises(run.UserError, match=message):
            task_setup.check_model(model, words, cfg)
