"""What is served: model, tokenizer, engine, limits; and how a checked request becomes work for the engine.

`prepare`, `embed` and what they call run in the thread of the engine (engine_loop.py), which owns the model.
"""

import hmac
import time

import torch

from deploy import generation
from deploy.constrained import ConstrainedPick
from deploy.engine import Engine
from deploy.engine_loop import EngineLoop
from deploy.grammars import Masks
from deploy.logits_processors import argmax_token, sampler
from deploy.logprobs import LogprobRecorder
from deploy.protocol import Limits
from deploy.protocol_error import ProtocolError, require
from deploy.server_metrics import Metrics
from deploy.token_bytes import token_bytes
from utils.text import plain, printable

# Below this temperature sampling is greedy; far below, logits would be divided to infinity
COLD = 1e-4


def text_chat(tokenizer):
    """The chat of a model without eyes: a function from [(role, [text or bytes])] to ids of the prompt,
    embeddings and names of image tokens, of which there are none. Raises ProtocolError."""
    import jinja2

    def chat(turns):
        has_template = tokenizer.chat_template is not None
        require(has_template, "this model has no chat template: use /v1/completions", "messages")
        messages = []
        for role, parts in turns:
            is_text = all(isinstance(part, str) for part in parts)
            require(is_text, "this model takes no pictures", "messages")
            # no word of a visitor is a control token
            content = plain("\n".join(parts), tokenizer)
            messages.append({"role": role, "content": content})
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:
            line = f"the chat template of this model refuses: {printable(error)}"
            raise ProtocolError(line, "messages") from None
        return tokenizer(text, add_special_tokens=False)["input_ids"], {}, {}

    return chat


class Service:
    """Model and engine behind the addresses of a server.

    engine: Engine; chat: as `text_chat` makes it; eos: ids that end an answer, if not those of the model; key:
    what clients must send, "" for none; waiting: answers that wait beside those that run; request_seconds: time
    of a request, from its body to its last token.
    """

    def __init__(
        self, model, tokenizer, engine: Engine, name, chat=None, eos=None, key="", waiting=32,
        limits=None, request_seconds=300.0, body_bytes=16 * 2**20, body_seconds=30.0,
    ):  # fmt: skip
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.chat = chat or text_chat(tokenizer)
        self.key = key
        # an answer and its prompt have room in the positions, and in the cache
        positions = engine.llama.config.max_position_embeddings
        room = min(positions, len(engine.pool.holders) * engine.pool.size)
        self.limits = limits or Limits(room=room)
        self.request_seconds = request_seconds
        self.body_bytes = body_bytes
        self.body_seconds = body_seconds
        # the engine, and its thread, which takes so many answers
        self.engine = engine
        self.engine_loop = EngineLoop(engine, engine.scheduler.max_batch + waiting)
        self.metrics = Metrics()
        self.created = int(time.time())
        self.draining = False
        # tokens: which there are, which end an answer, which a grammar allows
        self.vocabulary = engine.llama.config.vocab_size
        self.device = engine.llama.inv_freq.device
        self.eos = tuple(generation.ends(tokenizer, model) if eos is None else eos)
        self.masks = Masks(tokenizer, self.eos, self.vocabulary)
        self.bytes_of_tokens: list | None = None

    # Checks

    def check_key(self, header):
        """Raises ProtocolError unless the header Authorization holds the key. In constant time: how long it
        takes says nothing about how much of a guess was right."""
        if not self.key:
            return
        given = header.removeprefix("Bearer ").encode()
        right = hmac.compare_digest(given, self.key.encode())
        require(right, "missing or wrong API key", status=401, code="invalid_api_key")

    def check_model(self, name):
        """Raises ProtocolError for another model than this one."""
        line = f"there is no model {printable(name)}; this server has {self.name}"
        require(name in ("", self.name), line, "model", 404, "model_not_found")

    def check_open(self):
        """Raises ProtocolError while the server is draining."""
        require(not self.draining, "the server is shutting down", status=503)

    # In the thread of the engine

    def prepare(self, asked):
        """A checked request -> [(ids, max_new_tokens, fields of Request)], one for each of its answers.
        Raises ProtocolError or UserError."""
        wanted = []
        for prompt in asked.prompts:
            # prompt as ids, pictures as embeddings
            if asked.kind == "chat":
                ids, embeds, names = self.chat(prompt)
            else:
                ids, embeds, names = self.ids(prompt), {}, {}
            # length of the answer, if there is room for it
            room = self.limits.room - len(ids)
            new = asked.max_new_tokens or min(self.limits.max_new_tokens, room)
            line = f"{len(ids)} tokens of prompt and {max(new, 1)} new ones, but {self.limits.room}"
            fits = 1 <= new <= room
            require(fits, f"{line} is all there is room for", code="context_length_exceeded")
            # each answer has a sampler of its own
            for _ in range(asked.n):
                about = {"eos": self.eos, "embeds": embeds, "names": names}
                about["pick"] = self.pick(asked, len(wanted), new)
                wanted.append((ids, new, about))
        if asked.logprobs is not None:
            self.token_bytes()
        return wanted

    def ids(self, prompt):
        """A text or ids -> ids. Raises ProtocolError for ids that are no tokens."""
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        known = ids and min(ids) >= 0 and max(ids) < self.vocabulary
        require(known, f"ids of tokens are from 0 to {self.vocabulary - 1}, and one at least")
        return ids

    def pick(self, asked, number, new):
        """How the tokens of answer `number` are chosen: logits (1,V) -> token (1,)."""
        # greedy, or sampled with a generator of its own: neighbours change nothing
        pick = argmax_token
        if asked.temperature >= COLD:
            generator = torch.Generator(self.device)
            if asked.seed is None:
                generator.seed()
            else:
                generator.manual_seed((asked.seed + number) % 2**63)
            pick = sampler(asked.temperature, asked.top_k, asked.top_p, generator=generator)
        # the grammar is around the sampler, the recorder around both
        if asked.grammar is not None:
            pick = ConstrainedPick(self.masks.mask(asked.grammar), pick, new)
        if asked.logprobs is not None:
            pick = LogprobRecorder(asked.logprobs, pick)
        return pick

    @torch.no_grad()
    def embed(self, text):
        """A text or ids -> ids, the mean of the last hidden states (E,), of length 1."""
        ids = self.ids(text)
        few = len(ids) <= self.limits.room
        line = f"{len(ids)} tokens, but {self.limits.room} is all there is room for"
        require(few, line, "input", code="context_length_exceeded")
        x = torch.tensor([ids], device=self.device)
        states = self.model.base_model(input_ids=x, use_cache=False).last_hidden_state[0]
        mean = states.float().mean(0)
        return ids, torch.nn.functional.normalize(mean, dim=0).cpu()

    def token_bytes(self):
        """Bytes of each token. Raises UserError if the tokenizer is no byte-level BPE."""
        if self.bytes_of_tokens is None:
            self.bytes_of_tokens = token_bytes(self.tokenizer)
        return self.bytes_of_tokens

    # In the event loop

    def cancel(self, ticket, choice):
        """Stop one answer of a ticket; the others go on."""
        request = ticket.requests[choice]
        self.engine_loop.inbox.put(lambda: self.engine_loop.cancel([request]))
