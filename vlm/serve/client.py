"""Client of OpenAI's protocol: a conversation with photos in, pieces of the answer out, as they come."""

import json

from utils.run import UserError
from utils.text import printable
from vlm.serve.content import question

VISITOR = "x-visitor"  # a header: on whose behalf the page asks


def messages_of(turns, text, url=""):
    """Turns [(data URL or "", question, answer), ...] and a new question -> messages."""
    messages = []
    for photo, asked, answer in [*turns, (url, text, None)]:
        content = question(photo, asked) if photo else asked
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def error_line(raw):
    """The message of an error in OpenAI's form, or what there is of one, as a line."""
    try:
        return printable(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return printable(bytes(raw).decode("utf-8", "replace")) or "no reason was given"


def stream_chat(address, messages, key="", visitor="", max_tokens=64):
    """POST {address}/chat/completions with stream: true; yields pieces of text. address: http://host:port/v1.

    Raises UserError, one line: refused, not reached, broken off. Closing the generator ends the request.
    """
    import httpx

    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {VISITOR: visitor} if visitor else {}
    try:
        with (
            httpx.Client(timeout=httpx.Timeout(300, connect=5), trust_env=False) as client,
            client.stream("POST", f"{address}/chat/completions", json=body, headers=headers) as got,
        ):
            if got.status_code != 200:
                raise UserError(error_line(got.read()))
            for line in got.iter_lines():
                # server-sent events: `data: {...}`, and [DONE] in the end
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    return
                if data == line:
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise UserError(error_line(data.encode()))
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise UserError(f"the answer broke off ({type(error).__name__})") from None
    raise UserError("the answer broke off")
