"""vlm/open_flamingo.py: OpenFlamingo's weights load, and compute what its published forward pass does."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests import eyes, fuzz
from tests.conftest import gradients
from utils.run import UserError
from vlm import open_flamingo

WORDS, WIDTH, HEADS, HEAD_DIM, LATENTS = 100, 16, 2, 8, 3
END, IMAGE, PAD = 100, 101, 102  # new tokens, in the order of OpenFlamingo
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}


def words():
    """A tokenizer of a hundred words; 0 pads, 1 begins and 2 ends, as in `eyes.speaker`."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


class Attention(nn.Module):
    """Queries of one side, keys and values of the other in one matrix, by torch's own attention."""

    def __init__(self, width, seen, heads, head_dim):
        super().__init__()
        self.split = heads, head_dim
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(seen, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def attend(self, x, seen, mask=None):
        q, k, v = (
            part.unflatten(-1, self.split).transpose(1, 2)
            for part in (self.to_q(x), *self.to_kv(seen).chunk(2, -1))
        )
        mask = None if mask is None else mask[:, None]
        return self.to_out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class PerceiverAttention(Attention):
    def __init__(self, *split):
        super().__init__(WIDTH, WIDTH, *split)
        self.norm_media, self.norm_latents = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, media, latents):
        latents = self.norm_latents(latents)
        return self.attend(latents, torch.cat([self.norm_media(media), latents], 1))


class MaskedCrossAttention(Attention):
    def __init__(self, width, *split):
        super().__init__(width, WIDTH, *split)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, media, locations):
        """media (B,J,M,D): a word sees the last photo before it; a word before all photos none."""
        time = locations.cumsum(1)
        photo = torch.arange(1, media.shape[1] + 1).repeat_interleave(media.shape[2])
        blind = time[..., None] == 0
        found = self.attend(self.norm(x), media.flatten(1, 2), (time[..., None] == photo) | blind)
        return found.masked_fill(blind, 0)


def feed_forward(width):
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


class Perceiver(nn.Module):
    def __init__(self, depth, *split):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(LATENTS, WIDTH))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(*split), feed_forward(WIDTH)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, features):
        """(B,J,N,D) -> (B,J,M,D)."""
        media = features.flatten(0, 1)
        latents = self.latents.expand(len(media), -1, -1)
        layer: Any
        for layer in self.layers:
            attention, mlp = layer
            latents = latents + attention(media, latents)
            latents = latents + mlp(latents)
        return self.norm(latents).unflatten(0, features.shape[:2])


class GatedBlock(nn.Module):
    def __init__(self, width, *split):
        super().__init__()
        self.attn, self.ff = MaskedCrossAttention(width, *split), feed_forward(width)
        self.attn_gate, self.ff_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x, media, locations):
        x = x + self.attn_gate.tanh() * self.attn(x, media, locations)
        return x + self.ff_gate.tanh() * self.ff(x)


class Layer(nn.Module):
    """A decoder layer with a gated block before it, or none."""

    def __init__(self, block, decoder_layer):
        super().__init__()
        self.gated_cross_attn_layer, self.decoder_layer = block, decoder_layer
        self.seen: Any = ()

    def forward(self, x, *args, **kwargs):
        if self.gated_cross_attn_layer is not None:
            x = self.gated_cross_attn_layer(x, *self.seen)
        return self.decoder_layer(x, *args, **kwargs)


class Reference(nn.Module):
    """OpenFlamingo v2 in a hundred lines: gated blocks in wrapped layers, listed twice as in its files."""

    def __init__(
        self, kind="llama", every=1, depth=2, heads=HEADS, head_dim=HEAD_DIM, language=None
    ):
        super().__init__()
        language = language or eyes.speaker(kind, WORDS)
        rows = language.get_input_embeddings().weight.shape[0]
        language.resize_token_embeddings(rows + 3, mean_resizing=False)
        width = language.config.hidden_size
        torch.manual_seed(3)
        self.perceiver, self.lang_encoder = Perceiver(depth, heads, head_dim), language
        parent, _, name = LAYERS[kind].rpartition(".")
        blocks = language.get_submodule(LAYERS[kind])
        gated = [
            GatedBlock(width, heads, head_dim) if (i + 1) % every == 0 else None
            for i, _ in enumerate(blocks)
        ]
        self.wrapped = nn.ModuleList(Layer(g, b) for g, b in zip(gated, blocks))
        setattr(language.get_submodule(parent), name, self.wrapped)
        language.gated_cross_attn_layers = nn.ModuleList(gated)
        language.old_decoder_blocks = blocks
        for part in (self.perceiver, language.gated_cross_attn_layers):
            eyes.shake(part, 0.3)
        eyes.shake(language.get_input_embeddings(), 0.3)

    def forward(self, ids, features):
        seen = self.perceiver(features), ids == IMAGE
        for layer in self.wrapped:
            layer.seen = seen
        return self.lang_encoder(ids).logits

    def weights(self, listed="gated_cross_attn_layers"):
        """What is released: the new parts and the tables; gated layers under the one name or the other."""
        keep = ("perceiver.", f"lang_encoder.{listed}.")
        tables = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
        found = {
            k: v.clone()
            for k, v in self.state_dict().items()
            if not k.startswith("wrapped.")
            and (k.startswith(keep) or k.endswith(tables))
            and ("decoder_layer" not in k)
        }
        return found


class Eye:
    width = WIDTH


def text():
    return torch.tensor(
        [[1, 7, IMAGE, 8, END, IMAGE, 9, 10, END], [1, IMAGE, 11, 12, END, 13, IMAGE, 14, END]]
    )


def load(path, kind="llama", **more):
    return open_flamingo.load(
        path, Eye(), eyes.speaker(kind, WORDS), words(), head_dim=HEAD_DIM, **more
    )


def write(path, tensors):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


OURS = {  # their name -> ours, two where they have one matrix
    "0.norm_media": ["norm_context"], "0.norm_latents": ["norm_latents"], "0.to_q": ["q_proj"],
    "0.to_kv": ["k_proj", "v_proj"], "0.to_out": ["o_proj"], "1.0": ["norm_mlp"], "1.1": ["mlp.0"], "1.3": ["mlp.2"],
    "attn.norm": ["norm_attention"], "attn.to_q": ["q_proj"], "attn.to_kv": ["k_proj", "v_proj"],
    "attn.to_out": ["o_proj"], "ff.0": ["norm_mlp"], "ff.1": ["up_proj"], "ff.3": ["down_proj"],
}  # fmt: skip


def ours_as_theirs(mine, every):
    """Gradients of ours under their names; those of keys and values one above the other."""
    found = {}
    for n in {int(k.split(".")[2]) for k in mine if k.startswith("resampler.layers")}:
        for theirs, names in list(OURS.items())[:8]:
            for leaf in ("weight", "bias"):
                parts = [mine.get(f"resampler.layers.{n}.{name}.{leaf}") for name in names]
                if parts[0] is not None:
                    found[f"perceiver.layers.{n}.{theirs}.{leaf}"] = torch.cat(parts)
    for n in {int(k.split(".")[1]) for k in mine if k.startswith("cross.")}:
        their_layer = f"lang_encoder.gated_cross_attn_layers.{(n + 1) * every - 1}"
        for theirs, names in list(OURS.items())[8:]:
            for leaf in ("weight", "bias"):
                parts = [mine.get(f"cross.{n}.{name}.{leaf}") for name in names]
                if parts[0] is not None:
                    found[f"{their_layer}.{theirs}.{leaf}"] = torch.cat(parts)
        found[f"{their_layer}.attn_gate"] = mine[f"cross.{n}.gate_attention.alpha"]
        found[f"{their_layer}.ff_gate"] = mine[f"cross.{n}.gate_mlp.alpha"]
    for name in ("latents", "norm.weight", "norm.bias"):
        found[f"perceiver.{name}"] = mine[f"resampler.{name}"]
    return found


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_open_flamingo_weights_give_the_published_forward_pass(parity, tmp_path, kind, every):
    theirs = Reference(kind, every)
    write(tmp_path / "model.safetensors", theirs.weights())
    ours = load(tmp_path, kind)
    assert list(ours.cross_layer_ids) == [i for i in range(2) if (i + 1) % every == 0]
    features = torch.randn(2, 2, 5, WIDTH)
    mine = ours(text(), ours.resample(features))
    them = theirs(text(), features)
    name = "OpenFlamingo v2's forward pass, written out in the test"
    parity("Flamingo", "open_flamingo.load", name, mine, them)
    for model, prefixes in ((ours, ("resampler.", "cross.")), (theirs, ("perceiver.", "gated"))):
        for key, p in model.named_parameters():
            p.requires_grad_(any(part in key for part in prefixes))
    mine = gradients(ours, ours(text(), ours.resample(features)))
    them = gradients(theirs, theirs(text(), features))
    mine = ours_as_theirs(mine, every)
    # torch names a shared module by its first place: that beside its decoder layer
    them = {
        re.sub(
            rf"{LAYERS[kind]}\.(\d+)\.gated_cross_attn_layer", r"gated_cross_attn_layers.\1", k
        ): g
        for k, g in them.items()
    }
    parity("Flamingo", "open_flamingo.load, gradients", name, mine, them, 1e-4)


@pytest.fixture(scope="module")
def theirs():
    return Reference(every=1)


@pytest.fixture(scope="module")
def wanted(theirs):
    torch.manual_seed(8)
    features = torch.randn(2, 2, 5, WIDTH)
    return features, theirs(text(), features).detach()


def same(ours, wanted):
    features, logits = wanted
    torch.testing.assert_close(ours(text(), ours.resample(features)), logits, atol=1e-5, rtol=1e-5)


def test_each_form_of_the_file_loads(tmp_path, theirs, wanted):
    """Released weights, a training checkpoint, names beside the decoder layers, the whole language model."""
    weights = theirs.weights()
    torch.save(weights, tmp_path / "a.pt")
    trained = {f"module.{k}": v for k, v in weights.items()}
    torch.save({"epoch": 3, "model_state_dict": trained}, tmp_path / "b.pt")
    beside = theirs.weights("model.layers")
    assert any(".gated_cross_attn_layer." in k for k in beside) and len(beside) == len(weights)
    write(tmp_path / "c.safetensors", beside)
    whole = {k: v.clone() for k, v in theirs.state_dict().items() if not k.startswith("wrapped")}
    write(tmp_path / "d.safetensors", whole)
    for name in ("a.pt", "b.pt", "c.safetensors", "d.safetensors"):
        ours = load(tmp_path / name)
        same(ours, wanted)
        assert not ours.trainable_parameters() and not ours.training


def test_decoder_layers_in_the_file_take_the_place_of_those_given(tmp_path, theirs, wanted):
    whole = {k: v.clone() for k, v in theirs.state_dict().items() if not k.startswith("wrapped")}
    only = {k: v for k, v in whole.items() if "model.layers" not in k}
    assert any("old_decoder_blocks.1." in k for k in only)
    write(tmp_path / "x.safetensors", only)
    language = eyes.shake(eyes.speaker(words=WORDS), 0.3)
    ours = open_flamingo.load(
        tmp_path / "x.safetensors", Eye(), language, words(), head_dim=HEAD_DIM
    )
    # all but the norm before the head, which is not in a decoder layer, comes from the file
    ours.language.model.norm.load_state_dict(theirs.lang_encoder.model.norm.state_dict())
    same(ours, wanted)


def test_new_tokens_stand_in_the_order_of_open_flamingo(tmp_path, theirs):
    write(tmp_path / "x.safetensors", theirs.weights())
    tokenizer = words()
    ours = open_flamingo.load(
        tmp_path, Eye(), eyes.speaker(words=WORDS), tokenizer, head_dim=HEAD_DIM
    )
    assert ours.new_ids.tolist() == [IMAGE, END]
    assert tokenizer.convert_ids_to_tokens([END, IMAGE]) == ["<|endofchunk|>", "<image>"]
    assert ours.language.get_input_embeddings().weight.shape[0] == PAD + 1
    assert ours.new_embeddings is None


def test_text_after_a_remembered_prompt_scores_as_in_one_reading(tmp_path, theirs, wanted):
    from transformers import DynamicCache

    write(tmp_path / "x.safetensors", theirs.weights())
    ours, (features, logits) = load(tmp_path), wanted
    cache, latents = DynamicCache(), ours.resample(features[:1])
    ours(text()[:1, :6], latents, cache=cache)
    after = ours(text()[:1, 6:], latents, before=2, cache=cache)
    torch.testing.assert_close(after, logits[:1, 6:], atol=1e-5, rtol=1e-5)


def renamed(weights, old, new):
    return {k.replace(old, new): v for k, v in weights.items()}


def test_another_layout_is_refused_in_one_line(tmp_path, theirs):
    good = theirs.weights()
    gate = "lang_encoder.gated_cross_attn_layers.1.attn_gate"
    table = "lang_encoder.model.embed_tokens.weight"
    last = "perceiver.layers.1."
    cases = [
        ({k: v for k, v in good.items() if k != gate}, f"missing {gate} \\(1 in all"),
        ({k: v for k, v in good.items() if k != table}, f"missing {table}"),
        ({k: v for k, v in good.items() if "lm_head" not in k}, "missing lang_encoder.lm_head.weight"),
        ({k: v for k, v in good.items() if "gated" not in k}, "missing .*gated_cross_attn_layers.0"),
        ({k: v for k, v in good.items() if "perceiver" not in k}, "missing perceiver.latents"),
        ({k: v for k, v in good.items() if k != last + "1.3.weight"}, "missing perceiver.layers.1.1.3"),
        (good | {"vision_encoder.conv1.weight": torch.ones(2)}, "unexpected vision_encoder.conv1.weight"),
        (good | {"perceiver.frame_embs": torch.ones(2)}, "unexpected perceiver.frame_embs"),
        (good | {"lang_encoder.model.extra": torch.ones(2)}, "unexpected lang_encoder.model.extra"),
        (good | {gate + "2": torch.ones(2)}, "unexpected .*attn_gate2"),
        (good | {gate: torch.ones(2)}, "cross.1.gate_attention.alpha has the shape \\(2,\\)"),
        (good | {"lang_encoder.model.layers.1.gated_cross_attn_layer.attn_gate": torch.ones(1)}, "is there twice"),
        (renamed(good, "attn_layers.1.", "attn_layers.3."), "gated layers 0, 3 are not every n-th of 2"),
        (renamed(good, "attn_layers.0.", "attn_layers.4."), "gated layers 1, 4 are not every n-th of 2"),
        (good | {table: good[table][:101]}, "101 rows of embeddings, too few"),
        (good | {table: torch.ones(300)}, "0 rows of embeddings, too few"),
        (good | {"perceiver.latents": torch.ones(16)}, "latents has 1 dimensions, not 2"),
        (good | {last + "0.to_kv.weight": torch.tensor(1.0)}, "to_kv.weight has 0 dimensions"),
        (good | {gate.replace("attn_gate", "ff.1.weight"): torch.ones(3)}, "ff.1.weight has 1 dimensions"),
        ({"x": torch.ones(2)}, "unexpected x"),
    ]  # fmt: skip
    for n, (tensors, says) in enumerate(cases):
        path = write(tmp_path / f"{n}.safetensors", tensors)
        with pytest.raises(UserError, match=says) as error:
            load(path)
        assert "\n" not in str(error.value)
    write(tmp_path / "good.safetensors", good)
    with pytest.raises(UserError, match="reads features of 16 numbers, the vision encoder gives 8"):
        narrow = type("Narrow", (), {"width": 8})()
        open_flamingo.load(
            tmp_path / "good.safetensors", narrow, eyes.speaker(words=WORDS), words(), HEAD_DIM
        )
    with pytest.raises(UserError, match="16 and 16 are no multiples of 64, a head"):
        open_flamingo.load(tmp_path / "good.safetensors", Eye(), eyes.speaker(words=WORDS), words())
    with pytest.raises(UserError, match="21 files of weights"):
        load(tmp_path)
    with pytest.raises(UserError, match="there is no file"):
        load(tmp_path / "none.pt")


def test_a_file_of_anything_but_weights_is_refused(tmp_path, theirs):
    for n, value in enumerate(({"a": [1]}, [torch.ones(2)], {}, {1: torch.ones(2)}, torch.ones(2))):
        torch.save(value, tmp_path / f"{n}.pt")
        with pytest.raises(UserError, match="holds no weights by name"):
            load(tmp_path / f"{n}.pt")
    torch.save({"a": torch.nn.Linear(2, 2)}, tmp_path / "code.pt")  # not weights alone
    with pytest.raises(UserError, match="no whole file of weights alone") as error:
        load(tmp_path / "code.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_read_or_refused(tmp_path, suffix):
    weights = {"perceiver.latents": torch.ones(2, 2), "lang_encoder.x": torch.ones(3)}
    path = tmp_path / f"x{suffix}"
    if suffix == ".pt":
        torch.save(weights, path)
    else:
        write(path, weights)
    for bad in fuzz.damaged(path.read_bytes(), 250):
        path.write_bytes(bad)
        found = fuzz.reads_or_refuses(lambda: open_flamingo.read(path))
        assert found is None or all(isinstance(x, torch.Tensor) for x in found.values())
