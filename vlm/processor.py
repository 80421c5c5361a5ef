"""The processor of a vision-language model: pictures to pixels, text to tokens, <image> to as many as a picture has.

In the frame of transformers, so that `AutoProcessor`, `Trainer` and pipelines take it: it holds an image processor and
a tokenizer, and is saved beside the model.

Shapes: text of B prompts with P pictures in all -> input_ids and attention_mask (B,T), pixel_values (P,3,S,S).
"""

from typing import Any

from transformers import AutoProcessor, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature

from utils.run import check
from vlm import anyres
from vlm.config import VLMConfig
from vlm.prompts import IMAGE


class VLMProcessor(ProcessorMixin):
    """Image processor and tokenizer of one model; `image_tokens` is M, the tokens <image> of a picture,
    or of one of its tiles."""

    def __init__(
        self, image_processor=None, tokenizer: Any = None, chat_template=None, image_tokens=1
    ):
        self.image_tokens = image_tokens
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **more) -> BatchFeature:
        """Pictures (one or a list) and prompts (one or a list) -> what the model's forward takes.

        Raises UserError if the prompts have more <image> than there are pictures, or fewer.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        several = isinstance(images, (list, tuple))
        pictures = list(images) if several else [] if images is None else [images]
        asked = sum(prompt.count(IMAGE) for prompt in prompts)
        check(asked == len(pictures), f"{asked} {IMAGE} in the text, but {len(pictures)} pictures")
        # One place becomes M, or as many as a picture of this size has with tiles
        counts = iter([self.count_of((p.height, p.width)) for p in pictures])
        written = []
        for prompt in prompts:
            first, *rest = prompt.split(IMAGE)
            written.append(first + "".join(IMAGE * next(counts) + part for part in rest))
        found = dict(self.tokenizer(written, **more))
        if pictures:
            rgb = [picture.convert("RGB") for picture in pictures]
            # pixel_values, and with tiles image_sizes
            found |= self.image_processor(rgb, return_tensors=more.get("return_tensors"))
        return BatchFeature(found)

    def count_of(self, size):
        """Tokens <image> of a picture of `size` (H,W)."""
        grids = getattr(self.image_processor, "image_grid_pinpoints", None)
        if not grids:
            return self.image_tokens
        side = self.image_processor.crop_size["height"]
        g = round(self.image_tokens**0.5)
        return anyres.count_tokens(size, side, g, grids)


AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)
