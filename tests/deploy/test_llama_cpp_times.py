"""deploy/llama_cpp_times.py: tokens and times of another process. A stand-in has the names of llama-cpp-python."""

import contextlib
import io
import json
import sys

import pytest
import torch

from deploy import gguf_write, llama_cpp_times, load, low_bit
from tests import llamas
from tests.deploy.test_low_bit_layers import tiny
from utils.run import UserError

STAND_IN = '''
import ctypes
import sys

READ = []


class Llama:
    """The next token is the sum of all that was read, modulo 11."""

    def __init__(self, path, **options):
        assert options == dict(n_ctx=40, n_threads=1, n_threads_batch=1, verbose=False), options
        # another file, another model: one more
        self.more = ["model.gguf", "other.gguf"].index(path)
        self.ctx = self

    def n_vocab(self):
        return 11

    def reset(self):
        READ.clear()

    def eval(self, ids):
        READ.extend(ids)
        if READ[0] == 7:
            sys.exit("out of memory")


def llama_get_logits_ith(ctx, place):
    assert place == -1
    logits = (ctypes.c_float * 11)(*range(-11, 0))
    logits[(sum(READ) + ctx.more) % 11] = 5
    return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder with a package llama_cpp, before all others."""
    (tmp_path / "llama_cpp.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp_times, "smollm2", lambda python: "model.gguf")
    return tmp_path


def test_greedy_tokens_of_each_request_from_its_beginning(stand_in):
    with llama_cpp_times.started(sys.executable, 40) as ask:
        # 1 + 2 = 3, 1 + 2 + 3 = 6, and 12, which is 1
        found = ask([1, 2], 3)
        assert found["tokens"] == [3, 6, 1]
        assert len(found["seconds"]) == 3 and all(0 <= s < 1 for s in found["seconds"])
        assert ask([4], 2)["tokens"] == [4, 8]
    with llama_cpp_times.started(sys.executable, 40, "other.gguf") as ask:
        assert ask([1, 2], 2)["tokens"] == [4, 8]


def test_a_process_that_ends_is_one_line(stand_in):
    says = pytest.raises(UserError, match=r"--llama-cpp .*: out of memory")
    with llama_cpp_times.started(sys.executable, 40) as ask, says:
        ask([7], 1)


def test_a_python_without_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp_times, "smollm2", lambda python: "model.gguf")
    says = pytest.raises(UserError, match="No module named 'llama_cpp'")
    with llama_cpp_times.started(sys.executable, 40) as ask, says:
        ask([1], 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="--llama-cpp nowhere: there is no such Python"):
        low_bit.main(low_bit.Config(llama_cpp="nowhere", out=str(tmp_path)))
    with pytest.raises(UserError, match="leave out --model"):
        low_bit.main(low_bit.Config(llama_cpp=sys.executable, model="other", out=str(tmp_path)))


def test_requests_are_read_and_answered_line_by_line(stand_in, monkeypatch):
    monkeypatch.syspath_prepend(str(stand_in))
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    answers = io.StringIO()
    requests = ['{"ids": [2], "new": 1}\n', '{"ids": [3, 3], "new": 2}\n']
    llama_cpp_times.answer_lines("model.gguf", 40, requests, answers)
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert [one["tokens"] for one in found] == [[2], [6, 1]]
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)


def test_llama_cpp_takes_its_turn_in_each_round():
    asked = []

    def ask(ids, new):
        asked.append((ids, new))
        return {"seconds": [0.5 - 0.1 * len(asked), 0.02, 0.03, 0.04]}

    cfg = low_bit.Config(rounds=3, max_new_tokens=4)
    llama = low_bit.Llama(tiny())
    found = low_bit.compare_speed({"fp32": llama}, torch.tensor([[5, 6, 7]]), cfg, ask)
    assert asked == [([5, 6, 7], 4)] * 3
    assert found["llama.cpp"] == {"prefill, ms": pytest.approx(200), "a token, ms": 30}
    assert set(low_bit.compare_speed({"fp32": llama}, torch.tensor([[5]]), cfg)) == {"fp32"}


def test_its_server_under_load_has_one_thread_and_is_not_interrupted(tmp_path):
    cfg = load.Config(llama_cpp=sys.executable, threads=3)
    command, port, model = load.commands(cfg, tmp_path)["llama_cpp.server"]
    assert command[:3] == [sys.executable, "-m", "llama_cpp.server"] and model == "smollm2"
    flags = dict(zip(command[3::2], command[4::2]))
    assert flags["--port"] == str(port) and flags["--interrupt_requests"] == "False"
    assert flags["--n_threads"] == flags["--n_threads_batch"] == "3"
    assert flags["--model"].endswith(".Q4_1.gguf")


def test_a_server_without_a_health_address_has_started(tmp_path):
    script = "import http.server as h, sys\n"
    script += (
        "h.HTTPServer(('127.0.0.1', int(sys.argv[1])), h.BaseHTTPRequestHandler).serve_forever()"
    )
    port = load.free_port()
    command = [sys.executable, "-c", script, str(port)]
    with load.started(command, port, 1, tmp_path / "log") as process:
        # a 501 of the handler
        assert process.is_running()


def test_tokens_of_a_written_file_are_compared_up_to_the_first_that_differs(tmp_path, monkeypatch):
    """A stand-in for llama.cpp goes on as transformers does, then otherwise."""
    model = llamas.tiny(vocabulary=len(llamas.tokenizer()))
    model.save_pretrained(tmp_path / "model")
    llamas.tokenizer().save_pretrained(tmp_path / "model")
    asked = []
    differs = {"at": gguf_write.NEW}

    @contextlib.contextmanager
    def started(python, positions, path):
        def ask(ids, new):
            asked.append((python, positions, path, ids))
            prompt = torch.tensor([ids])
            text = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            tokens = model.generate(prompt, **text)[0, len(ids) :].tolist()
            if differs["at"] < new:
                tokens[differs["at"]] += 1
            return {"tokens": tokens}

        yield ask

    monkeypatch.setattr(llama_cpp_times, "started", started)
    about = {"model": str(tmp_path / "model"), "kind": "f16", "check": False}
    cfg = gguf_write.Config(**about, llama_cpp=sys.executable, out=str(tmp_path / "out"))
    assert gguf_write.main(cfg)["tokens as in llama.cpp, of 32"] == 32
    python, positions, path, ids = asked[0]
    assert python == sys.executable and path == tmp_path / "out/model-f16.gguf"
    assert ids == llamas.tokenizer()(cfg.text).input_ids and positions == len(ids) + 32
    differs["at"] = 5
    assert gguf_write.main(cfg)["tokens as in llama.cpp, of 32"] == 5
    with pytest.raises(UserError, match="there is no such Python"):
        gguf_write.main(gguf_write.Config(**about, llama_cpp="nowhere", out=str(tmp_path)))
