"""vlm/engines.py: every engine makes the steps of one process; sharded checkpoints; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import eyes, llamas
from training import ranks
from utils import checkpoint
from utils.run import UserError
from vlm import checkpoints, connector, conversations, data, engines, llava, tower, trainable
from vlm import train as teach
from vlm.config import DeepSpeedConfig, FSDPConfig, QuantConfig
from vlm.train_config import Config, changed, check_flags

ENGINES = {
    "plain": {},
    "DDP": {"engine": "ddp"},
    "accelerate": {"engine": "accelerate"},
    "FSDP2": {"fsdp": FSDPConfig(True)},
    "ZeRO-0": {"deepspeed": DeepSpeedConfig(0)},
    "ZeRO-1": {"deepspeed": DeepSpeedConfig(1)},
    "ZeRO-2": {"deepspeed": DeepSpeedConfig(2)},
    "ZeRO-2, optimizer offloaded": {"deepspeed": DeepSpeedConfig(2, "optimizer")},
    "ZeRO-3": {"deepspeed": DeepSpeedConfig(3)},
    "ZeRO-3, parameters offloaded": {"deepspeed": DeepSpeedConfig(3, "parameters")},
}
# What learns, and by which engines
CASES = [("use_lora", name) for name in ENGINES]
CASES += [("projector", name) for name in ("DDP", "accelerate", "FSDP2", "ZeRO-3")]
CASES += [("lora_frozen_projector", name) for name in ("FSDP2", "ZeRO-3")]
CASES += [("none", name) for name in ("DDP", "accelerate", "FSDP2", "ZeRO-3")]


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """Six photos of fruit and two rows without one, a tiny language model -> flags of a run."""
    folder = tmp_path_factory.mktemp("lesson")
    rows = data.fruit("train")[:6]
    for i in range(2):
        turn = ("What is red and grows?", "an apple")
        rows.append(conversations.row(f"text-{i}", None, [turn]))
    (folder / "chat.json").write_text(json.dumps(rows))
    eyes.folder(folder / "eye")
    return changed(
        Config(),
        text_name_or_path=llamas.folder(folder / "speaker"),
        data_path=str(folder / "chat.json"),
        image_folder=str(data.photos()),
        precision="fp32",
        packing=False,
        text_share=0.0,
        views=1,
        steps=3,
        warmup_steps=1,
        lr=0.03,
        lr_pretrained=0.03,
        out=str(folder),
    )


def smooth_adamw(groups, cfg):
    """AdamW whose steps follow the size of gradients: with the usual eps, noise of 1e-9 moves a weight as far as 1."""
    return torch.optim.AdamW(groups, eps=0.01, weight_decay=0.0)


def of_kind(cfg, kind):
    """What learns; a tower that learns is a tiny CLIP, without batch norms and dropped layers."""
    cfg = changed(cfg, train_type=kind)
    if kind == "none":
        cfg = changed(cfg, vision_name_or_path=f"{Path(cfg.data.data_path).parent}/eye")
    return cfg


def of_two_ranks(cfg, kind, name):
    """A rank reads one conversation at a time, and some have no photo."""
    flags = {"batch_size": 1, "gradient_accumulation_steps": 2}
    # clipping would hide gradients of another size
    flags["grad_clip"] = 0.0 if kind == "projector" else 1.0
    cfg = of_kind(cfg, kind)
    return changed(cfg, out=f"{cfg.out}/{kind}-{name}", **flags, **ENGINES[name])


def every_case(cfg):
    """In two ranks: losses of all engines; FSDP in two pieces and in one."""
    engines.adamw = smooth_adamw
    found = {}
    for kind, name in CASES:
        found[f"{kind}-{name}"] = teach.worker(of_two_ranks(cfg, kind, name))["losses"]
    constant = changed(of_two_ranks(cfg, "use_lora", "FSDP2"), lr_scheduler_type="constant")
    found["whole"] = teach.worker(changed(constant, out=f"{cfg.out}/whole"))["losses"]
    half = changed(constant, out=f"{cfg.out}/pieces", steps=2, save_steps=1)
    found["half"] = teach.worker(half)["losses"]
    return found


def gone_on(cfg):
    """In one rank: FSDP goes on from what two ranks wrote."""
    engines.adamw = smooth_adamw
    cfg = changed(
        of_two_ranks(cfg, "use_lora", "FSDP2"), out=f"{cfg.out}/pieces", resume=True, batch_size=2
    )
    cfg = changed(cfg, lr_scheduler_type="constant", save_steps=1)
    try:
        teach.worker(cfg)
    except UserError as error:
        refused = str(error)
    same = changed(cfg, batch_size=1)
    return {"refused": refused, "losses": teach.worker(same)["losses"]}


@pytest.fixture(scope="module")
def runs(lesson):
    return ranks.launch(every_case, lesson, 2)[0]


@pytest.fixture(scope="module")
def alone(lesson):
    """In one process, of each kind of training: the same four conversations a step."""
    patch = pytest.MonkeyPatch()
    patch.setattr(engines, "adamw", smooth_adamw)
    found = {}
    for kind in dict.fromkeys(kind for kind, _ in CASES):
        clip = 0.0 if kind == "projector" else 1.0
        cfg = changed(of_kind(lesson, kind), batch_size=4, grad_clip=clip)
        cfg = changed(cfg, out=f"{lesson.out}/{kind}-alone")
        found[kind] = teach.main(cfg)["losses"]
    patch.undo()
    return found


def weights(lesson, name):
    return checkpoint.read(Path(lesson.out) / name / "model.safetensors")[0]


@pytest.mark.long
@pytest.mark.parametrize("kind, name", CASES)
def test_every_engine_makes_the_steps_of_one_process(lesson, runs, alone, parity, kind, name):
    ours = f"vlm.train, one process, {kind}"
    theirs = f"{name}, 2 ranks"
    parity("LLaVA, engines", ours, f"{theirs}, losses", alone[kind], runs[f"{kind}-{name}"], 1e-4)
    mine = weights(lesson, f"{kind}-alone")
    them = weights(lesson, f"{kind}-{name}")
    assert mine.keys() == them.keys()
    parity("LLaVA, engines", ours, f"{theirs}, weights", mine, them, 1e-4)


@pytest.mark.long
def test_fsdp_goes_on_with_another_number_of_ranks(lesson, runs):
    """One rank reads the shards of two; a batch of another size is refused."""
    assert runs["half"] == runs["whole"][:2]
    found = ranks.launch(gone_on, lesson, 1)[0]
    assert "--batch_size 1" in found["refused"]
    assert found["losses"][:2] == runs["half"] and len(found["losses"]) == 3


def small(kind="projector", **flags):
    """A Llava of a few thousand weights -> learner, flags."""
    cfg = changed(Config(), train_type=kind, precision="fp32", r=2, **flags)
    language = eyes.speaker()
    join = connector.build("perceiver", 16, 24, latents=4, heads=2, kv_heads=2, head_dim=4)
    model = llava.Llava(tower.VisionTower(eyes.tower()), join, language, 99)
    trainable.set_trainable(model, cfg)
    return teach.Learner(model), cfg


def test_classes_that_fsdp_shards_one_by_one():
    learner, cfg = small()
    assert engines.shard_classes(learner, cfg) == {"LlamaDecoderLayer", "PerceiverLayer"}
    learner, cfg = small("none")
    found = engines.shard_classes(learner, cfg)
    assert found == {
        "LlamaDecoderLayer",
        "PerceiverLayer",
        "CLIPEncoderLayer",
        "CLIPVisionEmbeddings",
    }
    named = changed(cfg, fsdp=FSDPConfig(True, ("LlamaMLP",)))
    assert engines.shard_classes(learner, named) == {"LlamaMLP"}
    unknown = changed(cfg, fsdp=FSDPConfig(True, ("LlamaMLP", "Nothing")))
    with pytest.raises(UserError, match="the model has no Nothing"):
        engines.shard_classes(learner, unknown)


def test_a_frozen_tower_is_no_part_of_what_engines_shard():
    learner, _ = small()
    assert not [name for name, _ in learner.named_parameters() if "vision" in name]
    assert learner.model.vision.count == 16
    learner, _ = small("none")
    assert [name for name, _ in learner.named_parameters() if "vision" in name]


def test_fp16_scales_the_loss_and_the_step_is_that_of_fp32():
    """Products in fp32 all the same: what is scaled up is scaled down before clipping."""
    found = {}
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        learner, cfg = small(grad_clip=0.01)
        engine: Any = engines.Plain(learner, changed(cfg, precision=precision), torch.device("cpu"))
        engine.optimizer = torch.optim.SGD(engine.learned(), 1.0)
        seen = learner.model.project(torch.ones(1, 16, 16))
        value = (seen * torch.arange(24.0)).sum()
        engine.backward(value)
        found[precision] = engine.learned()[0].grad.clone()
        engine.step()
        found[f"{precision} after"] = engine.learned()[0].detach().clone()
    assert found["fp32"].abs().max() > 0.01
    torch.testing.assert_close(found["fp16"], found["fp32"] * 65536.0)
    torch.testing.assert_close(found["fp16 after"], found["fp32 after"])


def test_accumulated_parts_send_gradients_once():
    learner, cfg = small()
    engine = engines.DDP(learner, cfg, torch.device("cpu"))
    waited = []

    class Wrapped:
        def no_sync(self):
            waited.append(1)
            return engines.nullcontext()

    engine.wrapped = Wrapped()
    for last in (False, False, True):
        with engine.part(last):
            pass
    assert waited == [1, 1]


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"fsdp": FSDPConfig(True), "engine": "ddp"}, "one engine at a time: fsdp or ddp"),
        ({"fsdp": FSDPConfig(True), "precision": "fp16"}, "fp16 is not done under fsdp"),
        ({"quant": QuantConfig(4), "train_type": "none"}, "cannot learn; use LoRA"),
        ({"betas": (0.9, 1.0)}, "--betas"),
        ({"min_lr": 1.0}, "--min_lr"),
        ({"warmup_ratio": 1.0}, "--warmup_ratio"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"log_steps": 0}, "--log_steps"),
        ({"grad_clip": -1.0}, "below 0"),
    ],
)
def test_flags_that_contradict_each_other(flags, says):
    with pytest.raises(UserError, match=says):
        check_flags(changed(Config(), **flags))


def test_fsdp_needs_ranks():
    learner, cfg = small(fsdp=FSDPConfig(True))
    with pytest.raises(UserError, match="--fsdp shards over ranks"):
        engines.build(learner, cfg, torch.device("cpu"))


def test_a_sharded_state_is_known_by_its_engine():
    assert not checkpoints.sharded(Config())
    assert checkpoints.sharded(changed(Config(), fsdp=FSDPConfig(True)))
    assert checkpoints.sharded(changed(Config(), deepspeed=DeepSpeedConfig(0)))
