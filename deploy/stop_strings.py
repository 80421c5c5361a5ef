"""Stop strings: text that ends an answer, though its letters lie across tokens.

The answer ends before the stop string, of which nothing is shown: while streaming, text that could
still become one is held back. The end does not depend on how the text is cut into pieces: it is at the
stop string that is complete first; of several that are complete with the same letter, the longest.
"""

from deploy import decode
from utils.run import check


def check_stops(stops):
    """A text or several -> [text]. Raises UserError for an empty one, which would stand everywhere."""
    found = [stops] if isinstance(stops, str) else list(stops)
    whole = all(isinstance(stop, str) and stop for stop in found)
    check(whole, "a stop string is a text of at least one letter")
    return found


def find_stop(text, stops):
    """(where it begins, the stop string) of the one that is complete first, or None."""
    found = []
    for stop in stops:
        at = text.find(stop)
        if at >= 0:
            found.append((at + len(stop), at, stop))
    # of those that end at the same place, the one that begins first
    return min(found)[1:] if found else None


def held_back(text, stops):
    """How many letters at the end of a text could be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0


def until_stop(pieces, stops):
    """Pieces of text -> pieces up to the first stop string, each as soon as it can be shown.

    Returns (the value of `yield from`) the stop string that ended the text, None if none did. Raises
    UserError for an empty stop string.
    """
    stops = check_stops(stops)
    held = ""
    for piece in pieces:
        held += piece
        # what was shown before cannot be part of a stop string: only what is held is searched
        found = find_stop(held, stops)
        if found:
            at, stop = found
            if at:
                yield held[:at]
            return stop
        # show all but what could still become one
        shown = len(held) - held_back(held, stops)
        if shown:
            yield held[:shown]
        held = held[shown:]
    # the text is over: it became none
    if held:
        yield held
    return None


def stop_stream(tokens, tokenizer, stops):
    """Ids one after the other -> pieces of text up to the first stop string; takes no token after the
    one that completes it (a later one if that one ends in the middle of a letter).

    tokens: such as those of generation.stream for one prompt. Returns and raises what `until_stop`
    does.
    """
    return until_stop(decode.pieces(tokens, tokenizer), stops)
