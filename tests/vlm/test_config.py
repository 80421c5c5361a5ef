"""vlm/config.py: a file fills the flags, flags win, an unknown key is refused by name."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
import tyro

from tests import fuzz
from tests.conftest import ROOT
from utils.run import UserError
from vlm import config, config_file, connector


@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    fused: bool = False
    amsgrad: bool = True


@dataclass(frozen=True)
class Config:
    model: Annotated[config.ModelFlags, tyro.conf.arg(name="")] = config.ModelFlags()
    optimizer: Optimizer = Optimizer()
    name: str = ""


YAML = """
model:
  connector: perceiver
  perceiver:
    n_latents: 5
    concat_latents_kv: false
optimizer:
  lr: 0.002
  betas: [0.8, 0.95]
  fused: true
  amsgrad: false
name: "a b"
"""


def parse(*words):
    return tyro.cli(Config, args=config_file.with_file(list(words)))


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return str(path)


def test_a_file_fills_nested_flags(run_yaml, tmp_path):
    found = parse("--config", run_yaml)
    assert found.optimizer == Optimizer(0.002, (0.8, 0.95), fused=True, amsgrad=False)
    assert found.name == "a b" and found.model.connector == "perceiver"
    assert found.model.perceiver.n_latents == 5
    assert found.model.perceiver.concat_latents_kv is False
    assert found.model.perceiver.depth == config.PerceiverConfig().depth
    # the same as JSON
    values = {"optimizer": {"lr": 0.002, "fused": True}, "name": "a b"}
    (tmp_path / "run.json").write_text(json.dumps(values))
    found = parse(f"--config={tmp_path}/run.json")
    assert found.optimizer == Optimizer(0.002, fused=True) and found.name == "a b"


def test_flags_win_wherever_they_stand(run_yaml):
    before = parse("--optimizer.lr", "3", "--config", run_yaml)
    after = parse("--config", run_yaml, "--optimizer.lr", "3", "--optimizer.no-fused")
    assert before.optimizer.lr == after.optimizer.lr == 3
    assert before.optimizer.fused and not after.optimizer.fused
    assert before.optimizer.betas == after.optimizer.betas == (0.8, 0.95)


def test_no_file_no_change():
    assert config_file.with_file(["--name", "x"]) == ["--name", "x"]


def test_an_unknown_key_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("optimizer:\n  learning_rat: 3\n")
    with pytest.raises(SystemExit) as stopped:
        parse("--config", str(tmp_path / "run.yaml"))
    assert stopped.value.code == 2
    assert "--optimizer.learning_rat" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a\n- b\n", "must hold a mapping"),
        ("a: [", "no YAML or JSON"),
        ("1: 2", "no name of a flag: 1"),
        ("a b: 2", "no name of a flag: a b"),
        ("name: [[1]]", "a list of words or numbers"),
        ("x: !!python/object/apply:os.system [echo]", "no YAML or JSON"),
    ],
)
def test_bad_files(tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        config_file.with_file(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    "args, words",
    [
        (["--config"], "name a YAML or JSON file"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--config", "a", "--config=b"], "one file only"),
    ],
)
def test_bad_arguments(args, words):
    with pytest.raises(UserError, match=words):
        config_file.with_file(args)


def test_damaged_files_give_one_line(tmp_path):
    """500 damaged copies: arguments, or one line; never a traceback."""
    path = tmp_path / "run.yaml"
    for data in fuzz.damaged(YAML.encode(), 500, seed=0):
        path.write_bytes(data)
        try:
            found = list(config_file.with_file(["--config", str(path)]))
            assert all(isinstance(word, str) for word in found)
        except UserError as error:
            assert "\n" not in str(error)


def test_perceiver_options_are_those_of_the_resampler():
    given = config.PerceiverConfig(
        depth=3, n_latents=5, n_heads=4, n_query_groups=2, head_dim=6, concat_latents_kv=False
    )
    made = connector.build("perceiver", 10, 12, **given.options())
    assert len(made.layers) == 3 and made.latents.shape == (5, 12)
    layer = made.layers[0]
    assert (layer.heads, layer.kv_heads, layer.concat_latents_kv) == (4, 2, False)
    assert layer.q_proj.out_features == 24 and layer.k_proj.out_features == 12
    assert vars(config.PerceiverConfig()) == vars(config.PerceiverConfig(2, 16, 8, 8, 32, True))


def test_a_model_without_a_resampler_has_none_of_its_options():
    assert config.model_flags(connector="linear").perceiver is None
    assert config.model_flags(connector="perceiver").perceiver["depth"] == 2


def test_a_configuration_is_saved_and_read(tmp_path):
    made = config.model_flags(connector="perceiver", img_size=64, select="all")
    made.save_pretrained(tmp_path)
    read = config.VLMConfig.from_pretrained(tmp_path)
    assert read.to_dict() == made.to_dict() and read.img_size == 64


def test_the_line_of_a_user(tmp_path):
    """One line, exit code 2."""
    (tmp_path / "run.yaml").write_text("- a\n")
    words = ["vlm/build.py", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
