"""OpenAI's protocol, answers: the objects of chat, completions and embeddings, whole and as chunks of a stream.

Streams are server-sent events: a line `data: {...}` and an empty line for each chunk, `data: [DONE]` at the end.
"""

import base64
import json
import struct
import time
import uuid

from deploy.logprobs import openai_logprobs
from utils.text import clean

NAMES = {  # kind -> object of an answer, of a chunk, beginning of the id
    "chat": ("chat.completion", "chat.completion.chunk", "chatcmpl"),
    "completion": ("text_completion", "text_completion", "cmpl"),
}


def dump(content):
    """-> JSON in UTF-8, without lone surrogates."""
    return clean(json.dumps(content, ensure_ascii=False)).encode()


def event(content):
    """One server-sent event."""
    return b"data: " + dump(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def usage(prompt, new):
    """Numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class Writer:
    """The objects of one HTTP request: they have its id and its time. kind: "chat" or "completion"."""

    def __init__(self, kind, model, tokenizer, pieces=None):
        self.kind = kind
        self.model = model
        self.tokenizer = tokenizer
        self.pieces = pieces  # of token_bytes, for logprobs
        self.id = f"{NAMES[kind][2]}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def head(self, name):
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def logprobs(self, steps):
        """[(where the text of a token begins, step of LogprobRecorder)] -> the field of a choice."""
        if self.pieces is None:
            return None
        # chat: an object for each token
        found = openai_logprobs([step for _, step in steps], self.tokenizer, pieces=self.pieces)
        if self.kind == "chat":
            return found
        # completions have the older form: a list for each property
        content = found["content"]
        best = [{x["token"]: x["logprob"] for x in one["top_logprobs"]} for one in content]
        return {
            "tokens": [one["token"] for one in content],
            "token_logprobs": [one["logprob"] for one in content],
            "top_logprobs": best,
            "text_offset": [offset for offset, _ in steps],
        }

    def choice(self, number, text, steps, finished, delta=None):
        """An answer, or with `delta`, {...}, what is new of it."""
        # what both kinds have; then text, what is new, or a whole message
        about = {"index": number, "logprobs": self.logprobs(steps) if steps else None}
        about["finish_reason"] = finished or None
        if self.kind == "completion":
            return about | {"text": text}
        if delta is not None:
            return about | {"delta": delta}
        return about | {"message": {"role": "assistant", "content": text, "refusal": None}}

    def answer(self, choices, prompt_tokens, new_tokens):
        """All choices -> the whole answer."""
        head = self.head(NAMES[self.kind][0])
        return head | {"choices": choices, "usage": usage(prompt_tokens, new_tokens)}

    def chunk(self, choices, about=None):
        """Choices of a stream, or the usage at its end."""
        found = self.head(NAMES[self.kind][1]) | {"choices": choices}
        return found | {"usage": about} if about else found

    def opening(self, number):
        """Chat: the first chunk of a choice says who speaks."""
        return self.chunk([self.choice(number, "", [], "", {"role": "assistant", "content": ""})])

    def piece(self, number, text, steps, finished):
        """One chunk of a choice."""
        delta = {"content": text} if text else {}
        return self.chunk([self.choice(number, text, steps, finished, delta)])


def embeddings(vectors, encoding, model, tokens):
    """Vectors, lists of floats -> the answer; base64 is of little-endian float32."""
    data = []
    for number, vector in enumerate(vectors):
        value = vector
        if encoding == "base64":
            value = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": number, "embedding": value})
    about = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": about}


def models(name, created):
    """The one model that is served."""
    one = {"id": name, "object": "model", "created": created, "owned_by": "vlm-action"}
    return {"object": "list", "data": [one]}
