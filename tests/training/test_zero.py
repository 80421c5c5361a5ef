"""ZeRO: sharded states, the same training. Two ranks against one process, DeepSpeed and FSDP2."""

import functools
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from training import ranks, tiny, zero, zero_memory
from utils import run
from utils.run import UserError

CFG = zero.Config(width=64, layers=2, steps=5, batch=8, length=32, accumulate=2, bf16=False)
WAIT = timedelta(seconds=90)


def fresh(dtype):
    run.seed(0)
    return tiny.llama(CFG.width, CFG.layers, dtype=dtype)


def alone(dtype, accumulate=1):
    """One process, torch's AdamW, the whole batch -> losses and weights."""
    model, text, losses = fresh(dtype), tiny.corpus(), []
    optimizer = torch.optim.AdamW(model.parameters(), CFG.lr, weight_decay=0.01)
    for i in range(CFG.steps):
        loss = tiny.loss(model, tiny.batch(text, 0, i, CFG.batch, CFG.length))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


def shift(model, weights):
    return max(
        float((p.detach() - weights[name].detach()).abs().max())
        for name, p in model.named_parameters()
    )


def stages(dtype):
    """Every stage on this rank -> {stage: [largest difference of losses, of weights]} against one process."""
    found, text, (losses, weights) = {}, tiny.corpus(), alone(dtype)
    for stage in range(4):
        model = fresh(dtype)
        engine = zero.STAGES[stage](model, CFG.lr, weight_decay=0.01)
        mine = [loss for loss, _ in zero.train(model, engine, text, CFG)]
        if stage == 3:
            engine.unshard(engine.flat_params)
        found[stage] = [max(abs(a - b) for a, b in zip(mine, losses)), shift(model, weights)]
    return found


def by_fsdp(dtype):
    from torch.distributed.fsdp import fully_shard

    model, text, (_, weights) = fresh(dtype), tiny.corpus(), alone(dtype)
    for layer in [*model.model.layers, model]:
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), CFG.lr, weight_decay=0.01)
    for i in range(CFG.steps):
        for part in tiny.share(tiny.batch(text, 0, i, CFG.batch, CFG.length)).chunk(CFG.accumulate):
            (tiny.loss(model, part) / CFG.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    return max(float((whole[name] - weights[name]).abs().max()) for name in whole)


def by_deepspeed(dtype, stage):
    import deepspeed

    deepspeed.utils.logging.logger.setLevel("ERROR")
    model, text, (_, weights) = fresh(dtype), tiny.corpus(), alone(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), CFG.lr, weight_decay=0.01)
    config = {
        "train_micro_batch_size_per_gpu": CFG.batch // 4, "gradient_accumulation_steps": CFG.accumulate,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # who says nothing gets 1.0
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for i in range(CFG.steps):
        for part in tiny.share(tiny.batch(text, 0, i, CFG.batch, CFG.length)).chunk(CFG.accumulate):
            engine.backward(tiny.loss(engine, part))
            engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return shift(model, weights)


def worker(folder):
    """All of ours that needs two ranks, in one start of them."""
    tiny.corpus = functools.cache(tiny.corpus)
    found: dict = {"float64": stages(torch.float64), "float32": stages(torch.float32)}
    cfg = replace(CFG, bf16=True, out=folder, stages=(0, 1, 2, 3), accumulate=2, save_every=3)
    found["bf16"] = zero.worker(cfg)
    found["again"] = zero.worker(replace(cfg, resume=True))  # the last two of five steps
    found["frozen"] = frozen()
    found["quiet"], found["slopes"] = quiet(), slopes()
    return found


def engines(_):
    """The same training by the engines of others: {"fsdp", "deepspeed"}, the largest difference of weights."""
    found: dict = {"fsdp": by_fsdp(torch.float32)}
    return found | {"deepspeed": {stage: by_deepspeed(torch.float32, stage) for stage in (1, 2, 3)}}


def frozen():
    """Stage 3 with all but the norms frozen, layers checkpointed: losses equal those of stage 0."""
    losses = {}
    for stage in (0, 3):
        model, text = fresh(torch.float32), tiny.corpus()
        for name, p in model.named_parameters():
            p.requires_grad_("norm" in name)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        engine = zero.STAGES[stage](model, 0.1)
        losses[stage] = [loss for loss, _ in zero.train(model, engine, text, CFG)]
    return losses


class Two(torch.nn.Module):
    """Two layers, of which not every text goes through the second."""

    def __init__(self):
        super().__init__()
        run.seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False) for _ in range(2)])

    def forward(self, both):
        x = self.layers[0](torch.ones(2, 4))
        return (self.layers[1](x) if both else x).square().sum()


def quiet():
    """The second layer is used on rank 0 only: what is the mean of its gradient, and does anybody hang?"""
    apart, rank = {}, dist.get_rank()
    single = Two()
    ((single(True) + single(False)) / 2).backward()
    for stage in (0, 1, 2):
        model = Two()
        engine = zero.STAGES[stage](model, 0.1)
        engine.backward(model(rank == 0))
        apart[stage] = distance(engine, [p.grad for p in single.parameters()], rank)
    return apart


def distance(engine, wanted, rank):
    """Largest difference between the shards of the mean gradient and those of `wanted`, in the parameters' order."""
    worst = 0.0
    for flat, whole in zip(engine.trained, flattened(engine, wanted)):
        own = (
            whole[rank * flat.shard_size : (rank + 1) * flat.shard_size]
            if engine.sharded
            else whole
        )
        worst = max(worst, float((engine.mean_gradient(flat)[: len(own)] - own).abs().max()))
    return worst


def flattened(engine, wanted):
    """The wanted gradients, in the order of the engine's parameters, as vectors, one a flat parameter."""
    named = dict(zip([id(p) for flat in engine.trained for p in flat.params], wanted))
    return [torch.cat([named[id(p)].flatten() for p in flat.params]) for flat in engine.trained]


def slopes():
    """The mean gradient of every stage against that of the whole batch: AdamW would hide a wrong scale."""
    apart, text = {}, tiny.corpus()
    single = fresh(torch.float64)
    ids = tiny.batch(text, 0, 0, 8, 32)
    tiny.loss(single, ids).backward()
    named = dict(single.named_parameters())
    for stage in range(4):
        model = fresh(torch.float64)
        engine = zero.STAGES[stage](model, 0.1)
        names = {id(p): name for name, p in model.named_parameters()}
        for part in tiny.share(ids).chunk(2):
            engine.backward(tiny.loss(model, part) / 2)
        wanted = [named[names[id(p)]].grad for flat in engine.trained for p in flat.params]
        apart[stage] = distance(engine, wanted, dist.get_rank())
    return apart


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.launch(worker, str(tmp_path_factory.mktemp("zero")), 2, WAIT)


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_are_one_process(parity, found, stage):
    """In double precision to the last digits. In fp32, AdamW turns the noise of a gradient near zero into a step."""
    for row in found:
        losses, weights = row["float64"][stage]
        parity(
            "ZeRO",
            f"stage {stage} on 2 ranks, losses",
            "one process, AdamW",
            losses,
            0.0,
            atol=1e-6,
        )
        parity(
            "ZeRO",
            f"stage {stage} on 2 ranks, weights",
            "one process, AdamW",
            weights,
            0.0,
            atol=1e-6,
        )
        losses, weights = row["float32"][stage]
        parity(
            "ZeRO",
            f"stage {stage} on 2 ranks, fp32, losses",
            "one process, AdamW",
            losses,
            0.0,
            atol=2e-6,
        )
        assert weights < 2e-5


@pytest.mark.long
def test_the_production_engines_do_the_same(parity):
    """They equal one process with AdamW, as ours do above."""
    found = ranks.launch(engines, None, 2, WAIT)
    parity("ZeRO", "stage 3 on 2 ranks, fp32, weights", "FSDP2", found[0]["fsdp"], 0.0, atol=2e-5)
    for stage, difference in found[0]["deepspeed"].items():
        parity(
            "ZeRO",
            f"stage {stage} on 2 ranks, fp32, weights",
            "DeepSpeed",
            difference,
            0.0,
            atol=2e-5,
        )


@pytest.mark.parametrize("stage", range(4))
def test_bytes_are_those_of_the_paper(found, stage):
    for row in found:
        row = row["bf16"][stage]
        said = zero_memory.formula(row["psi"], 2, stage)
        for name, size in row["held"].items():
            assert size == pytest.approx(said[name], rel=0.002), name
        sent, weights = sum(row["sent"].values()), 2 * row["psi"]
        said = zero_memory.volume(weights, 2, stage, 2)
        # embedding, head and last norm stay between forward and backward: gathered once a part
        if stage == 3:
            said -= 2 * 0.5 * 2 * (256 * CFG.width + CFG.width)
        assert sent == pytest.approx(said, rel=0.002)


def test_stages_learn_alike(found):
    losses = [row["losses"] for row in found[0]["bf16"].values()]
    assert all(x[-1] < x[0] - 0.3 for x in losses)
    assert max(abs(a - b) for x in losses for a, b in zip(x, losses[0])) < 0.02


@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_run_is_the_same_bit_for_bit(found, stage):
    for row in found:
        assert row["again"][stage]["losses"] == row["bf16"][stage]["losses"]


def test_frozen_weights_and_checkpointed_layers(found):
    losses = found[0]["frozen"]
    assert losses[0] == pytest.approx(losses[3], abs=1e-6) and losses[0][-1] != losses[0][0]


def test_a_layer_without_gradient_on_one_rank_hangs_nobody(found):
    for row in found:
        assert row["quiet"] == {
            0: pytest.approx(0, abs=1e-6),
            1: pytest.approx(0, abs=1e-6),
            2: pytest.approx(0, abs=1e-6),
        }


@pytest.mark.parametrize("stage", range(4))
def test_the_gradient_is_that_of_the_whole_batch(parity, found, stage):
    for row in found:
        parity(
            "ZeRO",
            f"stage {stage}, mean gradient",
            "one process",
            row["slopes"][stage],
            0.0,
            atol=1e-8,
        )


def test_a_run_is_resumed_from_the_command(tmp_path):
    cfg = replace(CFG, stages=(2,), steps=2, save_every=2, ranks=1, out=str(tmp_path))
    first = zero.main(cfg)
    again = zero.main(replace(cfg, resume=True))  # nothing is left to do
    assert again["stage 2"]["loss"] == first["stage 2"]["loss"]
    assert (
        zero.main(replace(cfg, resume=True, steps=3))["stage 2"]["loss"] != first["stage 2"]["loss"]
    )


def test_the_formulas_at_the_ends():
    psi = 7e9
    for stage in range(4):
        assert sum(zero_memory.formula(psi, 1, stage).values()) == 16 * psi
        assert sum(zero_memory.formula(psi, 1, stage, bf16=False).values()) == 16 * psi
    many = [sum(zero_memory.formula(psi, 10**9, stage).values()) / psi for stage in range(4)]
    assert many == pytest.approx([16, 4, 2, 0], abs=1e-6)  # the paper's Fig. 1
    # Its Sec. 7
    assert [zero_memory.volume(1, 10**9, stage) for stage in range(4)] == pytest.approx(
        [2, 2, 2, 3]
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(stages=(4,)), "--stages"),
        (dict(batch=6), "--batch 6"),
        (dict(width=20), "--width"),
        (dict(length=1), "--length"),
        (dict(ranks=0), "--ranks"),
    ],
)
def test_bad_input(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        zero.main(zero.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()
