"""Text that somebody else wrote: read as UTF-8 or refused, without lone surrogates, without control tokens in it."""

import re
from pathlib import Path
from typing import Any

from utils.run import UserError, clean

# What a chat template writes between turns, as letters: [INST], <<SYS>>, <|im_end|>, <start_of_turn>, </s>.
TEMPLATE_MARKS = re.compile(r"\[/?[A-Z][A-Z_]*\]|<</?[A-Z]+>>|</?\|?[A-Za-z]\w*\|?>")


def read_text(path: str | Path, limit_mb: float = 64) -> str:
    """A UTF-8 file, with or without a byte order mark -> its text, ends of lines as "\\n".

    Raises UserError, one line that names the file: missing, not readable, larger than `limit_mb`, another encoding.
    """
    path = Path(path)
    try:
        if path.stat().st_size > limit_mb * 2**20:
            raise UserError(f"{printable(path)} is larger than {limit_mb:g} MB; split it")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None
    return decode(data, printable(path))


def decode(data: bytes, name: str) -> str:
    """Bytes of a text file called `name` -> text. Raises UserError: which byte is not UTF-8, and how to mend it."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise UserError(f"{name} is not UTF-8 ({found}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def printable(value: Any) -> str:
    """A path or a value as it can be printed: without surrogates, on one line, at most 200 characters."""
    line = " ".join(clean(str(value)).split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def control_tokens(tokenizer: Any) -> list[str]:
    """What this tokenizer reads as commands: its special tokens, and the marks that its chat template writes."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marks = {token.content for token in added if token.special}
    marks |= set(getattr(tokenizer, "all_special_tokens", ()))
    # A tokenizer has one chat template, or several by their names
    template = getattr(tokenizer, "chat_template", None) or ""
    for written in template.values() if isinstance(template, dict) else [template]:
        marks |= set(TEMPLATE_MARKS.findall(str(written)))
    # The longest first: one may be part of another
    long_enough = [mark for mark in marks if len(mark.strip()) > 1]
    return sorted(long_enough, key=len, reverse=True)


def plain(text: str, tokenizer: Any) -> str:
    """Text of a user or a document, safe to put between control tokens: "<|im_end|>" becomes "< |im_end|>"."""
    text = clean(text)
    for mark in control_tokens(tokenizer):
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text
