"""vlm/loader_study.py: what is timed, the ratios, and the command."""

import time

import pytest
import torch

from utils.run import UserError
from vlm import loader_study
from vlm.loader_study import Config


def test_wall_waiting_and_cpu_seconds_of_a_slow_loader():
    def batches():
        for i in range(4):
            time.sleep(0.1)
            yield i

    seen = []

    def step(batch):
        seen.append(batch)
        time.sleep(0.05)

    found = loader_study.timed(batches(), step)
    # after the first of four: three waits of 0.1 s, three steps of 0.05 s
    assert seen == [0, 1, 2, 3]
    assert 0.3 <= found["waited_seconds"] < 0.4 and 0.45 <= found["wall_seconds"] < 0.6
    assert found["wall_seconds"] > found["waited_seconds"] and found["cpu_seconds"] < 0.1


def test_ratios_are_those_of_the_same_round():
    first = [{"wall_seconds": x, "cpu_seconds": 1.0} for x in (2.0, 8.0, 4.0)]
    other = [{"wall_seconds": x, "cpu_seconds": 1.5} for x in (1.0, 2.0, 4.0)]
    found = loader_study.summary(other, first)
    assert found["times as fast"] == 2 and found["times the CPU seconds"] == 1.5
    assert found["wall_seconds"] == 2


def test_the_command_times_each_number_of_workers(tmp_path):
    threads = torch.get_num_threads()
    cfg = Config(workers=(0, 1), batch=2, steps=1, size=32, rounds=1, out=str(tmp_path))
    found = loader_study.main(cfg)
    torch.set_num_threads(threads)
    names = [f"{way}, workers {n}" for way in ("loading alone", "beside a step") for n in (0, 1)]
    assert list(found) == names and (tmp_path / "metrics.json").is_file()
    for way in (names[:2], names[2:]):
        seconds = [found[name]["wall_seconds"] for name in way]
        assert found[way[0]]["times as fast"] == 1
        assert found[way[1]]["times as fast"] == pytest.approx(seconds[0] / seconds[1])


@pytest.mark.parametrize("flags", [{"batch": 0}, {"workers": ()}, {"workers": (-1,)}, {"size": 8}])
def test_bad_flags_are_one_line(tmp_path, flags):
    with pytest.raises(UserError, match="must be") as found:
        loader_study.main(Config(out=str(tmp_path), **flags))
    assert "\n" not in str(found.value)
