"""A vision-language model as a model of transformers: any vision encoder, connector and language model, one folder.

LLaVA's forward pass (Liu et al. 2023, arXiv:2304.08485, Eq. 1) in the frame that the libraries expect: a
`PreTrainedModel`, so that `from_pretrained`, `generate`, PEFT, accelerate and `Trainer` take it. The parts are those of
vlm/tower.py and vlm/connector.py, the language model is any causal one of transformers.

Shapes: pixels (P,3,S,S) of P pictures, features (P,M,E), text (B,T), where T counts M tokens <image> for each picture.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm import anyres, connector, llava_parts, prompts, tower
from vlm.config import VLMConfig
from vlm.image_tokens import merge
from vlm.prompt_sparsity import choose, prompts_of


def vision_network(config):
    """The encoder that a configuration describes, without weights: of transformers, or EfficientNet-lite0's maps."""
    if config.vision_config is None:
        from efficientnet_lite_pytorch import EfficientNet

        return tower.EfficientNetMaps(EfficientNet.from_name("efficientnet-lite0"))
    network = AutoModel.from_config(config.vision_config)
    # Of CLIP and its like the half that sees
    return getattr(network, "vision_model", network)


class VLM(PreTrainedModel, GenerationMixin):
    """Vision encoder, connector, language model. Image tokens stand where the text says <image>."""

    config_class = VLMConfig
    base_model_prefix = "vlm"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        # Vision encoder
        network = vision_network(config)
        size = config.img_size or None
        self.vision = tower.VisionTower(network, config.vision_layer, config.select, size)
        # Language model
        self.language: Any = AutoModelForCausalLM.from_config(config.text_config)
        # Connector, from the width of one to that of the other
        width = config.text_config.hidden_size
        options = config.connector_options()
        self.connector = connector.build(config.connector, self.vision.width, width, **options)
        # LLaVA-1.6: sizes that a picture is tiled to, and a vector that ends a row of tiles
        self.grids = config.grids(self.vision.size)
        self.newline: Any = None
        if self.grids:
            llava_parts.check_map(self.vision, self.connector)
            if not connector.joins_tiles(self.connector):
                self.newline = nn.Parameter(torch.randn(width) / width**0.5)
        if config.vision_config is None:
            # EfficientNet's batch statistics suffer in bf16, and it is small
            self._keep_in_fp32_modules_strict = ["vision"]
        self.post_init()

    def _init_weights(self, module):
        """New parts were initialised when they were made, the others by their own classes."""

    def get_input_embeddings(self):
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language.set_output_embeddings(value)

    @property
    def dtype(self):
        """Of the language model: it is by far the largest part."""
        return self.language.dtype

    @property
    def image_tokens(self):
        """M, tokens <image> for a picture."""
        return connector.tokens(self.connector, self.vision.count)

    def get_image_features(self, pixel_values, image_sizes=None):
        """(P,3,S,S), normalised -> (P,M,E): H_v = W g(X_v). Eq. 1.

        With tiles (P,K,3,S,S), of each picture the whole, its tiles and what is filled up, and its
        size (P,2) -> one sequence (1,N,E).
        """
        if not self.grids:
            return self.project(pixel_values)
        sizes = torch.as_tensor(image_sizes).tolist()
        side = self.vision.size
        shown = []
        for picture, size in zip(pixel_values, sizes):
            shown.append(picture[: anyres.count_tiles(size, side, self.grids)])
        features = self.vision(torch.cat(shown))
        return llava_parts.tile_tokens(self, features, sizes, self.grids)

    def project(self, pixel_values):
        """Pictures or tiles (P,3,S,S) -> their tokens (P,M,E)."""
        features = self.vision(pixel_values)  # (P,N,D)
        # The encoder may be in fp32 where the connector is in bf16
        weight = next(self.connector.parameters(), features)
        return self.connector(features.to(weight.dtype))

    def embed(self, input_ids, image_features=None, prompt_of=None):
        """Text (B,T) and features (P,M,E) -> embeddings (B,T,E): features in the places of <image>, in order.

        prompt_of (B,T): as prompt_sparsity.choose takes it.
        """
        # <image> may have no row in the table: word 0 is looked up, and overwritten
        places = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        if image_features is None:
            return merge(embeds, embeds[:0, :0], places)
        image_features = choose(self.connector, image_features, places, embeds, prompt_of)
        return merge(embeds, image_features, places)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        image_features=None,
        logits_to_keep=0,
        image_sizes=None,
        **more,
    ):
        """-> CausalLMOutputWithPast; with labels (B,T) the loss is the mean of -log p over those that are learned.

        image_features: instead of pixel_values, where the vision encoder was asked before.
        """
        # 1. Pictures to features
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, image_sizes)
        # 2. Features among the embeddings of the text
        if inputs_embeds is None:
            prompt_of = prompts_of(input_ids, attention_mask, labels)
            inputs_embeds = self.embed(input_ids, image_features, prompt_of)
        # 3. The language model reads on
        outputs = self.language(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            logits_to_keep=logits_to_keep,
            **more,
        )
        loss = None
        if labels is not None:
            # 4. Each token is predicted from all before it
            logits = outputs.logits[:, :-1].float().flatten(0, 1)
            loss = nn.functional.cross_entropy(
                logits, labels[:, 1:].flatten(), ignore_index=prompts.IGNORE
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self, input_ids, pixel_values=None, image_sizes=None, **kwargs
    ):
        """Pictures are read with the prompt; afterwards they are in the cache."""
        mixin: Any = super()
        found = mixin.prepare_inputs_for_generation(input_ids, **kwargs)
        # The first pass reads the prompt; without a cache every pass does
        first = kwargs.get("is_first_iteration", False)
        if first or not kwargs.get("use_cache", True):
            found["pixel_values"] = pixel_values
            found["image_sizes"] = image_sizes
        return found


def assemble(config, vision, join, language, image_token_id, newline=None):
    """Parts with their weights -> VLM, whose configuration says what they are: a saved folder needs no names.

    config: names, connector, layer; the parts are taken as they are, and not copied; newline: with
    tiles, the vector that ends a row of them, if there is one already.
    """
    config.vision_config = getattr(vision.network, "config", None)
    config.text_config = language.config
    config.image_token_id = image_token_id
    # An empty model, which costs no memory, takes the parts
    with torch.device("meta"):
        model: Any = VLM(config)
    # Parts with their weights in the places of empty ones
    model.vision = vision
    model.language = language
    model.connector = join
    if model.newline is not None:
        width = language.config.hidden_size
        new = torch.randn(width) / width**0.5 if newline is None else newline.detach()
        model.newline = nn.Parameter(new.to(language.dtype))
    model.generation_config = language.generation_config
    return model.eval()


AutoConfig.register("vlm_action", VLMConfig, exist_ok=True)
AutoModel.register(VLMConfig, VLM, exist_ok=True)
AutoModelForImageTextToText.register(VLMConfig, VLM, exist_ok=True)
