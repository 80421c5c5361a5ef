"""finetune/llama2_full.py: the loop learns and resumes bit for bit, memory is counted, all methods run."""

import json
from dataclasses import replace

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
    sentiment,
)
from tests.llamas import batch, folder, tiny
from utils import pretrained, run

SCRIPTS = (llama2_full, llama2_lora, llama2_prompt, llama2_ptune, llama2_prefix, llama2_ptune_v2, llama2_qlora)


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
    return replace(script.Config(), model=model, data=data, out=str(out), **{"steps": 3, "batch": 4, "texts": 8} | kw)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__.split(".")[1])
def test_every_method_runs_and_writes_what_it_promises(script, model, data, tmp_path):
    kw = {"targets": ("q_proj",)} if hasattr(script.Config, "targets") else {}
    kw |= {"block": 16} if script is llama2_qlora else {}
    metrics = script.main(settings(script, model, data, tmp_path, **kw))
    names = {p.name for p in tmp_path.iterdir()}
    weights = "model" if script is llama2_full else "adapter"
    assert {"config.json", "metrics.json", "loss.png", weights} <= names
    assert metrics["trained"] > 0 and metrics["checkpoint_MiB"] > 0 and metrics["tensor_MiB"] > 0
    assert 0 <= metrics["likelihood"]["low"] <= metrics["likelihood"]["accuracy"] <= metrics["likelihood"]["high"] <= 1


@pytest.mark.parametrize("script", (llama2_lora, llama2_prompt, llama2_prefix), ids=lambda s: s.__name__.split(".")[1])
def test_peft_in_our_place_has_the_same_number_of_weights(script, model, data, tmp_path):
    kw = {"targets": ("q_proj",)} if script is llama2_lora else {}
    ours, theirs = (
        script.main(settings(script, model, data, tmp_path / backend, backend=backend, **kw))
        for backend in ("ours", "peft")
    )
    assert ours["trained"] == theirs["trained"]
    files = [{p.name for p in (tmp_path / b / "adapter").glob("adapter_*")} for b in ("ours", "peft")]
    assert files[0] == files[1] == {"adapter_config.json", "adapter_model.safetensors"}


def test_it_learns(model, data, tmp_path):
    metrics = llama2_full.main(settings(llama2_full, model, data, tmp_path, steps=60, batch=8, lr=2e-2, texts=0))
    assert metrics["final_loss"] < 0.5 and metrics["likelihood"]["accuracy"] > 0.9
    assert metrics["generated"]["accuracy"] > 0.9


def test_a_merged_model_is_an_ordinary_folder(model, data, tmp_path):
    cfg = settings(llama2_lora, model, data, tmp_path, steps=5, lr=1e-1, targets=("q_proj", "down_proj"), merge=True)
    llama2_lora.main(cfg)
    _, merged = pretrained.language_model(tmp_path / "merged")
    _, adapted = pretrained.language_model(model)
    _, base = pretrained.language_model(model)
    llama2_lora.load(adapted, tmp_path / "adapter")
    ids, mask = batch()
    a, b, c = (sentiment.network(m.float())(ids, mask)[mask] for m in (merged, adapted, base))
    assert (a - b).norm() < 0.02 * (b - c).norm()  # the folder is in bf16


def test_resume_is_bit_exact(model, data, tmp_path):
    """Six steps; and six steps killed after a checkpoint at the third."""
    cfg = settings(llama2_lora, model, data, tmp_path / "whole", steps=6, save_every=3, targets=("q_proj",))
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
    a, b = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "broken"))
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
            llama2_full.draw(None, pairs, cfg, i)
    lengths = [[len(t) for t, _ in chosen] for chosen in texts]
    assert max(max(x) - min(x) for x in lengths) <= 4 and {n for x in lengths for n in x} == set(range(1, 51))


def test_peak_counts_weights_gradients_optimizer_and_activations():
    """A network so plain that every byte is known: y = W x, loss = sum y^2."""
    layer = torch.nn.Linear(1000, 500, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    x = torch.randn(1, 1000)

    def step():
        layer(x).square().sum().backward()
        optimizer.step()

    step()  # so that AdamW has its two moments
    in_weights = llama2_full.peak(layer, optimizer, step) / (4 * 500_000)
    assert in_weights == pytest.approx(6, abs=0.01)  # weight, gradient, two moments, and AdamW's two temporaries


def test_learning_rate_rises_and_falls():
    cfg = llama2_full.Config(steps=100, lr=1.0)
    rates = [llama2_full.learning_rate(cfg, i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 == rates[9] and 0 < rates[-1] < 0.02


def test_hard_prompts_run(model, data, tmp_path):
    cfg = replace(llama2_hard_prompt.Config(), model=model, data=data, texts=6, out=str(tmp_path), shots=(0, 2))
    metrics = llama2_hard_prompt.main(cfg)
    assert len(metrics) == 2 * 3 + 3 * 2 + 2 and (tmp_path / "wordings.png").is_file()


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"model": "no/such/model"}, {"targets": ("x",)}]
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
    answers = sentiment.answers(tokenizer, sentiment.Task(words=(" a", " b")))
    one, many = (sentiment.likelihood(network, tokenizer, questions, answers, device, n) for n in (1, 3))
    torch.testing.assert_close(one, many, atol=0.05, rtol=0)
