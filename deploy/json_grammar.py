"""JSON as a pushdown automaton over characters: which texts are the beginning of JSON, and which are
complete.

RFC 8259. An acceptor has a `start`, and `step` from a state and a character to the next state, None
if no JSON text goes on like that. A state is a pair (mode, stack) of strings, so that it can be a
key of a dictionary: the mode says what comes next, the stack which arrays "[", objects "{" and keys
"k" are open. `json.loads` accepts the same texts, and NaN and Infinity too, which are not JSON.
"""

from dataclasses import dataclass

WHITESPACE = " \t\n\r"
DIGITS = "0123456789"
HEX = "0123456789abcdefABCDEF"
ESCAPES = '"\\/bfnrt'
# the beginning of a value, by its first character, and what is left of the three words
NUMBERS = {"-": "minus", "0": "zero"} | dict.fromkeys("123456789", "integer")
WORDS = {"t": "=rue", "f": "=alse", "n": "=ull"}
# Inside of a number: which characters lead where. Those of WHOLE may end.
NUMBER = {
    "minus": (("0", "zero"), ("123456789", "integer")),
    "zero": ((".", "point"), ("eE", "exponent")),
    "integer": ((DIGITS, "integer"), (".", "point"), ("eE", "exponent")),
    "point": ((DIGITS, "fraction"),),
    "fraction": ((DIGITS, "fraction"), ("eE", "exponent")),
    "exponent": (("+-", "sign"), (DIGITS, "power")),
    "sign": ((DIGITS, "power"),),
    "power": ((DIGITS, "power"),),
}
WHOLE = ("zero", "integer", "fraction", "power")
# What completes the innermost thing; brackets that are open come after it
TAILS = {
    "value": "0",
    "first value": "",
    "object": "{}",
    "first key": "",
    "key": '"":0',
    "colon": ":0",
    "after": "",
    "string": '"',
    "escape": 'n"',
    "minus": "0",
    "point": "0",
    "exponent": "0",
    "sign": "0",
}
CLOSERS = {"[": "]", "{": "}", "k": ":0"}


def string_step(mode, stack, char):
    """Inside of a string or a key: the next state, or None."""
    if mode == "string":
        if char == "\\":
            return "escape", stack
        if char != '"':
            # all else but a control character is a letter of the string
            return (mode, stack) if char >= " " else None
        # the end: of a key, whose value follows, or of a value
        return ("colon", stack[:-1]) if stack.endswith("k") else ("after", stack)
    if mode == "escape":
        if char == "u":
            return "hex4", stack
        return ("string", stack) if char in ESCAPES else None
    # four digits of \\uXXXX, counted down
    left = int(mode[-1])
    if char not in HEX:
        return None
    return (f"hex{left - 1}" if left > 1 else "string"), stack


def number_step(mode, stack, char):
    """Inside of a number: the next state, or None if the number does not go on with this."""
    for characters, following in NUMBER[mode]:
        if char in characters:
            return following, stack
    return None


@dataclass(frozen=True)
class JsonGrammar:
    """The acceptor of JSON texts with at most `max_depth` arrays and objects inside of each other.

    root: "value", or "object" for texts that are objects.
    """

    max_depth: int = 16
    root: str = "value"

    @property
    def start(self):
        return self.root, ""

    def step(self, state, char):
        """State, one character -> the next state, or None if no JSON text goes on like that."""
        mode, stack = state
        if mode in ("string", "escape") or mode.startswith("hex"):
            return string_step(mode, stack, char)
        # a number goes on, or is over: what follows comes after a value
        if mode in NUMBER:
            following = number_step(mode, stack, char)
            if following or mode not in WHOLE:
                return following
            mode = "after"
        # one of the three words, letter by letter
        if mode.startswith("="):
            if char != mode[1]:
                return None
            return (f"={mode[2:]}" if mode[2:] else "after"), stack
        # between words
        if char in WHITESPACE:
            return mode, stack
        return self.structure_step(mode, stack, char)

    def structure_step(self, mode, stack, char):
        """Between strings, numbers and words: the next state, or None."""
        if mode in ("key", "first key"):
            if char == '"':
                return "string", stack + "k"
            return ("after", stack[:-1]) if (mode, char) == ("first key", "}") else None
        if mode == "colon":
            return ("value", stack) if char == ":" else None
        if mode == "after":
            # what goes on or ends depends on what is open
            inside = stack[-1:]
            if char == "," and inside:
                return ("value" if inside == "[" else "key"), stack
            return ("after", stack[:-1]) if inside and char == CLOSERS[inside] else None
        if (mode, char) == ("first value", "]"):
            return "after", stack[:-1]
        return self.value_step(mode, stack, char)

    def value_step(self, mode, stack, char):
        """The first character of a value: the next state, or None."""
        room = len(stack) < self.max_depth
        if char == "{":
            return ("first key", stack + "{") if room else None
        if mode == "object":
            return None
        if char == "[":
            return ("first value", stack + "[") if room else None
        if char == '"':
            return "string", stack
        begins = NUMBERS.get(char) or WORDS.get(char)
        return (begins, stack) if begins else None

    def is_complete(self, state):
        """Whether the text may end here."""
        mode, stack = state
        return not stack and (mode == "after" or mode in WHOLE)

    def in_string(self, state):
        """Whether the state stays the same at every character but quote, backslash and control
        characters.
        """
        return state[0] == "string"

    def closing(self, state):
        """A short text that completes this one: `step` accepts each character of it, and each makes
        the rest one shorter.
        """
        mode, stack = state
        if mode.startswith("hex"):
            tail = "0" * int(mode[-1]) + '"'
        elif mode.startswith("="):
            tail = mode[1:]
        else:
            tail = TAILS.get(mode, "")  # a number that is whole needs nothing
        return tail + "".join(CLOSERS[opened] for opened in reversed(stack))


def read(grammar, text):
    """The state after a text, None if it is not the beginning of one that the grammar accepts."""
    state = grammar.start
    for char in text:
        state = grammar.step(state, char)
        if state is None:
            return None
    return state
