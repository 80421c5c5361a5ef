"""Two vision encoders at once: channels side by side against the spatial aggregator, at equal tokens.

Small connectors (spatial_aggregator.py) on the frozen maps of EfficientNet-lite0, 7 x 7 of 224 pixels, and of
the masked autoencoder, 14 x 14 of 112: 49 tokens each, whose mean says which of 14 kinds of fruit a photo
shows, or colour and shape of a picture of easy-VQA (both must be right). Beside them either encoder alone.

    python vlm/two_encoders.py       # 4 CPU min
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from utils import data, run
from utils.run import check
from vlm import easy_vqa_baselines, easy_vqa_data, encoders, probe, tower
from vlm.easy_vqa_data import COLOURS, SHAPES
from vlm.spatial_aggregator import ChannelConcat, SpatialAggregator

SIDE = 7  # of the grid of tokens


@dataclass(frozen=True)
class Config:
    """Train connectors of one and of two encoders, and compare them."""

    judged: int = 300  # held-out photos of fruit
    pictures: int = 600  # of easy-VQA to learn from, half as many to be judged by; 0: none
    seeds: int = 3  # trainings of each connector
    steps: int = 120  # of a training
    batch: int = 32
    lr: float = 1e-3
    width: int = 192  # of the tokens behind a connector
    out: str = "outputs/two_encoders"


class Heads(nn.Module):
    """A connector for the maps of some encoders, and a linear head for each question about the picture."""

    def __init__(self, join, which, width, classes):
        super().__init__()
        self.join = join
        self.which = which  # numbers of the encoders that it reads
        self.heads = nn.ModuleList([nn.Linear(width, n) for n in classes])

    def forward(self, features):
        x = self.join([features[k] for k in self.which]).mean(1)
        return [head(x) for head in self.heads]


def train(model, features, truths, cfg):
    """The loop; yields the loss. features: of each encoder (n,N_k,D_k); truths (n,) of each head."""
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=0.01)
    for step in range(cfg.steps):
        # warm-up, then a line to zero in the second half
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / 10, 2 * (cfg.steps - step) / cfg.steps)
        pick = torch.randint(len(truths[0]), (cfg.batch,))
        logits = model([x[pick].float() for x in features])
        losses = [F.cross_entropy(out, y[pick]) for out, y in zip(logits, truths)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def score(model, features, truths):
    """Share of held-out pictures of which every head is right."""
    logits = model.eval()([x.float() for x in features])
    right = torch.stack([out.argmax(-1) == y for out, y in zip(logits, truths)])
    return probe.share(right.all(0))


def joins(dims, width):
    """{row of the table: (encoders it reads, function that makes its connector)}."""
    return {
        "EfficientNet": ((0,), lambda: ChannelConcat(dims[:1], width, SIDE)),
        "MAE": ((1,), lambda: ChannelConcat(dims[1:], width, SIDE)),
        "channels of both": ((0, 1), lambda: ChannelConcat(dims, width, SIDE)),
        "spatial aggregator": ((0, 1), lambda: SpatialAggregator(dims, width, SIDE)),
    }


def join_study(cfg, learn, judge):
    """Rows: accuracy, mean, least and most over the seeds, parameters, tokens, CPU ms of a step.

    learn, judge: (features of each encoder, truths of each head)."""
    dims = [x.shape[-1] for x in learn[0]]
    classes = [int(y.max()) + 1 for y in learn[1]]
    found = {}
    for name, (which, make) in joins(dims, cfg.width).items():
        scores = []
        for seed in range(cfg.seeds):
            run.seed(seed)
            model = Heads(make(), which, cfg.width, classes)
            start = time.process_time()
            for _ in run.progress(train(model, learn[0], learn[1], cfg), cfg.steps):
                pass
            seconds = (time.process_time() - start) / cfg.steps
            scores.append(score(model, *judge))
        size = sum(p.numel() for p in model.join.parameters())
        row = {"accuracy": sum(scores) / len(scores), "least": min(scores), "most": max(scores)}
        found[name] = row | {"parameters": size, "tokens": SIDE**2, "CPU ms": 1000 * seconds}
    return found


def pair():
    """The two encoders: maps of 7 x 7 and of 14 x 14."""
    return [tower.load("efficientnet"), tower.load("mae", size=112)]


def fruit_maps(both, chosen):
    """-> (features of each encoder, [kinds]) of photos of fruit."""
    features = [tower.vision_features(one, encoders.photos(one.size, chosen)) for one in both]
    return features, [data.groceries(64).fine[chosen]]


def scene_maps(both, split, count):
    """-> (features of each encoder, [colours, shapes]) of pictures of easy-VQA whose scene is settled."""
    known = easy_vqa_baselines.known_scenes(easy_vqa_data.questions(split))
    numbers = sorted(known)[:count]
    features = [easy_vqa_baselines.picture_features(one, split, numbers) for one in both]
    colours = torch.tensor([COLOURS.index(known[i][0]) for i in numbers])
    shapes = torch.tensor([SHAPES.index(known[i][1]) for i in numbers])
    return features, [colours, shapes]


def main(cfg: Config) -> dict:
    """Every connector on both data sets."""
    least = min(cfg.judged, cfg.seeds, cfg.steps, cfg.batch, cfg.width)
    check(least > 0 and cfg.pictures != 1 and cfg.lr > 0, "all numbers must be above 0")
    folder = run.output(cfg.out, cfg)
    both = pair()
    rows = {}
    learn, judge = (fruit_maps(both, part) for part in encoders.parts(cfg.judged))
    for name, row in join_study(cfg, learn, judge).items():
        rows[f"fruit: {name}"] = row
    if cfg.pictures > 1:
        learn = scene_maps(both, "train", cfg.pictures)
        judge = scene_maps(both, "test", cfg.pictures // 2)
        for name, row in join_study(cfg, learn, judge).items():
            rows[f"easy-VQA: {name}"] = row
    return run.report(folder, rows)


if __name__ == "__main__":
    run.cli(main, Config)
