"""Monitor: real commands that compute, sleep, read or wait for workers; signals, exit codes; a fake NVML."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from tests.conftest import ROOT
from training import monitor, monitor_bounds, monitor_plot, monitor_probe
from utils.run import UserError

BUSY = "import time; t = time.process_time()\nwhile time.process_time() < t + {}: pass"
READER = """
import os, sys
path = sys.argv[1]
for _ in range(1500):
    file = os.open(path, os.O_RDONLY)
    while os.read(file, 1 << 20):
        pass
    os.close(file)
"""
WORKERS = """
import time
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        t = time.process_time()
        while time.process_time() < t + 0.15:
            pass
        return i

for x in DataLoader(Slow(), batch_size=2, num_workers=1):
    pass
"""
COUNTER = """
import signal, sys, time
seen = []
def note(number, frame):
    seen.append(number)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
print("ready", flush=True)
end = time.time() + 20
while not seen and time.time() < end:
    time.sleep(0.02)
time.sleep(0.2)
print("signals", *seen, flush=True)
"""


@pytest.fixture(autouse=True)
def interrupts():
    """A runner in the background ignores Ctrl-C, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def command(folder, *words, interval="0.05"):
    flags = ["--interval", interval, "--out", str(folder)]
    return [sys.executable, "training/monitor.py", *flags, "--", *words]


def watch(folder, *words, **more):
    """Run it under the monitor -> the finished process, the series, metrics.json."""
    done = subprocess.run(command(folder, *words, **more), cwd=ROOT, capture_output=True, text=True)
    return done, series(folder), json.loads((folder / "metrics.json").read_text())


def series(folder):
    return [json.loads(line) for line in (folder / "series.jsonl").read_text().splitlines()]


def share(metrics, bound):
    return metrics.get(f"{bound}, share", 0)


def test_busy_loop_is_compute_bound_and_its_output_and_code_are_kept(tmp_path):
    script = BUSY.format(1.5) + "\nprint('hello'); raise SystemExit(7)"
    done, samples, metrics = watch(tmp_path, sys.executable, "-c", script)
    assert done.returncode == metrics["exit_code"] == 7
    assert done.stdout == "hello\n"
    assert share(metrics, "compute-bound") > 0.7
    assert "compute-bound" in done.stderr and "idle" not in done.stderr.split("seconds")[0][-200:]
    # CPU seconds by sampling are those that the kernel tells at the end
    sampled = sum(x["cores"] * x["seconds"] for x in samples)
    assert metrics["cpu_seconds_of_command"] == pytest.approx(1.5, abs=0.2)
    assert sampled == pytest.approx(1.5, abs=0.35)
    assert sum(x["seconds"] for x in samples) <= metrics["seconds"]
    assert metrics["monitor, cores"] < 0.02
    assert (tmp_path / "monitor.png").stat().st_size > 5000


def test_sleeper_is_idle(tmp_path):
    done, _, metrics = watch(tmp_path, "sleep", "1.2")
    assert done.returncode == 0 and done.stdout == ""
    assert share(metrics, "idle") > 0.9
    assert metrics["cores"] < 0.2


def test_reader_of_files_waits_for_data(tmp_path):
    big = tmp_path / "big"
    big.write_bytes(bytes(8 << 20))
    _, samples, metrics = watch(tmp_path, sys.executable, "-c", READER, str(big))
    assert share(metrics, "waiting for data") > 0.6
    # 1500 times 8 MiB went through read(2)
    total = sum(x["read_calls"] * x["seconds"] for x in samples)
    assert 0.5 * 1500 * (8 << 20) < total < 1.1 * 1500 * (8 << 20)


def test_children_are_counted_also_those_that_ended(tmp_path):
    loop = f"{sys.executable} -c '{BUSY.format(0.3)}'; "
    _, samples, metrics = watch(tmp_path, "sh", "-c", loop * 4)
    sampled = sum(x["cores"] * x["seconds"] for x in samples)
    assert sampled == pytest.approx(metrics["cpu_seconds_of_command"], rel=0.3)
    assert metrics["cpu_seconds_of_command"] > 1.2
    assert max(x["processes"] for x in samples) >= 2


def test_data_loader_workers_are_told_from_the_process_that_computes(tmp_path):
    _, samples, metrics = watch(tmp_path, sys.executable, "-c", WORKERS)
    working = [x for x in samples if x["worker_cores"] > 0.8 * x["cores"] > 0]
    assert {x["bound"] for x in working[1:-1]} == {"waiting for data"}
    assert 0.1 < share(metrics, "waiting for data") < 0.9  # the imports before are computing
    assert sum(x["worker_cores"] * x["seconds"] for x in samples) == pytest.approx(1.2, abs=0.6)


def ready(process):
    """Wait until the command says so."""
    assert process.stdout.readline().strip() == "ready"


def test_killed_command_leaves_its_series(tmp_path):
    script = "import os, time; time.sleep(1.5); os.kill(os.getpid(), 9)"
    done, samples, metrics = watch(tmp_path, sys.executable, "-c", script)
    assert done.returncode == metrics["exit_code"] == 128 + 9
    assert len(samples) >= 3 and samples[0]["t"] < samples[-1]["t"]


def test_killed_monitor_leaves_its_series(tmp_path):
    words = command(tmp_path, sys.executable, "-c", COUNTER)
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    ready(process)
    time.sleep(1.5)
    child = psutil.Process(process.pid).children()[0]
    process.kill()
    process.wait(timeout=60)
    samples = series(tmp_path)
    child.kill()
    assert len(samples) >= 3 and samples[-1]["bound"] == "idle"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_go_to_the_command_once(tmp_path, number):
    process = subprocess.Popen(command(tmp_path, sys.executable, "-c", COUNTER), cwd=ROOT, stdout=subprocess.PIPE,
                               stdin=subprocess.DEVNULL, text=True)  # fmt: skip
    ready(process)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert rest == f"signals {int(number)}\n"
    # the command has dealt with it, and ended well: so does the monitor, with its report
    assert process.returncode == 0
    assert (tmp_path / "metrics.json").is_file()


def test_control_c_of_a_terminal_comes_once(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, command(tmp_path, sys.executable, "-c", COUNTER))
    seen = b""
    sent = False
    while True:
        try:
            seen += os.read(terminal, 1000)
        except OSError:  # it has ended
            break
        if b"ready" in seen and not sent:
            os.write(terminal, b"\x03")
            sent = True
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    # the terminal may show ^C in the same line
    assert re.findall("signals.*\\d", seen.decode()) == [f"signals {int(signal.SIGINT)}"]


def test_process_by_its_number(tmp_path):
    sleeper = subprocess.Popen(["sleep", "30"])
    words = [sys.executable, "training/monitor.py", "--pid", str(sleeper.pid), "--interval", "0.05"]
    process = subprocess.Popen([*words, "--out", str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
    path = tmp_path / "series.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 3:
        time.sleep(0.05)
    # a signal ends the monitor, and not the process that it did not start
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0 and sleeper.poll() is None
    sleeper.kill()
    sleeper.wait()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["exit_code"] == 0 and share(metrics, "idle") == 1


def test_the_end_of_a_followed_process_is_noticed_before_its_parent_asks(tmp_path):
    """A zombie has ended, though its number is still taken."""
    sleeper = subprocess.Popen(["sleep", "0.5"])
    words = [sys.executable, "training/monitor.py", "--pid", str(sleeper.pid), "--interval", "0.05"]
    subprocess.run([*words, "--out", str(tmp_path)], cwd=ROOT, timeout=60, check=True)
    assert json.loads((tmp_path / "metrics.json").read_text())["exit_code"] == 0
    sleeper.wait()


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--", "no-such-command"], "there is no command 'no-such-command'"),
        ([], "name a command behind --"),
        (["--pid", "1", "--", "true"], "and not both"),
        (["--interval", "0", "--", "true"], "--interval must be"),
        (["--interval", "nan", "--", "true"], "--interval must be"),
        (["--pid", "-3"], "--pid must be"),
        (["--pid", "99999999"], "no such process"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path, flags, line, capsys, monkeypatch):
    import tyro

    cfg = tyro.cli(monitor.Config, args=["--out", str(tmp_path / "new"), *flags])
    with pytest.raises(UserError, match=line) as error:
        monitor.main(cfg)
    assert "\n" not in str(error.value)
    assert "no such process" in line or not (tmp_path / "new").exists()


def test_file_that_is_no_program(tmp_path):
    path = tmp_path / "notes"
    path.write_text("\0 no program")
    path.chmod(0o755)
    done = subprocess.run(
        command(tmp_path / "out", str(path)), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# GPUs, which are not here: NVML as its manual describes it


class FakeNVML(ModuleType):
    NVML_PCIE_UTIL_RX_BYTES = 1

    def __init__(self, count=2, **answers):
        super().__init__("pynvml")
        usual = {"gpu": 90, "memory": 20, "used": 5 << 30, "watts": 300}
        usual |= {"kilobytes": 1000, "processes": [1]}
        self.said = usual | answers
        self.count = count

    def nvmlInit(self):
        if self.said.get("driver") is False:
            raise RuntimeError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, i):
        return i

    def nvmlDeviceGetUtilizationRates(self, handle):
        if self.said["gpu"] is None:
            raise RuntimeError("Not Supported")
        return SimpleNamespace(gpu=self.said["gpu"], memory=self.said["memory"])

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self.said["used"])

    def nvmlDeviceGetPowerUsage(self, handle):
        return self.said["watts"] * 1000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 600_000

    def nvmlDeviceGetPcieThroughput(self, handle, counter):
        assert counter == self.NVML_PCIE_UTIL_RX_BYTES
        return self.said["kilobytes"]

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return self.said["processes"]


@pytest.fixture
def gpus(monkeypatch):
    def read(**answers):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNVML(**answers))
        return monitor_probe.Gpus().read()

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return read


def test_counters_of_nvml_have_their_units(gpus):
    one, other = gpus()
    assert one == other == {
        "gpu": 0.9, "gpu_memory": 0.2, "memory_used": 5 << 30, "power": 300.0, "power_share": 0.5,
        "pcie_received": 1_000_000, "processes": 1,
    }  # fmt: skip


def test_gpus_that_are_not_there(gpus, monkeypatch):
    assert gpus(driver=False) == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert monitor_probe.Gpus().read() == []


def test_only_visible_gpus_are_asked(gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert len(gpus()) == 1
    assert monitor_probe.visible(2) == [1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f6d")
    assert monitor_probe.visible(2) == [0, 1]


def made(gpus=(), **rates):
    names = ("cores", "worker_cores", "queued", "worker_queued", "system", "blocked")
    names += ("storage_read", "read_calls", "received")
    return dict.fromkeys(names, 0.0) | {"gpus": list(gpus)} | rates


@pytest.mark.parametrize(
    "answers, rates, bound",
    [
        ({"gpu": 95, "memory": 20}, {"cores": 1.0}, "compute-bound"),
        ({"gpu": 95, "memory": 80}, {"cores": 1.0}, "memory-bound"),
        ({"gpu": 70, "memory": 50}, {}, "memory-bound"),
        ({"gpu": 69, "memory": 80}, {"cores": 1.0}, "overhead-bound"),
        ({"gpu": 30}, {"cores": 1.0}, "overhead-bound"),
        ({"gpu": 30}, {"cores": 4.0, "worker_cores": 3.9}, "waiting for data"),
        ({"gpu": 30, "kilobytes": 6_000_000}, {"cores": 1.0}, "waiting for data"),
        ({"gpu": 30}, {"storage_read": 1e8}, "waiting for data"),
        ({"gpu": 0}, {}, "idle"),
        # nobody computes on it, or it does not tell: the host alone
        ({"gpu": 95, "processes": []}, {"cores": 1.0}, "compute-bound"),
        ({"gpu": None}, {"cores": 0.1}, "idle"),
    ],
)  # fmt: skip
def test_bound_of_a_gpu(gpus, answers, rates, bound):
    assert monitor_bounds.classify(made(gpus(**answers), **rates)) == bound


@pytest.mark.parametrize(
    "rates, bound",
    [
        ({"cores": 1.0}, "compute-bound"),
        ({"cores": 0.2, "queued": 0.7}, "compute-bound"),  # others had the cores
        ({"cores": 0.2}, "idle"),
        ({"cores": 1.0, "system": 0.7, "read_calls": 1e9}, "waiting for data"),
        ({"cores": 1.0, "system": 0.2, "read_calls": 1e9}, "compute-bound"),
        ({"cores": 1.0, "system": 0.7}, "compute-bound"),
        ({"cores": 0.1, "storage_read": 6e6}, "waiting for data"),
        ({"cores": 0.1, "received": 6e6}, "waiting for data"),
        ({"cores": 0.1, "blocked": 1}, "waiting for data"),
        ({"cores": 1.1, "worker_cores": 1.0}, "waiting for data"),
        ({"cores": 1.9, "worker_cores": 1.0}, "compute-bound"),
        ({"cores": 0.3, "worker_cores": 0.3, "queued": 0.7, "worker_queued": 0.7}, "waiting for data"),
    ],
)  # fmt: skip
def test_bound_of_a_host(rates, bound):
    assert monitor_bounds.classify(made(**rates)) == bound


def test_busy_gpus_and_idle_ones_are_averaged():
    one = {"gpu": 1.0, "gpu_memory": 0.4, "pcie_received": None, "processes": 1}
    other = one | {"gpu": 0.5, "gpu_memory": 0.2}
    idle = one | {"gpu": 0.0, "processes": 0}
    found = monitor_bounds.device(made([one, other, idle]))
    assert found == pytest.approx({"gpu": 0.75, "gpu_memory": 0.3, "pcie_received": 0})


def test_segments_and_shares_are_of_time_not_of_samples(tmp_path):
    lengths = [("idle", 1.0), ("idle", 2.0), ("compute-bound", 5.0), ("idle", 2.0)]
    samples = []
    t = 0.0
    for bound, seconds in lengths:
        t += seconds
        samples.append(made(bound=bound, seconds=seconds, t=t, rss=1e9, cores=seconds))
    assert monitor_bounds.shares(samples) == {"idle": 0.5, "compute-bound": 0.5}
    assert monitor_bounds.segments(samples) == [
        {"bound": "idle", "from": 0.0, "to": 3.0},
        {"bound": "compute-bound", "from": 3.0, "to": 8.0},
        {"bound": "idle", "from": 8.0, "to": 10.0},
    ]
    assert monitor_bounds.mean(samples, "cores") == pytest.approx((1 + 4 + 25 + 4) / 10)
    assert monitor.timeline(samples).splitlines()[1].endswith("8.0 s  compute-bound")
    assert monitor_plot.draw(tmp_path / "x.png", samples).stat().st_size > 5000


def test_figure_shows_the_gpu_where_there_is_one(gpus):
    samples = [made(gpus(), rss=1e9), made([], rss=1e9)]
    shown = monitor_plot.panels(samples)["share of time"]
    assert shown == {"a kernel ran": [0.9, 0], "device memory in use": [0.2, 0]}
    assert "share of time" not in monitor_plot.panels(samples[1:])


def test_long_timeline_is_cut_to_its_longest_parts():
    samples = []
    for i in range(40):
        bound = monitor_bounds.BOUNDS[i % 2]
        samples.append(made(bound=bound, seconds=1.0, t=i + 1.0))
    lines = monitor.timeline(samples).splitlines()
    assert len(lines) == monitor.SHOWN + 1 and "28 shorter ones" in lines[-1]


def test_time_in_the_queue_is_kept_of_those_that_ended(monkeypatch):
    """The main process has waited 2 s, its worker 3 s; the worker ends, the main process waits 1 s more."""
    waited = {1: 2.0, 2: 3.0}
    monkeypatch.setattr(monitor_probe, "queued_seconds", lambda pid: waited[pid])
    tree = monitor_probe.ProcessTree(SimpleNamespace(pid=1))
    main, worker = Named(1), Named(2)
    tree.wait(main, False)
    tree.wait(worker, True)
    waited[1] = 3.0
    tree.wait(main, False)
    assert tree.queued == {"queued": 6.0, "worker_queued": 3.0}


class Named(NamedTuple):
    """A process of which only the number is asked for."""

    pid: int


class Costly:
    """A probe whose sample takes 30 ms of CPU time."""

    def sample(self):
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass


def test_costly_samples_become_rare():
    """30 ms a sample: 100 times that must pass before the next, whatever the interval."""
    pauses = []

    def wait(pause):
        pauses.append(pause)
        if len(pauses) < 3:
            raise psutil.TimeoutExpired(pause)
        return -15

    followed = SimpleNamespace(wait=wait, status=lambda: psutil.STATUS_RUNNING)
    code, spent = monitor.follow(followed, Costly(), 0.01, None)
    assert pauses[0] == 0.01 and min(pauses[1:]) > 100 * 0.029
    assert monitor.exit_code(code) == 143 and spent == pytest.approx(0.06, abs=0.03)
