"""Text encoder of latent diffusion: a frozen MiniLM reads captions, word by word. Rombach et al. 2022, Sec. 3.3."""

import torch

from utils import pretrained, run
from utils.text import plain, printable


class TextEncoder:
    """Captions -> word features (N, L, E) and a mask (N, L), True where there is a word. Sec. 3.3's tau, frozen.

    Raises UserError for a caption of more than L tokens, of which two are the marks of start and end.
    """

    def __init__(self, device="cpu", words=16):
        self.tokenizer, self.model = pretrained.minilm(device)
        self.words = words

    def tokens(self, captions):
        """Captions, control tokens in them read as letters -> token ids and mask, padded to L on the right."""
        captions = [plain(caption, self.tokenizer) for caption in captions]
        # longer captions are refused, not cut: a word that is not read cannot be drawn
        padding = {"padding": "max_length", "max_length": self.words}
        tokens = self.tokenizer(captions, **padding, verbose=False)
        for caption, ids in zip(captions, tokens["input_ids"]):
            needed = f"has {len(ids) - 2} tokens and the network reads {self.words - 2}"
            message = f'"{printable(caption)}" {needed}: say it shorter'
            run.check(len(ids) <= self.words, message)
        return tokens.convert_to_tensors("pt").to(self.model.device)

    @torch.no_grad()
    def __call__(self, captions, batch=256):
        states = []
        masks = []
        for i in range(0, len(captions), batch):
            tokens = self.tokens(captions[i : i + batch])
            states.append(self.model(**tokens).last_hidden_state)
            masks.append(tokens["attention_mask"].bool())
        return torch.cat(states), torch.cat(masks)
