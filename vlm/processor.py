"""The processor of a vision-language model: pictures to pixels, text to tokens, <image> to as many as a picture has.

In the frame of transformers, so that `AutoProcessor`, `Trainer` and pipelines take it: it holds an image processor and
a tokenizer, and is saved beside the model.

Shapes: text of B prompts with P pictures in all -> input_ids and attention_mask (B,T), pixel_values (P,3,S,S).
"""

from typing import Any

from transformers import AutoProcessor, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature

from utils.run import check
from vlm.config import VLMConfig
from vlm.prompts import IMAGE


class VLMProcessor(ProcessorMixin):
    """Image processor and tokenizer of one model; `image_tokens` is M, the tokens <image> of a picture."""

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
        # One place becomes M
        prompts = [prompt.replace(IMAGE, IMAGE * self.image_tokens) for prompt in prompts]
        found = dict(self.tokenizer(prompts, **more))
        if pictures:
            rgb = [picture.convert("RGB") for picture in pictures]
            pixels = self.image_processor(rgb, return_tensors=more.get("return_tensors"))
            found["pixel_values"] = pixels["pixel_values"]
        return BatchFeature(found)


AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)
