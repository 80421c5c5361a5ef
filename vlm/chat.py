"""Multi-turn chat with a LLaVA: several pictures, streamed answers, a KV cache that is kept between turns.

Of each prompt only the tokens behind the longest common prefix with what was read before are new; all
others have their keys and values in the cache (Pope et al. 2022, arXiv:2211.05102, Sec. 3; prefix
caching of one conversation). An image token is the same only if it shows the same picture. Greedy
decoding. The commands of `python vlm/llava.py --image PHOTO --chat` are in chat_terminal.py.

Shapes: T tokens of a prompt, N image tokens of a picture, E width of the language model.
"""

import torch

from deploy import decode, generation
from deploy.text_stream import TextStream
from utils.run import UserError, check
from utils.text import clean
from vlm import prompts
from vlm.generation import photo_embeddings
from vlm.prompt_sparsity import check_not_read
from vlm.prompts import IMAGE


class Conversation:
    """Turns of a chat, the pictures in them, and keys and values of all that was read.

    tiles, max_prompt: as in llava.Config; max_prompt counts the tokens that a question makes new.
    """

    def __init__(self, tokenizer, model, max_new_tokens=30, tiles=0, max_prompt=512):
        check_not_read(model, "a chat")
        self.tokenizer = tokenizer
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.tiles = tiles
        self.max_prompt = max_prompt
        self.end_ids = prompts.ends(tokenizer, model.language)
        self.turns: list[tuple[str, str]] = []  # (question with <image>, answer)
        self.shown: list[
            tuple[int, torch.Tensor]
        ] = []  # pictures in turns: (name, (N,E)), in order
        self.waiting: list[tuple[int, torch.Tensor]] = []  # pictures of the next question
        self.named = 0  # pictures that ever came
        self.cache = None
        self.cached_keys: list = []  # what each position in the cache is
        self.fed = 0  # tokens that were read
        self.reused = 0  # tokens that were found in the cache
        self.log_p = 0.0  # of the last answer

    def add(self, picture):
        """A picture, uint8 (3,H,W), for the next question."""
        embedding = photo_embeddings(self.model, picture, self.tiles)[0]
        # a number that never comes again: another picture is another key
        self.waiting.append((self.named, embedding))
        self.named += 1

    def clear(self):
        """Forget everything, pictures too."""
        self.turns = []
        self.shown = []
        self.waiting = []

    def undo(self):
        """Take back the last question and its answer; its pictures wait again. Raises UserError."""
        check(self.turns, "there is nothing to undo")
        question, _ = self.turns.pop()
        count = question.count(IMAGE)
        first = len(self.shown) - count
        self.waiting = self.shown[first:] + self.waiting
        self.shown = self.shown[:first]

    def place_images(self, question):
        """A question with an <image> for each picture that waits; those of a question without any come first.

        Raises UserError for an empty question, and another number of <image>.
        """
        check(question.strip(), "type a question")
        count = question.count(IMAGE)
        pictures = len(self.waiting)
        if count == 0:
            return f"{IMAGE}\n" * pictures + question
        fits = f"{count} {IMAGE} in the question, {pictures} pictures wait for one"
        rule = "name a place for each, or none; a picture that was shown needs none"
        check(count == pictures, f"{fits}: {rule}")
        return question

    def prompt(self, question):
        """The whole conversation up to this question -> ids (T,), embeddings of its image tokens, and a key of each
        token: its id, or (picture, place in it)."""
        turns = [*self.turns, (question, None)]
        short, _ = prompts.chat(self.tokenizer, turns, 1)
        pictures = iter(self.shown + self.waiting)
        ids: list[int] = []
        keys: list = []
        embeddings = []
        for token in short:
            if token != self.model.image_id:
                ids.append(token)
                keys.append(token)
                continue
            # one <image> becomes the N tokens of its picture
            name, embedding = next(pictures)
            embeddings.append(embedding)
            ids += [token] * len(embedding)
            keys += [(name, i) for i in range(len(embedding))]
        return ids, embeddings, keys

    def check_room(self, tokens, new):
        """Raises UserError for a prompt past the model's positions, or with more new tokens than one waits for."""
        try:
            decode.check_length(self.model.language, tokens, self.max_new_tokens)
            decode.check_length(self.model.language, new, 0, self.max_prompt)
        except UserError as error:
            raise UserError(f"{error}; in a chat /undo and /clear make room") from None

    def reuse(self, keys):
        """Crop the cache to the longest common prefix with `keys` -> its length; the last token is always new."""
        same = 0
        most = min(len(self.cached_keys), len(keys) - 1)
        while same < most and self.cached_keys[same] == keys[same]:
            same += 1
        removed = len(self.cached_keys) - same
        try:
            if self.cache is not None and removed:
                self.cache.crop(-removed)
        # a sliding window has forgotten what came before; a recurrent state holds one moment
        except (RuntimeError, NotImplementedError, AttributeError):
            self.cache = None
        if self.cache is None:
            same = 0
        self.cached_keys = self.cached_keys[:same]
        return same

    def read(self, embeds, keys):
        """New tokens (1,T,E) behind the cache -> logits of the next one (1,V)."""
        # an interrupted pass leaves some layers longer than others: without its end there is no cache
        cache = self.cache
        self.cache = None
        total = len(self.cached_keys) + len(keys)
        mask = torch.ones(1, total, dtype=torch.long, device=embeds.device)
        logits, self.cache = generation.forward(
            self.model.language, mask, cache, inputs_embeds=embeds
        )
        self.cached_keys = self.cached_keys + keys
        self.fed += len(keys)
        return logits

    @torch.no_grad()
    def tokens(self, question):
        """Yields the ids of the answer, greedy, its end included. Raises UserError if there is no room."""
        # 1. what the cache does not hold, of pictures and words
        ids, embeddings, keys = self.prompt(question)
        same = self.reuse(keys)
        self.check_room(len(ids), len(ids) - same)
        on = next(self.model.language.parameters()).device
        features = torch.cat(embeddings)[None] if embeddings else None
        embeds = self.model.embed(torch.tensor([ids], device=on), features)
        self.reused += same
        logits = self.read(embeds[:, same:], keys[same:])
        # 2. token by token
        for count in range(1, self.max_new_tokens + 1):
            log_p, token = logits.log_softmax(-1).max(-1)
            self.log_p += float(log_p)
            yield int(token)
            if int(token) in self.end_ids or count == self.max_new_tokens:
                return
            logits = self.read(self.model.embed(token[None]), [int(token)])

    def ask(self, question):
        """Yields the text of the answer, piece by piece; a question that is stopped keeps what was said so far.

        Raises UserError, and changes nothing, for a question that cannot be asked.
        """
        question = self.place_images(clean(question))
        self.log_p = 0.0
        stream = TextStream(self.tokenizer)
        said = ""
        begun = False
        try:
            for token in self.tokens(question):
                begun = True
                piece = "" if token in self.end_ids else stream.push(token)
                said += piece
                yield piece
            rest = stream.finish()
            said += rest
            yield rest
        finally:
            if begun:
                self.turns.append((question, said.strip()))
                self.shown += self.waiting
                self.waiting = []
