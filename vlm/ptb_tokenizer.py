"""Penn Treebank tokenizer of captions, as the COCO caption evaluation has it: what is a word?

The official evaluation calls a Java program (Stanford's PTBTokenizer, lower case) and drops
punctuation; BLEU, ROUGE-L, CIDEr and METEOR count its tokens. "It's a man's T-shirt." becomes
it 's a man 's t-shirt. Here the same rules as one regular expression; a test compares both where Java
is at hand. Marcus et al. 1993 (Penn Treebank).

What differs: addresses of the web, slang ('n', y'all), negative numbers and versions (v5.1) are not treated.
"""

import re

# The official list of dropped punctuation has brackets in upper case, and tokens are in lower case
# by then, so that -lrb- stays a word. A slip of the official code, kept: it is the measure.
BRACKETS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip
# Two words written as one
SPLIT = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na",
    "gimme": "gim me", "lemme": "lem me", "'tis": "'t is", "'twas": "'t was",
}  # fmt: skip
# Words that keep their point
ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|blvd|rd|mt|prof|gen|col|capt|lt|sgt|rev|gov|sen|rep|inc|corp|co|ltd|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
TOKEN = re.compile(
    rf"""
      -[lr][rsc]b-                               # a bracket
    | (?:[a-z]\.){{2,}}                          # u.s., a.m.
    | \b(?:{ABBREVIATIONS})\.(?!\w)              # mr.
    | \bno\.(?=\s*\d)                            # no. 5
    | o['’]clock\b
    | n['’]t\b | ['’](?:s|m|d|re|ve|ll)\b        # contractions
    | 't(?=\s(?:is|was)\b)
    | \d+(?:[.,:/]\d+)+                          # 3.5 1,000 2:30 1/2
    | \w+?(?=n['’]t\b)                           # do + n't
    | \w+(?:(?:[-/&.]|’(?!(?:s|m|d|re|ve|ll)\b))\w+)*    # t-shirt, and/or, at&t
    | [^\w\s.,;:!?'"`-]                          # $ # % &
    """,
    re.VERBOSE,
)


def ptb_tokenize(text):
    """Caption -> tokens, lower case, without punctuation: "He can't." -> he ca n't."""
    # quotation marks, and dashes that are no hyphens
    text = re.sub("--+|[–—…“”‘]", " ", text.lower())
    for mark, name in BRACKETS.items():
        text = text.replace(mark, f" {name} ")
    for word, parts in SPLIT.items():
        text = re.sub(rf"(?<!\w){word}\b", parts, text)
    return [re.sub("’(?=(?:s|m|d|re|ve|ll|t)$)", "'", token) for token in TOKEN.findall(text)]
