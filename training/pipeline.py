"""Pipeline parallelism: the first layers here, the next there. GPipe: Huang et al. 2018, arXiv:1811.06965.

Cut a model between layers, and only activations travel, from each stage to the next. But then one rank computes while
all others wait; so cut the batch too, and let the stages work on different micro-batches at once. What is left of the
waiting, at both ends, is the bubble. A micro-batch that has gone forward and not back yet is in flight, and its
activations are kept. GPipe does all forwards, then all backwards. 1F1B (Narayanan et al. 2021,
arXiv:2104.04473, Sec. 2.2) begins to go back as soon as it can: the same bubble, but fewer activations to keep.

Shapes: p stages, one a rank; m micro-batches of B/m texts; L tokens, D width. A forward takes one unit of time, a
backward two. Differences from the papers: GPipe recomputes activations, here they are kept; one step is enough here.

    python training/pipeline.py                              # a small Llama, four stages, eight micro-batches
    python training/pipeline.py --model smollm2 --layers 8   # the first layers of a real one: stages are not equal
    torchrun --nproc_per_node 2 training/pipeline.py
"""

import copy
import time
import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from training import ranks, tiny
from utils import data, figures, pretrained, run


@dataclass(frozen=True)
class Config:
    """Run one training step through a pipeline in two orders; compare with one process, and time with the formula."""

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


def gpipe(stage, stages, micro):
    """All forwards, then all backwards: yields ("forward" or "backward", micro-batch). GPipe, Fig. 2c."""
    for i in range(micro):
        yield "forward", i
    for i in reversed(range(micro)):
        yield "backward", i


def one_f_one_b(stage, stages, micro):
    """A forward for each stage behind this one, then in turn one forward, one backward. Narayanan et al., Fig. 4."""
    warm = min(stages - 1 - stage, micro)
    for i in range(warm):
        yield "forward", i
    for i in range(warm, micro):
        yield "forward", i
        yield "backward", i - warm
    for i in range(micro - warm, micro):
        yield "backward", i


UNITS = {"forward": 1, "backward": 2}  # time: twice as many products
COLOURS = {"forward": "lightskyblue", "backward": "sandybrown"}
# ours, torch's
SCHEDULES = {"gpipe": (gpipe, "ScheduleGPipe"), "1f1b": (one_f_one_b, "Schedule1F1B")}


def bubble(stages, micro):
    """The share of its time that a rank waits, if all stages are equally fast. GPipe, Sec. 2.3."""
    return (stages - 1) / (micro + stages - 1)


def max_in_flight(actions):
    """In-flight micro-batches, forward done and backward not yet, at the most: m in GPipe, p - stage in 1F1B."""
    in_flight = 0
    most = 0
    for kind, _ in actions:
        in_flight += 1 if kind == "forward" else -1
        most = max(most, in_flight)
    return most


def simulate(schedule, stages, micro, seconds=None):
    """When everything happens, if an action waits for its inputs only: [[(kind, micro-batch, begin, end)] by rank].

    seconds: {(stage, kind, micro-batch): how long it takes}; None: 1 forward, 2 backward. Raises UserError if ranks
    wait for each other for ever.
    """
    todo = [list(schedule(stage, stages, micro)) for stage in range(stages)]
    done, lines = {}, [[] for _ in range(stages)]
    while any(todo):
        left = sum(map(len, todo))
        for stage, queue in enumerate(todo):
            while queue:
                kind, i = queue[0]
                # Who sends what this action needs
                before = stage - 1 if kind == "forward" else stage + 1
                if 0 <= before < stages and (before, kind, i) not in done:
                    break
                begin = max(
                    done.get((before, kind, i), 0), lines[stage][-1][3] if lines[stage] else 0
                )
                done[stage, kind, i] = begin + (seconds[stage, kind, i] if seconds else UNITS[kind])
                lines[stage].append((kind, i, begin, done[stage, kind, i]))
                queue.pop(0)
        run.check(
            sum(map(len, todo)) < left,
            f"in {schedule.__name__} the ranks wait for each other for ever",
        )
    return lines


def idle(lines):
    """The share of the time between the first begin and the last end in which ranks do nothing, their mean."""
    span = max(line[-1][3] for line in lines) - min(line[0][2] for line in lines)
    return 1 - sum(end - begin for line in lines for _, _, begin, end in line) / (span * len(lines))


class Stage(nn.Module):
    """Layers of a Llama that follow each other, its words before the first of them, its head behind the last.

    ids (B, L) or states (B, L, D) -> states, or logits (B, L, V). The weights are the model's own, not copies.
    """

    def __init__(self, model, stage, stages):
        super().__init__()
        first, last = stage == 0, stage == stages - 1
        layers = model.model.layers
        ends = [round(i * len(layers) / stages) for i in (stage, stage + 1)]
        self.words = model.get_input_embeddings() if first else None
        self.layers = layers[ends[0] : ends[1]]
        self.norm, self.head = (model.model.norm, model.lm_head) if last else (None, None)
        self.rotary, self.width = model.model.rotary_emb, model.config.hidden_size
        self.first, self.last = first, last

    def blank(self, ids):
        """A tensor to receive the states of (B, L) ids into: (B, L, D)."""
        return torch.empty(
            *ids.shape, self.width, dtype=next(self.parameters()).dtype, device=ids.device
        )

    def forward(self, x):
        x = self.words(x) if self.words else x
        position = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=position)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def loss(logits, labels):
    """Mean of -log p(label): logits (B, L, V), labels (B, L) -> ()."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class Lane:
    """Messages in one direction, in order; the other direction has a group of its own and does not wait for them."""

    def __init__(self, step):
        self.group, self.step, self.under_way = dist.new_group(), step, []

    def send(self, x):
        x = x.detach().contiguous()
        # To wait here would be to wait for ever
        work = dist.isend(x, dist.get_rank() + self.step, group=self.group)
        self.under_way.append((work, x))

    def receive(self, blank):
        dist.recv(blank, dist.get_rank() - self.step, group=self.group)
        return blank

    def finish(self):
        for work, _ in self.under_way:
            work.wait()
        self.under_way = []


def execute(actions, module, ids, labels, lanes, watch):
    """Run a stage's actions: ids, labels: a list of (B/m, L) -> the loss, 0 on all but the last stage.

    Gradients end up in the weights of the stage: those of the mean over the whole batch.
    """
    down, up = lanes  # of activations, of gradients
    in_flight = {}  # in-flight micro-batches: {number: input and output of this stage}
    value = 0.0
    for kind, i in actions:
        if kind == "forward":
            # Activations from the stage before, or ids; to the stage behind, or into the loss.
            x = ids[i] if module.first else down.receive(module.blank(ids[i])).requires_grad_()
            with watch(kind, i):
                y = loss(module(x), labels[i]) / len(ids) if module.last else module(x)
            in_flight[i] = (x, y)
            if module.last:
                value += y.item()
            else:
                down.send(y)
        else:
            # The gradient of the output from the stage behind; that of the input to the stage before.
            x, y = in_flight.pop(i)
            grad = None if module.last else up.receive(torch.empty_like(y))
            with watch(kind, i):
                y.backward(grad)
            if not module.first:
                up.send(x.grad)
    for lane in lanes:
        lane.finish()
    return value


def tie(module, group):
    """Words that are the head's weights too are on the first stage and on the last: add their gradients up."""
    weight = module.words.weight if module.first else module.head.weight if module.last else None
    if weight is not None:
        dist.all_reduce(weight.grad, group=group)


class Watch:
    """Notes of each action when it ran and how long it computed, and counts what is kept for backward passes."""

    def __init__(self, module, pace):
        self.pace, self.line, self.seconds, self.most, self.one = pace, [], {}, 0, 0
        self.weights = {p.untyped_storage()._cdata for p in module.parameters()}
        # Autograd alone holds what is in here, as long as it needs it
        self.kept = weakref.WeakSet()
        dist.barrier()
        self.start = time.perf_counter()

    def keep(self, x):
        box = Box(x.detach())
        if x.untyped_storage()._cdata not in self.weights:
            self.kept.add(box)
        return box

    @contextmanager
    def __call__(self, kind, i):
        begin, used = time.perf_counter(), time.process_time()
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda box: box.tensor):
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[kind, i] = time.process_time() - used
        time.sleep(max(0.0, begin + self.pace * UNITS[kind] - time.perf_counter()))
        self.line.append((kind, i, begin - self.start, time.perf_counter() - self.start))
        now = ranks.held(*(box.tensor for box in self.kept))  # bytes
        self.most, self.one = max(self.most, now), self.one or now  # `one`: after the first forward


class Box:
    """Something to hold a tensor that can be watched: tensors themselves come and go as views."""

    def __init__(self, tensor):
        self.tensor = tensor


def through_torch(schedule, module, ids, labels, micro):
    """The same step by torch.distributed.pipelining: ids, labels (B, L) -> the loss, 0 on all but the last stage."""
    from torch.distributed import pipelining

    stage = pipelining.PipelineStage(module, dist.get_rank(), dist.get_world_size(), ids.device)
    losses = []
    inputs = [ids] if module.first else []
    target = {"target": labels, "losses": losses} if module.last else {}
    make_schedule = getattr(pipelining, SCHEDULES[schedule][1])
    make_schedule(stage, micro, loss_fn=loss).step(*inputs, **target)
    return sum(x.item() for x in losses) / micro


def check(config):
    """Raises UserError unless `Stage` can go through the layers of a model of this configuration."""
    kind, known = config.model_type, ("llama", "mistral", "qwen2")
    run.check(
        kind in known, f"--model is a {kind}; stages are made of the layers of {', '.join(known)}"
    )
    window = getattr(config, "sliding_window", None)
    run.check(not window or kind == "qwen2" and not config.use_sliding_window,
              f"--model looks {window} tokens back only; stages have no mask for that")  # fmt: skip


def read(cfg):
    """The first layers of the model, fp32, and real text for it: -> model, ids (B, L + 1)."""
    if cfg.model == "bytes":
        model, ids = (
            tiny.llama(layers=cfg.layers),
            tiny.batch(tiny.corpus(), cfg.seed, 0, cfg.batch, cfg.length + 1),
        )
    else:
        tokenizer, model = (
            pretrained.smollm2() if cfg.model == "smollm2" else pretrained.language_model(cfg.model)
        )
        check(model.config)
        run.check(
            cfg.layers <= len(model.model.layers),
            f"--layers: the model has {len(model.model.layers)}",
        )
        del model.model.layers[cfg.layers :]
        text = "\n\n".join(page for _, page in data.docs()[: cfg.batch])
        ids = torch.tensor(tokenizer(text)["input_ids"])[: cfg.batch * (cfg.length + 1)]
        run.check(
            len(ids) == cfg.batch * (cfg.length + 1), "there is not so much text: lower --length"
        )
    model.set_attn_implementation("sdpa")  # causal without a mask, so that a stage needs none
    return model.float().requires_grad_().to(ranks.device()), ids.view(cfg.batch, -1).to(
        ranks.device()
    )


def difference(ours, theirs):
    """The largest difference of two lists of gradients, as a share of the largest number of the tensor at hand."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


def worker(cfg):
    """What every rank does: the step in both orders, by us and by torch, and whole -> what was found."""
    torch.manual_seed(cfg.seed)
    rank, stages = dist.get_rank(), dist.get_world_size()
    run.check(
        cfg.layers >= stages,
        f"{cfg.layers} layers cannot be dealt to {stages} stages; raise --layers",
    )
    run.check(
        cfg.micro >= stages,
        f"--micro must be at least {stages}, the stages: torch's 1F1B asks for it",
    )
    model, ids = read(cfg)
    ids, labels = ids[:, :-1], ids[:, 1:]
    some_ids, some_labels = ([part.clone() for part in x.chunk(cfg.micro)] for x in (ids, labels))
    lanes, ends = (Lane(1), Lane(-1)), dist.new_group([0, stages - 1])
    found, gradients = {name: {} for name in SCHEDULES}, {}
    for name, (schedule, _) in SCHEDULES.items():
        for by in ("torch", "ours"):  # ours second: whatever is slow for the first time was done
            module = Stage(copy.deepcopy(model), rank, stages)
            if by == "ours":
                watch = Watch(module, cfg.pace)
                actions = schedule(rank, stages, cfg.micro)
                value = execute(actions, module, some_ids, some_labels, lanes, watch)
                seconds = [[*action, s] for action, s in watch.seconds.items()]
                found[name] |= {
                    "line": watch.line,
                    "seconds": seconds,
                    "most": watch.most,
                    "one": watch.one,
                }
            else:
                value = through_torch(name, module, ids, labels, cfg.micro)
            if model.config.tie_word_embeddings and stages > 1:
                tie(module, ends)
            found[name][f"{by} loss"], gradients[name, by] = (
                value,
                [p.grad for p in module.parameters()],
            )
    value = loss(model(input_ids=ids, use_cache=False).logits, labels)
    value.backward()
    whole = [p.grad for p in Stage(model, rank, stages).parameters()]
    for name in SCHEDULES:
        found[name]["gradients"] = difference(gradients[name, "ours"], whole)
        found[name]["torch gradients"] = difference(
            gradients[name, "ours"], gradients[name, "torch"]
        )
    return found | {"loss": value.item()}


def gantt(axis, lines, title):
    """Ranks down, time across, a box an action with the number of its micro-batch."""
    for rank, line in enumerate(lines):
        for kind, i, begin, end in line:
            axis.barh(
                rank, end - begin, left=begin, height=0.9, color=COLOURS[kind], edgecolor="white"
            )
            axis.text((begin + end) / 2, rank, i, ha="center", va="center", fontsize=7)
    axis.set(yticks=range(len(lines)), yticklabels=[f"rank {rank}" for rank in range(len(lines))])
    axis.set_title(title, fontsize=9, loc="left")
    axis.invert_yaxis()


def main(cfg: Config) -> dict:
    """One step in both orders, compared; writes the timeline."""
    import matplotlib.pyplot as plt

    run.check(
        min(cfg.micro, cfg.batch, cfg.length, cfg.layers) > 0,
        "--micro, --batch, --length, --layers: at least 1",
    )
    run.check(
        cfg.batch % cfg.micro == 0,
        "--batch must be a multiple of --micro: unequal parts have another mean",
    )
    run.check(cfg.pace >= 0, "--pace must be at least 0")
    found = ranks.launch(worker, cfg, cfg.ranks)
    if found is None:
        return {}
    folder = run.output(cfg.out, cfg)
    stages, last = len(found), found[-1]
    metrics = {"stages": stages, "micro-batches": cfg.micro, "loss": last["loss"]}
    figure, axes = plt.subplots(5, 1, figsize=(11, 1.1 + 0.36 * stages * 5), layout="constrained")
    for k, name in enumerate(SCHEDULES):
        one = [x[name] for x in found]
        order = SCHEDULES[name][0]
        seconds = {(rank, kind, i): s for rank, x in enumerate(one) for kind, i, s in x["seconds"]}
        plan, measured = simulate(order, stages, cfg.micro), [x["line"] for x in one]
        metrics[f"{name}, differences"] = {
            "loss": abs(one[-1]["ours loss"] - last["loss"]), "gradients": max(x["gradients"] for x in one),
            "loss, torch": abs(one[-1]["ours loss"] - one[-1]["torch loss"]),
            "gradients, torch": max(x["torch gradients"] for x in one),
        }  # fmt: skip
        metrics[f"{name}, idle share"] = {
            "formula": bubble(stages, cfg.micro), "planned": idle(plan), "measured": idle(measured),
            "of seconds computed": idle(simulate(order, stages, cfg.micro, seconds)),
        }  # fmt: skip
        planned = {f"rank {r}": max_in_flight(order(r, stages, cfg.micro)) for r in range(stages)}
        metrics[f"{name}, in flight, planned"] = planned
        metrics[f"{name}, in flight, measured"] = {
            f"rank {r}": x["most"] / x["one"] for r, x in enumerate(one)
        }
        metrics[f"{name}, kept, MiB"] = {f"rank {r}": x["most"] / 2**20 for r, x in enumerate(one)}
        share = metrics[f"{name}, idle share"]
        says = "in units of a forward (blue; a backward, orange, takes two)"
        gantt(axes[2 * k], plan, f"{name} as planned, {says}: {share['planned']:.1%} idle")
        gantt(
            axes[2 * k + 1],
            measured,
            f"{name} as measured, in seconds: {share['measured']:.1%} idle",
        )
        where, kept = (
            [r + 0.4 * k - 0.2 for r in range(stages)],
            metrics[f"{name}, kept, MiB"].values(),
        )
        axes[4].bar(where, kept, 0.38, label=name, color=f"{0.4 + 0.3 * k}")
    axes[4].set(
        xticks=range(stages), xticklabels=[f"rank {r}" for r in range(stages)], ylabel="MiB"
    )
    axes[4].set_title("activations kept at once, at the most", fontsize=9, loc="left")
    axes[4].legend(fontsize=8, frameon=False)
    figures.close(figure, folder / "timeline.png")
    return run.report(
        folder, metrics, then=f"open {folder}/timeline.png; then python training/tensor_parallel.py"
    )


if __name__ == "__main__":
    run.cli(main, Config)
