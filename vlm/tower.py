"""Vision towers: any vision encoder as a sequence of features for a language model.

A transformer's patches are tokens already; the maps of a convolutional network become tokens, one
for each place. The layer before the last is read, as in LLaVA: the last one of CLIP is made for a
single vector. Any vision encoder of transformers will do, by folder or hub id; the book's own are in
book_encoders.py, by default EfficientNet-lite0, whose maps are 49 tokens.

Shapes: pixels (B,3,S,S) -> (B,N,D). A tower may begin with tokens that are no patches (class,
distilled, registers).
"""

import hashlib
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from utils import assets, checkpoint, pretrained, run
from utils.run import UserError, check
from vlm import book_encoders
from vlm.book_encoders import EfficientNetMaps

# Of what this file makes of pictures: raise it with any change that moves a feature, or old ones are read
VERSION = 1
# Of ImageNet, where a folder names no others
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionTower(nn.Module):
    """An encoder, and which of its states are the tokens. LLaVA, Sec. 4.1.

    layer: of the hidden states, -2 the one before the last; select: "patch" leaves out what is no
    patch, "all" keeps it; size S: of the pictures, if not that of the encoder: its positions are
    interpolated. Raises UserError for an encoder without the layer.
    """

    def __init__(self, network, layer=-2, select="patch", size=None):
        super().__init__()
        check(select in ("patch", "all"), f"--select is patch or all, not {select}")
        check(isinstance(layer, int), f"one layer is read, not {layer}")
        self.network = network
        self.layer = layer
        self.select = select
        # size of the pictures: that of the encoder, or positions for another one
        config = getattr(network, "config", None)
        side = getattr(config, "image_size", 224)
        self.size = side if isinstance(side, int) else side[0]
        if size and size != self.size:
            resize: Any = getattr(network, "resize", None)  # of the book's own encoders
            resize(size) if resize else interpolate_positions(network, size)
            self.size = size
        # normalisation of pixels
        self.mean: tuple[float, ...] = MEAN
        self.std: tuple[float, ...] = STD
        # number and width of the tokens, and how many stand before the patches: one look at a black picture
        patch = getattr(config, "patch_size", None)
        self.lead = 0
        with torch.no_grad():
            states = self.states(torch.zeros(1, 3, self.size, self.size, device=device(network)))
        if states.dim() == 3 and isinstance(patch, int) and select == "patch":
            self.lead = max(0, states.shape[1] - (self.size // patch) ** 2)
        self.count, self.width = self.tokens(states).shape[1:]

    def states(self, pixels):
        """Hidden states of the chosen layer: (B,N,D), or maps (B,D,h,w)."""
        # pictures in the precision of the encoder
        pixels = pixels.to(next(self.network.parameters()).dtype)
        if isinstance(self.network, EfficientNetMaps):
            return self.network(pixels)
        found = self.network(pixel_values=pixels, output_hidden_states=True).hidden_states
        found = () if found is None else found
        check(
            -len(found) <= self.layer < len(found),
            f"--layer {self.layer}: the encoder has {len(found)} states",
        )
        return found[self.layer]

    def tokens(self, states):
        """Maps row by row; without what stands before the patches."""
        if states.dim() == 4:
            states = rearrange(states, "b d h w -> b (h w) d")
        return states[:, self.lead :]

    def forward(self, pixels):
        return self.tokens(self.states(pixels))

    def pixels(self, images):
        """Pictures uint8 (B,3,S,S) -> as the encoder was trained to see them."""
        if isinstance(self.network, EfficientNetMaps):
            return pretrained.efficientnet_input(images, self.size)
        mean, std = (
            torch.tensor(x, device=images.device).view(3, 1, 1) for x in (self.mean, self.std)
        )
        return (images / 255 - mean) / std


def device(network):
    return next(network.parameters()).device


def interpolate(positions, lead, grid):
    """Learned positions (1, lead + g*g, D) for another grid (rows, columns): bicubic (ViT, Sec.
    3.2)."""
    # class token and the like have no place in the grid
    before, patches = positions[:, :lead], positions[:, lead:]
    # as maps, resized like a picture
    g = round(patches.shape[1] ** 0.5)
    patches = rearrange(patches, "b (h w) d -> b d h w", h=g)
    patches = F.interpolate(patches, grid, mode="bicubic", align_corners=False)
    return torch.cat([before, rearrange(patches, "b d h w -> b (h w) d")], dim=1)


def interpolate_positions(network, size):
    """Give the encoder (CLIP, SigLIP, ViT, DeiT and the like) positions for pictures of size x
    size, in place."""
    parts: Any = getattr(network, "embeddings", None)
    patch = getattr(getattr(network, "config", None), "patch_size", None)
    check(
        patch and size >= patch and size % patch == 0,
        f"--size {size}: a multiple of the patch, {patch}, is needed",
    )
    grid = (size // patch, size // patch)
    if hasattr(parts, "position_embedding"):  # CLIP, SigLIP: a table
        old = parts.position_embedding.weight[None]
        lead = old.shape[1] - int(old.shape[1] ** 0.5) ** 2
        new = interpolate(old, lead, grid)[0]
        parts.position_embedding = nn.Embedding.from_pretrained(new.detach(), freeze=False)
        parts.position_ids = torch.arange(len(new), device=new.device)[None]
        parts.image_size = size
    # ViT, DeiT: a parameter
    elif isinstance(getattr(parts, "position_embeddings", None), nn.Parameter):
        old = parts.position_embeddings
        lead = old.shape[1] - parts.patch_embeddings.num_patches
        parts.position_embeddings = nn.Parameter(interpolate(old, lead, grid).detach())
        parts.image_size = parts.patch_embeddings.image_size = (size, size)
        parts.patch_embeddings.num_patches = grid[0] * grid[1]
    else:
        raise UserError(
            f"--size {size}: of {type(network).__name__} it is not known where its positions are"
        )
    network.config.image_size = size


def fingerprint(vision_tower):
    """A hash of all that its features depend on: weights and buffers, configuration, layer, size,
    normalisation, code.

    Not its name: a tower retrained in place keeps its name and has other features.
    """
    network = vision_tower.network
    # weights and configuration, then how they are read
    weights = {name: x.detach().cpu().contiguous() for name, x in network.state_dict().items()}
    config: Any = getattr(network, "config", None)
    described = config.to_json_string(use_diff=False) if config is not None else ""
    read = (vision_tower.layer, vision_tower.select, vision_tower.size, vision_tower.lead)
    normalisation = (tuple(vision_tower.mean), tuple(vision_tower.std))
    settings = (*read, *normalisation, network.training)
    return checkpoint.digest(weights, repr((VERSION, type(network).__name__, described, settings)))


@torch.no_grad()
def encode(vision_tower, batches):
    """Batches of pictures, uint8 (b,3,S,S) each -> features of all of them, bf16 (n,N,D) on the CPU."""
    on = device(vision_tower.network)
    found = [vision_tower(vision_tower.pixels(batch.to(on))).bfloat16().cpu() for batch in batches]
    return torch.cat(found)


def vision_features(vision_tower, images, key=None, batch=4):
    """Vision features of pictures, uint8 (n,3,S,S), kept for the next time -> bf16 (n,N,D), in memory.

    With a key, which says all that the pictures depend on, `images` is a function, and called the
    first time only. Of more pictures than fit into memory: views.features.
    """
    shape = b"" if key else repr(tuple(images.shape)).encode()
    content = repr(key).encode() if key else images.contiguous().numpy().tobytes()
    name = hashlib.sha256(fingerprint(vision_tower).encode() + shape + content).hexdigest()[:16]
    path = assets.cache() / "features" / f"tower-{name}.safetensors"
    # frozen feature cache; not there yet, or damaged: look again
    with suppress(UserError):
        return checkpoint.read(path)[0]["features"]
    # larger batches are slower on a CPU
    parts = (images() if key else images).split(batch)
    found = encode(vision_tower, run.bar(parts, len(parts), name="look"))
    checkpoint.write(path, {"features": found})
    return found


def load(name, layer=-2, select="patch", size=None, on="cpu"):
    """Vision tower, frozen: a name of book_encoders.py, such as "efficientnet" or "mae", or a folder or hub
    id of transformers. Raises UserError if there is none.

    EfficientNet has one answer, its last maps: any `layer` but the default is refused.
    """
    if book_encoders.is_ours(str(name)):
        network, normalisation = book_encoders.build(str(name), on)
        maps = isinstance(network, EfficientNetMaps)
        refused = f"--layer {layer}: of EfficientNet the last maps are read; leave it out"
        check(layer == -2 or not maps, refused)
        tower = VisionTower(pretrained.frozen(network, on), layer, select, size)
        if normalisation:
            tower.mean, tower.std = normalisation
        return tower
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, AutoModel

    try:
        network = AutoModel.from_pretrained(name)
        shown = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"no vision encoder at '{name}': {reason}") from error
    # the encoder, and the mean and deviation that its pictures had
    network = getattr(network, "vision_model", network)  # the half of CLIP that sees
    tower = VisionTower(pretrained.frozen(network, on), layer, select, size)
    tower.mean = tuple(getattr(shown, "image_mean", None) or MEAN)
    tower.std = tuple(getattr(shown, "image_std", None) or STD)
    return tower
