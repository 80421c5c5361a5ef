"""Prompt variants of answering from passages: what is asked, in which order, and how it is decoded.

A variant says how many passages the model reads, where the question stands, which instruction it
has and which decoding. `answer_study.py` measures them.
"""

from dataclasses import dataclass, field, replace

from rag import answer

EXTRACT = "Copy the one sentence out of the passages that answers the question, word for word."
CHOSEN = "1 passage"  # the default of the chapter
OLD = "3 passages, penalty 1.1"  # to compare with


@dataclass(frozen=True)
class PromptVariant:
    """How many passages, in which order with the question, which instruction, which decoding."""

    k: int = 3
    question: str = "last"  # behind the passages; or first, or both
    instruction: str = answer.WITH
    repeated: str = ""  # instruction once more, behind everything
    decoding: dict = field(default_factory=dict)


THREE = PromptVariant()
ONE = PromptVariant(k=1)
VARIANTS = {
    "3 passages": THREE,
    "3 passages, penalty 1.05": replace(THREE, decoding={"repetition_penalty": 1.05}),
    OLD: replace(THREE, decoding={"repetition_penalty": 1.1}),
    "3 passages, no repeated 4-grams": replace(THREE, decoding={"no_repeat_ngram_size": 4}),
    "3 passages, question first": replace(THREE, question="first"),
    "3 passages, question first and last": replace(THREE, question="both"),
    "3 passages, extractive": replace(THREE, instruction=EXTRACT),
    "3 passages, extractive, repeated": replace(THREE, instruction=EXTRACT, repeated=EXTRACT),
    "5 passages": replace(THREE, k=5),
    CHOSEN: ONE,
    "1 passage, penalty 1.1": replace(ONE, decoding={"repetition_penalty": 1.1}),
    "1 passage, extractive, repeated": replace(ONE, instruction=EXTRACT, repeated=EXTRACT),
}


def chat(question, passages, variant):
    """The messages of one prompt variant."""
    asked = f"Question: {question}"
    told = answer.format_passages(passages)
    # Where the question stands
    orders = {"last": [told, asked], "first": [asked, told], "both": [asked, told, asked]}
    parts = orders[variant.question]
    # The instruction once more
    if variant.repeated:
        parts.append(variant.repeated)
    return [
        {"role": "system", "content": variant.instruction},
        {"role": "user", "content": "\n\n".join(parts)},
    ]
