"""Constrained decoding: a language model writes JSON, because no other token may come.

At each step the tokens after which the text could no longer become JSON get probability 0: Willard
& Louf 2023, arXiv:2307.09702. The acceptor of JSON is in json_grammar.py, that of an object of given
keys and types in json_schema.py, masks over tokens in token_mask.py. Whatever the model is and
however few tokens it has, what comes out is JSON: when few are left, only tokens may come after which
the text can still be closed.

Shapes: B prompts of N tokens, V tokens in the vocabulary.

    python deploy/constrained.py --prompt "Describe a cat as a JSON object."          # any object
    python deploy/constrained.py --fields name:string age:integer mood:happy,sleepy   # of these keys
"""

import json
import time
from dataclasses import dataclass

import torch

from deploy import decode, generation, json_schema
from deploy.json_grammar import JsonGrammar
from deploy.logits_processors import argmax_token, sampler
from deploy.token_bytes import token_bytes
from deploy.token_mask import TokenMask
from utils import run
from utils.run import check
from utils.text import clean


@dataclass(frozen=True)
class Config:
    """Answer a question in JSON."""

    # the question to the assistant
    prompt: str = "Describe a cat as a JSON object with its name, age and mood."
    fields: tuple[
        str, ...
    ] = ()  # keys and types, such as age:integer mood:happy,sad; none: any object
    chat: bool = True  # put the prompt as a question to the assistant
    model: str = "smollm2"  # or a local folder, or a hub id
    max_new_tokens: int = 96  # tokens of the answer
    max_depth: int = 8  # arrays and objects inside of each other
    temperature: float = 0.0  # 0 is greedy decoding
    seed: int = 0  # same seed, same draws
    device: str = "auto"
    out: str = "outputs/constrained"


class ConstrainedPick:
    """`pick` of generation.stream under a grammar: masks the logits, lets `pick` choose, and follows
    what it chose.

    For one call of `stream` of at most max_new_tokens. Raises UserError if so few tokens cannot
    complete any text.
    """

    def __init__(self, mask, pick=argmax_token, max_new_tokens=40):
        least = mask.left(mask.start)
        check(least <= max_new_tokens, f"the shortest text has {least} bytes: ask for more tokens")
        self.mask = mask
        self.pick = pick
        self.left = max_new_tokens
        self.states: list = []  # of each prompt; None after its end
        self.seconds = 0.0  # CPU time of the masks

    def __call__(self, logits):
        """(B,V) -> tokens (B,)."""
        begun = time.process_time()
        self.states = self.states or [self.mask.start] * len(logits)
        self.left -= 1
        # what may come after what was chosen so far
        rows = [self.allowed_row(state) for state in self.states]
        allowed = torch.stack(rows).to(logits.device)
        self.seconds += time.process_time() - begun
        token = self.pick(logits.masked_fill(~allowed, -torch.inf))
        self.states = [self.advance(s, t) for s, t in zip(self.states, token.tolist())]
        return token

    def allowed_row(self, state):
        """bool (V,): after its end, anything."""
        if state is None:
            return torch.ones(self.mask.vocabulary, dtype=torch.bool)
        return self.mask.allowed(state, self.left)

    def advance(self, state, token):
        """The state after a token; None after the end, which has no bytes."""
        return None if state is None else self.mask.advance(state, token)


def parses(text):
    """Whether a text is JSON."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def grammar(cfg):
    """The acceptor of the flags. Raises UserError for fields that make no sense."""
    if cfg.fields:
        return json_schema.ObjectGrammar(json_schema.fields(cfg.fields))
    return JsonGrammar(cfg.max_depth, root="object")


def main(cfg: Config) -> dict:
    """Answer a question freely and in JSON; writes both texts, and what the masks cost."""
    # flags, model and prompt; what is wrong with them ends the run before anything is written
    check(cfg.prompt.strip(), "--prompt is empty")
    check(min(cfg.max_new_tokens, cfg.max_depth) > 0, "--max-new-tokens, --max-depth start at 1")
    check(cfg.temperature >= 0, "--temperature must be at least 0; 0 is greedy decoding")
    acceptor = grammar(cfg)
    run.seed(cfg.seed)
    device = run.device(cfg.device)
    tokenizer, model = decode.load(cfg.model, device)
    eos = generation.ends(tokenizer, model)
    asked = decode.prompt_ids(tokenizer, cfg.prompt, cfg.chat)
    generation.check_length(model, len(asked), cfg.max_new_tokens)
    vocabulary = model.config.get_text_config().vocab_size
    begun = time.process_time()
    mask = TokenMask(acceptor, token_bytes(tokenizer), eos, vocabulary)
    built = time.process_time() - begun
    draw = sampler(cfg.temperature) if cfg.temperature else argmax_token
    constrained = ConstrainedPick(mask, draw, cfg.max_new_tokens)
    folder = run.output(cfg.out, cfg)
    prompt = decode.left_padded([asked], 0, device)
    print(clean(cfg.prompt))
    # the same question, without and with the masks
    texts = {}
    rows = {}
    for name, pick in {"free": draw, "constrained": constrained}.items():
        begun = time.process_time()
        options = {"max_new_tokens": cfg.max_new_tokens, "eos": eos}
        tokens = [int(token) for token in generation.stream(model, pick, **options, **prompt)]
        seconds = time.process_time() - begun
        texts[name] = tokenizer.decode(tokens, skip_special_tokens=True)
        is_json = parses(texts[name])
        rows[name] = {
            "tokens": len(tokens),
            "JSON": is_json,
            "ms a token": 1e3 * seconds / len(tokens),
        }
        print(f"\n{name}, {'JSON' if is_json else 'not JSON'}:\n{clean(texts[name])}")
    # what the masks cost in CPU time: the trie once, a walk for each new state
    a_token = 1e3 * constrained.seconds / rows["constrained"]["tokens"]
    rows["masks"] = {"trie s": built, "states": len(mask.cache), "ms a token": a_token}
    run.write_json(folder / "texts.json", texts)
    return run.report(folder, rows, then=f"cat {folder}/texts.json")


if __name__ == "__main__":
    run.cli(main, Config)
