"""Token masks: from an acceptor of characters to the tokens that may come next.

Willard & Louf 2023, arXiv:2307.09702: an automaton reads characters, a model writes tokens of
several. For each state of the automaton that is met, a trie of all tokens is walked once: what its
bytes lead to is kept. Shapes: V tokens in the vocabulary.

Beyond the paper: the mask knows how many bytes would complete the text after each token. When few
tokens are left, only those may come after which it can still be completed, a byte a token.
"""

import torch

from deploy.token_bytes import utf8_step
from utils.run import check

# More bytes than any text needs: the token cannot come at all
REFUSED = 2**15 - 1


class Node:
    """A node of the trie of all tokens, reached by the bytes before it."""

    __slots__ = ("children", "ids", "plain", "mixed")

    def __init__(self):
        self.children: dict[int, Node] = {}
        # tokens that end here
        self.ids: list[int] = []
        # tokens below of which all the rest are letters that mean nothing inside of a string
        self.plain: list[int] = []
        # whether any other token goes through here, as seen from the node above
        self.mixed = False


def plain_from(token):
    """The first byte of a token after which there is no quote, backslash, control character; all of
    it if its letters are not whole.
    """
    try:
        token.decode("utf-8")
    except UnicodeDecodeError:
        return len(token)
    marked = [i + 1 for i, byte in enumerate(token) if byte < 0x20 or byte in b'"\\']
    return marked[-1] if marked else 0


def trie(tokens):
    """[bytes or None] -> the root of the trie of all tokens."""
    root = Node()
    for token_id, token in enumerate(tokens):
        if not token:
            continue
        first = plain_from(token)
        node = root
        for i, byte in enumerate(token):
            # the rest is plain; inside of a letter nobody asks
            is_plain = i >= first
            if is_plain:
                node.plain.append(token_id)
            node = node.children.setdefault(byte, Node())
            node.mixed = node.mixed or not is_plain
        node.ids.append(token_id)
    return root


class TokenMask:
    """Which tokens may come next, for a grammar with `start`, `step`, `is_complete`, `in_string` and
    `closing`, as JsonGrammar has them.

    tokens: the bytes of each, as token_bytes gives them. ends: the ids that end a text. vocabulary:
    V, of the logits, if it is larger. A state is that of the grammar, and what a letter of several
    bytes waits for. Raises UserError if a byte that may be needed is no token.
    """

    def __init__(self, grammar, tokens, ends, vocabulary=None, max_states=256):
        single = {token[0] for token in tokens if token and len(token) == 1}
        missing = [byte for byte in (*range(0x20, 0x7F), *range(0x80, 0xC0)) if byte not in single]
        problem = f"{len(missing)} bytes are no token of this model: a text may have no end"
        check(not missing, f"{problem}; take another model")
        self.grammar = grammar
        self.tokens = tokens
        self.ends = list(ends)
        self.vocabulary = vocabulary or len(tokens)
        self.max_states = max_states
        self.root = trie(tokens)
        self.cache: dict = {}  # state -> bytes that complete the text after each token
        self.start = (grammar.start, ())

    def byte_step(self, state, byte):
        """State, one byte -> the next state, or None."""
        inner, waiting = state
        following = utf8_step(waiting, byte)
        if following is None:
            return None
        if byte < 0x80:
            inner = self.grammar.step(inner, chr(byte))
            return None if inner is None else (inner, ())
        # a letter beyond ASCII stands in strings only, where it changes nothing
        return (inner, following) if self.grammar.in_string(inner) else None

    def advance(self, state, token):
        """The state after a token, None if it may not come."""
        for byte in self.tokens[token] or b"":
            state = self.byte_step(state, byte)
            if state is None:
                return None
        return state if self.tokens[token] else None

    def left(self, state):
        """Bytes that complete the text."""
        inner, waiting = state
        return (waiting[0] if waiting else 0) + len(self.grammar.closing(inner))

    def bytes_left(self, state):
        """How many bytes complete the text after each token, REFUSED if it may not come: (V,)."""
        if state not in self.cache:
            if len(self.cache) >= self.max_states:
                self.cache.pop(next(iter(self.cache)))  # the oldest
            self.cache[state] = self.walk(state)
        return self.cache[state]

    def walk(self, state):
        """Walk the trie from a state: `bytes_left` of it."""
        ids = []
        lefts = []
        stack = [(self.root, state)]
        while stack:
            node, here = stack.pop()
            # inside of a string plain letters change nothing: all such tokens at once
            loops = not here[1] and self.grammar.in_string(here[0])
            if loops:
                ids += node.plain
                lefts += [self.left(here)] * len(node.plain)
            for byte, child in node.children.items():
                if loops and not child.mixed:
                    continue
                after = self.byte_step(here, byte)
                if after is not None:
                    ids += child.ids
                    lefts += [self.left(after)] * len(child.ids)
                    stack.append((child, after))
        # the end of the text, where it is complete
        if not state[1] and self.grammar.is_complete(state[0]):
            ids += self.ends
            lefts += [0] * len(self.ends)
        found = torch.full((self.vocabulary,), REFUSED, dtype=torch.int16)
        found[torch.tensor(ids, dtype=torch.long)] = torch.tensor(lefts, dtype=torch.int16)
        return found

    def allowed(self, state, left):
        """The tokens after which `left` more can complete the text: bool (V,)."""
        return self.bytes_left(state) <= min(left, REFUSED - 1)
