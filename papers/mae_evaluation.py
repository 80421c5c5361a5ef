"""Evaluation of the masked autoencoder's encoder: linear probes and fine-tuning, beside baselines without it.

He et al. 2021, arXiv:2111.06377, Sec. 4.

Shapes: N photos of C x H x W, D features of each.
"""

from dataclasses import asdict

import torch

from papers import photos, vit
from utils import data, run


@torch.no_grad()
def features(model, images, size):
    """Photos uint8 (N,C,H,W) -> mean of the states of all patches, without masking, (N,D)."""
    device = next(model.parameters()).device
    parts = photos.whole(images, size).split(128)
    found = []
    for x in run.bar(parts, len(parts), name="look", delay=2):
        states, _, _ = model.forward_encoder(x.to(device), 0)
        found.append(states[:, 1:].mean(1).cpu())
    return torch.cat(found)


def fine_tune(start, cfg, fruit, learn, judge):
    """Train a ViT on labels, its encoder from `start` (a state of an MAE) or from nothing: -> accuracies. Sec. 4."""
    torch.manual_seed(cfg.seed)
    model = vit.build(cfg.image_size, cfg.patch, cfg.size, pool="mean")
    # the weights of the encoder; the decoder is thrown away
    if start is not None:
        own = model.state_dict()
        encoder = {k: v for k, v in start.items() if k in own}
        model.load_state_dict(encoder, strict=False)
    model = model.to(run.device(cfg.device))
    # train on labels
    rules = vit.Config(steps=cfg.tune, image_size=cfg.image_size, lr=1e-3)
    steps = vit.train(model, fruit.images[learn], fruit.fine[learn], rules)
    for _ in run.progress(steps, cfg.tune):
        pass
    # measure on held-out photos
    logits = vit.predict(model.eval(), fruit.images[judge], cfg.image_size)
    return photos.accuracies(logits, fruit, judge)


def evaluate(model, build, cfg, fruit, learn, judge):
    """What the encoder is worth on held-out photos, beside what needs no encoder: {name: accuracies}.

    build: makes an untrained network of the run's flags, for comparison.
    """
    device = run.device(cfg.device)
    rows = {"majority": photos.majority(fruit, learn, judge)}
    # linear probes of pixels, of this encoder, of features that ImageNet's labels taught
    probed = {
        "pixels": photos.whole(fruit.images, 32).flatten(1),
        "this encoder": features(model, fruit.images, cfg.image_size),
        "ImageNet features": photos.imagenet(data.groceries(224).images, device),
    }
    for name, x in probed.items():
        rows[f"probe of {name}"] = photos.probed(x, fruit, learn, judge)
    # and of an encoder that learned nothing
    torch.manual_seed(cfg.seed)
    blank = build(**asdict(cfg)).to(device).eval()
    x = features(blank, fruit.images, cfg.image_size)
    rows["probe of an untrained encoder"] = photos.probed(x, fruit, learn, judge)
    # a few steps of training on labels, from nothing and from this encoder
    if cfg.tune:
        rows["trained from nothing"] = fine_tune(None, cfg, fruit, learn, judge)
        rows["fine-tuned"] = fine_tune(model.state_dict(), cfg, fruit, learn, judge)
    return rows
