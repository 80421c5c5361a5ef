"""Log probabilities of generated tokens and of the likeliest alternatives: logprobs, top_logprobs.

They are those of the model at temperature 1, before any truncation, as OpenAI's protocol and
`output_logits` of transformers have them; a repetition penalty above 1 is in them. Shapes: B prompts,
V tokens in the vocabulary, n alternatives.
"""

from deploy.logits_processors import argmax_token
from deploy.token_bytes import token_bytes
from utils.run import check


def top_logprobs(logits, token, n):
    """Logits (B,V), the chosen token (B,) -> its log p (B,); log p and ids of the n likeliest (B,n),
    the likeliest first.

    Raises UserError unless 0 <= n <= V.
    """
    check(0 <= n <= logits.shape[-1], f"top_logprobs must be between 0 and {logits.shape[-1]}")
    log_p = logits.float().log_softmax(-1)
    chosen = log_p.gather(-1, token[:, None]).squeeze(-1)
    best, ids = log_p.topk(n)
    return chosen, best, ids


class LogprobRecorder:
    """`pick` of generation.stream that also writes down `top_logprobs` of every step.

    steps: [(tokens (B,), log p (B,), log p (B,n), ids (B,n))]. Where the pick masks or bends the logits
    itself (temperature, top-p, a grammar), those written down are the ones before that.
    """

    def __init__(self, n=0, pick=argmax_token):
        self.n = n
        self.pick = pick
        self.steps = []

    def __call__(self, logits):
        """(B,V) -> tokens (B,)."""
        token = self.pick(logits)
        self.steps.append((token, *top_logprobs(logits, token, self.n)))
        return token


def openai_logprobs(steps, tokenizer, row=0, pieces=None):
    """The steps of one prompt as the `logprobs` of a choice in OpenAI's chat protocol.

    -> {"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}]}. bytes: a token may be a piece
    of a letter, whose text is then U+FFFD. pieces: those of token_bytes, if they are there already.
    Raises UserError unless the tokenizer is a byte-level BPE.
    """
    pieces = pieces or token_bytes(tokenizer)

    def entry(token, log_p):
        text = tokenizer.decode([token])
        # special tokens, and ids that are not in the vocabulary
        piece = (pieces[token] if token < len(pieces) else None) or text.encode("utf-8")
        return {"token": text, "logprob": float(log_p), "bytes": list(piece)}

    content = []
    for token, log_p, best, ids in steps:
        alternatives = [entry(int(i), p) for i, p in zip(ids[row], best[row])]
        made = entry(int(token[row]), log_p[row]) | {"top_logprobs": alternatives}
        content.append(made)
    return {"content": content}
