"""vlm/serve/docker-compose.yml and Dockerfile: flags, ports, users and pins; its three commands run as processes."""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import httpx
import pytest
import yaml

from deploy import serve
from deploy.load import free_port
from tests.conftest import ROOT
from tests.vlm.fake_workers import until
from vlm import demo
from vlm.serve import client, gateway, page, worker
from vlm.serve.content import data_url

FILE = ROOT / "vlm/serve/docker-compose.yml"
CONFIGS = {"worker": worker.Config, "gateway": gateway.Config, "page": page.Config}


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(FILE.read_text("utf-8"))["services"]


def flags(service):
    """{flag: value} of its command."""
    words = service["command"]
    assert words[0] == "python" and (ROOT / words[1]).is_file()
    found = {}
    for word in words[2:]:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            found[name] = True
        else:
            found[name] = word
    return found


def test_commands_have_the_flags_of_their_scripts(services):
    assert set(services) == set(CONFIGS)
    for name, service in services.items():
        given = flags(service)
        assert service["command"][1] == f"vlm/serve/{name}.py"
        assert set(given) <= set(CONFIGS[name].__dataclass_fields__)
        assert given["host"] == "0.0.0.0" and given["out"].startswith("/tmp/")
    # each finds the next one by its name and port
    ports = {name: flags(service)["port"] for name, service in services.items()}
    assert flags(services["gateway"])["workers"] == f"http://worker:{ports['worker']}"
    assert flags(services["page"])["gateway"] == f"http://gateway:{ports['gateway']}/v1"


def test_health_checks_order_and_ports(services):
    for name, service in services.items():
        port = flags(service)["port"]
        test = service["healthcheck"]["test"]
        path = "/" if name == "page" else "/health"
        assert test[:3] == ["CMD", "python", "-c"] and f"127.0.0.1:{port}{path}'" in test[3]
        compile(test[3], "health", "exec")
    healthy = {"condition": "service_healthy"}
    assert services["gateway"]["depends_on"] == {"worker": healthy}
    assert services["page"]["depends_on"] == {"gateway": healthy}
    # the page alone is published, on loopback alone
    port = flags(services["page"])["port"]
    assert services["page"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert "ports" not in services["worker"] and "ports" not in services["gateway"]


def test_users_keys_and_pins(services):
    text = (FILE.parent / "Dockerfile").read_text("utf-8")
    for service in services.values():
        user = service["user"]
        assert int(user) > 0 and f"useradd --uid {user} " in text
        assert serve.KEY in service["environment"] and ":?" in service["environment"][serve.KEY]
        assert int(service["stop_grace_period"].rstrip("s")) > serve.Config.drain_seconds
        assert service["cap_drop"] == ["ALL"] and ":" in service["image"]
        build = service["build"]
        assert (FILE.parent / build["context"] / build["dockerfile"]).samefile(
            FILE.parent / "Dockerfile"
        )
    assert re.search(r"^FROM python:\d+\.\d+\.\d+-\S+$", text, re.M) and "\nUSER vlm\n" in text
    # every version is pinned
    install = re.search(r"^RUN pip install (.*?)[^\\]\n", text, re.M | re.S)[1]
    names = [word for word in install.split() if re.match(r"[a-z]", word) and "://" not in word]
    assert len(names) > 12 and all("==" in name for name in names)
    for folder in re.findall(r"^COPY (\S+) ", text, re.M):
        assert (ROOT / folder / "__init__.py").is_file()


@pytest.mark.long
def test_the_image_holds_every_chapter_that_is_imported(tmp_path):
    """The three scripts import no other folder than those that are copied."""
    text = (FILE.parent / "Dockerfile").read_text("utf-8")
    copied = set(re.findall(r"^COPY (\S+) ", text, re.M))
    chapters = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    left_out = [name for name in chapters if "." not in name and name not in copied]
    assert left_out
    code = f"import sys\nfor name in {left_out}: sys.modules[name] = None\n"
    code += "from vlm.serve import worker, gateway, page\nworker.llava.load(worker.llava.WEIGHTS)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="no docker-compose (apt)")
def test_docker_compose_reads_the_file():
    command = ["docker-compose", "-f", str(FILE), "config"]
    environment = os.environ | {serve.KEY: "x"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(CONFIGS)
    # and refuses to start without a key
    del environment[serve.KEY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "set a key" in done.stderr


@pytest.mark.long
def test_the_three_commands_run(services, tmp_path):
    """As the file has them, but for addresses: on loopback, at free ports. The shipped weights answer."""
    ports = {name: free_port() for name in services}
    environment = os.environ | {serve.KEY: "secret", "OMP_NUM_THREADS": "1"}
    processes = []
    try:
        for name, service in services.items():
            words = [sys.executable, *service["command"][1:]]
            given = flags(service)
            new = {given["host"]: "127.0.0.1", given["out"]: str(tmp_path / name)}
            new[given["port"]] = str(ports[name])
            words = [new.get(word, word) for word in words]
            for other in services:
                old = f"{other}:{flags(services[other])['port']}"
                words = [word.replace(old, f"127.0.0.1:{ports[other]}") for word in words]
            processes.append(subprocess.Popen(words, cwd=ROOT, env=environment))
            # its health check, with its port
            test = service["healthcheck"]["test"][3].replace(given["port"], str(ports[name]))

            def healthy(code=test):
                done = subprocess.run([sys.executable, "-c", code], capture_output=True)
                return done.returncode == 0

            assert until(healthy, 120), name
        address = f"http://127.0.0.1:{ports['gateway']}/v1"
        messages = client.messages_of([], "What fruit is this?", data_url(demo.PHOTO))
        assert "".join(client.stream_chat(address, messages, "secret")) == "cantaloupe melon"
        assert "Ask about a photo" in httpx.get(f"http://127.0.0.1:{ports['page']}").text
    finally:
        for process in reversed(processes):
            process.terminate()
        codes = [process.wait(60) for process in processes]
    assert codes == [0, 0, 0]
    assert all((tmp_path / name / "metrics.json").is_file() for name in services)
