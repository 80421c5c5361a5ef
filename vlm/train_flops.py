"""FLOPs and tokens of the steps of vlm/train.py as they are: packed rows, cached features, adapters, frozen parts.

Model FLOPs utilisation (MFU) is the FLOPs that the real tokens need, by those that the machine could
have made in that time (Chowdhery et al. 2022, arXiv:2204.02311, App. B). Padding, scores across the
samples of a packed row and what gradient checkpointing computes again are no part of it. Logits are
those of supervised tokens, as in train.py. The formulas of the parts: flops_parts.py.

Shapes: samples of n_1, n_2, ... tokens in a step, S supervised tokens, P pictures.
"""

import torch

from finetune import llama2_lora
from training.flops import mfu, peak_flops
from training.ranks import rank_and_world_size
from utils.run import UserError
from vlm import anyres, flops_parts
from vlm.flops_parts import Products, product
from vlm.train_data import count_supervised


def sample_lengths(batch):
    """Real tokens of each sample of a padded or packed batch."""
    if "segments" not in batch:
        return batch["mask"].sum(1).tolist()
    lengths = []
    for row in batch["segments"]:
        # segment 0 is padding
        lengths += torch.bincount(row)[1:].tolist()
    return lengths


def learns(module):
    """Does any parameter of it learn?"""
    return any(p.requires_grad for p in module.parameters())


def adapter_products(language, rank, tokens):
    """LoRA beside its targets: x A^T, and its product with B^T; `first`: those of q, k and v of the first layer."""
    total = 0
    first = 0
    for name in llama2_lora.names(language):
        # shapes of the layer, for a weight that ZeRO-3 has sharded has none
        base = language.get_submodule(name).base
        down = product(tokens, base.in_features, rank)
        total += down + product(tokens, rank, base.out_features)
        if ".layers.0." in name and name.endswith(("q_proj", "k_proj", "v_proj")):
            first += down
    return Products(total, 0, first)


def language_flops(model, rank, lengths, supervised):
    """Forward and backward pass of the language model over samples, logits at supervised tokens only.

    LoRA below a frozen connector: with adapters beside q, k or v of the first layer.
    """
    language = model.language
    text = language.config.get_text_config()
    tokens = sum(lengths)
    # layers: their matrices, and scores of each sample with itself
    layers = Products(0)
    for n in lengths:
        layers += flops_parts.decoder_layer(text, n)
    layers *= text.num_hidden_layers
    # products whose input is that of the model: no gradient of it is made if nothing before learns
    shapes = flops_parts.linears(text)
    first = sum(product(tokens, *shapes[name]) for name in ("q_proj", "k_proj", "v_proj"))
    embedding = language.get_input_embeddings().weight
    before = learns(model.connector) or embedding.requires_grad
    # adapters; matrices are frozen beside them
    adapters = adapter_products(language, rank, tokens)
    whole = learns(language) and not adapters.weights
    backward = adapters.backward(True, before) + layers.backward(whole, True)
    if not before:
        backward -= first
    # logits
    head = language.get_output_embeddings()
    logits = Products(product(supervised, head.in_features, head.out_features))
    backward += logits.backward(whole, True)
    return layers.forward + adapters.forward + logits.forward + backward


def vision_flops(model, cfg, tiles):
    """Forward and backward pass of the connector, and of a tower that learns; features of a frozen one are cached.

    tiles: how many pictures the tower sees of each picture, [1, ...] without tiles. Raises UserError for a tower
    without a formula: EfficientNet, if it learns.
    """
    width = model.language.config.get_text_config().hidden_size
    tower = model.vision
    trained = learns(tower)
    total = 0
    for count in tiles:
        read, times = flops_parts.connector_calls(cfg.model, tower.count, count)
        joined = flops_parts.connector(cfg.model, read, tower.width, width)
        total += times * (joined.forward + joined.backward(learns(model.connector), trained))
    if trained:
        # EfficientNet has none, and no formula
        config = getattr(tower.network, "config", None)
        encoder, unused = flops_parts.vision_encoder(config, cfg.model.vision_layer)
        total += sum(tiles) * (encoder.forward + unused + encoder.backward(True, False))
    return total


def step_flops(model, cfg, lengths, supervised, tiles):
    """FLOPs of forward and backward pass of one part of a step. Raises UserError for a model without a formula.

    tiles: as in vision_flops; model: Llava with its trainable parameters; cfg: flags of train.py, which name the
    connector.
    """
    seen = vision_flops(model, cfg, tiles) if tiles else 0
    return seen + language_flops(model, cfg.lora.r, lengths, supervised)


class Throughput:
    """Real tokens and FLOPs of the batches that a rank has trained on: the batches pass through `watch`."""

    def __init__(self, model, cfg):
        self.model = model
        self.cfg = cfg
        self.tokens = 0
        # unknown for a model that was trained before: the flags do not name its parts
        self.flops = None if cfg.train.ckpt_path else 0

    def add(self, batch, features):
        """Count one part of a step."""
        lengths = sample_lengths(batch)
        # pictures for the tower and the connector: one of each, or its whole and its tiles
        tiles = [1] * (0 if features is None else len(features))
        if "sizes" in batch:
            about = (self.model.vision.size, self.model.grids)
            tiles = [anyres.count_tiles(size, *about) for size in batch["sizes"].tolist()]
        self.tokens += sum(lengths)
        if self.flops is None:
            return
        try:
            supervised = count_supervised(batch)
            self.flops += step_flops(self.model, self.cfg, lengths, supervised, tiles)
        except UserError:
            # no formula for this model: tokens only
            self.flops = None

    def watch(self, batches):
        """The parts of every step, counted when they are taken."""
        for parts in batches:
            for batch, features in parts:
                self.add(batch, features)
            yield parts


def throughput_metrics(tokens, flops, seconds, on, precision):
    """Of all ranks together -> {"tokens_a_second", and "mfu" if the FLOPs are known}.

    The peak is that of a large matrix product in the type of --precision, measured here, for each rank.
    """
    found = {"tokens_a_second": tokens / seconds}
    if flops:
        types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        peak = peak_flops(on, types[precision])
        _, world_size = rank_and_world_size()
        found["mfu"] = mfu(flops, seconds, world_size * peak)
    return found
