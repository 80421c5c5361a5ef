"""The processor of a vision-language model: pictures to pixels, text to tokens, <image> to as many as a picture has.

In the frame of transformers, so that `AutoProcessor`, `Trainer` and pipelines take it: it holds an image processor and
a tokenizer, and is saved beside the model.

Shapes: text of B prompts with P pictures in all -> input_ids and attention_mask (B,T), pixel_values (P,3,S,S).
"""

from typing import Any

from transformers import AutoProcessor, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import load_image

from utils.run import check
from utils.text import printable
from vlm import anyres, templates
from vlm.config import VLMConfig
from vlm.prompts import IMAGE


class VLMProcessor(ProcessorMixin):
    """Image processor and tokenizer of one model; `image_tokens` is M, the tokens <image> of a picture,
    or of one of its tiles; with `fixed_tokens` of a picture, however many tiles it has."""

    def __init__(
        self,
        image_processor=None,
        tokenizer: Any = None,
        chat_template=None,
        image_tokens=1,
        fixed_tokens=False,
    ):
        self.image_tokens = image_tokens
        self.fixed_tokens = fixed_tokens
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __call__(self, images: Any = None, text: Any = None, **more) -> BatchFeature:
        """Pictures (one or a list) and prompts (one or a list) -> what the model's forward takes.

        A text that a chat template wrote has its own beginning-of-sequence token: none is added to it. Raises UserError
        if the prompts have more <image> than there are pictures, or fewer.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        several = isinstance(images, (list, tuple))
        pictures = list(images) if several else [] if images is None else [images]
        asked = sum(prompt.count(IMAGE) for prompt in prompts)
        check(asked == len(pictures), f"{asked} {IMAGE} in the text, but {len(pictures)} pictures")
        # As apply_chat_template of transformers: bos once
        bos = self.tokenizer.bos_token
        if bos and all(prompt.startswith(bos) for prompt in prompts):
            more.setdefault("add_special_tokens", False)
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
        if not grids or self.fixed_tokens:
            return self.image_tokens
        side = self.image_processor.crop_size["height"]
        g = round(self.image_tokens**0.5)
        return anyres.count_tokens(size, side, g, grids)

    def apply_chat_template(
        self,
        conversation,
        tokenize=False,
        return_dict=False,
        return_tensors=None,
        processor_kwargs=None,
        **more,
    ):
        """Messages, or several lists of them -> the prompt; with `tokenize` its ids, with `return_dict`, too, all that
        the model takes.

        The content of a message is a text with <image> in it, or a list of {"type": "image", "image": picture, file or
        address} and {"type": "text", "text": words}; a picture stands before the words, as in training.
        """
        several = bool(conversation) and not isinstance(conversation[0], dict)
        images: list[Any] = []
        asked = []
        # 1. Contents as the template reads them; the pictures beside them, in order
        in_parts = templates.wants_parts(self.tokenizer)
        for messages in conversation if several else [conversation]:
            written = []
            for message in messages:
                text = text_of(message["content"], images)
                written.append(templates.message(message["role"], text, in_parts))
            asked.append(written)
        # 2. The prompts
        prompts: Any = super().apply_chat_template(asked if several else asked[0], **more)
        if not tokenize:
            return prompts
        # 3. Tokens and pixels; bos stands where the template writes it, as in training
        options = {"return_tensors": return_tensors, "add_special_tokens": False}
        options |= processor_kwargs or {}
        found = self(images or None, prompts, **options)
        return found if return_dict else found["input_ids"]


def text_of(content, images):
    """The content of a message as one text; its pictures are added to `images`. Raises UserError for a strange part."""
    if isinstance(content, str):
        return content
    text = ""
    for part in content:
        kind = part.get("type")
        check(kind in ("image", "text"), f"a part of a message is image or text: {printable(kind)}")
        if kind == "text":
            text += part["text"]
            continue
        # a part without a picture is a place for one that is given otherwise
        source = part.get("image") or part.get("url") or part.get("path")
        if source is not None:
            images.append(load_image(source))
        text += f"{IMAGE}\n"
    return text


AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)
