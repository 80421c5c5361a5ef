"""Vision encoders of the book as `--vision`: EfficientNet's maps, those in CLIP's space, the masked autoencoder.

EfficientNet-lite0 is a convolutional network of known weights. `papers/clip.py` learns a projection of its
pooled features into a space that texts share; applied at every place it gives a map of that space (as in
MaskCLIP, Zhou et al. 2021, arXiv:2112.01071). The encoder of `papers/mae.py` is a vision transformer; here it
has the interface of transformers: hidden states, a config with image_size and patch_size.

Shapes: pixels (B,3,S,S) -> maps (B,D,h,w), or hidden states (B,1+N,D) each.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from papers import mae, vit
from utils import checkpoint, pretrained
from utils.run import check

SPACE = "space.safetensors"  # what papers/clip.py writes
STRIDE = 32  # pixels of a place of EfficientNet's last maps


class EfficientNetMaps(nn.Module):
    """The last maps of EfficientNet-lite0: (B,3,S,S) -> (B,1280,S/32,S/32), of mean 0 and variance 1
    at every place.

    A transformer's states were normalised on their way, these were not, and some channels are of
    fifty times the norm.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network

    def resize(self, size):
        """A convolutional network has no positions: any size will do that fills its places."""
        check(size % STRIDE == 0 and size > 0, f"--size {size}: a multiple of {STRIDE} is needed")

    def forward(self, pixels):
        maps = self.network.extract_features(pixels)
        return F.layer_norm(maps.movedim(1, -1), maps.shape[1:2]).movedim(-1, 1)


class ClipMaps(EfficientNetMaps):
    """EfficientNet's maps in the space of papers/clip.py, a unit vector at every place: (B,E,h,w).

    W x + b of the standardised features x: the mean of all places is, but for the norm, what CLIP gives of the
    whole picture.
    """

    def __init__(self, network, space):
        super().__init__(network)
        for name in ("mean", "scale", "W", "b"):
            self.register_buffer(name, space[name].float())

    def forward(self, pixels):
        x = self.network.extract_features(pixels).movedim(1, -1)  # (B,h,w,D)
        x = (x - self.mean) / self.scale
        return F.normalize(x @ self.W + self.b, dim=-1).movedim(-1, 1)


class Settings(SimpleNamespace):
    """What VisionTower asks a config of transformers for."""

    def to_json_string(self, use_diff=False):
        return json.dumps(vars(self))


class MaskedAutoencoder(nn.Module):
    """Encoder of papers/mae.py without masking, as an encoder of transformers: positions are added, nothing is
    hidden; hidden_states holds what enters the first block and what leaves each."""

    def __init__(self, model, size):
        super().__init__()
        self.model = model
        self.config = Settings(image_size=size, patch_size=model.patch)

    def resize(self, size):
        """Positions of another grid are interpolated when a picture comes (vit.resize_positions)."""
        patch = self.config.patch_size
        check(size % patch == 0 and size > 0, f"--size {size}: a multiple of {patch} is needed")
        self.config.image_size = size

    def forward(self, pixel_values, output_hidden_states=True):
        model = self.model
        grid = (pixel_values.shape[2] // model.patch, pixel_values.shape[3] // model.patch)
        position = vit.resize_positions(model.position, model.grid, grid)
        # patches and the class token, each with its position
        patches = model.embed(pixel_values) + position[:, 1:]
        cls = (model.cls + position[:, :1]).expand(len(patches), -1, -1)
        states = [torch.cat([cls, patches], 1)]
        for block in model.blocks:
            states.append(block(states[-1]))
        last = model.norm(states[-1])
        return SimpleNamespace(hidden_states=tuple(states), last_hidden_state=last)


def is_ours(name):
    """Whether a name of --vision is one of these: efficientnet, mae, weights of papers/mae.py, a folder of
    papers/clip.py."""
    path = Path(name)
    return name in ("efficientnet", "mae") or path.suffix == ".safetensors" or is_space(path)


def check_saved(vision_tower):
    """Raises UserError for a tower that an ordinary folder of a model has no place for."""
    network = vision_tower.network
    plain = type(network) is EfficientNetMaps and vision_tower.size == 224
    ours = isinstance(network, (EfficientNetMaps, MaskedAutoencoder))
    advice = "the weights of vlm/train.py name it, and can be used as they are"
    check(plain or not ours, f"a folder of a model cannot hold this encoder; {advice}")


def is_space(path):
    return (path / SPACE).is_file()


def build(name, on="cpu"):
    """-> the encoder, and mean and deviation of its pixels, or None where it scales them itself.

    Raises UserError for files of another kind, and for a space of other features.
    """
    path = Path(name)
    if name == "efficientnet":
        return EfficientNetMaps(pretrained.efficientnet(on)), None
    if is_space(path):
        space, meta = checkpoint.read(path / SPACE)
        known = meta.get("image") == "efficientnet"
        check(known, f"{path} is a space of other features; python papers/clip.py makes one")
        return ClipMaps(pretrained.efficientnet(on), space), None
    # the shipped masked autoencoder, or one of papers/mae.py; its pixels are between -1 and 1
    model, flags = mae.load(mae.WEIGHTS if name == "mae" else path, on)
    half = (0.5, 0.5, 0.5)
    return MaskedAutoencoder(model, flags["image_size"]), (half, half)
