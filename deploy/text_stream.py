"""From tokens to text that can be shown: whole letters, and nothing of a stop string.

A token may end in the middle of a letter (token_bytes.py), and a stop string may lie across tokens
(stop_strings.py). Both are held back until it is clear what they are. Only the last few tokens are decoded
at each step: the text of a token may depend on the one before it, never on earlier ones.
"""

from deploy.stop_strings import find_stop, held_back


class TextStream:
    """The text of one answer, token by token. stops: texts that end it, of which nothing is shown."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer = tokenizer
        self.stops = list(stops)
        self.ids = []
        self.before = 0  # first token that is decoded, for the context of those after `read`
        self.read = 0  # tokens whose text is complete
        self.length = 0  # letters of these
        self.shown = 0  # letters that were given out
        self.held = ""  # letters that could become a stop string
        self.stopped = False
        # of tokens that nobody has seen the text of: (where it begins, what is known of them)
        self.waiting = []

    def decode(self, start, end):
        return self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True)

    def push(self, token, about=None):
        """One more token -> the text that can be shown now, often none. `about` comes back from `take`."""
        self.waiting.append((self.length, about))
        self.ids.append(token)
        text = self.decode(self.before, len(self.ids))
        # the sign for bytes that are no letter yet
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self.decode(self.before, self.read)) :]
        self.before = self.read
        self.read = len(self.ids)
        return self.show(piece)

    def show(self, piece):
        """Letters that are whole -> those of them, and of those held back, that can be shown."""
        self.length += len(piece)
        self.held += piece
        # what was shown before cannot be part of a stop string: only what is held is searched
        found = find_stop(self.held, self.stops)
        if found:
            self.stopped = True
            text = self.held[: found[0]]
            self.held = ""
        else:
            keep = held_back(self.held, self.stops)
            text = self.held[: len(self.held) - keep]
            self.held = self.held[len(text) :]
        self.shown += len(text)
        return text

    def finish(self):
        """The answer is over -> what was held back; a letter that was never completed is U+FFFD."""
        if self.stopped:
            return ""
        rest = self.decode(self.before, len(self.ids))
        text = self.show(rest[len(self.decode(self.before, self.read)) :])
        # it may have become a stop string with its last letter
        if self.stopped:
            return text
        text += self.held
        self.shown += len(self.held)
        self.held = ""
        return text

    def take(self):
        """[(where its text begins, `about`)] of tokens of which something was shown since the last call."""
        seen = [one for one in self.waiting if one[0] < self.shown]
        self.waiting = self.waiting[len(seen) :]
        return seen
