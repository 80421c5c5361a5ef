"""A local LLaVA as a teacher: how likely it finds the name of each class after each of several prompts.

The likelihoods of the names (answer_ranking.py) become probabilities by a softmax over the classes.
Several prompts ask the same in other words: where they disagree, the answer hangs on the wording.

Shapes: P prompts, N photos, C classes; log_p (P,N,C).
"""

from pathlib import Path

import torch

from utils import data, run
from vlm import generation, llava
from vlm.label_files import digest
from vlm.prompted_answers import embed_prompt, rank_answers


def settings_of(model):
    """What tells this teacher from another one: its name, and the hash of its file."""
    found = {"model": str(model)}
    if Path(model).is_file():
        found = {"model": Path(model).name, "sha256": digest(model)}
    return found


@torch.no_grad()
def photo_tokens(model, paths):
    """Image tokens of photos: [(1,M,E)] one by one if the model cuts them into tiles, else [(N,M,E)]."""
    on = next(model.language.parameters()).device
    if model.grids:
        return [generation.photo_embeddings(model, data.read_image(path, 0)) for path in paths]
    images = torch.stack([data.read_image(path, model.vision.size) for path in paths])
    features = model.vision(model.vision.pixels(images.to(on)))
    with run.autocast(on):
        return [model.project(features)]


@torch.no_grad()
def likelihoods(tokenizer, model, paths, prompts, names):
    """log p(name of a class | photo, prompt) of photos -> (P,N,C)."""
    found = []
    parts = photo_tokens(model, paths)
    for prompt in prompts:
        scores = []
        for tokens in parts:
            with run.autocast(tokens.device):
                embeds = embed_prompt(tokenizer, model, prompt, tokens)
                scores.append(rank_answers(tokenizer, model, embeds, names, prompt).float().cpu())
        found.append(torch.cat(scores))
    return torch.stack(found)


def label(model, photos, prompts, names, append, device="cpu", batch=16):
    """Label photos, and append a row for each: log p of every class after every prompt."""
    tokenizer, teacher = llava.load(model, run.device(device))
    parts = [photos[i : i + batch] for i in range(0, len(photos), batch)]
    for part in run.bar(parts, len(parts), name="label"):
        log_p = likelihoods(tokenizer, teacher, [photo.path for photo in part], prompts, names)
        for n, photo in enumerate(part):
            scores = [[round(x, 5) for x in row] for row in log_p[:, n].tolist()]
            append({"photo": photo.name, "sha256": digest(photo.path), "log_p": scores})
