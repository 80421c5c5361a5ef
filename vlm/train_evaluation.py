"""Evaluation behind vlm/train.py: held-out photos, the linear probe beside, text loss before and after."""

import torch

from utils import data
from vlm import checkpoints, evaluate, fruit_photos, llava_io, probe, tower
from vlm.train_data import TEXT_LOSS_PAGES


def evaluate_run(cfg, tokenizer, model, folder):
    """Accuracies on held-out photos, forgetting, a figure of generated answers -> metrics."""
    fruit = data.groceries(model.vision.size)
    on = next(model.language.parameters()).device
    learn, chosen = fruit_photos.split(fruit, cfg.train.judged, cfg.train.seed)
    # vision features of held-out photos; those of a tower that learned are computed anew, and not kept
    if cfg.train.train_type == "none":
        parts = fruit.images[chosen].split(8)
        with torch.no_grad():
            features = torch.cat([model.vision(model.vision.pixels(x.to(on))).cpu() for x in parts])
    else:
        features = tower.vision_features(model.vision, fruit.images[chosen])
    # accuracies, beside the linear probe on the same features
    found, answers, _ = evaluate.evaluate_photos(tokenizer, model, features.float(), fruit, chosen)
    metrics = {"photos": len(chosen), "LLaVA": found}
    if cfg.train.train_type != "none":
        metrics |= probe.yardsticks(model.vision, fruit, learn, chosen)
    # some photos with their generated answers
    shown = fruit_photos.spread(torch.arange(len(chosen)))
    texts = [answers[i] for i in shown]
    truths = [fruit_photos.name_of(fruit, chosen[i]) for i in shown]
    images = fruit.images[chosen[shown]]
    fruit_photos.draw(folder / "answers.png", images, texts, truths, fruit_photos.QUESTION)
    # forgetting: text loss of the model, and of its language model as it was
    pages = evaluate.paragraphs(min(TEXT_LOSS_PAGES, cfg.train.judged or TEXT_LOSS_PAGES))
    metrics["text loss"] = {"after": evaluate.text_loss(tokenizer, model.language, pages)}
    before, parts = llava_io.start_of(checkpoints.about(cfg), on)
    language = parts.language
    metrics["text loss"]["before"] = evaluate.text_loss(before, language, pages)
    return metrics
