"""vlm/flamingo_lora.py: who learns in each way, LoRA that can be taken out, flags that make no sense."""

from functools import partial

import pytest
import torch

from finetune import llama2_lora
from tests import eyes, llamas
from utils import data, pretrained
from utils.run import UserError
from vlm import few_shot, flamingo, flamingo_adapters, flamingo_lora, fruit_photos, tower

IMAGE, END = 98, 99


def model():
    torch.manual_seed(3)
    made = flamingo.Flamingo(
        eyes.speaker(), [IMAGE, END], dim_in=16, every=1, latents=3, latent_width=12
    ).eval()
    eyes.shake(made.cross, 0.3)
    return made


def text():
    return torch.tensor([[1, 7, IMAGE, 8, END, IMAGE, 9, 10, END]])


@pytest.mark.parametrize("way", flamingo_lora.WAYS)
def test_what_learns_is_what_was_asked_for(way):
    made = flamingo_lora.set_trainable(model(), way, flamingo_lora.Config(rank=2))
    names = set(made.trainable_parameters())
    assert names and not any(n.startswith("language") for n in names)
    if way == "gates":
        assert names == {
            f"cross.{i}.gate_{k}.alpha" for i in range(2) for k in ("attention", "mlp")
        }
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
        flamingo_lora.set_trainable(made, "lora", flamingo_lora.Config(rank=2))
        assert len(llama2_lora.names(made.cross)) == 12
        assert torch.equal(made(text(), made.resample(features)), before)
    loss = few_shot.loss(made, text(), text() != IMAGE, features)
    loss.backward()
    with torch.no_grad():
        for p in made.trainable_parameters().values():
            p.add_(torch.randn_like(p))
        assert not torch.allclose(made(text(), made.resample(features)), before, atol=1e-3)
        assert torch.equal(
            flamingo_adapters.remove_lora(made)(text(), made.resample(features)), before
        )
    assert not llama2_lora.names(made)


def test_every_kind_has_a_name_of_its_own():
    assert flamingo_lora.FRENCH.keys() == fruit_photos.NAMES.keys()
    assert len(set(flamingo_lora.FRENCH.values())) == 14


def test_bad_flags_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    tokenizer, _ = pretrained.smollm2()
    monkeypatch.setattr(
        pretrained, "smollm2", lambda on: (tokenizer, llamas.tiny(6, len(tokenizer)))
    )
    monkeypatch.setattr(flamingo, "load", lambda path, *about: flamingo.Flamingo(*about[:2]))
    monkeypatch.setattr(tower, "load", None)  # flags are looked at before the tower is
    for flags, says in (
        ({"steps": 0}, "above 0"), ({"lora_lr": 0.0}, "above 0"), ({"ways": ()}, "--ways"),
        ({"judged": -1}, "--judged"),
        ({"targets": ("c_attn",)}, "names no linear layer"), ({"rank": 0}, "--rank and --lora_alpha"),
        ({"lora_dropout": 1.0}, "--lora_dropout"), ({"modules_to_save": ("x",)}, "there is no such module"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            flamingo_lora.main(flamingo_lora.Config(**{"out": str(tmp_path / "out")} | flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more", [{}, {"lora_in": "both", "bias": "all", "modules_to_save": ("resampler", "gate_mlp")}]
)
def test_each_way_starts_alike_learns_french_and_is_judged_on_other_photos(
    tmp_path, monkeypatch, more
):
    """The whole script before a Flamingo of a few thousand weights, whose trainings and judgements are written down."""
    tokenizer, _ = pretrained.smollm2()
    trained, judged, asked, dropping = [], [], [], []
    real_train, real_judge, tiny = few_shot.train, few_shot.evaluate, flamingo.Flamingo

    def load(path, language, new, on):
        assert path == flamingo.WEIGHTS
        torch.manual_seed(7)
        made = flamingo.Flamingo(language, new).eval().requires_grad_(False)
        eyes.shake(made.cross, 0.3)
        return made

    def train(model, said, kinds, first, chunks, cfg, on):
        start = model.resampler.latents.detach().clone()
        names = [tokenizer.decode(chunk).split("<")[1].split("> ")[1] for chunk in chunks]
        assert (
            said.shape == (20, 4, 16)
            and said[:, 0, 0].tolist() == list(range(20))
            and kinds.tolist()[:3] == [0, 1, 2]
        )
        trained.append((model.training, names, start, set(model.trainable_parameters())))
        dropping.append(
            [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
        )
        return real_train(model, said, kinds, first, chunks, cfg, on)

    def judge(model, features, first, chunks, said, kinds, shots, cfg, on):
        scores = real_judge(model, features, first, chunks, said, kinds, shots, cfg, on)
        assert not model.training and features[:, 0, 0].min() >= 20 and len(features) == 8
        judged.append((tokenizer.decode(chunks[0][1:-1]).strip(), scores))
        asked.append((features, first, chunks, said, kinds, shots, cfg, on))
        return scores

    size = len(tokenizer)  # before the new tokens
    language = lambda on: (tokenizer, llamas.tiny(layers=6, vocabulary=size))  # noqa: E731
    monkeypatch.setattr(pretrained, "smollm2", language)
    monkeypatch.setattr(tower, "load", lambda name, on: None)
    monkeypatch.setattr(tower, "vision_features", eyes.seen)
    monkeypatch.setattr(data, "groceries", lambda size: eyes.shop())
    monkeypatch.setattr(
        flamingo, "Flamingo", partial(tiny, dim_in=16, every=3, latents=3, latent_width=12)
    )
    monkeypatch.setattr(flamingo, "load", load)
    for name, made in (("train", train), ("evaluate", judge)):
        monkeypatch.setattr(few_shot, name, made)
    cfg = flamingo_lora.Config(
        steps=2, batch=4, longest=2, judged=8, rank=2, lr=0.25, lora_lr=0.5, lora_dropout=0.1,
        out=str(tmp_path), **more,
    )  # fmt: skip
    rows = flamingo_lora.main(cfg)
    assert list(rows) == ["before", "gates", "lora", "LoRA taken out", "layers", "from nothing"]
    assert set(dropping[1]) == {0.1} and not dropping[0] and not dropping[2]
    french = [flamingo_lora.FRENCH[kind] for kind in eyes.shop().fine_names]
    assert all(names == french for _, names, *_ in trained)
    starts = [start for _, _, start, _ in trained]
    assert all(torch.equal(start, starts[0]) for start in starts[:3]) and not torch.equal(
        starts[3], starts[0]
    )
    for (_, _, _, moving), way in zip(trained, flamingo_lora.WAYS):
        assert rows[way]["learned"] == sum(
            p.numel() for n, p in parameters(way, tokenizer, cfg) if n in moving
        )
    assert [name for name, _ in judged] == ["Pink Lady apple", "pomme rose"] * 6
    scores = [score for _, score in judged]
    for half in (0, 1):
        before, gates, lora, out, layers, nothing = scores[half::2]
        assert torch.equal(before, out)
        assert not any(torch.allclose(x, before, atol=1e-3) for x in (gates, lora, layers, nothing))
    # the adapter that was written is what was judged
    torch.manual_seed(7)
    speaker = language(None)[1]
    again = load(flamingo.WEIGHTS, speaker, few_shot.add_words(tokenizer, speaker), None)
    assert flamingo_adapters.load(again, tmp_path / "adapter")
    assert set(again.trainable_parameters()) == trained[1][3]
    found = real_judge(again.eval(), *asked[5])
    torch.testing.assert_close(found, scores[5], atol=1e-2, rtol=1e-4)
    assert (scores[5] - scores[1]).abs().max() > 0.1
    assert {p.name for p in tmp_path.iterdir()} >= {
        "flamingo_lora.png",
        "metrics.json",
        "config.json",
    }


def parameters(way, tokenizer, cfg):
    made = flamingo.Flamingo(llamas.tiny(layers=6, vocabulary=len(tokenizer)), [5, 6])
    return list(flamingo_lora.set_trainable(made, way, cfg).named_parameters())


@pytest.mark.long
def test_the_whole_script_runs(tmp_path):
    cfg = flamingo_lora.Config(
        ways=("gates", "lora"), steps=1, batch=4, longest=2, judged=20, out=str(tmp_path)
    )
    rows = flamingo_lora.main(cfg)
    assert rows["LoRA taken out"] == rows["before"]
    assert {p.name for p in tmp_path.iterdir()} >= {
        "flamingo_lora.png",
        "metrics.json",
        "config.json",
    }
