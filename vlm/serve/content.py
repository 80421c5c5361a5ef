"""Pictures in messages of OpenAI's protocol: data URLs (RFC 2397), parts of a message."""

import base64
import io
from pathlib import Path

from PIL import Image


def data_url(photo):
    """A PIL image, or the path of one -> data URL."""
    if isinstance(photo, Image.Image):
        packed = io.BytesIO()
        photo.save(packed, "PNG")
        content = packed.getvalue()
    else:
        content = Path(photo).read_bytes()
    kind = "jpeg" if content[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def question(url, text):
    """A photo and a question on it -> content of a message."""
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
