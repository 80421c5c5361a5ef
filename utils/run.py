"""What every script does around its idea: read the flags, choose the device, fix the seed, write the results."""

import json
import math
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong and how to mend it, exit code 2, no traceback."""


def check(condition: Any, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def clean(text: str) -> str:
    """Lone surrogates, half characters out of JSON, a PDF or a file name, become U+FFFD: no encoder takes them."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def cli(
    main: Callable[[Any], Any],
    config: type,
    expand: Callable[[list[str], type], list[str]] = lambda args, config: args,
) -> Any:
    """Parse the command line into the dataclass `config`, run main; a UserError becomes one line and exit code 2.

    expand: what is done with the arguments first, such as reading those of a file; it is given them and `config`.
    """
    # Launchers add --local-rank=0 or --local_rank=0; LOCAL_RANK in the environment says the same
    args = [a for a in sys.argv[1:] if not a.startswith(("--local-rank=", "--local_rank="))]
    try:
        for argument in args:
            whole = argument == clean(argument)
            check(whole, f"'{clean(argument)}' is not UTF-8; write it in UTF-8, or rename the file")
        return main(tyro.cli(config, args=expand(args, config)))
    except UserError as error:
        line = f"error: {clean(str(error))}"
        print(line, file=sys.stderr)
        tell_torchrun(line)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def tell_torchrun(line: str) -> None:
    """Put the line where torchrun looks for the cause of a rank's end: it stands in the report that torchrun adds."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with suppress(OSError):
            more = {"py_callstack": line, "timestamp": str(int(time.time()))}
            record = {"message": {"message": line, "extraInfo": more}}
            Path(path).write_text(json.dumps(record), "utf-8")


def device(name: str = "auto") -> torch.device:
    """auto, cpu, cuda, cuda:1, mps ... -> the torch device. Raises UserError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def seed(value: int) -> None:
    """Seed Python, NumPy and torch on every device: same seed, same numbers."""
    check(0 <= value < 2**63, "--seed must be at least 0 and below 2 to the 63")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def autocast(on: torch.device) -> torch.autocast:
    """Matrix products in bf16, what needs range in fp32. Never fp16: a CPU is a hundred times slower in it."""
    return torch.autocast(on.type, torch.bfloat16)


def output(folder: str | Path, cfg: Any) -> Path:
    """Make the folder of a run, put the configuration there. Raises UserError if it cannot be written or resumed."""
    folder = Path(folder)
    resume = getattr(cfg, "resume", False)
    check(
        not (resume and getattr(cfg, "pretrained", False)),
        "--resume trains, --pretrained does not: leave out one",
    )
    # A resumed run: config.json stays that of the run to go on with, until its state is loaded
    if resume:
        there = any(folder.glob("state*.safetensors"))
        check(there, f"no checkpoint in {folder} to go on from; leave out --resume")
        return folder
    # A new run: its configuration is the first file, so that a place that cannot be written shows now
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", asdict(cfg))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another place with --out"
        ) from None
    return folder


# What a resumed run may change: what it writes and draws. A new --steps sets another pace for what is left.
FREE = {"resume", "out", "device", "save_every", "steps", "max_steps"}
FREE |= {"samples", "guidance_scale", "sampling_steps", "prompt", "negative"}
FREE |= {"split", "texts", "merge", "judged", "save_steps", "save_total_limit"}
FREE |= {"log_steps", "local_rank"}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested flags side by side: {"lora": {"r": 8}} -> {"lora.r": 8}."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def same_flags(cfg: Any, then: dict[str, Any], path: str | Path) -> None:
    """Raises UserError if a run resumed from `path` would learn otherwise than with its flags of `then`."""
    now = flat(json.loads(json.dumps(asdict(cfg), default=str)))  # as JSON gives them back
    then = flat(then)
    changed = [k for k in now if k.split(".")[-1] not in FREE and then.get(k) != now[k]]
    flags = ", ".join(f"--{k.split('.')[-1]} {then.get(k)}" for k in changed)
    check(
        not changed, f"--resume goes on with the flags that the run in {path} began with: {flags}"
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all, without lone surrogates. Raises UserError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = clean(json.dumps(content, indent=2, default=str, ensure_ascii=False)) + "\n"
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"cannot write {path}: {error.strerror}; choose another place with --out"
        ) from None


def bar(
    things: Iterable[Any], total: int, start: int = 0, name: str = "train", delay: float = 0
) -> tqdm:
    """A progress bar, after `delay` seconds; in a log file a line every half minute instead."""
    interval = 0.2 if sys.stderr.isatty() else 30
    quiet = os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
    pace = {"mininterval": interval, "maxinterval": 30, "delay": delay}
    return tqdm(things, total=total, initial=start, desc=name, disable=quiet, **pace)


def progress(
    losses: Iterable[float],
    total: int,
    start: int = 0,
    every: int = 0,
    save: Callable[[], Any] | None = None,
) -> Iterator[float]:
    """Pass the losses on under a progress bar; call `save` every so many steps.

    Raises UserError at the first loss that is not finite, before anything is saved over the last good checkpoint.
    """
    smooth = 0.0
    shown = bar(losses, total, start)
    for step, loss in enumerate(shown, start + 1):
        # Stop before a broken model is saved
        advice = "the last checkpoint is kept. Try a lower --lr"
        check(math.isfinite(loss), f"the loss is {loss} at step {step}; {advice}")
        # The bar shows an exponential moving average, of those that were seen
        smooth = 0.98 * smooth + 0.02 * loss
        seen = 1 - 0.98 ** (step - start)
        shown.set_postfix_str(f"loss {smooth / seen:.4f}", refresh=False)
        yield loss
        # The caller has taken the step: now it can be saved
        if save and every and step % every == 0 and step < total:
            save()


class Clock:
    """Seconds since it was made, and those `before`: a resumed run goes on counting."""

    def __init__(self, before: float = 0) -> None:
        self.start = time.perf_counter() - before

    def __call__(self) -> float:
        return time.perf_counter() - self.start


def report(folder: Path, metrics: dict[str, Any], then: str = "") -> dict[str, Any]:
    """Write metrics.json, with the command, machine and threads; say what was written and what to run next."""
    # What made the numbers: the command, the machine, its threads
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    made: dict[str, Any] = {"command": shlex.join(["python", *sys.argv])}
    made["machine"] = f"{os.cpu_count()} CPU cores {gpu}".strip()
    made["threads"] = torch.get_num_threads()  # another number of them adds up in another order
    made["cpu_seconds"] = time.process_time()  # of all cores together
    write_json(folder / "metrics.json", metrics | made)
    # The numbers, a line each
    for name, value in metrics.items():
        if isinstance(value, dict):  # a row of a table
            value = ", ".join(f"{k} {v:.4g}" for k, v in value.items())
        elif isinstance(value, float):
            value = f"{value:.4g}"
        print(clean(f"{name:>28}  {value}"))
    same = "the same seed gives the same numbers with as many (OMP_NUM_THREADS)"
    print(f"{'threads':>28}  {made['threads']}: {same}")
    # What was written, and what to run next
    files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    # not what an earlier run left there: config.json is the first file of a run
    config = folder / "config.json"
    begun = config.stat().st_mtime_ns if config.exists() else 0
    written = sorted(p.name for p in files if p.stat().st_mtime_ns >= begun)
    print(f"written to {folder}/: {', '.join(written)}")
    if then:
        print(f"next: {then}")
    return metrics
