"""Evaluation of a LLaVA: answer ranking by likelihood, generated answers, forgetting; beside a linear probe.

Held-out photos of fruit, of 14 kinds in 5 groups. The kind is read in two ways: by likelihood,
which of the 14 names the model finds most probable after the question, and from its generated
answer. Beside it stand the majority class, and a linear probe: logistic regression on the mean of
the same features, which cannot talk. Generated answers are scored as captions, too
(caption_metrics.py). And since a language model that learned to see may have forgotten how to read:
its loss on pages of manuals, text alone.

Shapes: features (B,N,D) of B photos, C names.

    python vlm/evaluate.py                                          # 300 photos, the weights of the book
    python vlm/evaluate.py --judged 0                               # all 1322
    python vlm/evaluate.py --model outputs/vlm_train/model.safetensors
    python vlm/evaluate.py --benchmark pope                         # a benchmark's questions: benchmarks.py
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from utils import data, run
from utils.run import check
from vlm import (
    answer_metrics,
    benchmarks,
    caption_metrics,
    fruit_photos,
    llava,
    probe,
    tower,
)
from vlm.answer_metrics import vqa_accuracy
from vlm.benchmark_scores import pope as pope
from vlm.fruit_photos import QUESTION
from vlm.prompted_answers import embed_prompt, generate_answers, rank_answers


@dataclass(frozen=True)
class Config:
    """Score a LLaVA on held-out photos."""

    model: str = str(llava.WEIGHTS)  # weights, or a folder or hub id
    prompt: str = QUESTION
    judged: int = 300  # photos; 0: all 1322
    batch: int = 32  # photos at a time
    probe: bool = True  # compare with a linear probe on the same features
    seed: int = 0
    device: str = "auto"
    # pope, vqav2, okvqa, textvqa, aokvqa, scienceqa, coco, folders; see benchmarks.md
    benchmark: str = ""
    data: str = ""  # folder of the benchmark as it was published
    split: str = ""  # of it: a part of a file's name, such as val2014
    suffix: str = ""  # line behind each question, such as "Answer with a single word or phrase."
    out: str = "outputs/evaluate"


def prompt_embeddings(tokenizer, model, prompt, features):
    """Vision features of photos (B,N,D), and a question -> embeddings of the prompt (B,T,E)."""
    return embed_prompt(tokenizer, model, prompt, model.project(features))


@torch.no_grad()
def answer_likelihoods(tokenizer, model, features, answers, prompt=QUESTION):
    """log p(answer and the end of it | photo, question) -> (B,C). The question is read once, each
    answer after it.

    Raises UserError for an answer without a word, or a tokenizer without a word that ends an
    answer.
    """
    embeds = prompt_embeddings(tokenizer, model, prompt, features)
    return rank_answers(tokenizer, model, embeds, answers, prompt)


@torch.no_grad()
def generated_answers(tokenizer, model, features, prompt=QUESTION, max_new_tokens=12):
    """Generated answers about each photo, greedy decoding -> texts."""
    embeds = prompt_embeddings(tokenizer, model, prompt, features)
    return generate_answers(tokenizer, model, embeds, max_new_tokens)


def check_whole(model):
    """Raises UserError for a model with tiles, to which pictures are to be shown whole."""
    check(
        not model.grids,
        "the model was trained with tiles, and here photos are shown whole; "
        "python vlm/questions.py asks it with its tiles",
    )


def paragraphs(count=40):
    """Paragraphs of manuals, text alone: what the language model could read before it could see."""
    found = []
    for _, text in data.docs():
        for paragraph in text.split("\n\n"):
            if 300 < len(paragraph) < 600:
                found.append(paragraph.replace("\n", " "))
    order = np.random.default_rng(5).permutation(len(found))
    return [found[i] for i in order[:count]]


@torch.no_grad()
def text_loss(tokenizer, language, texts):
    """Text loss: mean of -log p of the tokens of texts."""
    summed = 0
    tokens = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
        logits = language(input_ids=ids.to(language.device)).logits[0, :-1].float()
        summed += float(F.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum"))
        tokens += ids.shape[1] - 1
    return summed / tokens


def evaluate_photos(tokenizer, model, features, fruit, chosen, prompt=QUESTION, batch=32):
    """-> accuracies of 14 kinds and 5 groups by likelihood, and of generated answers; the answers;
    log p (photos,14).

    features (B,N,D) of the photos `chosen` of the groceries. A generated answer is right if it is
    the name, word for word.
    """
    names = [fruit_photos.NAMES[kind] for kind in fruit.fine_names]
    scores = []
    answers = []
    for part in features.split(batch):
        part = part.to(next(model.connector.parameters(), part).device)
        with run.autocast(part.device):
            scores.append(answer_likelihoods(tokenizer, model, part, names, prompt).cpu())
            answers += generated_answers(tokenizer, model, part, prompt)
    log_p = torch.cat(scores)
    # generated answers against the names
    named = []
    for answer, kind in zip(answers, fruit.fine[chosen]):
        named.append(answer_metrics.normalise(answer) == answer_metrics.normalise(names[kind]))
    found = {
        "14 kinds": probe.share(log_p.argmax(-1) == fruit.fine[chosen]),
        "5 groups": probe.share(fruit_photos.grouped(log_p, fruit) == fruit.coarse[chosen]),
        "name in the generated answer": probe.share(torch.tensor(named)),
    }
    return found, answers, log_p


def main(cfg: Config) -> dict:
    """Score the model on held-out photos, the linear probe on the same, and its language model on
    text alone."""
    check(cfg.judged >= 0 and cfg.batch > 0, "--judged must be 0 or more, --batch at least 1")
    if cfg.benchmark:
        return benchmarks.main(cfg)
    check(
        not (cfg.data or cfg.split or cfg.suffix), "--data, --split, --suffix go with --benchmark"
    )
    tokenizer, model = llava.load(cfg.model, run.device(cfg.device))
    check_whole(model)
    folder = run.output(cfg.out, cfg)
    run.seed(cfg.seed)
    # held-out photos, their vision features, the model's answers
    fruit = data.groceries(model.vision.size)
    learn, chosen = fruit_photos.split(fruit, cfg.judged, cfg.seed)
    features = tower.vision_features(model.vision, fruit.images[chosen])
    found, answers, log_p = evaluate_photos(
        tokenizer, model, features.float(), fruit, chosen, cfg.prompt, cfg.batch
    )
    metrics = {"photos": len(chosen), "LLaVA": found}
    # linear probe, and the paired difference from it
    if cfg.probe:
        reader = probe.probed(model.vision, fruit, learn, chosen)
        metrics |= probe.yardsticks(model.vision, fruit, learn, chosen, reader)
        kinds = fruit.fine[chosen]
        ours = log_p.argmax(-1) == kinds
        metrics["LLaVA less the probe"] = probe.paired(ours, reader["14 kinds"] == kinds)
    # generated answers as captions, and as answers that ten people agree on
    truths = [fruit_photos.name_of(fruit, i) for i in chosen]
    metrics["as captions"] = caption_metrics.scores(answers, [[t] for t in truths])
    accuracies = [vqa_accuracy(a, [t] * 10) for a, t in zip(answers, truths)]
    metrics["VQA accuracy"] = float(np.mean(accuracies))
    # forgetting
    pages = paragraphs(min(40, cfg.judged or 40))
    metrics["text loss"] = text_loss(tokenizer, model.language, pages)
    # figures: confusion matrix, some photos with their answers
    fruit_photos.confusion(folder / "confusion.png", log_p, fruit, chosen)
    large = data.groceries(348)
    shown = fruit_photos.spread(torch.arange(len(chosen)))
    texts = [answers[i] for i in shown]
    names = [truths[i] for i in shown]
    fruit_photos.draw(folder / "answers.png", large.images[chosen[shown]], texts, names, cfg.prompt)
    run.write_json(folder / "answers.json", [{"said": a, "is": b} for a, b in zip(answers, truths)])
    then = 'python vlm/llava.py --image PHOTO --prompt "What fruit is this?"'
    return run.report(folder, metrics, then)


if __name__ == "__main__":
    run.cli(main, Config)
