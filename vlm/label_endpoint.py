"""A teacher behind OpenAI's protocol: one question a photo and prompt, the answer JSON with a name of the class list.

vlm/serve/worker.py, vLLM, llama.cpp or a provider. A key, if the server wants one, is in VLM_ACTION_API_KEY or
OPENAI_API_KEY, is written nowhere, and is sent over https or to this machine alone; redirects are not
followed. A photo goes as PNG of at most `side` pixels, without the EXIF data of its file, such as where
it was taken. Answers 429 and 5xx, and broken connections, are tried again after 1, 2, 4 ... seconds, or
when Retry-After says.

Shapes: P prompts; an answer is the index of a class, -1 for "unsure" and for what is no class.
"""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any

from utils import images, run
from utils.run import UserError, check
from utils.text import printable
from vlm.label_files import digest
from vlm.serve import data_url, question

KEYS = ("VLM_ACTION_API_KEY", "OPENAI_API_KEY")
UNSURE = "unsure"
LETTERS = 4  # of a token, in the mean: a guess
ANSWER = 12  # tokens of {"label": "Granny Smith apple"}: a guess
LONGEST_WAIT = 60.0  # seconds between two tries


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to another address."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def headers_of(address):
    """Headers of a request. Raises UserError for a key that would go unencrypted over a network."""
    parts = urllib.parse.urlsplit(address)
    known = parts.scheme in ("http", "https") and parts.hostname
    check(known, f"--endpoint {printable(address)} is no address like http://127.0.0.1:8001/v1")
    found = {"Content-Type": "application/json"}
    key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
    if key:
        here = parts.hostname in ("localhost", "127.0.0.1", "::1")
        check(here or parts.scheme == "https", f"a key is sent over https alone, not to {address}")
        found["Authorization"] = f"Bearer {key}"
    return found


def instruction(prompt, names):
    """The question with the class list behind it: {classes} in the prompt is where it stands."""
    listed = ", ".join(names)
    if "{classes}" in prompt:
        return prompt.replace("{classes}", listed)
    return f'{prompt} One of: {listed}; or "{UNSURE}". Answer in JSON with the key "label".'


def request_body(model, url, prompt, names):
    """A body of /v1/chat/completions; the answer is one of the names, or "unsure"."""
    label = {"type": "string", "enum": [*names, UNSURE]}
    schema = {"type": "object", "properties": {"label": label}, "required": ["label"]}
    schema["additionalProperties"] = False
    wrapped = {"name": "label", "strict": True, "schema": schema}
    return {
        "model": model,
        "messages": [{"role": "user", "content": question(url, instruction(prompt, names))}],
        "temperature": 0,
        "max_tokens": 64,
        "response_format": {"type": "json_schema", "json_schema": wrapped},
    }


def parse_answer(text, names):
    """Text of an answer -> index of the class, -1 for "unsure" or no class. Case does not count."""
    said = str(text).strip()
    # JSON where the server heeds response_format, a word by itself where it does not
    with suppress(ValueError):
        found = json.loads(said)
        said = found.get("label", "") if isinstance(found, dict) else found
    said = str(said).strip().strip("\"'.").casefold()
    folded = [name.casefold() for name in names]
    return folded.index(said) if said in folded else -1


def seconds_to_wait(headers, attempt):
    """Retry-After if the server says one in seconds, else 2**attempt and up to as much again; at most
    a minute."""
    wait = 2**attempt * (1 + random.random())
    # a date, which it may be too, is not read
    with suppress(TypeError, ValueError):
        wait = max(0.0, float(headers.get("Retry-After", wait)))
    return min(wait, LONGEST_WAIT)


def post(address, body, retries=5, seconds=120, sleep=time.sleep):
    """Body -> the answer's JSON object, tried again where that can help.

    Raises UserError: refused, no JSON, or no answer after all tries."""
    headers = headers_of(address)
    send = urllib.request.build_opener(NoRedirect()).open
    content = json.dumps(body).encode()
    reason = ""
    for attempt in range(retries + 1):
        about: Any = {}
        request = urllib.request.Request(f"{address}/chat/completions", content, headers)
        try:
            with send(request, timeout=seconds) as response:
                found = json.load(response)
            check(isinstance(found, dict), f"{printable(address)} answers with no object")
            return found
        except urllib.error.HTTPError as error:
            reason = (
                f"status {error.code}: {printable(error.read(2000).decode('utf-8', 'replace'))}"
            )
            about = error.headers
            again = error.code == 429 or error.code >= 500
            check(again, f"{printable(address)} refuses, {reason}")
        # no connection, cut off, half an answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = printable(error) or type(error).__name__
        if attempt < retries:
            sleep(seconds_to_wait(about, attempt))
    raise UserError(f"{printable(address)} gives no answer, tried {retries + 1} times; {reason}")


def read_answer(found, names):
    """An answer of the protocol -> class, tokens of the prompt, tokens of the answer. Raises UserError."""
    try:
        label = parse_answer(found["choices"][0]["message"]["content"], names)
        usage = found.get("usage") or {}
        tokens = [int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError("the endpoint answers otherwise than OpenAI's protocol says") from None
    return label, *tokens


def label_photo(cfg, photo, names):
    """One photo, every prompt -> row: answers of the prompts, tokens that the server counted."""
    picture = images.open_image(photo.path)
    picture.thumbnail((cfg.side, cfg.side))
    url = data_url(picture)
    rows = []
    for prompt in cfg.prompts:
        body = request_body(cfg.model, url, prompt, names)
        rows.append(read_answer(post(cfg.endpoint, body, cfg.retries), names))
    answers, read, written = zip(*rows)
    tokens = {"tokens_in": sum(read), "tokens_out": sum(written)}
    return {"photo": photo.name, "sha256": digest(photo.path), "answers": list(answers)} | tokens


def label(cfg, photos, names, append):
    """Label photos, at most cfg.parallel at a time, and append a row for each as it comes.

    After the first photo that fails no other one is begun; those that are done stay in the file.
    Raises its UserError."""
    failed = None
    with ThreadPoolExecutor(cfg.parallel) as pool:
        waiting = [pool.submit(label_photo, cfg, photo, names) for photo in photos]
        try:
            for done in run.bar(as_completed(waiting), len(photos), name="label"):
                if done.cancelled():
                    continue
                # what was asked for meanwhile is paid for: it is kept
                if done.exception() is None:
                    append(done.result())
                elif failed is None:
                    failed = done.exception()
                    for one in waiting:
                        one.cancel()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failed:
        raise failed


def estimate(cfg, photos, names):
    """Requests, tokens and cost of labelling photos: a guess, before anything is sent."""
    written = sum(len(instruction(prompt, names)) for prompt in cfg.prompts) / LETTERS
    read = len(photos) * (len(cfg.prompts) * cfg.photo_tokens + written)
    answered = len(photos) * len(cfg.prompts) * ANSWER
    requests = len(photos) * len(cfg.prompts)
    return {"photos": len(photos), "requests": requests} | cost(cfg, read, answered)


def cost(cfg, read, answered):
    """Tokens in and out, and their price; prices are per million tokens."""
    price = (read * cfg.price_in + answered * cfg.price_out) / 1e6
    return {"tokens in": round(read), "tokens out": round(answered), "cost": price}
