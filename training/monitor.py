"""Monitor of a command: CPU, memory, disk, network and GPU while it runs, and what bound it: compute, memory, data?

Roofline: Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785; overhead: He 2022, "Making Deep Learning
Go Brrrr From First Principles". Counters: monitor_probe.py; thresholds: monitor_bounds.py. What differs: a roofline
counts FLOPs and bytes of one kernel, this looks at a whole program from outside, once a second.

The command keeps its terminal, its output, its signals and its exit code; what is said here goes to stderr. Each
sample is written at once, so that a kill leaves the series.

    python training/monitor.py -- python training/pretrain_tiny_llama.py --steps 20
    python training/monitor.py --interval 0.2 --out outputs/look -- bash run.sh
    python training/monitor.py --pid 4711
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field

import tyro

from training import monitor_bounds
from utils import run
from utils.text import printable

PATIENCE = (
    100  # times the CPU seconds of a sample is the shortest interval: less than 1 % of a core
)
SHOWN = 12  # segments that are printed: the longest ones


@dataclass(frozen=True)
class Config:
    """Run a command, or follow a process, and say what it was bound by."""

    # the command and its flags, behind --
    command: tyro.conf.Positional[tuple[str, ...]] = field(default=())
    pid: int = 0  # instead of a command: a process that runs already
    interval: float = 1.0  # seconds between two samples
    out: str = "outputs/monitor"  # where series, figure and numbers go


def check_flags(cfg):
    """Raises UserError for flags that make no sense."""
    one = bool(cfg.command) != bool(cfg.pid)
    run.check(one, "name a command behind --, or a process by --pid, and not both")
    run.check(0.01 <= cfg.interval <= 3600, "--interval must be between 0.01 and 3600 seconds")
    run.check(cfg.pid >= 0, "--pid must be the number of a process")
    if cfg.command:
        name = printable(cfg.command[0])
        found = shutil.which(cfg.command[0])
        run.check(found, f"there is no command '{name}' that can be run; is the name right?")


def start(cfg):
    """Start the command, or find the process -> psutil's. Raises UserError: there is none, it cannot be run."""
    import psutil

    try:
        if cfg.pid:
            return psutil.Process(cfg.pid)
        return psutil.Popen(cfg.command)
    except psutil.NoSuchProcess:
        raise run.UserError(f"--pid {cfg.pid}: there is no such process") from None
    except (OSError, ValueError) as error:  # no program after all
        name = printable(cfg.command[0])
        raise run.UserError(f"'{name}' cannot be run: {printable(error)}") from None


def in_foreground():
    """Whether a terminal sends its Ctrl-C to this group of processes, and so to the command as well."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # no terminal
        return False


class Interrupted(Exception):
    """A signal that ends the monitor of a process that it did not start."""


def pass_on_signals(process, started):
    """SIGINT, SIGTERM and SIGHUP go to the command, which decides what becomes of them; the monitor stays.

    Ctrl-C reaches the command from the terminal: handed on as well, it would come twice. A process that was not
    started here gets nothing: the monitor ends.
    """

    def handler(number, frame):
        if not started:
            raise Interrupted
        if number == signal.SIGINT and in_foreground():
            return
        with contextlib.suppress(Exception):  # it has just ended
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, handler)


def is_zombie(process):
    """Has it ended, and nobody has read its exit code?"""
    import psutil

    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_ZOMBIE
    return False


def follow(process, probe, interval, write):
    """Sample until the process ends -> (its exit code, CPU seconds of the sampling).

    Where a sample costs much, as on a machine of thousands of processes, the pause grows with it.
    """
    import psutil

    pause = interval
    spent = 0.0
    while True:
        # 1. Wait for the end, no longer than until the next sample
        try:
            return process.wait(pause), spent
        except psutil.TimeoutExpired:
            # of a process that was followed only: its parent has not asked for its end yet
            if is_zombie(process):
                return None, spent
        # 2. Read the counters, say what they mean, write it down
        then = time.process_time()
        sample = probe.sample()
        if sample is not None:
            sample["bound"] = monitor_bounds.classify(sample)
            write(sample)
        # 3. Pay attention to the own cost
        cost = time.process_time() - then
        spent += cost
        pause = max(interval, PATIENCE * cost)


def exit_code(code):
    """Of a shell: 128 + the number of the signal that ended it; 0 for a process that was followed only."""
    if code is None:
        return 0
    return 128 - int(code) if code < 0 else int(code)


def command_seconds():
    """CPU seconds of the command and of what it waited for, as the kernel adds them up at its end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(samples, seconds):
    """Numbers of the whole run, and a line for each bound: {"compute-bound": share, ...}."""
    if not samples:
        return {"seconds": seconds, "samples": 0}
    found = {"seconds": seconds, "samples": len(samples)}
    found |= {f"{bound}, share": share for bound, share in monitor_bounds.shares(samples).items()}
    for name in ("cores", "worker_cores", "queued"):
        found[name] = monitor_bounds.mean(samples, name)
    found["peak_GB"] = max(sample["rss"] for sample in samples) / 1e9
    for name in ("storage_read", "storage_written", "read_calls", "received"):
        found[f"{name}, MB/s"] = monitor_bounds.mean(samples, name) / 1e6
    devices = [x for x in map(monitor_bounds.device, samples) if x is not None]
    if devices:
        found["gpu"] = sum(x["gpu"] for x in devices) / len(devices)
        found["gpu_memory"] = sum(x["gpu_memory"] for x in devices) / len(devices)
    return found


def timeline(samples):
    """When it was bound by what, a line each: the longest, in the order of time."""
    found = monitor_bounds.segments(samples)
    longest = sorted(found, key=lambda x: x["from"] - x["to"])[:SHOWN]
    lines = []
    for part in sorted(longest, key=lambda x: x["from"]):
        lines.append(f"{part['from']:10.1f} to {part['to']:8.1f} s  {part['bound']}")
    if len(found) > SHOWN:
        lines.append(
            f"{'':>10} and {len(found) - SHOWN} shorter ones: series.jsonl has all of them"
        )
    return "\n".join(lines)


def report(folder, found):
    """Write metrics.json, and print it."""
    run.write_json(folder / "metrics.json", found)
    for name, value in found.items():
        print(f"{name:>28}  {value:.4g}" if isinstance(value, float) else f"{name:>28}  {value}")
    print(f"written to {folder}/: series.jsonl, metrics.json, config.json, monitor.png")


def main(cfg: Config) -> dict:
    """Run, sample, report -> metrics; "exit_code" is the command's."""
    check_flags(cfg)
    folder = run.output(cfg.out, cfg)
    from training import monitor_plot, monitor_probe

    samples = []
    # 1. The command, and the series beside it
    clock = run.Clock()
    used = command_seconds()
    process = start(cfg)
    pass_on_signals(process, not cfg.pid)
    with open(folder / "series.jsonl", "w", encoding="utf-8", buffering=1) as series:

        def write(sample):
            samples.append(sample)
            series.write(json.dumps(sample) + "\n")

        code = None
        spent = 0.0
        with contextlib.suppress(Interrupted):
            probe = monitor_probe.Probe(process, clock)
            code, spent = follow(process, probe, cfg.interval, write)
    # 2. What it was bound by: to stderr, for stdout is the command's
    found = summary(samples, clock())
    found["exit_code"] = exit_code(code)
    if not cfg.pid:
        found["cpu_seconds_of_command"] = command_seconds() - used
        found["monitor, cores"] = spent / found["seconds"]
    with contextlib.redirect_stdout(sys.stderr):
        if samples:
            print(f"\n{timeline(samples)}\n")
            monitor_plot.draw(folder / "monitor.png", samples)
        else:
            print("\nit ended before the first sample: try a shorter --interval")
        report(folder, found)
    return found


if __name__ == "__main__":
    sys.exit(run.cli(main, Config)["exit_code"])
