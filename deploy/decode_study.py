"""Decoders compared: probability and repetition of what they write, beside what people wrote.

Holtzman et al. 2020, arXiv:1904.09751, Fig. 2: the most probable text is a dull one. Ten decoders
(decode.py) go on with real paragraphs of manuals from their first 24 tokens; every text is scored
by the log probability that the model itself gives it, and by the fraction of its 4-grams that are
repeated.

    python deploy/decode_study.py
    python deploy/decode_study.py --passages 20 --max-new-tokens 128
"""

import re
from dataclasses import dataclass

import torch

from deploy import decode, generation
from utils import data, figures, run
from utils.run import check


@dataclass(frozen=True)
class Config(decode.Config):
    """Decode the same prompts in ten ways; compare probability and repetition with people's."""

    passages: int = 6  # paragraphs of real manuals; their first 24 tokens are the prompt
    out: str = "outputs/decode_study"


def passages(tokenizer, count, tokens, head=24):
    """Paragraphs of prose from three manuals: beginnings [ids], and what follows (count,tokens)."""
    # paragraphs without markup or code
    texts = []
    for _, page in data.docs():
        for text in re.split(r"\n\s*\n", page):
            if text[:1].isupper() and not re.search(r"[`:*|_<>={}\\]", text):
                texts.append(" ".join(text.split()))
    # those that are long enough
    every = tokenizer(texts)["input_ids"] if texts else []  # all at once: a third of the time
    found = [ids[: head + tokens] for ids in every if len(ids) >= head + tokens]
    enough = len(found) >= count
    check(enough, f"only {len(found)} paragraphs are so long: lower --passages or --max-new-tokens")
    # some from everywhere, each cut into its beginning and what follows
    some = [found[i * len(found) // count] for i in range(count)]
    return [ids[:head] for ids in some], torch.tensor([ids[head:] for ids in some])


def mean(values):
    return sum(values) / len(values)


def draw(path, scored):
    """Left: probability of each token of one text (Fig. 2). Right: log p against repetition."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), width_ratios=(1.2, 1))
    search = list(scored)[1]
    human = list(scored)[-1]
    # the text that beam search repeats most in
    dullest = max(range(len(scored[human])), key=lambda i: scored[search][i][1])
    for i, (name, texts) in enumerate(scored.items()):
        look = {"color": f"C{i}", "marker": "o"}
        if name == human:
            look = {"color": "black", "marker": "*"}
        # left: the probability of each token of it
        if name in (search, human):
            log_p, _ = texts[dullest]
            line = {"marker": "o", "markersize": 3, "linewidth": 1}
            left.plot(log_p.exp(), color=look["color"], label=name, **line)
        # right: each text, and their mean
        xs = [log_p.mean().item() for log_p, _ in texts]
        ys = [100 * again for _, again in texts]
        size = 200 if name == human else 90
        right.scatter(xs, ys, s=16, alpha=0.4, linewidths=0, **look)
        right.scatter(mean(xs), mean(ys), s=size, edgecolors="white", label=name, **look)
    title = "how a paragraph goes on: a search, and its author"
    left.set(xlabel="token", ylabel="probability", title=title)
    left.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, -0.32))
    title = "small: one text; large: the mean"
    right.set(xlabel="mean log p of a token", ylabel="4-grams repeated, %", title=title)
    right.legend(fontsize=8, frameon=False, loc="upper left")
    right.grid(alpha=0.3)
    figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Decode the prompt and the beginnings of real paragraphs in ten ways; writes texts, a table
    and the figure.
    """
    # flags, model and prompts; what is wrong with them ends the run before anything is written
    decode.check_flags(cfg)
    check(cfg.passages > 0, "--passages must be 1 or more")
    run.seed(cfg.seed)
    device = run.device(cfg.device)
    tokenizer, model = decode.load(cfg.model, device)
    eos = generation.ends(tokenizer, model)
    pad = tokenizer.eos_token_id or 0
    asked = decode.prompt_ids(tokenizer, cfg.prompt, cfg.chat)
    generation.check_length(model, max(len(asked), 24), cfg.max_new_tokens, max(cfg.max_prompt, 24))
    beginnings, theirs = passages(tokenizer, cfg.passages, cfg.max_new_tokens)
    folder = run.output(cfg.out, cfg)
    # each decoder goes on with one batch: the prompt of --prompt, then the paragraphs
    prompt = decode.left_padded([asked, *beginnings], pad, device)
    texts = {}
    scored = {}
    for name, decoder in decode.decoders(model, cfg, eos=eos, pad=pad).items():
        tokens = decoder(prompt)
        scored[name] = decode.score(model, tokens, eos, **prompt)[1:]
        texts[name] = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
    # what the authors of the paragraphs wrote, scored by the same model
    human = decode.left_padded(beginnings, pad, device)
    scored["people"] = decode.score(model, theirs.to(device), None, **human)
    # the figure, and the means of each decoder
    draw(folder / "decode.png", scored)
    rows = {}
    for name, some in scored.items():
        rows[name] = {
            "tokens": mean([len(log_p) for log_p, _ in some]),
            "log p": mean([log_p.sum().item() for log_p, _ in some]),
            "a token": mean([log_p.mean().item() for log_p, _ in some]),
            "repeated": mean([again for _, again in some]),
        }
    run.write_json(folder / "texts.json", texts)
    return run.report(folder, rows, then=f"open {folder}/decode.png")


if __name__ == "__main__":
    run.cli(main, Config)
