"""finetune/flamingo_lora.py: who learns in each way, LoRA that can be taken out, flags that make no sense."""

import pytest
import torch

from finetune import flamingo_lora, llama2_lora
from models import flamingo, llava
from tests import eyes
from utils.run import UserError

IMAGE, END = 98, 99


def model():
    torch.manual_seed(3)
    made = flamingo.Flamingo(eyes.speaker(), [IMAGE, END], dim_in=16, every=1, latents=3, seen=12).eval()
    eyes.shake(made.cross, 0.3)
    return made


def text():
    return torch.tensor([[1, 7, IMAGE, 8, END, IMAGE, 9, 10, END]])


@pytest.mark.parametrize("way", flamingo_lora.WAYS)
def test_what_learns_is_what_was_asked_for(way):
    made = flamingo_lora.choose(model(), way, flamingo_lora.Config(rank=2))
    names = set(made.moving())
    assert names and not any(n.startswith("language") for n in names)
    if way == "gates":
        assert names == {f"cross.{i}.gate_{k}" for i in range(2) for k in ("attention", "mlp")}
    elif way == "lora":
        targets = flamingo_lora.Config().targets
        assert names == {f"cross.{i}.{t}.lora_{x}" for i in range(2) for t in targets for x in "AB"}
    else:
        whole = {n for n, _ in made.named_parameters() if not n.startswith("language")}
        assert names == whole


def test_lora_begins_as_nothing_moves_something_and_can_be_taken_out():
    made, features = model(), torch.randn(1, 2, 4, 16)
    with torch.no_grad():
        before = made(text(), made.resample(features))
        flamingo_lora.choose(made, "lora", flamingo_lora.Config(rank=2))
        assert len(llama2_lora.names(made.cross)) == 12
        assert torch.equal(made(text(), made.resample(features)), before)
    loss = flamingo.loss(made, text(), text() != IMAGE, features)
    loss.backward()
    with torch.no_grad():
        for p in made.moving().values():
            p.add_(torch.randn_like(p))
        assert not torch.allclose(made(text(), made.resample(features)), before, atol=1e-3)
        assert torch.equal(flamingo_lora.unplug(made)(text(), made.resample(features)), before)
    assert not llama2_lora.names(made)


def test_every_kind_has_a_name_of_its_own():
    assert flamingo_lora.FRENCH.keys() == llava.NAMES.keys()
    assert len(set(flamingo_lora.FRENCH.values())) == 14


def test_bad_flags_are_refused_before_anything_is_written(tmp_path):
    for flags, says in (
        ({"steps": 0}, "above 0"), ({"lora_lr": 0.0}, "above 0"), ({"ways": ()}, "--ways"),
        ({"judged": -1}, "--judged"),
        ({"targets": ("c_attn",)}, "names no linear layer"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            flamingo_lora.main(flamingo_lora.Config(**{"out": str(tmp_path / "out")} | flags))
    assert not (tmp_path / "out").exists()


def test_the_whole_script_runs(tmp_path):
    cfg = flamingo_lora.Config(ways=("gates", "lora"), steps=1, batch=4, longest=2, judged=20, out=str(tmp_path))
    rows = flamingo_lora.main(cfg)
    assert rows["LoRA taken out"] == rows["before"]
    assert {p.name for p in tmp_path.iterdir()} >= {"flamingo_lora.png", "metrics.json", "config.json"}
