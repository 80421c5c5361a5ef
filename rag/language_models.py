"""Chat models that stream an answer: in this process (`Local`), or behind an address (`Remote`).

Both take the messages of a chat and break up what the text of a passage could say to the chat
template: the letters that mark a turn stay letters. How `Local` decodes was chosen by
answer_study.py.
"""

import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch

from utils import pretrained, run
from utils.run import UserError, check
from utils.text import plain, printable

# A repetition penalty also punishes the words of the prompt: the model cannot copy its passages
DECODING = {"do_sample": False, "repetition_penalty": 1.0}


def context_length(model, tokenizer):
    """How many tokens a model reads at most.

    The length of its table of positions, or what its tokenizer says.
    """
    # Of the language model within a multimodal one
    config = getattr(model.config, "text_config", model.config)
    named = getattr(config, "max_position_embeddings", None)
    if not named:
        named = getattr(tokenizer, "model_max_length", None)
    return min(int(named or 2048), 2**20)  # tokenizers without a limit say 10^30


def end_tokens(model, tokenizer):
    """Every id that ends an answer.

    A model may have several, and its tokenizer another one, or none.
    """
    found = []
    for named in (
        model.generation_config.eos_token_id,
        model.config.eos_token_id,
        tokenizer.eos_token_id,
    ):
        found += named if isinstance(named, (list, tuple)) else [named]
    return sorted({int(i) for i in found if i is not None})


class Local:
    """A causal language model in this process; greedy: the same question has the same answer.

    Keywords are those of `generate` in transformers, on top of DECODING.
    """

    def __init__(self, name="smollm2", tokens=96, **decoding: Any):
        # Tokenizer and model
        device = run.device()
        if name == "smollm2":
            self.tokenizer, self.model = pretrained.smollm2(device)
            self.reads = 1  # it answers better from the first passage than from five
        else:
            self.tokenizer, self.model = pretrained.language_model(name, device)
        message = f"--llm {name} has no chat template: name a model made for chat"
        check(self.tokenizer.chat_template, message)
        # Room for the prompt, beside the tokens of the answer
        self.tokens = tokens
        self.room = context_length(self.model, self.tokenizer) - tokens
        most = tokens + self.room - 64
        message = f"--tokens {tokens} leaves --llm {name} no room to read in: at most {most}"
        check(self.room >= 64, message)
        # What ends an answer, and what fills up a batch
        ends = end_tokens(self.model, self.tokenizer)
        padding = self.tokenizer.pad_token_id
        if padding is None:
            padding = ends[0] if ends else 0
        self.rules = DECODING | {"eos_token_id": ends or None, "pad_token_id": padding} | decoding

    def prompt(self, chat):
        """-> token ids (1,T). Of a prompt that is too long for the model the middle is cut out.

        The instructions and the best passages stand in front of it, the question behind it. A
        passage may hold the very letters that mark the turns of a chat: they are broken up, and
        stay letters.
        """
        chat = [turn | {"content": self.letters(turn["content"])} for turn in chat]
        ids = self.template(chat)
        # Too long: the middle goes
        if ids.shape[1] > self.room:
            front = self.room // 2
            ids = torch.cat([ids[:, :front], ids[:, front - self.room :]], 1)
        return ids.to(self.model.device)

    def template(self, chat):
        """The chat as the model was taught to read it.

        Some templates know no system: its words go to the user.
        """
        from jinja2 import TemplateError

        rest: dict[str, Any] = {
            "add_generation_prompt": True,
            "return_tensors": "pt",
            "return_dict": True,
        }
        try:
            return self.tokenizer.apply_chat_template(chat, **rest)["input_ids"]
        except TemplateError:
            message = "the chat template of --llm takes no such messages: name another model"
            check(len(chat) == 2, message)
            told = [{"role": "user", "content": "\n\n".join(turn["content"] for turn in chat)}]
            return self.tokenizer.apply_chat_template(told, **rest)["input_ids"]

    def letters(self, text):
        """A text in which control tokens are letters."""
        return plain(text, self.tokenizer)

    def stream(self, chat) -> Iterator[str]:
        """The answer, a piece at a time.

        A reader that leaves stops the model; its errors are raised here.
        """
        from transformers import TextIteratorStreamer

        # Pieces of the answer come out of a queue
        ids = self.prompt(chat)
        pieces = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        left = threading.Event()
        errors = []

        def generate():
            try:
                self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=pieces,
                                    max_new_tokens=self.tokens, **self.rules,
                                    stopping_criteria=[lambda *_, **__: left.is_set()])  # fmt: skip
            except Exception as error:  # of another thread: kept, or nobody would see it
                errors.append(error)
            finally:
                pieces.end()  # the reader waits for this

        # Generate in a thread, and hand on what it writes
        work = threading.Thread(target=generate, daemon=True)
        work.start()
        try:
            yield from pieces
        finally:
            left.set()
            work.join()
        if errors:
            raise UserError(f"the model of --llm failed: {printable(errors[0])}") from errors[0]

    @torch.no_grad()
    def loss(self, chat, answer):
        """Mean negative log likelihood of an answer after this chat, in nats a token."""
        # Tokens of the prompt, and of the answer as letters
        before = self.prompt(chat)
        letters = self.letters(answer)
        tokens = self.tokenizer(letters, add_special_tokens=False, return_tensors="pt")
        told = tokens["input_ids"]
        check(told.shape[1], "an answer without words has no likelihood")
        # As many tokens of the answer as there are positions left
        told = told[:, : self.tokens + self.room - before.shape[1]].to(before.device)
        # The logits before each token of the answer
        ids = torch.cat([before, told], 1)
        logits = self.model(ids, logits_to_keep=told.shape[1] + 1).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits.float(), told[0]))


# What the templates of well-known models take for a command; which one a server has, it does not say
COMMANDS = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>")


class Remote:
    """A model behind an address that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama, a provider.

    `http://host:port/v1` asks the server for its first model, `http://host:port/v1#name` asks for
    that one. A key, if the server wants one, is in OPENAI_API_KEY.
    """

    PATIENCE = 120  # seconds without a word

    def __init__(self, url, tokens=96):
        import httpx
        from langchain_openai import ChatOpenAI
        from openai import OpenAI, OpenAIError

        address, _, name = url.partition("#")
        rest: dict[str, Any] = {
            "base_url": address,
            "api_key": os.environ.get("OPENAI_API_KEY", "none"),
        }
        # A server that is none answers with anything: a page, a list, half a line
        self.errors = (
            OpenAIError,
            httpx.HTTPError,
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
        )
        # Its first model, unless one is named
        try:
            name = name or OpenAI(timeout=20, max_retries=1, **rest).models.list().data[0].id
        except (*self.errors, httpx.InvalidURL) as error:
            raise UserError(f"--llm {printable(url)}: {reason(error)}") from None
        rest |= {"timeout": self.PATIENCE, "max_retries": 1, "max_tokens": tokens, "temperature": 0}
        self.chat = ChatOpenAI(model=name, **rest)

    def letters(self, text):
        """A text in which commands of well-known templates are letters."""
        return COMMANDS.sub(broken_up, text)

    def stream(self, chat):
        """The answer, a piece at a time."""
        from langchain_core.output_parsers import StrOutputParser

        chat = [turn | {"content": self.letters(turn["content"])} for turn in chat]
        try:
            yield from (self.chat | StrOutputParser()).stream(chat)
        except self.errors as error:
            raise UserError(f"the server of --llm failed: {reason(error)}") from None


def broken_up(found):
    """A command as letters: "[INST]" becomes "[ INST]"."""
    return f"{found[0][0]} {found[0][1:]}"


def reason(error):
    """The first line of an error, or its name if it says nothing."""
    lines = str(error).splitlines() or [type(error).__name__]
    return printable(lines[0])[:100]


def language_model(name, tokens=96, **decoding):
    """`smollm2`, a folder, a hub id or the address of a server -> what has `stream(messages)`."""
    check(tokens > 0, "--tokens must be 1 or more")
    if name.startswith(("http://", "https://")):
        return Remote(name, tokens)
    return Local(name, tokens, **decoding)
