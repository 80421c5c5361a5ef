"""LoRA of vlm/train.py in PEFT's files: loaded by PEFT over the base model, gone on with, asked."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests import eyes, llamas
from tests.vlm.test_modeling import asked, tiny
from utils import checkpoint
from utils.run import UserError
from vlm import build, data, llava, llava_io, peft_base, peft_files, prompts, train_model
from vlm import train as teach
from vlm.config import ModelFlags, PerceiverConfig
from vlm.train_config import Config, changed


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """Four photos of fruit, a tiny CLIP and a tiny language model -> flags of a run with LoRA."""
    folder = tmp_path_factory.mktemp("peft")
    (folder / "chat.json").write_text(json.dumps(data.fruit("train")[:4]))
    return changed(
        Config(),
        vision_name_or_path=eyes.folder(folder / "eye"),
        text_name_or_path=llamas.folder(folder / "speaker"),
        connector="mlp2x_gelu",
        data_path=str(folder / "chat.json"),
        image_folder=str(data.photos()),
        template="vicuna",
        precision="fp32",
        text_share=0.0,
        views=1,
        batch_size=4,
        steps=2,
        seed=3,
        lr=0.02,
        lr_pretrained=0.05,
        r=3,
        lora_alpha=5.0,
        target_modules=("q_proj", "down_proj"),
        warmup_steps=0,
        out=str(folder / "one"),
    )


@pytest.fixture(scope="module")
def trained(lesson):
    """A run of parts by their names, and the base model by the command that the adapter's README has."""
    teach.main(changed(lesson, save_model=True))
    out = Path(lesson.out)
    said = (out / "adapter/README.md").read_text()
    words = shlex.split(said.partition("this writes it: `")[2].partition("`")[0])
    assert words[:2] == ["python", "vlm/build.py"]
    build.main(tyro.cli(build.Config, args=words[2:]))
    return out


@pytest.fixture(scope="module")
def second(lesson, trained):
    """A run that goes on from a folder of transformers' LLaVA."""
    out = f"{lesson.out}-two"
    teach.main(going_on(lesson, trained / "model", out=out))
    return Path(out)


def going_on(cfg, path, **flags):
    """A run that begins with another model: its parts are not named again."""
    usual = Config().model
    names = ("vision_name_or_path", "text_name_or_path", "connector")
    parts = {name: getattr(usual, name) for name in names}
    return changed(cfg, ckpt_path=str(path), **parts | flags)


def in_training(cfg, adapter):
    """The model of a run that goes on with an adapter, before its first step, to be evaluated."""
    cfg = peft_files.with_adapter(changed(cfg, adapter=str(adapter), out="elsewhere"))
    return train_model.build_model(cfg, torch.device("cpu"))[1].eval()


def question(model):
    """ids with the tokens of two pictures, and noise as pictures."""
    torch.manual_seed(4)
    count = model.count
    image = torch.full((count,), model.image_id)
    words = torch.tensor([9, 8, 7])
    return torch.cat([words, image, words, image, words])[None], torch.randn(2, 3, 28, 28)


@torch.no_grad()
def logits(model, ids, pixels):
    """Of ours, or of a model of transformers, or of PEFT."""
    if isinstance(model, llava.Llava):
        return model(ids, pixels=pixels).logits.float()
    return model(input_ids=ids, pixel_values=pixels).logits.float()


def base_model(folder):
    """The model that an adapter names, in fp32."""
    base = json.loads((folder / "adapter/adapter_config.json").read_text())
    name = base["base_model_name_or_path"]
    return AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval()


@pytest.mark.parametrize("which", ["a folder of build.py", "transformers' LLaVA"])
def test_peft_loads_the_adapter_over_its_base(parity, lesson, trained, request, which):
    """The very logits of the model in training, <image> among them; and they are not those of the base."""
    out, cfg = trained, lesson
    if which != "a folder of build.py":
        out, cfg = request.getfixturevalue("second"), going_on(lesson, trained / "model")
    ours = in_training(cfg, out / "adapter")
    ours.vision.bfloat16().float()  # as the folder of the base model has it
    asking = question(ours)
    base = base_model(out)
    before = logits(base, *asking)
    theirs = PeftModel.from_pretrained(base, out / "adapter").eval()
    mine = logits(ours, *asking)
    found = logits(theirs, *asking)
    parity("LoRA", f"peft_files.write, {which}", "PeftModel.from_pretrained", mine, found)
    assert (found - before).abs().max() > 0.01
    # and what was trained is what the file says
    weights = checkpoint.read(out / "model.safetensors")[0]
    layer = ours.language.get_submodule("model.layers.1.self_attn.q_proj")
    assert torch.equal(layer.lora_B, weights["lora.model.layers.1.self_attn.q_proj.B"])
    assert layer.lora_B.abs().sum() > 0
    assert torch.equal(ours.connector[0].weight, weights["connector.0.weight"])


def test_peft_finds_class_and_base_by_the_adapter_alone(trained):
    allowed = {"import_allowlist": ["vlm.modeling"]}
    again = AutoPeftModel.from_pretrained(trained / "adapter", **allowed)
    assert type(again.get_base_model()).__name__ == "VLM"
    config = again.peft_config["default"]
    assert (config.r, config.lora_alpha, config.bias) == (3, 5.0, "none")
    assert config.modules_to_save == ["connector"] and len(config.target_modules) == 4


def test_merged_by_peft_is_the_folder_of_the_run(parity, trained):
    """merge_and_unload of base and adapter against OUT/model, both in bf16: rounding of weight and update apart."""
    name = peft_files.read(trained / "adapter").base
    base = AutoModelForImageTextToText.from_pretrained(name)
    language: Any = PeftModel.from_pretrained(base, trained / "adapter").merge_and_unload().language
    theirs = language.state_dict()
    _, model = llava.load(trained / "model")
    ours = model.language.state_dict()
    old = AutoModelForImageTextToText.from_pretrained(name).language.state_dict()
    assert ours.keys() == theirs.keys()
    moved = {key for key in ours if not torch.equal(ours[key], old[key])}
    assert len(moved) == 4  # queries and down projections of two layers
    for key in moved:
        before, mine, other = old[key].float(), ours[key].float(), theirs[key].float()
        rounding = 2**-7 * (other.abs() + (other - before).abs())
        assert ((mine - other).abs() <= rounding).all(), key
    for key in ours.keys() - moved:  # the row of <image>, too
        assert torch.equal(ours[key], theirs[key]), key
    mine, other = (
        ours["model.layers.0.mlp.down_proj.weight"],
        theirs["model.layers.0.mlp.down_proj.weight"],
    )
    parity("LoRA", "OUT/model, in bf16", "PEFT's merge_and_unload", mine, other, atol=2**-10)


@pytest.mark.parametrize("kind", ["trained", "second"])
def test_an_adapter_is_asked_by_its_folder(kind, request):
    """llava_io.load merges it into the model that it names: the model of the run's file, number by number."""
    out = request.getfixturevalue(kind)
    tokenizer, mine = llava.load(out / "adapter")
    other, theirs = llava.load(out / "model.safetensors")
    assert tokenizer.chat_template == other.chat_template == prompts.TEMPLATES["vicuna"]
    a = mine.language.state_dict()
    b = theirs.language.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    # a connector of a folder is in the precision of the language model
    for key, x in theirs.connector.state_dict().items():
        assert torch.equal(mine.connector.state_dict()[key].bfloat16(), x.bfloat16())


def test_going_on_begins_where_the_adapter_stopped(lesson, trained):
    """At a rate of next to nothing the new adapter is the old one, for the same base."""
    out = f"{lesson.out}-three"
    flags = {"lr": 1e-30, "lr_pretrained": 1e-30, "r": 8, "lora_alpha": 0, "out": out}
    usual = Config().lora.target_modules
    cfg = changed(lesson, adapter=str(trained / "adapter"), target_modules=usual, **flags)
    teach.main(cfg)
    old = load_file(trained / "adapter/adapter_model.safetensors")
    new = load_file(f"{out}/adapter/adapter_model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    one = json.loads((trained / "adapter/adapter_config.json").read_text())
    two = json.loads(Path(f"{out}/adapter/adapter_config.json").read_text())
    differ = {k for k in one if one[k] != two[k]}
    assert differ == {"base_model_name_or_path"}  # each run names its own place
    # the file of weights scales it as the adapter says
    assert checkpoint.read(f"{out}/model.safetensors")[1]["scale"] == 5 / 3


def test_another_template_than_that_of_the_model_is_one_warning(lesson, trained, capsys):
    """An adapter, a file, a folder go on in their own template, and in another one only with a word."""
    on = torch.device("cpu")
    adapter = peft_files.with_adapter(changed(lesson, adapter=f"{trained}/adapter", out="x"))
    others = [going_on(lesson, trained / name) for name in ("model.safetensors", "model")]
    for cfg in (adapter, *others):
        for name in ("", "vicuna"):
            tokenizer, _ = train_model.build_model(changed(cfg, template=name), on)
            assert tokenizer.chat_template == prompts.TEMPLATES["vicuna"]
        assert "warning" not in capsys.readouterr().out
        tokenizer, _ = train_model.build_model(changed(cfg, template="chatml"), on)
        assert tokenizer.chat_template == prompts.TEMPLATES["chatml"]
        said = [x for x in capsys.readouterr().out.splitlines() if "template" in x]
        assert len(said) == 1
        assert said[0].startswith(
            "warning: --template chatml: the model brings the chat template vicuna"
        )
    # parts by their names have learned none
    train_model.build_model(changed(lesson, template="plain"), on)
    assert "warning" not in capsys.readouterr().out


def test_a_run_without_lora_writes_no_adapter(lesson, tmp_path):
    teach.main(changed(lesson, train_type="projector", out=str(tmp_path)))
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_peft_over_the_model_generates_and_its_files_are_read(parity, tmp_path, task):
    """get_peft_model: greedy search with a cache is without; its own files, read by peft_files, are the same model."""
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    ids, pixels = asked(base)
    settings = LoraConfig(
        r=2,
        lora_alpha=7,
        task_type=task,
        target_modules=r"language\..*\.(q|v)_proj",
        modules_to_save=["connector"],
    )
    adapted: Any = eyes.shake(get_peft_model(base, settings)).eval()
    limits = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = adapted.generate(input_ids=ids, pixel_values=pixels, **limits)
    longer = ids
    for _ in range(4):
        best = logits(adapted, longer, pixels)[:, -1].argmax(-1, keepdim=True)
        longer = torch.cat([longer, best], dim=1)
    assert torch.equal(written, longer)
    adapted.save_pretrained(tmp_path / "adapter")
    found = peft_files.read(tmp_path / "adapter")
    assert found.base == str(tmp_path / "base") and found.scale == 3.5
    name = "model.layers.0.self_attn.q_proj"
    layer: Any = adapted.get_submodule(f"base_model.model.language.{name}")
    assert torch.equal(found.lora[f"{name}.A"], layer.lora_A["default"].weight)
    assert torch.equal(found.lora[f"{name}.B"], layer.lora_B["default"].weight)
    inner: Any = adapted.get_submodule("base_model.model.connector")
    for key, x in found.connector.items():
        assert torch.equal(x, inner.modules_to_save["default"].state_dict()[key])
    assert found.connector.keys() == model.connector.state_dict().keys()


def test_the_command_of_the_base_has_all_flags_that_matter():
    named = ModelFlags(connector="perceiver", perceiver=PerceiverConfig(depth=1, n_latents=5))
    line = peft_base.build_command(named, 7, "x y")
    words = shlex.split(line)
    cfg = tyro.cli(build.Config, args=words[2:])
    assert cfg == build.Config(named, seed=7, out="x y")
    assert "--vision" not in line and "heads" not in line


def test_the_base_of_a_file_of_weights_is_written_by_llava(lesson, trained):
    cfg = changed(Config(), ckpt_path=str(trained / "model.safetensors"), out=str(trained))
    _, model = llava.load(trained / "model")
    base, kind, command = peft_base.base_of(cfg, model)
    assert base == f"{trained.resolve()}/base/model" and kind == "llava"
    words = shlex.split(command)
    asked_for = tyro.cli(llava.Config, args=words[2:])
    assert (asked_for.model, asked_for.save) == (str(trained / "model.safetensors"), base)
    hub = changed(Config(), ckpt_path="llava-hf/llava-1.5-7b-hf")
    assert peft_base.base_of(hub, model) == ("llava-hf/llava-1.5-7b-hf", "llava", "")


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"r": 4}, "its r is 3; leave out --lora.r"),
        ({"lora_alpha": 8.0}, "its lora_alpha is 5.0"),
        ({"target_modules": ("v_proj",)}, "leave out --lora.target_modules"),
        ({"train_type": "projector"}, "goes with --train_type use_lora"),
        ({"adapter": "no/such"}, "no adapter in no/such"),
    ],
)
def test_flags_against_the_adapter_are_one_line(lesson, trained, tmp_path, flags, says):
    cfg = changed(lesson, adapter=str(trained / "adapter"), out=str(tmp_path / "new"))
    with pytest.raises(UserError, match=says):
        teach.main(changed(cfg, **flags))
    assert not (tmp_path / "new").exists()
    if says.startswith("no adapter"):
        return
    with pytest.raises(UserError, match="choose another place"):
        peft_files.with_adapter(changed(cfg, out=str(trained)))


def edited(source, target, **values):
    """A copy of an adapter folder without our hash, as PEFT writes it, with other settings."""
    target.mkdir()
    config = json.loads((source / "adapter_config.json").read_text()) | values
    (target / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    return target


def test_adapters_of_another_kind_are_one_line(lesson, trained, tmp_path):
    source = trained / "adapter"
    with pytest.raises(UserError, match="is no plain LoRA: merge it with PEFT"):
        peft_files.read(edited(source, tmp_path / "dora", use_dora=True))
    with pytest.raises(UserError, match="not of the rank 4"):
        peft_files.read(edited(source, tmp_path / "rank", r=4))
    gone = edited(source, tmp_path / "gone", base_model_name_or_path="/no/such/model")
    with pytest.raises(UserError, match="for a model that is not there: /no/such/model"):
        llava_io.load(gone)
    chain = edited(source, tmp_path / "chain", base_model_name_or_path=str(source))
    with pytest.raises(UserError, match="for another adapter"):
        llava_io.load(chain)
    # LoRA in the encoder, too
    seen = edited(source, tmp_path / "seen")
    path = seen / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "lora_A" in k)
    layer = "vision.network.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {f"base_model.model.{layer}": tensors[key].clone()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="not the language model alone"):
        peft_files.read(seen)
    # another language model, or another connector
    other = changed(lesson, adapter=str(source), out="elsewhere", connector="linear")
    with pytest.raises(UserError, match="weights of another connector"):
        train_model.build_model(peft_files.with_adapter(other), torch.device("cpu"))
    name = llamas.tiny(layers=1, vocabulary=49152).to(torch.bfloat16)
    name.save_pretrained(tmp_path / "small")
    llamas.tokenizer().save_pretrained(tmp_path / "small")
    other = changed(
        lesson, adapter=str(source), out="elsewhere", text_name_or_path=str(tmp_path / "small")
    )
    with pytest.raises(UserError, match="for other layers than this model has"):
        train_model.build_model(peft_files.with_adapter(other), torch.device("cpu"))


def test_the_example_of_the_page_runs(trained, tmp_path, monkeypatch, capsys):
    """The program of build.md, word by word, where its folders are those of another run."""
    page = Path(build.__file__).with_name("build.md").read_text("utf-8")
    program = page.partition("```py\n")[2].partition("```")[0]
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/first").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "build.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    # vicuna, with a picture of 16 tokens and 28 x 28 pixels
    assert "'pixel_values': (1, 3, 28, 28)" in said[0] and len(said) >= 3
