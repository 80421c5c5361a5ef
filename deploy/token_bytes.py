"""The bytes of each token, and which bytes are the beginning of a letter: UTF-8, piece by piece.

A byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2) cuts texts into runs of bytes. Most tokens are whole
letters, but one may end in the middle of a letter that has up to four bytes. Its vocabulary writes
each byte as one visible letter: Radford et al. 2019, Sec. 2.2.
"""

from utils.run import check

# The first byte of a letter of several -> how many follow, and between which two bytes the next one
# lies: nothing longer than needed, no half of a surrogate pair, nothing beyond U+10FFFF. RFC 3629.
LEADS = dict.fromkeys(range(0xC2, 0xE0), (1, 0x80, 0xBF))
LEADS |= dict.fromkeys(range(0xE0, 0xF0), (2, 0x80, 0xBF))
LEADS |= dict.fromkeys(range(0xF0, 0xF5), (3, 0x80, 0xBF))
LEADS |= {0xE0: (2, 0xA0, 0xBF), 0xED: (2, 0x80, 0x9F)}
LEADS |= {0xF0: (3, 0x90, 0xBF), 0xF4: (3, 0x80, 0x8F)}


def byte_table():
    """{letter: byte}: the 256 letters by which the vocabulary of a byte-level BPE writes bytes."""
    # what is visible in Latin-1 stands for itself
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    visible += range(ord("®"), ord("ÿ") + 1)
    table = {chr(byte): byte for byte in visible}
    # the others, in order, are the letters from 256 on
    hidden = [byte for byte in range(256) if byte not in visible]
    return table | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def token_bytes(tokenizer):
    """[bytes of token i], None for special tokens and ids without a token.

    Raises UserError unless the tokenizer is a byte-level BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = "ByteLevel" in repr(getattr(backend, "decoder", None))
    check(known, "the tokenizer is no byte-level BPE: take a model such as smollm2")
    table = byte_table()
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    vocabulary = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i not in special and token and all(letter in table for letter in token):
            found[i] = bytes(table[letter] for letter in token)
    return found


def utf8_step(waiting, byte):
    """What a letter waits for, () between letters, and the next byte -> what it waits for then.

    None if the byte cannot stand there. What a letter waits for: (bytes, least, largest) of which
    the last two are of the next byte.
    """
    if not waiting:
        return () if byte < 0x80 else LEADS.get(byte)
    count, least, largest = waiting
    if not least <= byte <= largest:
        return None
    return (count - 1, 0x80, 0xBF) if count > 1 else ()
