"""response_format of OpenAI's protocol: JSON, or an object with the keys of a schema, by token masks.

A grammar is named by a tuple, so that requests with the same one share its mask: ("json",), or ("fields",
((key, type or values), ...)). A small part of JSON Schema is taken, that of json_schema.py; the rest is
refused, for a mask that knows half of a schema makes promises that it does not keep.
"""

import copy
import math
from collections import OrderedDict

from deploy.json_grammar import JsonGrammar
from deploy.json_schema import TYPES, ObjectGrammar
from deploy.protocol_error import require
from deploy.token_bytes import token_bytes
from deploy.token_mask import TokenMask
from utils.text import printable

FIELD = "response_format"
MOST = 64  # keys of an object
# words of a schema that are understood, or say nothing that could be broken
OBJECT = {"type", "properties", "required", "additionalProperties", "title", "description"}
OBJECT |= {"$schema"}
PROPERTY = {"type", "enum", "title", "description"}


def response_grammar(value):
    """response_format -> None (any text), or the tuple that names a grammar. Raises ProtocolError."""
    if value is None:
        return None
    require(isinstance(value, dict), f"{FIELD} must be an object", FIELD)
    kind = value.get("type")
    kinds = ("text", "json_object", "json_schema")
    require(kind in kinds, f"{FIELD}: type must be one of {', '.join(kinds)}", FIELD)
    if kind == "text":
        return None
    if kind == "json_object":
        return ("json",)
    wrapped = value.get("json_schema")
    require(isinstance(wrapped, dict), f"{FIELD}: json_schema must be an object", FIELD)
    return ("fields", schema_fields(wrapped.get("schema")))


def known_words(schema, words, where):
    """Raises ProtocolError if a schema is none, or has a word that the masks know nothing of."""
    require(isinstance(schema, dict), f"{where} must be an object", FIELD)
    for word in schema:
        require(word in words, f"{where}: {printable(word)} is not supported", FIELD)


def schema_fields(schema):
    """A JSON Schema of a flat object -> ((key, type or tuple of values), ...), all of them required."""
    known_words(schema, OBJECT, "schema")
    require(schema.get("type") == "object", "schema: type must be object", FIELD)
    properties = schema.get("properties")
    fits = isinstance(properties, dict) and 0 < len(properties) <= MOST
    require(fits, f"schema: properties must be 1 to {MOST} keys", FIELD)
    required = schema.get("required", [])
    fits = isinstance(required, list) and all(isinstance(key, str) for key in required)
    require(fits, "schema: required must be a list of keys", FIELD)
    fits = all(key in properties for key in required)
    require(fits, "schema: required names a key that is no property", FIELD)
    fits = isinstance(schema.get("additionalProperties", False), bool)
    require(fits, "schema: additionalProperties must be true or false", FIELD)
    return tuple((key, kind_of(key, about)) for key, about in properties.items())


def kind_of(key, about):
    """The schema of one property -> one of TYPES, or a tuple of values."""
    where = f"schema, {printable(key)}"
    known_words(about, PROPERTY, where)
    kind = about.get("type")
    # a value of a list: it must be of the type that stands beside it
    if "enum" in about:
        values = about["enum"]
        scalars = (str, int, float, bool)
        fits = isinstance(values, list) and 0 < len(values) <= MOST
        fits = fits and all(isinstance(x, scalars) and is_finite(x) for x in values)
        require(fits, f"{where}: enum must be 1 to {MOST} texts, numbers or booleans", FIELD)
        fits = kind is None or all(is_of(x, kind) for x in values)
        require(fits, f"{where}: values of enum are not of type {printable(kind)}", FIELD)
        return tuple(values)
    require(kind in TYPES, f"{where}: type must be one of {', '.join(TYPES)}", FIELD)
    return kind


def is_finite(value):
    """1e400 is read as infinity, which JSON cannot write."""
    return not isinstance(value, float) or math.isfinite(value)


def is_of(value, kind):
    """Whether a value of an enum is of a type of JSON Schema."""
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, int):
        return kind in ("integer", "number")
    return kind == ("string" if isinstance(value, str) else "number")


class Masks:
    """Token masks of grammars, each made once; the trie of all tokens is shared. The least recently used
    goes when there are more than `most`."""

    def __init__(self, tokenizer, ends, vocabulary, most=8, max_states=64):
        self.tokenizer = tokenizer
        self.ends = ends
        self.vocabulary = vocabulary
        self.most = most
        self.max_states = max_states
        self.made: OrderedDict[str, TokenMask] = OrderedDict()

    def mask(self, name):
        """The name of a grammar -> its TokenMask. Raises UserError if the tokenizer is no byte-level BPE."""
        # 1 and true are equal in Python, and not in JSON
        key = repr(name)
        if key not in self.made:
            grammar = ObjectGrammar(name[1]) if name[0] == "fields" else JsonGrammar(root="object")
            self.made[key] = self.make(grammar)
        self.made.move_to_end(key)
        if len(self.made) > self.most:
            self.made.popitem(last=False)
        return self.made[key]

    def make(self, grammar):
        """A mask for this grammar; from the second on it takes the trie of another one."""
        if not self.made:
            tokens = token_bytes(self.tokenizer)
            return TokenMask(grammar, tokens, self.ends, self.vocabulary, self.max_states)
        mask = copy.copy(next(iter(self.made.values())))
        mask.grammar = grammar
        mask.cache = {}
        mask.start = (grammar.start, ())
        return mask
