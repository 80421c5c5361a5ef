"""vlm/perceiver.py: a width of its own, dropout of attention weights; without them nothing has changed."""

import hashlib

import pytest
import torch
from torch import nn
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from tests import eyes
from tests.conftest import gradients
from tests.vlm.test_connector import idefics2
from utils.run import UserError
from vlm import connector

SHAPE = {"depth": 2, "latents": 5, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp_ratio": 4}
# sha256 of names and initial weights, by seed 0, from before hidden_size and attention_dropout came
DEFAULT = "20a7ca8080baaa6c8fe99fe02635a9c3236a172be82b2d07a9b4a9e37857d35d"
FLAMINGO = "0dc63252727942fafacf5a49ec602aced088bb8e27da39e747de6f9578a612ac"
OLD_OPTIONS = {
    "depth": 3, "latents": 5, "heads": 4, "kv_heads": 2, "head_dim": 6, "concat_latents_kv": False,
    "use_rmsnorm_swiglu": False,
}  # fmt: skip


def digest(module):
    """sha256 of the names and bytes of all weights, in order."""
    found = hashlib.sha256()
    for name, weight in module.state_dict().items():
        found.update(name.encode())
        found.update(weight.numpy().tobytes())
    return found.hexdigest()


def theirs(width, dropout=0.0):
    """Idefics2's resampler, with attention written out, so that it can be dropped."""
    config = Idefics2PerceiverConfig(
        hidden_size=width, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=6,
        num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-6, attention_dropout=dropout,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return Idefics2PerceiverResampler._from_config(config)


def copied(ours, other):
    """The other with our weights -> a function (B,N,width) -> (B,5,width)."""
    names, weights = idefics2(ours), ours.state_dict()
    other.load_state_dict({them: weights[mine] for them, mine in names.items()})

    def forward(x):
        found = other(x, torch.ones(x.shape[:2], dtype=torch.long))
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state

    return forward


@pytest.mark.parametrize("options, known", [({}, DEFAULT), (OLD_OPTIONS, FLAMINGO)])
def test_names_and_draws_of_the_default_are_as_they_were(options, known):
    """Shipped weights load, and the same seed still gives the same network."""
    assert digest(connector.build("perceiver", 12, 16, **options)) == known
    torch.manual_seed(0)
    said = connector.build("perceiver", 12, 16, **options, hidden_size=16, attention_dropout=0.0)
    assert digest(said) == known


def test_output_of_the_default_is_as_it_was():
    ours = connector.build("perceiver", 12, 16).train()
    found = ours(torch.randn(2, 49, 12)).flatten()[:3]
    torch.testing.assert_close(found, torch.tensor([1.1843853, 0.3217204, 1.2622261]))


def test_hidden_size_is_the_width_between_two_projections(parity):
    """As a matrix, Idefics2's resampler of that width and a matrix, one after the other."""
    ours = eyes.shake(connector.build("perceiver", 16, 40, **SHAPE, hidden_size=24))
    resample = theirs(24)
    forward = copied(ours, resample)
    before, after = nn.Linear(16, 24), nn.Linear(24, 40)
    before.load_state_dict(ours.input_proj.state_dict())
    after.load_state_dict(ours.output_proj.state_dict())
    x = torch.randn(3, 9, 16)
    other = after(forward(before(x)))
    name = "torch Linear, transformers Idefics2PerceiverResampler, torch Linear"
    parity("Connector", "perceiver.PerceiverResampler, hidden_size", name, ours(x), other)
    mine = gradients(ours, ours(x))
    whole = nn.ModuleDict({"before": before, "resample": resample, "after": after})
    them = gradients(whole, after(forward(before(x))))
    names = {f"resample.{them}": mine for them, mine in idefics2(ours).items()}
    for leaf in ("weight", "bias"):
        names |= {f"before.{leaf}": f"input_proj.{leaf}", f"after.{leaf}": f"output_proj.{leaf}"}
    assert names.keys() == them.keys() and set(names.values()) == mine.keys()
    found = {n: mine[names[n]] for n in them}
    what = "perceiver.PerceiverResampler, hidden_size, gradients"
    parity("Connector", what, name, found, them, 1e-4)


def test_hidden_size_alone_decides_which_projections_there_are():
    made = connector.build("perceiver", 16, 40, hidden_size=24)
    assert made.latents.shape == (16, 24) and made.norm.weight.shape == (24,)
    assert made.output_proj.weight.shape == (40, 24) and made.input_proj.weight.shape == (24, 16)
    assert made.attention_map(torch.randn(2, 9, 16)).shape == (2, 16, 9)
    as_tower = connector.build("perceiver", 16, 40, hidden_size=16)
    assert isinstance(as_tower.input_proj, nn.Identity) and as_tower.output_proj.in_features == 16
    as_language = connector.build("perceiver", 16, 40, hidden_size=40)
    assert isinstance(as_language.output_proj, nn.Identity)
    # cheaper: a width of 16 of 40 has far fewer weights
    count = [sum(p.numel() for p in m.parameters()) for m in (as_tower, as_language)]
    assert count[0] < 0.5 * count[1]


def test_half_the_width_is_a_third_of_the_weights():
    """Between CLIP-L and a language model of seven billion: the numbers of the page."""
    counts = []
    for width in (None, 2048):
        with torch.device("meta"):
            made = connector.build("perceiver", 1024, 4096, hidden_size=width)
        counts.append(sum(p.numel() for p in made.parameters()))
    assert counts == [214_007_808, 65_064_960]


def test_dropout_of_attention_weights_is_that_of_idefics2(parity):
    """The same random state, the same weights dropped."""
    ours = eyes.shake(connector.build("perceiver", 24, 24, **SHAPE, attention_dropout=0.3)).train()
    other = theirs(24, 0.3)
    forward = copied(ours, other)
    other.train()
    x = torch.randn(3, 9, 24)
    found = []
    for run in (ours, forward):
        torch.manual_seed(7)
        found.append(run(x))
    name = "transformers Idefics2PerceiverResampler, eager, training"
    parity("Connector", "perceiver.PerceiverResampler, attention_dropout", name, *found)
    # another draw is another output; without training nothing is dropped
    assert not torch.allclose(ours(x), found[0], atol=1e-3)
    torch.testing.assert_close(ours.eval()(x), ours(x), atol=0, rtol=0)
    without = connector.build("perceiver", 24, 24, **SHAPE).train()
    without.load_state_dict(ours.state_dict())
    torch.testing.assert_close(without(x), ours(x), atol=0, rtol=0)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"hidden_size": 0}, "hidden_size must be above 0, not 0"),
        ({"hidden_size": -8}, "hidden_size must be above 0, not -8"),
        ({"attention_dropout": 1.0}, "at least 0 and below 1, not 1.0"),
        ({"attention_dropout": -0.1}, "at least 0 and below 1"),
        ({"attention_dropout": float("nan")}, "at least 0 and below 1"),
    ],
)
def test_options_that_make_no_sense_are_one_line(options, says):
    with pytest.raises(UserError, match=says):
        connector.build("perceiver", 16, 24, **options)
