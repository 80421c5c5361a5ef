"""Question service: length limit, rate limit, retrieval, and the streamed answer, for all visitors.

What a demonstration lacks until somebody misuses it. Without a passage that is close enough nothing
is answered; an error becomes one line for the visitor.
"""

import logging
import time
from typing import Any

from rag import answer
from utils.run import UserError
from utils.text import clean

LONGEST = answer.LONGEST  # characters of a question


def seconds_to_wait(asked, now, limit, span=60.0):
    """-> seconds until one more question is at most the limit-th in any `span` seconds.

    `asked`: times, in order.
    """
    if len(asked) < limit:
        return 0.0
    return max(0.0, asked[-limit] + span - now)


class QuestionService:
    """Where questions come in: one retriever and one model for all visitors."""

    def __init__(
        self, retriever, llm, k=5, rate=10, clock=time.monotonic, close: Any = None, abstain=-1.0
    ):
        """`close(question, passages)` says how close they are.

        Below `abstain` nothing is answered; -1: always.
        """
        self.retriever = retriever
        self.llm = llm
        self.k = k
        self.rate = rate
        self.clock = clock
        self.close = close
        self.abstain = abstain
        self.asked = {}  # times of the questions of each visitor
        self.answered = 0

    def refuse(self, question, visitor):
        """-> one line, why this is not answered; empty if it is."""
        # Empty or too long
        if not question:
            return "Type a question first."
        if len(question) > LONGEST:
            return f"The question has {len(question)} characters; {LONGEST} are the most."
        # Rate limit
        now = self.clock()
        if seconds := seconds_to_wait(self.asked.get(visitor, []), now, self.rate):
            return f"More than {self.rate} a minute: ask again in {seconds:.1f} s."
        # Forget visitors of more than a minute ago, and count this question
        recent = {}
        for name, times in self.asked.items():
            if times[-1] > now - 60:
                recent[name] = times[-self.rate :]
        self.asked = recent
        self.asked.setdefault(visitor, []).append(now)
        return ""

    def reply(self, question, visitor):
        """Yields (line for the visitor, answer so far, passages).

        First the passages, then a word at a time.
        """
        question = clean(question or "").strip()
        if line := self.refuse(question, visitor):
            yield line, "", []
            return
        yield "Searching ...", "", []
        told = ""
        found = []
        try:
            # Retrieve
            found = self.retriever.invoke(question)[: self.k]
            yield "Reading ...", told, found
            if found and self.abstain > -1 and self.close(question, found) < self.abstain:
                # Abstain
                told = answer.NOWHERE
            elif self.llm and found:  # without passages it would answer out of its head
                # Generate
                chat = answer.messages(question, answer.passages_read(self.llm, found))
                for word in self.llm.stream(chat):
                    told += word
                    yield "Answering ...", told, found
            self.answered += 1
            nothing = "No passage was found, so there is nothing to answer from."
            yield "" if found else nothing, told.strip(), found
        except UserError as error:
            yield f"{error}.", told, found
        except Exception as error:  # of the search, say: the page goes on, and its owner sees why
            logging.exception("a question was not answered")
            yield f"This could not be answered ({type(error).__name__}).", told, found
