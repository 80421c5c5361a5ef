"""Decoding: greedy search, beam search, contrastive search, temperature, top-k, top-p, min-p, locally
typical sampling, repetition penalty, each written out.

Greedy search takes the most probable token, beam search keeps the most probable few sentences,
contrastive search punishes what is like the text before. Sampling draws: from all tokens, the k best
(top-k), the fewest that have probability p together (top-p, nucleus), those not much less likely
than the likeliest (min-p), or those about as surprising as the model expects (locally typical).
Holtzman et al. 2020, arXiv:1904.09751. Searches and sampling are in generation.py and
contrastive.py, what changes the logits before is in logits_processors.py; here ten decoders go on
with one prompt.

Shapes: B prompts of N tokens, T new tokens. Any causal language model of transformers will do.

    python deploy/decode.py --prompt "The best way to learn a language is"     # one prompt, ten decoders
    python deploy/decode.py --prompt "Why is the sky blue?" --chat             # as a question to the assistant
    python deploy/decode.py --temperature 1.5 --top-p 0.7 --beams 8
    python deploy/decode_study.py                                              # against what people wrote
"""

from dataclasses import dataclass

import torch

from deploy.contrastive import contrastive_search
from deploy.generation import beam, check_length, ends, greedy, is_end, log_probs, sample
from deploy.logits_processors import sampler
from utils import pretrained, run
from utils.run import check
from utils.text import clean, plain


@dataclass(frozen=True)
class Config:
    """Decode a prompt in ten ways."""

    prompt: str = "The best way to learn a language is"  # the text to go on with
    chat: bool = False  # put the prompt as a question to the assistant
    model: str = "smollm2"  # or a local folder, or a hub id
    max_new_tokens: int = 64  # tokens of each continuation
    # tokens of the longest prompt that is read: each of ten decoders reads it
    max_prompt: int = 512
    beams: int = 4  # sentences that beam search keeps
    length_penalty: float = 1.0  # a finished sentence scores sum log p / length ** this
    contrastive_k: int = 4  # candidates of contrastive search
    alpha: float = 0.6  # weight of its penalty
    temperature: float = 0.7  # below 1 likely tokens get likelier
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.1  # least probability of a token, relative to that of the likeliest
    typical_p: float = 0.95  # probability mass of the locally typical tokens
    # penalty of a token that was there before, in the prompt too; 1 is none
    repetition: float = 1.3
    seed: int = 0  # same seed, same draws
    device: str = "auto"
    out: str = "outputs/decode"


def pieces(tokens, tokenizer):
    """Ids one after the other -> pieces of text, each as soon as its letters are whole: an emoji
    has several tokens.
    """
    ids = []
    shown = ""
    for token in tokens:
        # all of it again: a letter may need the bytes of several tokens
        ids.append(int(token))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the sign for bytes that are no letter yet
            yield text[len(shown) :]
            shown = text


def repeated(tokens, n=4):
    """n-gram repetition: the fraction of runs of n tokens that stood there before, 1 - distinct-n.
    Li et al. 2016.

    [id] -> float, 0 ... 1
    """
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def decoders(model, cfg, **options):
    """{name: a function from a prompt to new tokens (B,T)}. Options: those of `stream`."""
    options = {"max_new_tokens": cfg.max_new_tokens} | options

    def greedy_search(prompt):
        return greedy(model, **prompt, **options)

    def beam_search(prompt):
        width = {"beams": cfg.beams, "length_penalty": cfg.length_penalty}
        tokens, _ = beam(model, **width, **prompt, **options)
        return tokens[:, 0]

    def penalised(prompt):
        return greedy(model, repetition=cfg.repetition, **prompt, **options)

    def contrastive(prompt):
        how = {"k": cfg.contrastive_k, "alpha": cfg.alpha}
        return contrastive_search(model, **how, **prompt, **options)

    def with_temperature(prompt):
        return sample(model, cfg.temperature, **prompt, **options)

    def from_top_k(prompt):
        return sample(model, k=cfg.top_k, **prompt, **options)

    def from_top_p(prompt):
        return sample(model, p=cfg.top_p, **prompt, **options)

    def from_min_p(prompt):
        return sample(model, min_p=cfg.min_p, **prompt, **options)

    def typical(prompt):
        return sample(model, typical_p=cfg.typical_p, **prompt, **options)

    def ancestral(prompt):
        return sample(model, **prompt, **options)

    return {
        "greedy": greedy_search,
        f"{cfg.beams} beams": beam_search,
        f"penalty {cfg.repetition:g}": penalised,
        f"contrastive {cfg.alpha:g}": contrastive,
        f"temperature {cfg.temperature:g}": with_temperature,
        f"top-k {cfg.top_k}": from_top_k,
        f"top-p {cfg.top_p:g}": from_top_p,
        f"min-p {cfg.min_p:g}": from_min_p,
        f"locally typical {cfg.typical_p:g}": typical,
        "ancestral sampling (full distribution)": ancestral,
    }


def left_padded(prompts, pad, device="cpu"):
    """[ids] of any lengths -> {"input_ids": (B,N), "attention_mask": (B,N)}."""
    # left padding, and where there is a token
    wide = max(map(len, prompts))
    rows = [[pad] * (wide - len(ids)) + ids for ids in prompts]
    mask = [[0] * (wide - len(ids)) + [1] * len(ids) for ids in prompts]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def prompt_ids(tokenizer, prompt, chat):
    """A text to go on with, or a question to the assistant, in which no word is a command -> ids."""
    if not chat:
        return tokenizer(clean(prompt))["input_ids"]
    check(tokenizer.chat_template, "--chat: this model has no chat template; leave it out")
    # one turn of the user, in the model's template
    turn = [{"role": "user", "content": plain(prompt, tokenizer)}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them already


def check_flags(cfg):
    """Raises UserError for flags of which one makes no sense."""
    check(cfg.prompt.strip(), "--prompt is empty")
    numbers = (cfg.max_new_tokens, cfg.max_prompt, cfg.beams, cfg.contrastive_k, cfg.top_k)
    check(min(numbers) > 0, "numbers of tokens, beams ... start at 1")
    # raises UserError for flags of which no sampler can be made
    sampler(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.typical_p)
    check(0 <= cfg.alpha <= 1, "--alpha must be in [0, 1]; 0 is greedy decoding")
    check(cfg.repetition > 0, "--repetition must be above 0; 1 is no penalty")


def load(name, device):
    """-> tokenizer, model: smollm2, or a folder or hub id."""
    if name == "smollm2":
        return pretrained.smollm2(device)
    return pretrained.language_model(name, device)


def score(model, tokens, eos, **prompt):
    """Each new text up to its end: [(log p of each token (T,), fraction of repeated 4-grams)]."""
    log_p = log_probs(model, tokens, **prompt).cpu()
    scored = []
    for i, row in enumerate(tokens):
        # up to the first end, or all of it
        ends_at = is_end(row, eos).nonzero().flatten().tolist()
        length = ends_at[0] + 1 if ends_at else len(row)
        scored.append((log_p[i, :length], repeated(row[:length].tolist())))
    return scored


def main(cfg: Config) -> dict:
    """Decode one prompt in ten ways; writes the texts and their log probabilities."""
    # flags, model and prompt; what is wrong with them ends the run before anything is written
    check_flags(cfg)
    run.seed(cfg.seed)
    device = run.device(cfg.device)
    tokenizer, model = load(cfg.model, device)
    eos = ends(tokenizer, model)
    pad = tokenizer.eos_token_id or 0
    asked = prompt_ids(tokenizer, cfg.prompt, cfg.chat)
    check_length(model, len(asked), cfg.max_new_tokens, cfg.max_prompt)
    folder = run.output(cfg.out, cfg)
    prompt = left_padded([asked], pad, device)
    print(clean(cfg.prompt))
    # each decoder goes on with the same prompt
    texts = {}
    rows = {}
    for name, decoder in decoders(model, cfg, eos=eos, pad=pad).items():
        tokens = decoder(prompt)
        ((log_p, again),) = score(model, tokens, eos, **prompt)
        texts[name] = tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
        rows[name] = {"tokens": len(log_p), "log p": float(log_p.sum()), "repeated": again}
        print(f"\n{name}, sum log p {log_p.sum():.1f}, {100 * again:.0f} % of 4-grams repeated:")
        print(texts[name])
    if cfg.repetition > 1:
        print(f"\npenalty {cfg.repetition:g} counts words of the prompt, too:", end=" ")
        print("not for answers out of a passage")
    run.write_json(folder / "texts.json", texts)
    return run.report(folder, rows, then="python deploy/decode_study.py")


if __name__ == "__main__":
    run.cli(main, Config)
