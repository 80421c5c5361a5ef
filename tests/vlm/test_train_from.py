"""vlm/train.py --model: stage 2 from the connector of stage 1, and any LLaVA to go on with."""

import json

import pytest
import torch

from tests import eyes, llamas
from utils import checkpoint
from utils.run import UserError
from vlm import conversations, data, llava, llava_io, prompts
from vlm import train as teach
from vlm.config import PerceiverConfig
from vlm.train_config import Config, changed


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """Four photos of fruit, a tiny CLIP and a tiny language model -> flags of a run."""
    folder = tmp_path_factory.mktemp("from")
    (folder / "chat.json").write_text(json.dumps(data.fruit("train")[:4]))
    eyes.folder(folder / "eye")
    return changed(
        Config(),
        vision_name_or_path=str(folder / "eye"),
        text_name_or_path=llamas.folder(folder / "speaker"),
        connector="mlp2x_gelu",
        data_path=str(folder / "chat.json"),
        image_folder=str(data.photos()),
        precision="fp32",
        text_share=0.0,
        views=1,
        batch_size=4,
        steps=2,
        warmup_steps=0,
        out=str(folder / "out"),
    )


def going_on(cfg, path, **flags):
    """A run that begins with another model: its parts are not named again."""
    usual = Config().model
    names = ("vision_name_or_path", "text_name_or_path", "connector")
    return changed(cfg, ckpt_path=str(path), **{n: getattr(usual, n) for n in names}, **flags)


def connector_of(path):
    """The connector's weights in a file of the trainer."""
    tensors = checkpoint.read(path)[0]
    return {k: x for k, x in tensors.items() if k.startswith("connector.")}


def same(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.fixture(scope="module")
def first_stage(lesson):
    """The connector alone, and the whole model as a folder of transformers' LLaVA."""
    cfg = changed(lesson, train_type="projector", out=lesson.out + "/one", save_model=True)
    teach.main(cfg)
    return lesson.out + "/one"


@pytest.mark.parametrize("what", ["model.safetensors", "model"])
def test_the_second_stage_begins_with_the_connector_of_the_first(lesson, first_stage, what):
    """A file of the trainer, or the folder that it wrote; nothing moves at a rate of next to nothing."""
    out = f"{lesson.out}/two-{what}"
    rates = {"lr": 1e-30, "lr_pretrained": 1e-30}
    teach.main(going_on(lesson, f"{first_stage}/{what}", out=out, **rates))
    learned = connector_of(f"{out}/model.safetensors")
    before = connector_of(f"{first_stage}/model.safetensors")
    if what == "model":  # a folder is in the precision of the language model
        before = {k: x.bfloat16().float() for k, x in before.items()}
    assert same(learned, before)


def test_what_was_trained_from_a_model_loads_beside_it(lesson, first_stage):
    """LoRA of the second run is merged into the model that it began with."""
    out = f"{lesson.out}/three"
    cfg = going_on(lesson, f"{first_stage}/model", out=out, lr=0.05, lr_pretrained=0.05)
    teach.main(changed(cfg, save_model=True))
    _, before = llava.load(f"{first_stage}/model")
    _, after = llava.load(f"{out}/model.safetensors")
    _, whole = llava.load(f"{out}/model")
    name = "model.layers.0.self_attn.q_proj.weight"
    old, new = before.language.get_parameter(name), after.language.get_parameter(name)
    assert not torch.equal(old, new)
    assert torch.equal(new, whole.language.get_parameter(name))
    assert same(after.connector.state_dict(), whole.connector.state_dict())


def test_the_folder_is_one_of_transformers(lesson, first_stage):
    config = json.loads((llava_io.Path(first_stage) / "model" / "config.json").read_text())
    assert config["model_type"] == "llava"


def test_a_folder_of_build_is_trained(lesson, tmp_path):
    from vlm.build import Config as BuildConfig
    from vlm.build import main as build_main
    from vlm.config import ModelFlags

    named = ModelFlags(
        vision_name_or_path=lesson.model.vision_name_or_path,
        text_name_or_path=lesson.model.text_name_or_path,
        connector="pool2",
    )
    build_main(BuildConfig(named, out=str(tmp_path / "built")))
    cfg = going_on(lesson, tmp_path / "built/model", out=str(tmp_path / "out"))
    found = teach.main(changed(cfg, train_type="projector", save_model=True))
    assert len(found["losses"]) == 2
    _, model = llava.load(tmp_path / "out/model.safetensors")
    _, whole = llava.load(tmp_path / "out/model")
    assert type(model.connector).__name__ == "Pool"
    assert same(model.connector.state_dict(), whole.connector.state_dict())


def test_rows_of_text_and_photos(lesson, tmp_path):
    """A row without a picture beside those with one."""
    rows = data.fruit("train")[:2]
    rows.append(conversations.row("text", None, [("What is red?", "an apple")]))
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    cfg = changed(lesson, data_path=str(tmp_path / "chat.json"), out=str(tmp_path / "out"))
    assert len(teach.main(cfg)["losses"]) == 2


def test_the_chat_template_goes_with_the_weights(lesson, tmp_path):
    cfg = changed(lesson, template="vicuna", out=str(tmp_path / "out"), train_type="projector")
    teach.main(cfg)
    tokenizer, _ = llava.load(tmp_path / "out/model.safetensors")
    assert tokenizer.chat_template == prompts.TEMPLATES["vicuna"]
    with pytest.raises(UserError, match="no/such"):
        teach.main(changed(cfg, template="no/such", out=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_options_of_the_connector_go_with_the_weights(lesson, tmp_path):
    """A resampler of its own sizes behind a token-sparsification plug-in: file and folder give the same tokens."""
    options = {"depth": 1, "n_latents": 3, "n_heads": 2, "n_query_groups": 1, "head_dim": 4}
    cfg = changed(
        lesson,
        connector="perceiver",
        perceiver=PerceiverConfig(**options, hidden_size=8),
        sparsity_plugins=("topk_norm5",),
        out=str(tmp_path),
        train_type="projector",
        save_model=True,
    )
    teach.main(cfg)
    _, model = llava.load(tmp_path / "model.safetensors")
    _, whole = llava.load(tmp_path / "model")
    features = torch.randn(2, 16, 16)
    found = model.connector(features)
    assert found.shape == (2, 3, 32)
    torch.testing.assert_close(
        whole.connector(features.bfloat16()).float(), found, atol=0.05, rtol=0.05
    )


def test_a_file_whose_connector_alone_learned_is_not_needed_again(lesson, first_stage, tmp_path):
    """The file of the second stage names the parts; a third one, beside LoRA, names the second, by its hash."""
    second = going_on(lesson, f"{first_stage}/model.safetensors", out=str(tmp_path / "two"))
    teach.main(second)
    meta = checkpoint.read(tmp_path / "two/model.safetensors")[1]
    assert "base" not in meta and meta["connector"] == "mlp2x_gelu"
    third = going_on(lesson, tmp_path / "two/model.safetensors", out=str(tmp_path / "three"))
    teach.main(third)
    llava.load(tmp_path / "three/model.safetensors")
    # the second is trained anew, and is another model
    teach.main(changed(second, lr=0.01))
    with pytest.raises(UserError, match="has changed since"):
        llava.load(tmp_path / "three/model.safetensors")
    (tmp_path / "two/model.safetensors").unlink()
    with pytest.raises(UserError, match="it was trained from is gone"):
        llava.load(tmp_path / "three/model.safetensors")


def test_the_model_to_go_on_with_is_not_overwritten(lesson, first_stage):
    before = checkpoint.read(f"{first_stage}/model.safetensors")[0]
    with pytest.raises(UserError, match="holds --model"):
        teach.main(going_on(lesson, f"{first_stage}/model.safetensors", out=first_stage))
    assert same(before, checkpoint.read(f"{first_stage}/model.safetensors")[0])


def test_parts_are_not_named_beside_a_model(lesson, first_stage, tmp_path):
    cfg = changed(lesson, ckpt_path=f"{first_stage}/model.safetensors", out=str(tmp_path / "new"))
    with pytest.raises(UserError, match="--vision_name_or_path, --text_name_or_path, --connector"):
        teach.main(cfg)
    assert not (tmp_path / "new").exists()


def test_the_folder_of_a_run_is_no_model_and_the_line_says_which_file_is(first_stage):
    with pytest.raises(UserError, match="folder of a training run: name .*model.safetensors"):
        llava.load(first_stage)
    with pytest.raises(UserError, match="no such file or folder"):
        llava.load(first_stage + "/nothing")


def test_what_learns_is_counted_and_not_what_is_written(lesson, tmp_path):
    cfg = changed(lesson, train_type="lora_frozen_projector", out=str(tmp_path / "out"), steps=1)
    found = teach.main(cfg)
    tensors = checkpoint.read(tmp_path / "out/model.safetensors")[0]
    assert found["learned"] == sum(x.numel() for k, x in tensors.items() if "lora" in k)
