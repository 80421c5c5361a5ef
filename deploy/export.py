"""Export: a decode step with its KV cache as an ONNX file, quantised, run by onnxruntime, against eager PyTorch.

torch.export turns the step into a graph (export_step.py), torch.onnx writes it (export_onnx.py),
quantisers make smaller files of it (export_int8.py). Which layers dynamic int8 may quantise is chosen
on calibration text, and all files are judged on other pages: bytes, CPU time a token, perplexity, and
how often the next token is that of eager.
torch.compile and torch.jit.trace are in export_compile.py.

Shapes: a sequence of T new tokens after S past ones, V tokens in the vocabulary.

    python deploy/export.py                        # the table and the figure
    python deploy/export.py --layers 4 --keep      # a small model; the files stay
    python deploy/export.py --tolerance 0.03       # more layers stay in float32
    python deploy/export_compile.py                # torch.compile, torch.jit.trace, DeepSpeed
"""

from dataclasses import dataclass
from functools import partial

import torch

from deploy import decode, export_figure, export_int8, export_onnx
from deploy.export_int8 import perplexity, score, sensitivity
from deploy.export_step import DecodeStep, OnnxStep, export_step, generate
from deploy.export_times import measure
from deploy.perplexity import texts_of
from utils import run
from utils.run import check


@dataclass(frozen=True)
class Config:
    """Export a decode step to ONNX, quantise it, and compare with eager PyTorch."""

    model: str = "smollm2"  # or a local folder, or a hub id
    layers: int = 0  # only the first so many, for a quick look; 0: all
    calibration: int = 8  # pieces of text on which the layers of dynamic int8 are chosen
    held_out: int = 8  # other pieces, on which all are judged
    length: int = 128  # tokens of a piece
    tolerance: float = 0.1  # nats a token that the inputs of a kind of layers may cost in 8 bits
    block: int = 32  # weights that share a scale in 8 and 4 bits
    prompts: int = 4  # held-out openings of 32 tokens that are gone on with
    max_new_tokens: int = 16  # tokens of each continuation, greedy
    past: int = 128  # tokens in the cache when a token is timed
    rounds: int = 12  # each format once a round, the quickest counts
    keep: bool = False  # leave all ONNX files in --out (2 GB with smollm2), not step_8bit.onnx only
    seed: int = 0
    out: str = "outputs/export"


def write_formats(step, kinds, folder, block):
    """Export the step, quantise it in five ways -> {format: path}. kinds: what int8 may quantise."""
    source = folder / "step.onnx"
    export_onnx.write(export_step(step), source, *step.names())
    paths = {"onnx, fp32": source}
    for name in ("int8", "int8_channels", "int8_chosen", "step_8bit", "step_4bit"):
        paths[name] = folder / f"{name}.onnx"
    # dynamic int8: all that it finds, a scale for each channel, only the kinds that bear it
    products = {"op_types_to_quantize": ["MatMul"], "per_channel": True}
    export_int8.write_dynamic(source, paths["int8"])
    export_int8.write_dynamic(source, paths["int8_channels"], **products)
    export_int8.write_chosen(source, paths["int8_chosen"], kinds)
    # weights in blocks
    for bits in (8, 4):
        export_int8.write_blocks(source, paths[f"step_{bits}bit"], bits, block)
    return paths


def times(steps, past, rounds):
    """{name: least CPU ms of one token after `past` others}, all of them once a round, in turn."""
    token = torch.ones(1, 1, dtype=torch.long)
    ways = {name: partial(step, token, step.empty(past)) for name, step in steps.items()}
    return {name: row["ms"] for name, row in measure(ways, rounds).items()}


def one_at_a_time(step):
    """A function from ids (1,T) to logits (1,T,V) that reads one token a pass: each has scales of its own."""

    def logits_of(ids):
        past = step.empty(0)
        rows = []
        for token in ids.split(1, dim=1):
            logits, past = step(token, past)
            rows.append(logits)
        return torch.cat(rows, dim=1)

    return logits_of


def common(mine, theirs):
    """Tokens of two continuations (1,T) that are equal, up to the first that is not."""
    return int((mine == theirs).long().cumprod(1).sum())


@torch.no_grad()
def compare(eager, paths, held_out, cfg):
    """{format: {"MB", "ms a token", "of eager", "perplexity", ...}}, "eager" the first."""
    steps = {"eager": eager}
    for name, path in paths.items():
        steps[name] = OnnxStep(path, eager)
    milliseconds = times(steps, cfg.past, cfg.rounds)
    # what eager says: of openings, and at each place of the pieces
    openings = held_out[: cfg.prompts, :32]
    wanted = [generate(eager, row[None], cfg.max_new_tokens) for row in openings]
    _, eager_tokens = score(eager.logits, held_out)
    weights = sum(p.numel() * p.element_size() for p in eager.parameters())
    rows = {}
    for name, step in steps.items():
        # quality of whole pieces, and of a text that goes on
        nats, tokens = score(step.logits, held_out)
        found = [generate(step, row[None], cfg.max_new_tokens) for row in openings]
        size = paths[name].stat().st_size if name in paths else weights
        rows[name] = {
            "MB": size / 1e6,
            "ms a token": milliseconds[name],
            "of eager": milliseconds[name] / milliseconds["eager"],
            "perplexity": perplexity(nats),
            "argmax as eager, %": 100 * float((tokens == eager_tokens).float().mean()),
            "greedy tokens as eager": sum(map(common, found, wanted)),
        }
        # dynamic scales depend on what is read in the same pass
        if name.startswith("int8"):
            nats, _ = score(one_at_a_time(step), held_out)
            rows[name]["perplexity, one token a pass"] = perplexity(nats)
    return rows


def differences(eager, path, pieces):
    """Largest difference of logits between eager and a file, over pieces of text (n,T)."""
    exported = OnnxStep(path, eager)
    largest = 0.0
    for row in pieces:
        off = eager.logits(row[None]) - exported.logits(row[None])
        largest = max(largest, float(off.abs().max()))
    return largest


def main(cfg: Config) -> dict:
    """Export, quantise, measure; writes the table, the figure and step_8bit.onnx."""
    numbers = (cfg.calibration, cfg.held_out, cfg.prompts, cfg.max_new_tokens, cfg.rounds)
    check(
        min(numbers) > 0,
        "--calibration, --held-out, --prompts, --max-new-tokens, --rounds: 1 or more",
    )
    check(cfg.length > 1, "--length: 2 or more, for the first token is not predicted")
    check(cfg.past >= 0, "--past: 0 or more")
    run.seed(cfg.seed)
    torch.set_num_threads(1)  # CPU time of several threads is no latency
    tokenizer, model = decode.load(cfg.model, "cpu")
    step = DecodeStep(model.float(), cfg.layers)
    about = (cfg.calibration, cfg.held_out, cfg.length)
    to_choose, held_out = texts_of(tokenizer, *about)
    folder = run.output(cfg.out, cfg)
    # what bears 8 bits, on calibration text
    lost = sensitivity(step, to_choose)
    chosen = [kind for kind, nats in lost.items() if nats <= cfg.tolerance]
    # the files, and what they are worth on held-out text
    paths = write_formats(step, chosen, folder, cfg.block)
    rows = compare(step, paths, held_out, cfg)
    rows["onnx, fp32"]["largest difference of logits"] = differences(
        step, paths["onnx, fp32"], held_out
    )
    export_figure.save(folder / "export.png", lost, cfg.tolerance, rows)
    if not cfg.keep:
        for name, path in paths.items():
            if name != "step_8bit":
                path.unlink()
    metrics = {f"8-bit inputs of {kind}": {"nats a token": nats} for kind, nats in lost.items()}
    metrics |= rows
    metrics["kinds in int8_chosen"] = " ".join(chosen)
    metrics["greedy tokens"] = cfg.prompts * cfg.max_new_tokens
    return run.report(folder, metrics, then=f"open {folder}/export.png")


if __name__ == "__main__":
    run.cli(main, Config)
