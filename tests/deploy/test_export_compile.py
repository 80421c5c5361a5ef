"""deploy/export_compile.py: a static step that compiles once, and what a trace remembers."""

import pytest
import torch

from deploy import export_compile, export_step, kv_cache
from deploy.caches import GrowingCache, causal_mask
from deploy.export_step import DecodeStep
from deploy.llama import Llama, attention
from tests import llamas
from tests.deploy.test_decode import talker
from utils.run import UserError


@pytest.fixture(scope="module")
def model():
    return talker()


@pytest.fixture(scope="module")
def llama(model):
    return Llama(model)


def test_the_static_step_decodes_as_a_growing_cache(llama, parity):
    """Also the second text with the same memory: what the first one left in it is not seen."""
    step = export_compile.StaticStep(llama, 26)
    for seed in range(2):
        torch.manual_seed(seed)
        ids = torch.randint(3, 120, (1, 7))
        mine = export_compile.generate(step, ids, 20)
        theirs = kv_cache.generate(llama, ids, 20, GrowingCache(llama))
        name = f"export_compile.StaticStep, text {seed}"
        parity("Export", name, "caches.GrowingCache", mine, theirs, 0)
    step.keys.fill_(9.0)
    assert torch.equal(export_compile.generate(step, ids, 20), theirs)
    with pytest.raises(UserError, match="27 tokens do not fit into a cache of 26"):
        export_compile.generate(step, ids, 21)
    with pytest.raises(UserError, match="no tokens"):
        export_compile.generate(step, ids[:, :0], 2)


def test_each_token_goes_through_what_was_compiled(llama):
    step = export_compile.StaticStep(llama, 20)
    asked = []

    def one(token, position):
        asked.append((token.shape, int(position)))
        return step(token, position)

    export_compile.generate(step, torch.randint(3, 120, (1, 4)), 5, one)
    assert asked == [((1, 1), place) for place in (4, 5, 6, 7)]


def test_a_position_that_is_a_tensor_makes_one_graph_and_a_number_many(llama):
    found = export_compile.count_graphs(llama, 20, tokens=4)
    assert found["graph breaks"] == 0
    assert found["graphs, position a tensor"] == 1
    assert found["graphs, position a Python number"] >= 4


def test_a_trace_takes_other_sizes_if_cache_and_positions_are_inputs(model):
    step = DecodeStep(model)
    for tokens, past in ((3, 5), (1, 4)):
        traced = export_compile.trace(step, tokens, past)
        for new, held in ((1, 0), (1, 9), (6, 0), (5, 3)):
            ids = torch.randint(3, 120, (1, new))
            cache = step.empty(held)
            assert torch.equal(traced(ids, cache)[0], step(ids, cache)[0])


def test_a_trace_keeps_the_branch_that_it_took(model, monkeypatch):
    """Traced with one token, which needs no mask: a prompt sees its own future, without an error."""

    class Branching(export_step.PastCache):
        def attend(self, layer, q, k, v):
            keys = torch.cat([self.past[2 * layer], k], dim=2)
            values = torch.cat([self.past[2 * layer + 1], v], dim=2)
            self.present += [keys, values]
            new = q.shape[2]
            mask = causal_mask(keys.shape[2] - new, new) if new > 1 else None
            return attention(q, keys, values, mask)

    step = DecodeStep(model)
    ids = torch.randint(3, 120, (1, 6))
    right = step.logits(ids)
    monkeypatch.setattr(export_step, "PastCache", Branching)
    assert torch.equal(step.logits(ids), right)
    traced = export_compile.trace(step, 1, 4)
    wrong = traced(ids, step.empty(0))[0]
    torch.testing.assert_close(wrong[:, -1:].shape, right[:, -1:].shape)
    assert (wrong - right).abs().max() > 0.1


@pytest.mark.long
def test_the_compiled_step_gives_the_same_tokens(llama, parity):
    step = export_compile.StaticStep(llama, 24)
    compiled, seconds = export_compile.compile_step(step)
    assert seconds > 0
    ids = torch.randint(3, 120, (1, 6))
    mine = export_compile.generate(step, ids, 12, compiled)
    theirs = kv_cache.generate(llama, ids, 12, GrowingCache(llama))
    parity("Export", "export_compile, torch.compile", "caches.GrowingCache", mine, theirs, 0)


def test_no_compiler_is_one_line(llama, monkeypatch):
    monkeypatch.setattr(export_compile.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C"):
        export_compile.compile_step(export_compile.StaticStep(llama, 4))


@pytest.mark.long
def test_deepspeed_leaves_the_model_as_it_is_on_a_cpu():
    """Kernel injection is for GPUs: what comes back is the same modules."""
    made = talker()
    ids = torch.randint(3, 120, (1, 6))
    assert export_compile.deepspeed_difference(made, ids) == 0.0


@pytest.mark.long
def test_a_run_compiles_traces_and_times(tmp_path):
    name = llamas.folder(tmp_path / "model")
    flags = {"layers": 1, "length": 12, "prompt": 4, "max_new_tokens": 3, "rounds": 2}
    found = export_compile.main(
        export_compile.Config(model=name, **flags, out=str(tmp_path / "out"))
    )
    assert found["compiled tokens as eager"] == 3
    assert found["traced, largest difference of logits"] == 0
    assert found["eager, growing cache"]["of eager"] == 1
    for name in ("traced", "eager, static cache", "compiled, static cache"):
        assert found[name]["ms a token"] > 0 and 0 <= found[name]["idle fraction"] < 1
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_bad_flags_are_one_line(tmp_path):
    for flags, says in (
        ({"prompt": 0}, "1 or more"),
        ({"length": 20}, "--length 20: 44 tokens want room"),
    ):
        with pytest.raises(UserError, match=says):
            export_compile.main(export_compile.Config(**flags, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
