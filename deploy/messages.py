"""Messages of a chat, with pictures: who says what.

Pictures come as data URLs (RFC 2397) alone. A server that fetches addresses for its visitors reads what only
it can reach (server-side request forgery), so others are refused.
"""

import base64
import binascii
import re
from typing import Any

from deploy.protocol_error import require
from utils.text import clean

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
DATA_URL = re.compile(r"data:image/(png|jpeg|webp|gif);base64,")


def image_bytes(value, most):
    """{"url": "data:image/png;base64,..."} -> bytes of the picture. Raises ProtocolError, with status 413 for
    one of more than `most` bytes."""
    url: Any = value.get("url") if isinstance(value, dict) else None
    require(isinstance(url, str), "image_url must be an object with a url", "messages")
    line = "pictures come as data URLs (data:image/png;base64,...); this server fetches no address"
    require(DATA_URL.match(url), line, "messages")
    letters = url.partition(",")[2]
    # four letters are three bytes
    small = len(letters) * 3 // 4 <= most
    require(small, f"a picture has at most {most} bytes", "messages", 413)
    try:
        data = base64.b64decode(letters, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    require(data, "the data URL of a picture is not base64", "messages")
    return data


def message_parts(content, limits):
    """The content of a message -> [text or bytes of a picture]."""
    if isinstance(content, str):
        return [clean(content)]
    fits = isinstance(content, list) and content and all(isinstance(x, dict) for x in content)
    require(fits, "content must be a text or a list of parts", "messages")
    parts = []
    for part in content:
        kind = part.get("type")
        require(kind in ("text", "image_url"), "a part is of type text or image_url", "messages")
        if kind == "text":
            text = part.get("text")
            require(isinstance(text, str), "a part of type text has a text", "messages")
            parts.append(clean(text))
        else:
            parts.append(image_bytes(part.get("image_url"), limits.image_bytes))
    return parts


def conversation(body, limits):
    """messages -> [(role, [text or bytes of a picture])]."""
    messages = body.get("messages")
    fits = isinstance(messages, list) and messages and all(isinstance(x, dict) for x in messages)
    require(fits, "messages must be a list of at least one message", "messages")
    turns = []
    for message in messages:
        role = message.get("role")
        known = isinstance(role, str) and role in ROLES
        require(known, f"role must be one of {', '.join(ROLES)}", "messages")
        turns.append((ROLES[role], message_parts(message.get("content"), limits)))
    pictures = sum(isinstance(part, bytes) for _, parts in turns for part in parts)
    few = pictures <= limits.max_images
    require(few, f"at most {limits.max_images} pictures in a request", "messages")
    return turns
