"""A pipeline of three stages does what one process does, in either order, and what torch's does."""

import copy
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

from tests.llamas import tiny
from training import pipeline, ranks
from training.pipeline_schedules import (
    SCHEDULES,
    UNITS,
    bubble,
    gpipe,
    idle_fraction,
    max_in_flight,
    one_f_one_b,
    simulate,
)
from training.pipeline_stage import Channel, Stage, execute, loss, reduce_tied_gradients
from training.pipeline_timeline import Timeline
from utils import pretrained, run

SOON = timedelta(seconds=60)  # a rank that waits longer has been forgotten
P, M, B, L = 3, 4, 8, 9
PACE = 0.02


def batch():
    ids = torch.randint(2, 120, (B, L + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def part(model, rank=None):
    """A stage of a copy of the model: this rank's, or another's."""
    return Stage(copy.deepcopy(model), dist.get_rank() if rank is None else rank, P)


def write_down(order, module, inputs, output):
    """A hook: what a stage does, in order. (torch's own list, `pipeline_order`, counts the last stage's from one.)"""
    # -1: torch's first forward only finds the shapes out
    i = sum(kind == "forward" for kind, _ in order) - 1
    order.append(("forward", i))
    output.register_hook(lambda _: order.append(("backward", i)))


def gradients(module):
    return {name: p.grad.tolist() for name, p in module.named_parameters()}


def worker(_):
    """What every rank finds."""
    rank, model, found = dist.get_rank(), tiny(layers=4), {}
    ids, labels = batch()
    parts = [[x.clone() for x in whole.chunk(M)] for whole in (ids, labels)]
    channels, ends = (Channel(1), Channel(-1)), dist.new_group([0, P - 1])
    for name, schedule in SCHEDULES.items():
        module = part(model)
        timeline = Timeline(module, PACE)
        value = execute(schedule(rank, P, M), module, *parts, channels, timeline)
        one = {
            "loss": value,
            "untied": gradients(module),
            "line": timeline.line,
            "in flight": timeline.peak / timeline.one,
        }
        one["left"] = len(timeline.saved)
        reduce_tied_gradients(module, ends)
        one["gradients"] = gradients(module)
        module, order = part(model), []
        module.register_forward_hook(partial(write_down, order))
        one["torch loss"] = pipeline.torch_pipeline_step(name, module, ids, labels, M)
        one["torch gradients"] = gradients(module)
        one["torch order"] = [(kind, i) for kind, i in order if i >= 0]
        found[name] = one
    module, found["learned"] = part(model), []
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    for _ in range(8):
        optimizer.zero_grad()
        timeline = Timeline(module, 0)
        actions = one_f_one_b(rank, P, M)
        found["learned"].append(execute(actions, module, *parts, channels, timeline))
        reduce_tied_gradients(module, ends)
        optimizer.step()
    for flags, name in (({"layers": 2}, "layers"), ({"micro": 2}, "micro")):
        with pytest.raises(run.UserError) as error:
            pipeline.worker(pipeline.Config(**flags))
        found[name] = str(error.value)
    return found


@pytest.fixture(scope="module")
def found():
    return ranks.launch(worker, None, P, SOON)


@pytest.fixture(scope="module")
def whole():
    """The same step in one process -> its model, with gradients, and its loss."""
    model, (ids, labels) = tiny(layers=4), batch()
    value = loss(model(input_ids=ids, use_cache=False).logits, labels)
    value.backward()
    return model, value.item()


def tensors(found):
    return {name: torch.tensor(x) for name, x in found.items()}


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_does_what_one_process_does(name, found, whole, parity):
    model, value = whole
    parity("Pipeline", f"{name}, loss", "transformers", found[-1][name]["loss"], value)
    names = 0
    for rank, one in enumerate(found):
        theirs = {k: p.grad for k, p in Stage(model, rank, P).named_parameters()}
        parity(
            "Pipeline",
            f"{name}, gradients",
            "transformers",
            tensors(one[name]["gradients"]),
            theirs,
        )
        names += len(theirs)
    assert names == 4 * 9 + 1 + 2  # all layers once, the last norm, the words twice


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_does_what_torch_does(name, found, parity):
    parity(
        "Pipeline",
        f"{name}, loss",
        "torch pipelining",
        found[-1][name]["loss"],
        found[-1][name]["torch loss"],
    )
    for one in found:
        ours, theirs = tensors(one[name]["untied"]), tensors(one[name]["torch gradients"])
        parity("Pipeline", f"{name}, gradients", "torch pipelining", ours, theirs)


def test_tied_words_need_both_ends(found, whole):
    """What the first stage finds about the words is not all: the head, on the last stage, has used them too."""
    right = whole[0].get_input_embeddings().weight.grad
    for rank, name in ((0, "embedding.weight"), (P - 1, "head.weight")):
        one = found[rank]["1f1b"]
        assert (torch.tensor(one["untied"][name]) - right).abs().max() > 1e-3
        torch.testing.assert_close(
            torch.tensor(one["gradients"][name]), right, atol=1e-6, rtol=1e-5
        )


def test_the_order_is_torch_s(found):
    """Of 1F1B exactly; of GPipe but for the way back, which torch goes from the first micro-batch to the last."""
    for rank, one in enumerate(found):
        assert one["1f1b"]["torch order"] == list(one_f_one_b(rank, P, M))
        ours = list(gpipe(rank, P, M))
        assert one["gpipe"]["torch order"] == ours[:M] + ours[M:][::-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_activations_are_let_go(name, found):
    """By bytes: GPipe keeps all micro-batches, 1F1B as many as there are stages from here on; in the end nothing is."""
    for rank, one in enumerate(found):
        assert one[name]["in flight"] == pytest.approx(M if name == "gpipe" else P - rank, rel=1e-3)
        assert one[name]["left"] == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_clocks_of_the_ranks(name, found):
    """Each rank keeps its pace, one action after the other; all together are no faster than the formula."""
    times = {
        (r, kind, i): (b, e) for r, one in enumerate(found) for kind, i, b, e in one[name]["line"]
    }
    assert len(times) == P * M * 2
    for (_, kind, _), (begin, end) in times.items():
        assert end - begin >= PACE * UNITS[kind] * 0.99
    for one in found:
        assert all(b[2] >= a[3] for a, b in zip(one[name]["line"], one[name]["line"][1:]))
    span = max(end for _, end in times.values())
    assert span > 0.98 * 3 * PACE * (M + P - 1)  # no order is faster than the formula


@pytest.mark.parametrize("stages, micro", [(1, 1), (1, 5), (2, 2), (4, 8), (5, 5), (4, 2), (8, 32)])
@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
def test_the_plan_has_the_bubble_of_the_formula(schedule, stages, micro):
    lines = simulate(schedule, stages, micro)
    assert idle_fraction(lines) == pytest.approx(bubble(stages, micro))
    for stage, line in enumerate(lines):
        actions = list(schedule(stage, stages, micro))
        assert [(kind, i) for kind, i, _, _ in line] == actions
        assert sorted(actions) == sorted((kind, i) for kind in UNITS for i in range(micro))
        assert all(
            actions.index(("forward", i)) < actions.index(("backward", i)) for i in range(micro)
        )
        assert max_in_flight(actions) == (
            micro if schedule is gpipe else min(stages - stage, micro)
        )


def test_a_slow_stage_makes_the_others_wait():
    """Two stages, the second three times as slow: it never waits but for the first forward; the first waits for it."""
    cost = {
        (s, kind, i): (3 if s else 1) * u
        for s in (0, 1)
        for kind, u in UNITS.items()
        for i in range(4)
    }
    lines = simulate(one_f_one_b, 2, 4, cost)
    assert lines[1][0][2] == 1 and lines[1][-1][3] == 1 + 4 * 9 and lines[0][-1][3] == 1 + 4 * 9 + 2
    assert idle_fraction(lines) == pytest.approx(1 - (4 * 3 + 4 * 9) / (2 * 39))


def test_an_order_that_cannot_end_is_found_out():
    def backward_first(stage, stages, micro):
        return (
            reversed(list(gpipe(stage, stages, micro)))
            if stage == 0
            else gpipe(stage, stages, micro)
        )

    with pytest.raises(run.UserError, match="backward_first"):
        simulate(backward_first, 3, 2)


def test_it_learns_what_one_process_learns(found):
    model, (ids, labels), losses = tiny(layers=4), batch(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(model(input_ids=ids, use_cache=False).logits, labels)
        value.backward()
        losses.append(value.item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
    torch.testing.assert_close(
        torch.tensor(found[-1]["learned"]), torch.tensor(losses), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mistral"])
def test_other_models_are_refused_in_one_line(kind, monkeypatch):
    """GPT-2 and OPT have layers of another form; a Mistral's look back only so far."""
    other = SimpleNamespace(config=AutoConfig.for_model(kind))
    monkeypatch.setattr(pretrained, "language_model", lambda _: (None, other))
    with pytest.raises(run.UserError, match=f"--model (is a {kind}|looks 4096 tokens back)"):
        pipeline.read(pipeline.Config(model="other"))
    for known in ("llama", "qwen2"):
        pipeline.check(AutoConfig.for_model(known))


def test_bad_flags_are_refused_before_anything_is_written(found, tmp_path):
    for one in found:
        assert (
            one["layers"].startswith("2 layers cannot be dealt to 3 stages")
            and "--micro" in one["micro"]
        )
    for flags, says in (
        ({"batch": 7}, "multiple"),
        ({"micro": 0}, "at least 1"),
        ({"pace": -1.0}, "--pace"),
    ):
        with pytest.raises(run.UserError, match=says):
            pipeline.main(pipeline.Config(out=str(tmp_path / "x"), **flags))
    assert not (tmp_path / "x").exists()
