"""Word segmentation of any script: combining marks, words, and the terms that BM25 counts.

Letters are compared however they were typed (Unicode NFKC, case folded). Where a script puts no
blanks between words, each character and each pair of neighbours is a term, as in Lucene's CJK
analyser.
"""

import re
import unicodedata
from functools import lru_cache

# Scripts without blanks between words: Thai, Lao, Burmese, Khmer, kana, Han
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff"
    "\U00020000-\U0003ffff"
)


@lru_cache(maxsize=1)
def combining_marks():
    """Every character that only changes the one before it, for a class in a pattern.

    Accents, vowel signs of Hindi, and what joins or parts two letters.
    """
    characters = map(chr, range(0x300, 0x1F000))
    found = [c for c in characters if unicodedata.category(c).startswith("M")]
    joiners = "\u200c\u200d"
    return "".join(found) + joiners


@lru_cache(maxsize=1)
def word_pattern():
    """A word in any script: `\\w+` alone cuts it at each mark."""
    return re.compile(rf"[\w{combining_marks()}]+")


@lru_cache(maxsize=1)
def script_pattern():
    """A character of a script without blanks, with its marks; or a run of any other letters."""
    return re.compile(rf"[{UNSPACED}][{combining_marks()}]*|[^{UNSPACED}]+")


def unspaced_terms(word):
    """A word -> terms: itself, or where its script has no blanks each character and each pair."""
    found = []
    before = ""
    for part in script_pattern().findall(word):
        single = re.match(f"[{UNSPACED}]", part) is not None
        found.append(part)
        # The pair of this character and the one before it
        if single and before:
            found.append(before + part)
        before = part if single else ""
    return found


def terms(text):
    """Lower-case terms of a text, for BM25.

    `task_acks_late` counts as one and as its parts, a run of Han as characters and pairs.
    """
    # Case folding may undo the normal form, so it is made again
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found = []
    for word in word_pattern().findall(folded):
        if word.isascii():
            found.append(word)
        else:
            found += unspaced_terms(word)
    # Parts of names with underscores, besides the whole names
    parts = []
    for word in found:
        if "_" in word.strip("_"):
            parts += [part for part in word.split("_") if part]
    return found + parts
