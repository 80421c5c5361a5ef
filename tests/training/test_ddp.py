"""Data parallel: the ring, the buckets, and PyTorch's own; many ranks are one process with the whole batch."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.conftest import ROOT
from training import ddp, manifest, ranks, ring_all_reduce, tiny
from utils import run
from utils.run import UserError

CFG = ddp.Config(width=64, layers=2, steps=4, batch=12, length=32, bucket=0.1)
WAIT = timedelta(seconds=60)


def alone(dtype=torch.float64):
    run.seed(0)
    model, text, losses = tiny.llama(CFG.width, CFG.layers, dtype=dtype), tiny.corpus(), []
    optimizer = torch.optim.AdamW(model.parameters(), CFG.lr, weight_decay=0.01)
    for i in range(CFG.steps):
        loss = tiny.loss(model, tiny.batch(text, 0, i, CFG.batch, CFG.length))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, list(model.parameters())


def together(cfg):
    run.seed(0)
    model = tiny.llama(CFG.width, CFG.layers, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), CFG.lr, weight_decay=0.01)
    losses = list(ddp.train(*ddp.wrap(model, cfg), optimizer, tiny.corpus(), cfg))
    return losses, list(model.parameters())


class Two(nn.Module):
    """A part for pictures and a part for words: a text without a picture gives the first no gradient."""

    def __init__(self):
        super().__init__()
        self.eye, self.words = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x, picture):
        return self.words(self.eye(x) if picture else x).mean()


def worker(folder):
    tiny.corpus = functools.cache(tiny.corpus)
    found, (losses, weights) = {}, alone()
    for backend in ("ours", "pytorch"):
        for parts in (1, 2):
            ls, ws = together(replace(CFG, backend=backend, accumulate=parts))
            apart = max(float((a - b).detach().abs().max()) for a, b in zip(ws, weights))
            found[backend, parts] = max(abs(a - b) for a, b in zip(ls, losses)), apart
    found["ring"] = []
    for size in (1, 2, 7, 1000):
        x = torch.randn(size, generator=torch.Generator().manual_seed(dist.get_rank())).double()
        theirs = x.clone()
        dist.all_reduce(theirs)
        found["ring"].append(float((ring_all_reduce.all_reduce(x) - theirs).abs().max()))
    run.seed(0)
    model = Two()
    parallel = ddp.DataParallel(model)
    parallel.backward(parallel(torch.ones(2, 4), picture=dist.get_rank() == 0))
    found["eye"] = model.eye.weight.grad.tolist()
    single = Two()
    single.load_state_dict(model.state_dict())
    (single(torch.ones(2, 4), True) / dist.get_world_size()).backward()
    found["eye of one"] = single.eye.weight.grad.tolist()
    torch.manual_seed(dist.get_rank())  # each begins with weights of its own
    mixed = nn.Linear(3, 2)
    ddp.DataParallel(mixed)
    found["begins"] = mixed.weight.tolist()
    # The resumed run has a step whose loss the optimizer moved
    cfg = replace(CFG, out=folder, steps=5, save_every=3)
    found["whole"], found["resumed"] = (
        ddp.worker(cfg),
        ddp.worker(replace(cfg, resume=True, save_every=0)),
    )
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.launch(worker, str(tmp_path_factory.mktemp("ddp")), 3, WAIT)


@pytest.mark.parametrize("backend", ["ours", "pytorch"])
@pytest.mark.parametrize("parts", [1, 2])
def test_three_ranks_are_one_process(parity, found, backend, parts):
    name = "ddp.DataParallel" if backend == "ours" else "DistributedDataParallel"
    for row in found:
        losses, weights = row[backend, parts]
        # in double precision, but for the norms of transformers' Llama, which round to fp32; AdamW enlarges that
        parity("DDP", f"{name}, {parts} parts, losses", "one process", losses, 0.0, atol=1e-6)
        parity("DDP", f"{name}, {parts} parts, weights", "one process", weights, 0.0, atol=5e-6)


def test_the_ring_is_an_all_reduce(parity, found):
    for row in found:
        parity(
            "DDP",
            "ring_all_reduce.all_reduce",
            "dist.all_reduce",
            row["ring"],
            [0.0] * 4,
            atol=1e-12,
        )


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_plan_of_the_ring_gives_everyone_every_sum(n):
    parts = np.eye(n)[:, None, :].repeat(n, 1)  # (rank, piece, whose): each begins with its own
    for first, action in ring_all_reduce.schedule(n):
        before = parts.copy()
        for rank in range(n):
            piece, to = (first + rank) % n, (rank + 1) % n
            parts[to, piece] = before[rank, piece] + (before[to, piece] if action == "add" else 0)
    assert (parts == 1).all() and len(ring_all_reduce.schedule(n)) == 2 * (n - 1)


def test_weights_without_a_gradient_hang_nobody(found):
    for row in found:
        assert row["eye"] == [pytest.approx(x, abs=1e-7) for x in row["eye of one"]]


def test_all_begin_with_the_weights_of_the_first(found):
    torch.manual_seed(0)
    first = nn.Linear(3, 2).weight.tolist()
    assert all(row["begins"] == first for row in found)


def test_a_batch_is_drawn_by_seed_and_step_and_read_to_the_end():
    text = torch.arange(1000)
    draw = lambda seed, step: tiny.batch(text, seed, step, 4, 9)  # noqa: E731
    assert torch.equal(draw(1, 2), draw(1, 2)) and draw(1, 2).shape == (4, 9)
    assert not torch.equal(draw(1, 2), draw(1, 3)) and not torch.equal(draw(1, 2), draw(2, 2))
    assert ((draw(1, 2)[:, 1:] - draw(1, 2)[:, :-1]) == 1).all()  # pieces, not letters


def test_the_loss_of_the_small_llama_is_transformers_own():
    model, ids = tiny.llama(16, 1, 2), torch.randint(256, (3, 12))
    torch.testing.assert_close(tiny.loss(model, ids), model(input_ids=ids, labels=ids).loss)


# What `ranks.launch` promises, whatever it starts.


def scene(cfg):
    """What a rank sees of its surroundings; one of them may fail."""
    if cfg == "refuse" and dist.get_rank() == 1:
        raise UserError("rank 1 refuses")
    if cfg == "crash" and dist.get_rank() == 1:
        raise ZeroDivisionError
    if cfg in ("refuse", "crash"):
        dist.barrier()  # would wait for the other one for ever
    seen = {
        "rank": dist.get_rank(),
        "ranks": dist.get_world_size(),
        "threads": torch.get_num_threads(),
    }
    return seen | {"folder": os.getcwd(), "word": os.environ.get("A_WORD"), "process": os.getpid()}


def test_ranks_have_folder_and_environment_of_now(tmp_path, monkeypatch):
    """Not those of the moment in which the fork server was started."""
    ranks.launch(scene, None, 1, WAIT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A_WORD", "yes")
    found = ranks.launch(scene, None, 2, WAIT)
    assert [row["rank"] for row in found] == [0, 1] and {row["ranks"] for row in found} == {2}
    assert all(row["folder"] == str(tmp_path) and row["word"] == "yes" for row in found)
    assert len({row["process"] for row in found} | {os.getpid()}) == 3
    monkeypatch.delenv("A_WORD")
    (row,) = ranks.launch(scene, None, 1, WAIT)
    assert row["word"] is None and "RANK" not in os.environ


def test_a_rank_that_fails_ends_the_others():
    with pytest.raises(UserError, match="^rank 1 refuses$"):
        ranks.launch(scene, "refuse", 2, WAIT)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        ranks.launch(scene, "crash", 2, WAIT)
    with pytest.raises(UserError, match="--ranks must be at least 1"):
        ranks.launch(scene, None, 0)


def test_where_there_are_gpus_ranks_begin_from_nothing(monkeypatch):
    assert ranks.start_method() == ("forkserver" if sys.platform == "linux" else "spawn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ranks.start_method() == "spawn"


def test_ranks_can_be_started_by_a_fork(tmp_path):
    """The fork server of the parent is not the child's: it must not be waited for."""
    ranks.launch(scene, None, 1, WAIT)
    child = os.fork()
    if child == 0:
        done = ranks.launch(scene, None, 1, WAIT)
        (tmp_path / "done").write_text(str(len(done)), "utf-8")
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "done").read_text("utf-8") == "1"


def test_torchrun_reports_our_line(tmp_path):
    """A flag that cannot be meant: our line once, and again as the cause in the report that torchrun adds."""
    torchrun = str(Path(sys.executable).parent / "torchrun")
    command = [
        torchrun,
        "--nproc_per_node",
        "1",
        "--master_port",
        str(29900 + os.getpid() % 90),
        "training/ddp.py",
    ]
    command += ["--batch", "7", "--accumulate", "2", "--out", str(tmp_path / "x")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    line = "error: --batch 7 does not fall into 1 ranks x 2 parts"
    assert done.returncode != 0 and done.stderr.splitlines().count(line) == 1
    assert f"traceback : {line}" in done.stderr and 'training/ddp.py", line' not in done.stderr
    assert not (tmp_path / "x").exists()


def trap(find):
    """PyTorch's wrapper on ranks that see different modalities, as it comes."""
    run.seed(0)
    parallel = nn.parallel.DistributedDataParallel(Two(), find_unused_parameters=find)
    for _ in range(2):
        parallel(torch.ones(2, 4), picture=dist.get_rank() == 0).backward()
    return parallel.module.eye.weight.grad.sum().item()


def test_the_trap_of_different_modalities_is_there_and_can_be_mended():
    with pytest.raises(
        Exception, match="finished reduction|[Tt]imed out|[Cc]onnection (closed|reset)"
    ):
        ranks.launch(trap, False, 2, timedelta(seconds=8))
    first, second = ranks.launch(trap, True, 2, WAIT)
    assert first == second != 0


def test_a_resumed_run_is_the_same_bit_for_bit(found):
    for row in found:
        assert (
            row["whole"]["losses"] == row["resumed"]["losses"] and len(row["whole"]["losses"]) == 5
        )


def test_from_the_command(tmp_path):
    """A run is resumed; one that runs away stops with one line, and the last good checkpoint stays."""
    cfg = replace(CFG, steps=2, save_every=2, ranks=1, out=str(tmp_path))
    first = ddp.main(cfg)
    assert ddp.main(replace(cfg, resume=True))["loss"] == first["loss"]
    with pytest.raises(UserError, match="the last checkpoint is kept"):
        ddp.main(replace(cfg, steps=6, lr=1e30, save_every=1, out=str(tmp_path / "far")))
    manifest.load(tmp_path / "far")


def test_bytes_sent_are_those_of_the_formula(found):
    row = found[0]["whole"]
    # All but the rotary frequencies
    assert row["held"]["gradients"] == row["held"]["weights"] - 2 * 8 * 4
    assert (
        row["sent"] == pytest.approx(2 * 2 / 3 * row["held"]["gradients"])
        and len(row["buckets"]) > 3
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(batch=7), "--batch 7"),
        (dict(bucket=0.0), "--bucket"),
        (dict(width=9), "--width"),
        (dict(lr=0.0), "--lr"),
    ],
)
def test_bad_input(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        ddp.main(ddp.Config(**flags, out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


LEAVES = """
import sys
from pathlib import Path
from training import ddp, ranks

cfg = ddp.Config(width=16, layers=1, steps=2, batch=4, length=16, out=sys.argv[1])
assert ranks.launch(ddp.worker, cfg, 1)[0]["losses"]
print(*(name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="lists threads in /proc")
def test_a_rank_leaves_no_thread_of_gloo_behind(tmp_path):
    """One that outlives the interpreter aborts the process, about one of ten times under torchrun."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29800 + os.getpid() % 90)}
    command = [sys.executable, "-c", LEAVES, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert "python" in names[0] and not [name for name in names if "gloo" in name]
