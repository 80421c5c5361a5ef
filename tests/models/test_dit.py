"""models/dit.py: equal to diffusers' DiT, as large as the paper's, nothing at first, steered by class and guidance."""

import copy
import json
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import ddim, ddpm, dit, dit_network, guidance_study, quality
from tests.conftest import gradients
from tests.models.test_ddpm import (
    OneWeight,
    Spy,
    command,
    followed,
    one_line,
    only_noise,
    part_of,
    same,
)
from utils import checkpoint, data
from utils.run import UserError

TINY = {"depth": 3, "width": 32, "heads": 2, "patch": 2, "image": 8, "channels": 3, "classes": 5}
BLOCK = {  # ours -> diffusers', inside a block
    "adaln.1": "norm1.linear",
    "attention.to_q": "attn1.to_q",
    "attention.to_k": "attn1.to_k",
    "attention.to_v": "attn1.to_v",
    "attention.to_out.0": "attn1.to_out.0",
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
}


def random_dit(**changes):
    """A tiny DiT all of whose weights are random: the zeros of the initialisation would hide most of it."""
    model = dit_network.DiT(**TINY | changes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def names_of_theirs(depth):
    """{our name: diffusers' names for the same weight}; each of their blocks has its own copy of the embedders."""
    each = [f"transformer_blocks.{i}." for i in range(depth)]
    layers = {"embed": ["pos_embed.proj"], "adaln.1": ["proj_out_1"], "head": ["proj_out_2"]}
    for layer in ("linear_1", "linear_2"):
        layers[f"time.{layer}"] = [f"{block}norm1.emb.timestep_embedder.{layer}" for block in each]
    for i, block in enumerate(each):
        layers |= {f"blocks.{i}.{ours}": [block + theirs] for ours, theirs in BLOCK.items()}
    kinds = ("weight", "bias")
    names = {
        f"{ours}.{kind}": [f"{n}.{kind}" for n in ns]
        for ours, ns in layers.items()
        for kind in kinds
    }
    return names | {
        "label.weight": [
            f"{block}norm1.emb.class_embedder.embedding_table.weight" for block in each
        ]
    }


def diffusers_dit(ours):
    """diffusers' model with the weights of ours."""
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel(
        num_attention_heads=TINY["heads"],
        attention_head_dim=TINY["width"] // TINY["heads"],
        in_channels=TINY["channels"],
        num_layers=TINY["depth"],
        sample_size=TINY["image"],
        patch_size=TINY["patch"],
        num_embeds_ada_norm=TINY["classes"],
        norm_eps=1e-6,
    ).eval()  # eval: their embedder drops labels in training
    names, weights = names_of_theirs(TINY["depth"]), dict(ours.named_parameters())
    assert names.keys() == weights.keys()
    shapes = {name: p.shape for name, p in theirs.named_parameters()}
    state = {n: weights[name].detach().view(shapes[n]) for name, ns in names.items() for n in ns}
    assert state.keys() == shapes.keys()  # none of their parameters is left as it was
    theirs.load_state_dict(state)
    return theirs


def inputs():
    side, classes = TINY["image"], TINY["classes"]
    x = torch.randn(4, TINY["channels"], side, side)
    # The last: no class
    return x, torch.tensor([0, 20, 500, 999]), torch.tensor([0, 3, classes - 1, classes])


def test_equals_diffusers(parity):
    """Forward, and the gradient of every parameter.

    The frequencies of diffusers' time embedding divide the exponent by half - 1, those of the authors' code, and ours,
    by half: a switch in diffusers, set here to the authors' side. The next test shows that nothing else differs.
    """
    x, t, y = inputs()
    ours = random_dit()
    theirs = diffusers_dit(ours)
    for block in theirs.transformer_blocks:
        assert block.norm1.emb.time_proj.downscale_freq_shift == 1
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    mine, other = ours(x, t, y), theirs(x, t, y).sample
    assert other.std() > 0.1
    parity("DiT", "dit_network.DiT", "diffusers.DiTTransformer2DModel", mine, other, atol=1e-4)
    mine, other = gradients(ours, mine), gradients(theirs, other)
    names = names_of_theirs(TINY["depth"])  # gradients of their copies of one weight add up
    other = {name: sum(other[n] for n in ns).view_as(mine[name]) for name, ns in names.items()}
    assert mine.keys() == other.keys() == dict(ours.named_parameters()).keys()
    # Each in units of its own largest entry, so that no small gradient hides behind a large one
    for name in other:
        unit = other[name].abs().max()
        # Moves a row's scores alike, which softmax does not see: zero but for rounding
        if name.endswith("to_k.bias"):
            unit = other[name.replace("bias", "weight")].abs().max()
            assert other[name].abs().max() < 1e-5 * unit
        mine[name], other[name] = mine[name] / unit, other[name] / unit
    parity(
        "DiT",
        "dit_network.DiT, gradients",
        "diffusers.DiTTransformer2DModel",
        mine,
        other,
        atol=2e-5,
    )


def test_time_embedding_is_all_that_differs_from_diffusers():
    """At t = 0 every frequency gives the same angle, so diffusers as it comes is equal there, and only there."""
    x, t, y = inputs()
    ours = random_dit()
    theirs = diffusers_dit(ours)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, t * 0, y), theirs(x, t * 0, y).sample, atol=1e-4, rtol=1e-5
        )
        assert (ours(x, t, y) - theirs(x, t, y).sample)[2].abs().max() > 1e-2


@pytest.mark.parametrize("dim, size", [(32, 4), (160, 7), (1152, 16)])
def test_position_embedding_equals_diffusers(parity, dim, size):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    ours, theirs = (
        dit_network.position_embedding(dim, size),
        get_2d_sincos_pos_embed(dim, size, base_size=size).float(),
    )
    parity(
        "DiT",
        "dit_network.position_embedding",
        "diffusers get_2d_sincos_pos_embed",
        ours,
        theirs,
        1e-6,
    )


def test_position_embedding_refuses_a_width_that_is_no_multiple_of_four():
    with pytest.raises(UserError, match="30"):
        dit_network.position_embedding(30, 4)


TABLE_4 = [("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)]


@pytest.mark.parametrize("size, millions, gflops", TABLE_4)
def test_size_of_the_paper(size, millions, gflops):
    """Parameters and Gflops (the paper counts multiply-adds) with patch 2 on 4 x 32 x 32 latents and 1000 classes.

    On the meta device: no memory, no time. The paper's head also says a variance: as many outputs again as ours.
    """
    depth, width, heads = dit.SIZES[size]
    with torch.device("meta"):
        model = dit_network.DiT(depth, width, heads, 2, image=32, channels=4, classes=1000)
        variance = torch.nn.Linear(width, 2 * 2 * 4)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    parameters = sum(p.numel() for p in [*model.parameters(), *variance.parameters()])
    assert parameters == pytest.approx(millions * 1e6, rel=0.01)
    assert counter.get_total_flops() / 2 / 1e9 == pytest.approx(gflops, rel=0.01)
    # What the authors' train.py prints; it counts the fixed position embedding too
    if size == "XL":
        assert parameters + model.position.numel() == 675_129_632


def test_default_is_small():
    assert sum(p.numel() for p in dit.build("tiny", 4).parameters()) < 4.5e6


def test_blocks_are_the_identity_and_the_output_is_zero_at_first():
    model = dit_network.DiT(**TINY)
    x, t, y = inputs()
    tokens, condition = torch.randn(4, 16, 32), torch.randn(4, 32)
    for block in model.blocks:
        assert torch.equal(block(tokens, condition), tokens)
    assert torch.equal(model(x, t, y), torch.zeros_like(x))


def test_output_lies_where_its_patch_lies():
    """Blocks that do nothing do not mix tokens: a change of one patch must change the output there and nowhere else."""
    model = dit_network.DiT(**TINY)
    torch.nn.init.normal_(model.head.weight)
    x, t, y = inputs()
    other = x.clone()
    other[:, :, 2:4, 6:8] += 1  # row 1, column 3
    changed = (model(x, t, y) != model(other, t, y)).any(dim=(0, 1))
    assert changed[2:4, 6:8].all() and changed.sum() == 4


def test_guidance():
    """Scale 1 is the class's own prediction, 0 that of no class; guiding v is guiding eps."""
    model, schedule = random_dit(), ddpm.Schedule(kind="cosine")
    x, t, y = inputs()
    null = torch.full_like(y, TINY["classes"])
    with torch.no_grad():
        with_class, without = model(x, t, y), model(x, t, null)
        assert not torch.allclose(with_class[:3], without[:3], atol=1e-2)
        torch.testing.assert_close(
            dit.classifier_free_guidance(model, y, 1)(x, t), with_class, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            dit.classifier_free_guidance(model, y, 0)(x, t), without, atol=1e-5, rtol=1e-5
        )
        eps_class, eps_null = (ddpm.to_eps(schedule, x, t, v, "v") for v in (with_class, without))
        eps = ddpm.to_eps(schedule, x, t, dit.classifier_free_guidance(model, y, 3.0)(x, t), "v")
        torch.testing.assert_close(eps, eps_null + 3 * (eps_class - eps_null), atol=1e-4, rtol=1e-5)


def test_guided_sampling_of_gaussians():
    """Two classes with known densities, N(mean_y, 1): the exact v is known, so guided DDIM must end where theory says.

    Guidance turns a score of N(mean, 1) into that of N(scale mean_y + (1 - scale) mean_null, 1).
    """
    schedule, means = ddpm.Schedule(kind="cosine"), torch.tensor([-0.5, 0.4, 0.1])

    class Exact(torch.nn.Module):
        classes = 2

        def forward(self, xt, t, y):
            alpha_bar = ddpm.at(schedule.alpha_bar, t)
            eps = (1 - alpha_bar).sqrt() * (xt - alpha_bar.sqrt() * means[y][:, None, None, None])
            # v, from to_eps solved for it
            return (eps - (1 - alpha_bar).sqrt() * xt) / alpha_bar.sqrt()

    y, scale = torch.tensor([0, 1]), 1.5
    noise = 0.1 * torch.randn(2, 1, 4, 4)
    x = ddim.last(
        ddim.sample(dit.classifier_free_guidance(Exact(), y, scale), schedule, noise, 50, "v")
    )
    expected = scale * means[y] + (1 - scale) * means[2]
    torch.testing.assert_close(x, noise + expected[:, None, None, None], atol=0.05, rtol=0)


def test_drop_labels():
    y = torch.arange(20_000) % 10
    dropped = dit.drop_labels(y, 0.1, 10)
    hidden = dropped == 10
    assert abs(hidden.float().mean() - 0.1) < 0.01
    assert torch.equal(dropped[~hidden], y[~hidden])
    assert torch.equal(dit.drop_labels(y, 0.0, 10), y)
    shares = hidden.float().view(-1, 10).mean(0)  # every class alike
    assert (shares - 0.1).abs().max() < 0.03


class Names(OneWeight):
    """One weight for every answer; three classes, and "no class"."""

    def __init__(self, weight=3.0):
        super().__init__(weight)
        self.classes = 3


def test_training_by_hand():
    """Rate, zeroed gradients, clipping and EMA of every step; the target v is -x0 where the schedule is only noise."""
    cfg = dit.Config(steps=7, batch=4, lr=40.0, ema=0.25)
    white, labels = (
        torch.full((8, 1, 4, 4), 255, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.long),
    )
    rest = only_noise(), white, labels, cfg
    followed(lambda *parts: dit.train(*parts, *rest), -1.0, cfg, 0.25, Names)


def test_training_hides_labels_behind_the_null_class_and_keeps_images_with_their_labels():
    """A picture's grey is its label here; half of the labels are hidden, as the flag says."""
    labels = torch.arange(3).repeat(40)
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) * 100
    model, seen = Names(), []
    schedule = ddpm.Schedule()
    # Xt is x0
    schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar = torch.ones(1000), torch.zeros(1000)

    def forward(xt, t, y):
        seen.append((data.to_uint8(xt)[:, 0, 0, 0] // 100, y))
        return model.weight.expand_as(xt)

    model.forward = forward
    rest = (
        copy.deepcopy(Names()).requires_grad_(False),
        torch.optim.SGD(model.parameters()),
        schedule,
        images,
        labels,
    )
    list(dit.train(model, *rest, dit.Config(steps=20, batch=30, dropout=0.5)))
    grey, asked = (torch.cat(x) for x in zip(*seen))
    hidden = asked == 3
    assert torch.equal(asked[~hidden], grey[~hidden].long()) and len(grey) == 600
    assert 0.4 < hidden.float().mean() < 0.6


def test_accuracy_compares_with_the_class_asked_for(monkeypatch):
    said = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 2]), 10).float()
    monkeypatch.setattr(quality, "evaluate", lambda classifier, images: (None, said))
    assert (
        guidance_study.accuracy(None, torch.zeros(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])) == 0.75
    )


def test_main_asks_the_ema_for_every_digit_at_every_scale(monkeypatch, tmp_path):
    """One noise for all scales; classes in turn; written is what was sampled; the best has the least distance."""
    spy, asked, judged = Spy(monkeypatch, ddpm), [], []
    monkeypatch.setitem(dit.SIZES, "tiny", (1, 16, 2))
    monkeypatch.setattr(quality, "load", lambda device: None)
    monkeypatch.setattr(
        dit, "accuracy", lambda classifier, images, y: asked[-1].update(y=y) or 0.25
    )
    monkeypatch.setattr(quality, "scorer", lambda device: judge)

    def guide(model, y, scale):
        asked.append({"model": model, "classes": y, "scale": scale})
        return asked[-1]

    def sample(network, schedule, noise, n, predict="eps", *_, **__):
        network.update(noise=noise, n=n, predict=predict, schedule=schedule)
        yield torch.full_like(noise, network["scale"] / 10)

    def judge(images):
        judged.append(float(images.mean()))
        return {"recognised": 0.5, "frechet": {0.1: 3.0, 0.2: 1.0, 0.4: 2.0}[round(judged[-1], 2)]}

    monkeypatch.setattr(dit, "classifier_free_guidance", guide)
    monkeypatch.setattr(ddim, "sample", sample)
    cfg = dit.Config(
        steps=3, batch=8, samples=11, guidance_scale=(1, 2, 4), ema=0.5, out=str(tmp_path)
    )
    metrics = dit.main(cfg)
    assert [a["scale"] for a in asked] == [1, 2, 4]
    for a in asked:
        assert torch.equal(a["noise"], asked[0]["noise"]) and a["noise"].shape == (11, 1, 28, 28)
        assert a["classes"].tolist() == a["y"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
        assert (a["n"], a["predict"]) == (50, "v")
        assert torch.equal(a["schedule"].alpha_bar, ddpm.Schedule(kind="cosine").alpha_bar)
    written = checkpoint.read(tmp_path / "model.safetensors")[0]
    state = checkpoint.read(tmp_path / "state.safetensors")[0]
    assert same(written, part_of(state, "ema")) and same(written, asked[0]["model"].state_dict())
    assert not same(written, part_of(state, "model"))
    assert (
        metrics["best_guidance"] == 2
        and metrics["guidance 4: frechet"] == 2.0
        and judged == pytest.approx([0.1, 0.2, 0.4])
    )
    assert metrics["guidance 2: accuracy_error"] == pytest.approx((0.25 * 0.75 / 11) ** 0.5)
    for label, row in spy.strips["samples.png"].items():  # of the best scale, each digit in its row
        assert len(row) == (2 if label == "0" else 1) and float(row.mean()) == pytest.approx(0.2)


def test_learns_digits_and_their_names():
    """A minute network and 64 real zeros and ones: the loss falls, and a wrong name makes it worse."""
    images, labels = data.mnist("test")
    pick = (labels < 2).nonzero()[:64, 0]
    images, labels = images[pick], labels[pick]
    model, schedule = dit_network.DiT(2, 64, 2, 4), ddpm.Schedule(kind="cosine")
    cfg = dit.Config(steps=120, batch=32, lr=5e-3)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0)
    nothing = model.label.weight[10].clone()
    ema = dit_network.DiT(2, 64, 2, 4).requires_grad_(False)

    @torch.no_grad()
    def loss(y):  # the same noise every time
        torch.manual_seed(1)
        return float(ddpm.loss(partial(model, y=y), schedule, data.to_float(images), "v"))

    before = loss(labels)
    list(dit.train(model, ema, optimizer, schedule, images, labels, cfg))
    after, misnamed = loss(labels), loss(1 - labels)
    assert after < 0.5 * before
    assert misnamed > 1.02 * after
    assert not torch.equal(model.label.weight[10], nothing)  # "no class" was asked for, and learned
    drift = (ema.head.weight - model.head.weight).norm() / model.head.weight.norm()
    assert 0 < drift < 0.5  # the mean lags behind, not far


def test_command(tmp_path):
    """The README's command with small numbers: every file it promises, and weights that load again."""
    done = command(
        *f"--steps 2 --batch 8 --samples 10 --guidance-scale 2 --out {tmp_path}".split(),
        script="dit",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    files = {p.name for p in tmp_path.iterdir()}
    figures = {
        "loss.png",
        "samples.png",
        "guidance.png",
        "guidance_accuracy.png",
        "guidance_frechet.png",
    }
    assert files == figures | {
        "config.json",
        "metrics.json",
        "model.safetensors",
        "state.safetensors",
    }
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {
        f"guidance 2: {k}" for k in ("accuracy", "accuracy_error", "recognised", "frechet")
    } <= metrics.keys()
    assert "next:" in done.stdout
    model, _, meta = dit.load(tmp_path / "model.safetensors")
    assert meta["steps"] == 2 and model.head.weight.abs().max() > 0


def test_resume_is_bit_exact(tmp_path, monkeypatch):
    """Six steps, and six steps killed in the fifth after a checkpoint at the third, end in the same bits."""
    Spy(monkeypatch, ddpm)
    monkeypatch.setattr(ddim, "sample", lambda network, schedule, noise, *_: iter([noise]))
    monkeypatch.setitem(dit.SIZES, "tiny", (2, 32, 2))
    flags = {"steps": 6, "batch": 8, "samples": 10, "guidance_scale": (1,), "save_every": 3}
    dit.main(dit.Config(**flags, out=str(tmp_path / "whole")))
    train = dit.train

    def killed(*args):
        for i, value in enumerate(train(*args)):
            if i == 4:
                raise KeyboardInterrupt
            yield value

    monkeypatch.setattr(dit, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        dit.main(dit.Config(**flags, out=str(tmp_path / "parts")))
    monkeypatch.setattr(dit, "train", train)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    dit.main(dit.Config(**flags, resume=True, out=str(tmp_path / "parts")))
    for name in ("model", "state"):
        whole, parts = (
            checkpoint.read(tmp_path / out / f"{name}.safetensors")[0] for out in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and len(whole) > 10
        assert all(torch.equal(whole[k], parts[k]) for k in whole)


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--patch", "8"], "--patch 8"),
        (["--patch", "0"], "--patch 0"),
        (["--size", "XXL"], "XXL"),
        (["--steps", "0"], "--steps"),
        (["--samples", "5"], "--samples"),
        (["--dropout", "1"], "--dropout"),
        (["--guidance-scale", "-1"], "--guidance"),
        (["--guidance-scale", "1", "nan"], "--guidance"),
        (["--guidance-scale", "inf"], "--guidance-scale"),
        (["--guidance", "inf"], "--guidance-scale"),  # the flag's old name
        (["--lr", "inf"], "--lr"),
        (["--batch", "70000"], "--batch"),
        (["--resume"], "no checkpoint"),
        (["--device", "cuda:99"], "--device"),
    ],
)
def test_bad_flags_give_one_line(flags, word, tmp_path, monkeypatch, capsys):
    error = one_line(dit, [*flags, "--out", str(tmp_path)], monkeypatch, capsys)
    assert word in error
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["bit", "cut", "other"])
def test_damaged_checkpoint_gives_one_line_and_stays(damage, tmp_path, monkeypatch, capsys):
    state = tmp_path / "state.safetensors"
    model = dit_network.DiT(1, 32, 2, 4)
    checkpoint.save_state(
        state, model=model, ema=model, optimizer=torch.optim.AdamW(model.parameters()), losses=[1.0]
    )
    content = bytearray(state.read_bytes())
    if damage == "bit":
        content[-5] ^= 1
    if damage == "cut":
        content = content[:-100]
    state.write_bytes(content)
    error = one_line(dit, ["--resume", "--out", str(tmp_path)], monkeypatch, capsys)
    assert {"bit": "damaged", "cut": "not a whole", "other": "other settings"}[damage] in error
    assert state.read_bytes() == content
    if damage == "bit":
        monkeypatch.setattr(dit, "WEIGHTS", state)
        assert "damaged" in one_line(
            dit, ["--pretrained", "--out", str(tmp_path / "new")], monkeypatch, capsys
        )
