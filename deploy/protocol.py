"""OpenAI's protocol, requests: what a body may say, and what is refused, before a model hears of it.

The fields are those of OpenAI's API reference (chat completions, completions, embeddings), with `top_k`
beside them, as vLLM has it. Whatever would change the answer and is not done here is refused, never left
out in silence. A refusal is a ProtocolError: the status of HTTP, a sentence, and the field it is about.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from deploy.grammars import response_grammar
from deploy.messages import conversation
from deploy.protocol_error import ProtocolError, require
from utils.text import clean, printable

# fields of all bodies, and of each kind
COMMON = {"model", "n", "stream", "stream_options", "stop", "seed", "temperature", "top_p", "top_k"}
CHAT = COMMON | {"messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"}
CHAT |= {"response_format"}
COMPLETION = COMMON | {"prompt", "max_tokens", "logprobs"}
EMBEDDING = {"model", "input", "encoding_format", "dimensions"}
# fields that change no answer
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# fields that are taken only with the value that does nothing
NEUTRAL: dict[str, list[Any]] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "echo": [False],
    "best_of": [1],
    "suffix": [""],
}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_new_tokens: int = 512
    room: int = 4096  # tokens of prompt and answer together
    max_choices: int = 16  # answers of one request
    max_images: int = 8
    image_bytes: int = 8 * 2**20


@dataclass(frozen=True)
class Generation:
    """A request for text, checked."""

    kind: str  # "chat" or "completion"
    # chat: one conversation [(role, [text or bytes of a picture])]; completion: texts, or lists of ids
    prompts: list
    model: str
    n: int = 1
    max_new_tokens: int | None = None  # None: as many as may be
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    logprobs: int | None = None  # None: none; else so many alternatives
    grammar: tuple | None = None  # as grammars.response_grammar has it
    stream: bool = False
    include_usage: bool = False


def parse_json(raw):
    """Bytes of a body -> the object in it. Raises ProtocolError for anything else."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the body is not JSON: {printable(error)}") from None
    require(isinstance(body, dict), "the body must be a JSON object")
    return body


def no_number(name):
    """NaN and Infinity, which Python reads and JSON has not."""
    raise ValueError(f"{name} is not JSON")


def check_fields(body, known):
    """Raises ProtocolError for a field that is unknown, or asks for what is not done here."""
    for name, value in body.items():
        if name in NEUTRAL and value is not None and name not in known:
            # 0 == False, but a switch is no number
            fits = any(
                value == x and isinstance(value, bool) == isinstance(x, bool) for x in NEUTRAL[name]
            )
            require(fits, f"{name} is not supported by this server", name)
        shown = printable(name)
        fits = name in known or name in NEUTRAL or name in IGNORED
        require(fits, f"unrecognised field {shown}", shown)


def boolean(body, name, default=False):
    """true or false; null and a missing field are the default."""
    value = body.get(name)
    require(value is None or isinstance(value, bool), f"{name} must be true or false", name)
    return default if value is None else value


def number(body, name, least, most, default=None):
    """A number from `least` to `most`; null and a missing field are the default."""
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = is_number and least <= value <= most
    require(fits, f"{name} must be a number from {least} to {most}", name)
    return value


def integer(body, name, least, most, default=None):
    """The same for a whole number."""
    value = number(body, name, least, most, default)
    fits = value is default or isinstance(value, int)
    require(fits, f"{name} must be an integer from {least} to {most}", name)
    return value


def model_name(body):
    """The model that is asked for; "" if none is named."""
    name = body.get("model")
    require(name is None or isinstance(name, str), "model must be a string", "model")
    return name or ""


def stop_strings(body):
    """A text, or up to four -> [text]."""
    stop = body.get("stop")
    found = [stop] if isinstance(stop, str) else stop or []
    fits = isinstance(found, list) and len(found) <= 4
    fits = fits and all(isinstance(text, str) and 0 < len(text) <= 256 for text in found)
    require(fits, "stop must be a text of 1 to 256 letters, or up to four of them", "stop")
    return found


def is_ids(value):
    """Whether a value is a list of token ids."""
    return isinstance(value, list) and value and all(type(i) is int for i in value)


def texts_or_ids(body, name, most):
    """A text, texts, ids or lists of ids -> [text or ids], at most so many."""
    value = body.get(name)
    several = isinstance(value, list) and not is_ids(value)
    found = value if several else [value]
    fits = found and all((isinstance(x, str) and x) or is_ids(x) for x in found)
    require(fits, f"{name} must be a text, a list of token ids, or a list of these", name)
    require(len(found) <= most, f"{name}: at most {most} at a time", name)
    return [clean(x) if isinstance(x, str) else x for x in found]


def common_fields(body, limits):
    """What chat and completions have in common, as arguments of Generation."""
    options = body.get("stream_options")
    fits = options is None or isinstance(options, dict)
    require(fits, "stream_options must be an object", "stream_options")
    check_fields(options or {}, {"include_usage", "include_obfuscation"})
    return {
        "model": model_name(body),
        "n": integer(body, "n", 1, limits.max_choices, 1),
        "temperature": number(body, "temperature", 0, 2, 1.0),
        "top_p": number(body, "top_p", 1e-6, 1, 1.0),
        "top_k": integer(body, "top_k", 0, 10**6, 0),
        "seed": integer(body, "seed", -(2**63), 2**63 - 1),
        "stop": stop_strings(body),
        "stream": boolean(body, "stream"),
        "include_usage": boolean(options or {}, "include_usage"),
    }


def parse_chat(body, limits):
    """A body of /v1/chat/completions -> Generation. Raises ProtocolError."""
    check_fields(body, CHAT)
    most = limits.max_new_tokens
    new = integer(body, "max_tokens", 1, most)
    new = integer(body, "max_completion_tokens", 1, most, new)
    wanted = boolean(body, "logprobs")
    alternatives = integer(body, "top_logprobs", 0, 20)
    fits = wanted or alternatives is None
    require(fits, "top_logprobs needs logprobs: true", "top_logprobs")
    return Generation(
        kind="chat",
        prompts=[conversation(body, limits)],
        max_new_tokens=new,
        logprobs=(alternatives or 0) if wanted else None,
        grammar=response_grammar(body.get("response_format")),
        **common_fields(body, limits),
    )


def parse_completion(body, limits):
    """A body of /v1/completions -> Generation. Raises ProtocolError."""
    check_fields(body, COMPLETION)
    made = Generation(
        kind="completion",
        prompts=texts_or_ids(body, "prompt", limits.max_choices),
        max_new_tokens=integer(body, "max_tokens", 1, limits.max_new_tokens, 16),
        logprobs=integer(body, "logprobs", 0, 5),
        **common_fields(body, limits),
    )
    answers = len(made.prompts) * made.n
    require(answers <= limits.max_choices, f"at most {limits.max_choices} answers a request", "n")
    return made


def parse_embedding(body):
    """A body of /v1/embeddings -> [text or ids], encoding, model name. Raises ProtocolError."""
    check_fields(body, EMBEDDING)
    encoding = body.get("encoding_format") or "float"
    known = encoding in ("float", "base64")
    require(known, "encoding_format must be float or base64", "encoding_format")
    require(body.get("dimensions") is None, "dimensions cannot be chosen", "dimensions")
    return texts_or_ids(body, "input", 64), encoding, model_name(body)
