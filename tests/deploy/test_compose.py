"""deploy/compose/: names, ports and times of the files are those of the server; nginx reads its file if it is there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy import serve

FOLDER = Path(__file__).parents[2] / "deploy" / "compose"


def read(name):
    return (FOLDER / name).read_text("utf-8")


def flags(command):
    """Flags of a command line -> those of serve.Config."""
    names = re.findall(r"--([a-z0-9-]+)", command)
    return [name.replace("-", "_") for name in names]


def test_docker_compose():
    found = yaml.safe_load(read("docker-compose.yml"))
    assert set(found) == {"services", "volumes"}
    server = found["services"]["server"]
    assert (FOLDER / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    assert set(flags(" ".join(server["command"]))) <= set(serve.Config.__dataclass_fields__)
    # another host than loopback needs the key; ports are published on loopback alone
    assert "0.0.0.0" in server["command"] and serve.KEY in server["environment"]
    ports = [port for one in found["services"].values() for port in one["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert f"127.0.0.1:{serve.Config.port}:{serve.Config.port}" in ports
    assert int(server["stop_grace_period"].rstrip("s")) > serve.Config.drain_seconds
    # volumes that are named are declared, files that are mounted are there
    for service in found["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            known = (
                (FOLDER / source).is_file()
                if source.startswith(".")
                else source in found["volumes"]
            )
            assert known, source
        assert set(service.get("depends_on", ())) <= set(found["services"])


def test_prometheus_reads_the_metrics_of_the_server():
    (job,) = yaml.safe_load(read("prometheus.yml"))["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in yaml.safe_load(read("docker-compose.yml"))["services"]
    assert int(port) == serve.Config.port and job["metrics_path"] == "/metrics"


def test_the_image_starts_the_server_itself():
    """Without a shell between them, SIGTERM reaches it; what it copies is there."""
    text = read("Dockerfile")
    assert 'CMD ["python", "deploy/serve.py"]' in text
    for line in re.findall(r"^COPY (.*) \S+$", text, re.M):
        for name in line.split():
            assert (FOLDER.parents[1] / name).exists()


def test_the_unit_of_systemd():
    text = read("vlm-action.service")
    sections = re.findall(r"^\[(\w+)\]$", text, re.M)
    assert sections == ["Unit", "Service", "Install"]
    assert all(re.match(r"[A-Z]\w+=.+|\[\w+\]|#.*|$", line) for line in text.splitlines())
    command = re.search(r"^ExecStart=(.*)$", text, re.M)[1]
    assert set(flags(command)) <= set(serve.Config.__dataclass_fields__)
    stop = int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.M)[1])
    assert stop > serve.Config.drain_seconds and serve.KEY in text


def test_nginx_speaks_of_the_server():
    text = read("nginx.conf")
    assert text.count("{") == text.count("}")
    assert "proxy_buffering off" in text and "least_conn" in text
    assert f"client_max_body_size {16}m" in text
    assert f"proxy_read_timeout {serve.Config.seconds:.0f}s" in text
    assert "/metrics" not in text
    # the headers of all locations: a server refuses a name that is not this machine's, also at /health
    for location in re.findall(r"location[^{]*\{([^}]*)\}", text):
        assert "proxy_set_header" not in location


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed (apt: nginx)")
def test_nginx_reads_the_file(tmp_path):
    command = [
        "nginx",
        "-t",
        "-e",
        "error.log",
        "-c",
        str(FOLDER / "nginx.conf"),
        "-p",
        str(tmp_path),
    ]
    found = subprocess.run(command, capture_output=True, text=True)
    assert "syntax is ok" in found.stderr, found.stderr
