"""Pipeline parallelism: the first layers here, the next there. GPipe: Huang et al. 2018,
arXiv:1811.06965.

Cut a model between layers, and only activations travel, from each stage to the next. But then one
rank computes while all others wait; so cut the batch too, and let the stages work on different
micro-batches at once. What is left of the waiting, at both ends, is the bubble.
pipeline_schedules.py has the orders of work, GPipe and 1F1B (Narayanan et al. 2021,
arXiv:2104.04473), pipeline_stage.py runs them. This script does one training step by both, compares
loss and gradients with one process and with `torch.distributed.pipelining`, and draws the timeline
beside the planned one.

Shapes: p stages, one a rank; m micro-batches of B/m texts; L tokens, D width. Differences from the
papers: GPipe recomputes activations, here they are kept; one step is enough here.

    python training/pipeline.py                              # a small Llama, four stages
    python training/pipeline.py --model smollm2 --layers 8   # of a real one: stages are not equal
    torchrun --nproc_per_node 2 training/pipeline.py
"""

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training import ranks, tiny, unsharded
from training.pipeline_schedules import SCHEDULES, bubble, idle_fraction, max_in_flight, simulate
from training.pipeline_stage import Channel, Stage, execute, loss, reduce_tied_gradients
from training.pipeline_timeline import Timeline, draw_timelines
from training.unsharded import relative_error
from utils import run


@dataclass(frozen=True)
class Config:
    """Run one training step by two pipeline schedules; compare with one process and formula."""

    ranks: int = 4  # p, stages; each is a process
    micro: int = 8  # m, micro-batches
    batch: int = 8  # texts of a step, a multiple of --micro
    length: int = 64  # tokens a text
    # bytes: a small random Llama over bytes; or smollm2, a local folder, a hub id
    model: str = "bytes"
    layers: int = 8  # of the model, the first ones
    # seconds that a forward lasts at the least, a backward twice that: ranks may share cores
    pace: float = 0.1
    seed: int = 0  # same seed, same numbers
    out: str = "outputs/pipeline"  # where the results go


# Of torch.distributed.pipelining
TORCH_SCHEDULES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}


def check(config):
    """Raises UserError unless `Stage` can go through the layers of such a model."""
    kind = config.model_type
    known = ("llama", "mistral", "qwen2")
    run.check(
        kind in known, f"--model is a {kind}; stages are made of the layers of {', '.join(known)}"
    )
    # Sliding-window attention needs a mask; Qwen2 has a window that may be off.
    window = getattr(config, "sliding_window", None)
    windowed = window and (kind != "qwen2" or config.use_sliding_window)
    run.check(
        not windowed, f"--model looks {window} tokens back only; stages have no mask for that"
    )


def read(cfg):
    """The first layers of the model, fp32, and real text for it -> model, ids (B, L + 1)."""
    if cfg.model == "bytes":
        model = tiny.llama(layers=cfg.layers)
        ids = tiny.batch(tiny.corpus(), cfg.seed, 0, cfg.batch, cfg.length + 1)
    else:
        tokenizer, model = unsharded.load(cfg.model)
        check(model.config)
        depth = len(model.model.layers)
        run.check(cfg.layers <= depth, f"--layers: the model has {depth}")
        del model.model.layers[cfg.layers :]
        ids = unsharded.token_batch(tokenizer, cfg.batch, cfg.length + 1)
    model.set_attn_implementation("sdpa")  # causal without a mask, so that a stage needs none
    model = model.float().requires_grad_().to(ranks.device())
    return model, ids.to(ranks.device())


def torch_pipeline_step(schedule, module, ids, labels, micro):
    """The same step by torch.distributed.pipelining -> the loss, 0 on all but the last stage.

    ids, labels (B, L).
    """
    from torch.distributed import pipelining

    # Ids go into the first stage, labels into the last one's loss; a rank has one stage.
    stage = pipelining.PipelineStage(module, dist.get_rank(), dist.get_world_size(), ids.device)
    losses = []
    inputs = [ids] if module.first else []
    target = {"target": labels, "losses": losses} if module.last else {}
    make_schedule = getattr(pipelining, TORCH_SCHEDULES[schedule])
    make_schedule(stage, micro, loss_fn=loss).step(*inputs, **target)
    return sum(x.item() for x in losses) / micro


def worker(cfg):
    """What every rank does: the step by both schedules, ours and torch's, and unsharded."""
    torch.manual_seed(cfg.seed)
    rank = dist.get_rank()
    stages = dist.get_world_size()
    run.check(
        cfg.layers >= stages,
        f"{cfg.layers} layers cannot be dealt to {stages} stages; raise --layers",
    )
    run.check(
        cfg.micro >= stages,
        f"--micro must be at least {stages}, the stages: torch's 1F1B asks for it",
    )
    # Model and batch, the same on all ranks; the batch in micro-batches.
    model, tokens = read(cfg)
    ids = tokens[:, :-1]
    labels = tokens[:, 1:]
    micro_ids = [part.clone() for part in ids.chunk(cfg.micro)]
    micro_labels = [part.clone() for part in labels.chunk(cfg.micro)]
    # Activations go to the next rank, gradients to the one before; embedding and head, on the first
    # and on the last, may be one weight.
    channels = (Channel(1), Channel(-1))
    ends = dist.new_group([0, stages - 1])
    tied = model.config.tie_word_embeddings and stages > 1
    found = {}
    gradients = {}
    for name, schedule in SCHEDULES.items():
        # By PyTorch, first: whatever is slow for the first time is not on our timeline.
        module = Stage(copy.deepcopy(model), rank, stages)
        torch_loss = torch_pipeline_step(name, module, ids, labels, cfg.micro)
        if tied:
            reduce_tied_gradients(module, ends)
        torch_gradients = [p.grad for p in module.parameters()]
        # By our own stages, on the clock.
        module = Stage(copy.deepcopy(model), rank, stages)
        timeline = Timeline(module, cfg.pace)
        actions = schedule(rank, stages, cfg.micro)
        our_loss = execute(actions, module, micro_ids, micro_labels, channels, timeline)
        if tied:
            reduce_tied_gradients(module, ends)
        gradients[name] = [p.grad for p in module.parameters()]
        found[name] = {
            "line": timeline.line,
            "seconds": [[*action, s] for action, s in timeline.seconds.items()],
            "peak": timeline.peak,
            "one": timeline.one,
            "ours loss": our_loss,
            "torch loss": torch_loss,
            "torch gradients": relative_error(gradients[name], torch_gradients),
        }
    # The unsharded model: its gradients of this rank's layers.
    value = loss(model(input_ids=ids, use_cache=False).logits, labels)
    value.backward()
    whole = [p.grad for p in Stage(model, rank, stages).parameters()]
    for name in SCHEDULES:
        found[name]["gradients"] = relative_error(gradients[name], whole)
    return found | {"loss": value.item()}


def by_rank(numbers):
    return {f"rank {rank}": x for rank, x in enumerate(numbers)}


def main(cfg: Config) -> dict:
    """One step by both schedules, compared; writes the timeline."""
    run.check(
        min(cfg.micro, cfg.batch, cfg.length, cfg.layers) > 0,
        "--micro, --batch, --length, --layers: at least 1",
    )
    run.check(
        cfg.batch % cfg.micro == 0,
        "--batch must be a multiple of --micro: unequal parts have another mean",
    )
    run.check(cfg.pace >= 0, "--pace must be at least 0")
    # One step on the ranks, in both orders.
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    folder = run.output(cfg.out, cfg)
    stages = len(found)
    whole_loss = found[-1]["loss"]
    metrics = {"stages": stages, "micro-batches": cfg.micro, "loss": whole_loss}
    runs = {}
    for name, schedule in SCHEDULES.items():
        one = [x[name] for x in found]
        # The schedule in units, by the ranks' clocks, and by the seconds that they computed.
        planned = simulate(schedule, stages, cfg.micro)
        measured = [x["line"] for x in one]
        seconds = {}
        for rank, x in enumerate(one):
            for kind, i, s in x["seconds"]:
                seconds[rank, kind, i] = s
        computed = simulate(schedule, stages, cfg.micro, seconds)
        # Micro-batches in flight: counted in the schedule, and by bytes.
        planned_in_flight = []
        for rank in range(stages):
            planned_in_flight.append(max_in_flight(schedule(rank, stages, cfg.micro)))
        kept = [x["peak"] / 2**20 for x in one]
        metrics[f"{name}, differences"] = {
            "loss": abs(one[-1]["ours loss"] - whole_loss),
            "gradients": max(x["gradients"] for x in one),
            "loss, torch": abs(one[-1]["ours loss"] - one[-1]["torch loss"]),
            "gradients, torch": max(x["torch gradients"] for x in one),
        }
        metrics[f"{name}, idle share"] = {
            "formula": bubble(stages, cfg.micro),
            "planned": idle_fraction(planned),
            "measured": idle_fraction(measured),
            "of seconds computed": idle_fraction(computed),
        }
        metrics[f"{name}, in flight, planned"] = by_rank(planned_in_flight)
        metrics[f"{name}, in flight, measured"] = by_rank(x["peak"] / x["one"] for x in one)
        metrics[f"{name}, kept, MiB"] = by_rank(kept)
        runs[name] = {
            "planned": planned,
            "measured": measured,
            "planned idle": idle_fraction(planned),
            "measured idle": idle_fraction(measured),
            "kept": kept,
        }
    draw_timelines(folder / "timeline.png", runs)
    then = f"open {folder}/timeline.png; then python training/tensor_parallel.py"
    return run.report(folder, metrics, then=then)


if __name__ == "__main__":
    run.cli(main, Config)
