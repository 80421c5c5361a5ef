"""An object of given keys and types as an acceptor of characters, with the methods of JsonGrammar.

A small part of JSON Schema: an object all of whose properties are required, in the order given,
each a string, number, integer, boolean or one of a list (enum). It is written as `json.dumps` writes
it. A state is a pair: which part of the text, and where in it.
"""

import json

from deploy.json_grammar import DIGITS, WHITESPACE, JsonGrammar
from utils.run import check

TYPES = ("string", "number", "integer", "boolean")
# the first character of a value, and the shortest value
FIRST = {"string": '"', "number": "-" + DIGITS, "integer": "-" + DIGITS}
SHORTEST = {"string": '""', "number": "0", "integer": "0"}


def fields(texts):
    """["name:string", "mood:happy,sad"] -> [(key, type or tuple of values)].

    Raises UserError for an unknown type, a key without name and keys that stand there twice.
    """
    found = []
    for text in texts:
        key, colon, kind = text.rpartition(":")
        known = kind in TYPES or "," in kind
        known_types = f"{', '.join(TYPES)} or a list such as yes,no"
        check(key and colon and known, f"--fields '{text}': write key:type, the type {known_types}")
        found.append((key, kind if kind in TYPES else tuple(kind.split(","))))
    keys = [key for key, _ in found]
    check(len(keys) == len(set(keys)), "--fields: a key stands there twice")
    return found


class ObjectGrammar:
    """The acceptor of objects with these fields: [(key, type)], a type of TYPES or a tuple of
    values.

    Raises UserError if there is no field.
    """

    def __init__(self, some):
        check(some, "an object needs at least one field")
        self.json = JsonGrammar()
        # what stands in the text, one after the other: ("text", ...), (type, ...), ("enum", options)
        self.parts = []
        for i, (key, kind) in enumerate(some):
            self.parts.append(("text", f"{', ' if i else '{'}{json.dumps(key)}: "))
            if kind == "boolean":
                kind = (True, False)
            if isinstance(kind, tuple):
                self.parts.append(("enum", tuple(json.dumps(value) for value in kind)))
            else:
                self.parts.append((kind, None))
        self.parts.append(("text", "}"))
        self.start = (0, "")

    def begin(self, part):
        """The state at the beginning of a part."""
        is_json = part < len(self.parts) and self.parts[part][0] in FIRST
        return part, self.json.start if is_json else ""

    def step(self, state, char):
        """State, one character -> the next state, or None."""
        part, inner = state
        if part == len(self.parts):
            return None
        following = self.inner_step(part, inner, char)
        if following is not None:
            # a text is over with its last character, a string with its quote
            kind, content = self.parts[part]
            over = following == content or (kind == "string" and following[0] == "after")
            return self.begin(part + 1) if over else (part, following)
        # a number or a value of a list that may end here: the character belongs to the next part
        return self.step(self.begin(part + 1), char) if self.part_ends(part, inner) else None

    def inner_step(self, part, inner, char):
        """The next state inside of a part, or None if it does not go on like that."""
        kind, content = self.parts[part]
        # texts: what was read of them is their state
        if kind in ("text", "enum"):
            options = (content,) if kind == "text" else content
            read = inner + char
            return read if any(option.startswith(read) for option in options) else None
        # JSON of one type
        if inner == self.json.start and char not in FIRST[kind]:
            return None
        no_number = char in WHITESPACE or (kind == "integer" and char in ".eE")
        if kind != "string" and no_number:
            return None
        following = self.json.step(inner, char)
        over = following is not None and following[0] == "after" and kind != "string"
        return None if over else following

    def part_ends(self, part, inner):
        """Whether a number or a value of a list is complete."""
        kind, content = self.parts[part]
        if kind == "enum":
            return inner in content
        return kind in ("number", "integer") and self.json.is_complete(inner)

    def is_complete(self, state):
        """Whether the object is complete: nothing may follow."""
        return state[0] == len(self.parts)

    def in_string(self, state):
        """Whether all letters without a meaning of their own leave the state as it is."""
        part, inner = state
        return part < len(self.parts) and inner != "" and self.json.in_string(inner)

    def closing(self, state):
        """A short text that completes the object."""
        part, inner = state
        if part == len(self.parts):
            return ""
        kind, content = self.parts[part]
        if kind in FIRST:
            tail = SHORTEST[kind] if inner == self.json.start else self.json.closing(inner)
        else:
            options = (content,) if kind == "text" else content
            possible = [option[len(inner) :] for option in options if option.startswith(inner)]
            tail = min(possible, key=len)
        return tail + self.closing(self.begin(part + 1))
