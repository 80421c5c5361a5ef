"""Evaluation of a LLaVA: answer ranking by likelihood, generated answers, forgetting; beside a linear probe.

Photos of fruit that no training saw, of 14 kinds in 5 groups. The kind is read in two ways: by likelihood, which of
the 14 names the model finds most probable after the question, and by what it says when it is left to speak. Beside it
stand always saying the most frequent kind, and a linear probe: logistic regression on the mean of the same features,
which cannot talk. Free answers are scored as captions are (captions.py). And since a language model that learned to see
may have forgotten to speak: its loss on pages of manuals.

Shapes: features (B,N,D) of B photos, C names.

    python vlm/evaluate.py                                          # 300 photos, the weights of the book
    python vlm/evaluate.py --judged 0                               # all 1322
    python vlm/evaluate.py --model outputs/vlm_train/model.safetensors
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deploy import decode
from utils import data, figures, run
from utils.run import check
from utils.text import plain
from vlm import answer_ranking, captions, fruit_photos, llava, probe, prompts, tower
from vlm.fruit_photos import QUESTION


@dataclass(frozen=True)
class Config:
    """Score a LLaVA on photos that it never saw."""

    model: str = str(llava.WEIGHTS)  # weights, or a folder or hub id
    prompt: str = QUESTION
    judged: int = 300  # photos; 0: all 1322
    batch: int = 32  # photos at a time
    probe: bool = True  # compare with a linear probe on the same features
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/evaluate"


def prompt_embeddings(tokenizer, model, prompt, features):
    """Vision features of photos (B,N,D), and a question -> embeddings of the prompt (B,T,E)."""
    seen = model.project(features)
    return model.embed(
        llava.question(tokenizer, model, prompt, seen.shape[1])
        .expand(len(seen), -1)
        .to(seen.device),
        seen,
    )


@torch.no_grad()
def answer_likelihoods(tokenizer, model, features, answers, prompt=QUESTION):
    """log p(answer and the end of it | photo, question) -> (B,C). The question is read once, each answer after it.

    Raises UserError for an answer without a word, or a tokenizer without a word that ends an answer.
    """
    embeds = prompt_embeddings(tokenizer, model, prompt, features)
    # answers as ids, each with its end
    end = prompts.end_of_answer(tokenizer)
    check(end, "the tokenizer has no word that ends an answer: set its eos_token")
    end_id = tokenizer.convert_tokens_to_ids(end)
    targets = []
    for answer in answers:
        ids = tokenizer(plain(answer, tokenizer), add_special_tokens=False).input_ids
        check(ids, f"a name of no words cannot be scored: {answer!r}")
        decode.check_length(model.language, embeds.shape[1], len(ids) + 1)
        targets.append([*ids, end_id])
    # read the question once
    out = model.language(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    first_log_p = out.logits[:, -1].float().log_softmax(-1)

    # each answer after it
    def next_logits(ids):
        return model.language(input_ids=ids, cache=out.cache, use_cache=True).logits

    return answer_ranking.likelihoods(first_log_p, next_logits, out.cache, targets)


@torch.no_grad()
def generated_answers(tokenizer, model, features, prompt=QUESTION, max_new_tokens=12):
    """Generated answers about each photo, greedy decoding -> texts."""
    embeds = prompt_embeddings(tokenizer, model, prompt, features)
    decode.check_length(model.language, embeds.shape[1], max_new_tokens)
    new = model.language.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
        max_new_tokens=max_new_tokens, eos_token_id=prompts.ends(tokenizer, model.language) or None,
        pad_token_id=tokenizer.pad_token_id, **llava.GREEDY,
    )  # fmt: skip
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def paragraphs(count=40):
    """Paragraphs of manuals, words alone: what the language model could read before it could see."""
    found = [
        p.replace("\n", " ")
        for _, text in data.docs()
        for p in text.split("\n\n")
        if 300 < len(p) < 600
    ]
    return [found[i] for i in np.random.default_rng(5).permutation(len(found))[:count]]


@torch.no_grad()
def text_loss(tokenizer, language, texts):
    """Mean of -log p of the tokens of texts."""
    summed = tokens = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
        logits = language(input_ids=ids.to(language.device)).logits[0, :-1].float()
        summed += float(F.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum"))
        tokens += ids.shape[1] - 1
    return summed / tokens


def evaluate_photos(tokenizer, model, features, fruit, chosen, prompt=QUESTION, batch=32):
    """-> accuracies of 14 kinds and 5 groups by likelihood, of what was said, and the texts and scores themselves.

    features (B,N,D) of the photos `chosen` of the groceries. What was said is right if it is the name, word for word.
    """
    names = [fruit_photos.NAMES[kind] for kind in fruit.fine_names]
    scores, texts = [], []
    for part in features.split(batch):
        part = part.to(next(model.connector.parameters(), part).device)
        with run.autocast(part.device):
            scores.append(answer_likelihoods(tokenizer, model, part, names, prompt).cpu())
            texts += generated_answers(tokenizer, model, part, prompt)
    log_p = torch.cat(scores)
    truth = [names[k] for k in fruit.fine[chosen]]
    said = [captions.normalise(a) == captions.normalise(b) for a, b in zip(texts, truth)]
    found = {
        "14 kinds": probe.share(log_p.argmax(-1) == fruit.fine[chosen]),
        "5 groups": probe.share(fruit_photos.grouped(log_p, fruit) == fruit.coarse[chosen]),
        "said the name": probe.share(torch.tensor(said)),
    }
    return found, texts, log_p


def paired(ours, theirs):
    """Two readers of the same photos, right or wrong (B,) each -> how much more often ours is right, its 95 % interval,
    and the p-value of the sign test over the photos on which they differ (McNemar 1947, exact)."""
    difference = ours.float() - theirs.float()
    mean, error = float(difference.mean()), float(difference.std()) / len(difference) ** 0.5
    more, fewer = int((difference > 0).sum()), int((difference < 0).sum())
    least, all_of_them = min(more, fewer), more + fewer
    tail = sum(math.comb(all_of_them, k) for k in range(least + 1)) / 2**all_of_them
    return {
        "difference": mean,
        "low": mean - 1.96 * error,
        "high": mean + 1.96 * error,
        "p": min(1.0, 2 * tail),
    }


def confusion(path, log_p, fruit, chosen):
    """Which kind is taken for which: rows what it is, columns what it is taken for, sorted by group."""
    order = sorted(
        range(len(fruit.fine_names)), key=lambda k: (int(fruit.coarse[fruit.fine == k][0]), k)
    )
    table = torch.zeros(len(order), len(order))
    for truth, found in zip(fruit.fine[chosen], log_p.argmax(-1)):
        table[order.index(int(truth)), order.index(int(found))] += 1
    table /= table.sum(1, keepdim=True).clamp(min=1)
    names = [fruit_photos.NAMES[fruit.fine_names[k]] for k in order]
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 5.4))
    ax.imshow(table, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(order)):
        for j in range(len(order)):
            if table[i, j] >= 0.05:
                ax.text(j, i, f"{100 * table[i, j]:.0f}", ha="center", va="center", fontsize=6,
                        color="white" if table[i, j] > 0.5 else "black")  # fmt: skip
    ax.set_xticks(range(len(order)), names, rotation=60, ha="right", fontsize=7)
    ax.set_yticks(range(len(order)), names, fontsize=7)
    ax.set(xlabel="most probable answer", ylabel="what it is (rows add up to 100 %)")
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Score the model on photos, its yardsticks on the same, and its language model on words alone."""
    check(cfg.judged >= 0 and cfg.batch > 0, "--judged must be 0 or more, --batch at least 1")
    tokenizer, model = llava.load(cfg.model, run.device(cfg.device))
    folder = run.output(cfg.out, cfg)
    run.seed(cfg.seed)
    fruit = data.groceries(model.vision.size)
    learn, chosen = fruit_photos.split(fruit, cfg.judged, cfg.seed)
    features = tower.vision_features(model.vision, fruit.images[chosen])
    found, texts, log_p = evaluate_photos(
        tokenizer, model, features.float(), fruit, chosen, cfg.prompt, cfg.batch
    )
    metrics = {"photos": len(chosen), "LLaVA": found}
    if cfg.probe:
        reader = probe.probed(model.vision, fruit, learn, chosen)
        metrics |= probe.yardsticks(model.vision, fruit, learn, chosen, reader)
        mine, kinds = log_p.argmax(-1), fruit.fine[chosen]
        metrics["LLaVA less the probe"] = paired(mine == kinds, reader["14 kinds"] == kinds)
    truth = [fruit_photos.name_of(fruit, i) for i in chosen]
    metrics["as captions"] = captions.scores(texts, [[t] for t in truth])
    metrics["VQA accuracy"] = float(
        np.mean([captions.vqa_accuracy(a, [t] * 10) for a, t in zip(texts, truth)])
    )
    metrics["text loss"] = text_loss(
        tokenizer, model.language, paragraphs(min(40, cfg.judged or 40))
    )
    confusion(folder / "confusion.png", log_p, fruit, chosen)
    large = data.groceries(348)
    shown = fruit_photos.spread(torch.arange(len(chosen)))
    said, are = ([x[i] for i in shown] for x in (texts, truth))
    fruit_photos.draw(folder / "answers.png", large.images[chosen[shown]], said, are, cfg.prompt)
    run.write_json(folder / "answers.json", [{"said": a, "is": b} for a, b in zip(texts, truth)])
    return run.report(
        folder, metrics, 'python vlm/llava.py --image PHOTO --prompt "What fruit is this?"'
    )


if __name__ == "__main__":
    run.cli(main, Config)
