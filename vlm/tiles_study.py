"""Any-resolution tiles against none: a small emoji in a large picture, learned with and without, for as many steps.

A picture of 448 x 448 pixels holds one of eight emoji somewhere, 48 pixels wide. An encoder of 224 pixels
sees it in 24; in one of four tiles in all 48. Both runs are vlm/train.py on the same rows, pictures, seed
and number of steps, and are judged by answer likelihood on other pictures. Before them a linear probe says
what the vision features hold. The figure cuts a photo into its tiles and counts their tokens.

    python vlm/tiles_study.py --no-train        # the table of vlm/tiles.md: the probe alone
    python vlm/tiles_study.py                   # both runs, too
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils import data, figures, run
from utils.run import check
from vlm import (
    anyres,
    conversations,
    evaluate,
    generation,
    llava,
    tile_data,
    tower,
    train,
    views,
)
from vlm.train_config import Config as TrainConfig
from vlm.train_config import changed

NAMES = ("banana", "dog face", "soccer ball", "automobile", "sunflower", "key", "penguin", "house")
QUESTION = "What is in the picture?"
SIDE = 448  # of a picture: two of the encoder's 224
PHOTO = Path(__file__).parent / "figures/photo.jpg"


@dataclass(frozen=True)
class Config:
    """Train with and without tiles, put the results side by side, and draw a photo in tiles."""

    pictures: int = 480  # to learn from
    judged: int = 96  # other pictures
    steps: int = 100  # of each run
    batch: int = 8  # conversations a step
    train: bool = True  # both runs; else the linear probe alone
    probe_steps: int = 300  # of 32 pictures
    tiles: int = 4  # at most so many of a picture, in the second run
    emoji: int = 48  # width of an emoji in the picture, pixels
    photo: str = str(PHOTO)  # that is drawn in tiles
    seed: int = 0
    out: str = "outputs/tiles_study"


def scene(emoji, size, random):
    """An emoji uint8 (3,h,w) of `size` pixels somewhere on a noisy ground of a random colour: uint8
    (3,SIDE,SIDE)."""
    ground = random.integers(64, 192, (3, 1, 1)) + random.normal(0, 12, (3, SIDE, SIDE))
    picture = torch.from_numpy(ground.clip(0, 255).astype(np.uint8))
    y, x = random.integers(SIDE - size + 1, size=2)
    small = anyres.resize(emoji, (size, size))
    picture[:, y : y + size, x : x + size] = small
    return picture


def write_scenes(folder, count, cfg, part):
    """Pictures as files and chat.json -> names of what each shows."""
    folder.mkdir(parents=True, exist_ok=True)
    images, captions, _ = data.emoji(72)
    random = np.random.default_rng([cfg.seed, part])
    rows = []
    shown = []
    for number in range(count):
        name = NAMES[number % len(NAMES)]
        picture = scene(images[captions.index(name)], cfg.emoji, random)
        file = f"{number:04}.png"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / file)
        rows.append(conversations.row(file, file, [(QUESTION, name)]))
        shown.append(name)
    run.write_json(folder / "chat.json", rows)
    return shown


def place_features(vision_tower, folder, count, tiles):
    """Vision features of all places of pictures, of the whole, and with tiles of those, too: bf16
    (count, K, D)."""
    paths = [folder / f"{number:04}.png" for number in range(count)]
    if not tiles:
        return views.features(vision_tower, paths).tensor()[0]
    grids = anyres.candidates(vision_tower.size, tiles)
    sizes = [(SIDE, SIDE)] * count
    found = tile_data.tile_features(vision_tower, paths, sizes, grids, views.Files())
    return torch.stack([found(number).flatten(0, 1) for number in range(count)])


def probe(learn, names, judged, truths, cfg):
    """Multiple-instance probe: a matrix scores every place, the largest decides -> fraction of right
    answers on other pictures.

    Features (P,K,D); log sum exp over the places takes the place of the largest while it learns.
    """
    run.seed(cfg.seed)
    labels = torch.tensor([NAMES.index(name) for name in names])
    weight = torch.zeros(learn.shape[-1], len(NAMES), requires_grad=True)
    optimizer = torch.optim.AdamW([weight], 1e-3)
    for _ in range(cfg.probe_steps):
        chosen = torch.randint(len(learn), (32,))
        scores = (learn[chosen].float() @ weight).logsumexp(1)
        loss = F.cross_entropy(scores, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = (judged.float() @ weight.detach()).logsumexp(1).argmax(1)
    right = found == torch.tensor([NAMES.index(name) for name in truths])
    return float(right.float().mean())


def train_run(cfg, folder, tiles):
    """One run of vlm/train.py -> its metrics."""
    flags = changed(
        TrainConfig(),
        data_path=(str(folder / "learn/chat.json"),),
        tiles=tiles,
        views=1,
        text_share=0.0,
        steps=cfg.steps,
        batch_size=cfg.batch,
        warmup_steps=max(1, cfg.steps // 10),
        seed=cfg.seed,
        out=str(folder / f"tiles-{tiles}"),
    )
    return train.main(flags)


@torch.no_grad()
def accuracy(path, folder, shown):
    """Fraction of pictures whose most probable name is right; image tokens of a picture."""
    tokenizer, model = llava.load(path)
    right = 0
    tokens = 0
    for number, name in enumerate(shown):
        picture = data.read_image(folder / f"{number:04}.png", 0)
        seen = generation.photo_embeddings(model, picture)
        tokens = seen.shape[1]
        ids = generation.prompt_ids(tokenizer, model, QUESTION, tokens)
        with run.autocast(seen.device):
            about = (tokenizer, model, model.embed(ids, seen), NAMES, QUESTION)
            log_p = evaluate.rank_answers(*about)
        right += NAMES[int(log_p[0].argmax())] == name
    return right / len(shown), tokens


def draw_tiles(path, photo, side, most, g):
    """A photo whole and in its tiles, with the image tokens of each: g x g, and newlines."""
    import matplotlib.pyplot as plt

    image = data.read_image(Path(photo), 0)
    size = tuple(image.shape[1:])
    grids = anyres.candidates(side, most)
    rows, columns = anyres.grid_shape(size, side, grids)
    parts = anyres.tiles(image, side, grids)
    shape = (2.2 * (columns + 1), 2.4 * rows)
    figure, axes = plt.subplots(rows, columns + 1, figsize=shape, squeeze=False)
    for ax in axes[:, 0]:
        ax.axis("off")
    places = [axes[0, 0], *axes[:, 1:].flatten()]
    for number, (ax, part) in enumerate(zip(places, parts)):
        ax.imshow(part.permute(1, 2, 0))
        ax.axis("off")
        ax.set_title(f"{'tile' if number else 'whole'}: {g} x {g} tokens", fontsize=8)
    above, beside = anyres.padding(size, (rows * g, columns * g))
    high, wide = rows * g - 2 * above, columns * g - 2 * beside
    total = anyres.count_tokens(size, side, g, grids)
    text = f"{g * g} of the whole, {high} rows of {wide} and a newline: {total} tokens"
    figure.suptitle(f"{size[0]} x {size[1]} pixels, {text}", fontsize=9)
    return figures.close(figure, path)


def main(cfg: Config) -> dict:
    """Draw a photo in tiles, then both runs."""
    least = min(cfg.pictures, cfg.judged, cfg.steps, cfg.batch)
    check(least > 0, "--pictures, --judged, --steps, --batch: above 0")
    check(cfg.probe_steps > 0, "--probe_steps must be above 0")
    check(cfg.tiles > 1, "--tiles: 2 or more; the other run has none")
    check(8 <= cfg.emoji <= SIDE, f"--emoji: 8 to {SIDE} pixels")
    folder = run.output(cfg.out, cfg)
    draw_tiles(folder / "tiles.png", cfg.photo, 224, cfg.tiles, 3)
    write_scenes(folder / "learn", cfg.pictures, cfg, 0)
    shown = write_scenes(folder / "judged", cfg.judged, cfg, 1)
    # linear probe on the features alone
    rows = {}
    vision_tower = tower.load("efficientnet")
    names = [NAMES[number % len(NAMES)] for number in range(cfg.pictures)]
    for tiles in (0, cfg.tiles):
        learn = place_features(vision_tower, folder / "learn", cfg.pictures, tiles)
        judged = place_features(vision_tower, folder / "judged", cfg.judged, tiles)
        share = probe(learn, names, judged, shown, cfg)
        rows[f"probe, --tiles {tiles}"] = {"right of 8": share, "places": learn.shape[1]}
    # both runs of training
    for tiles in (0, cfg.tiles) if cfg.train else ():
        clock = time.process_time()
        found = train_run(cfg, folder, tiles)
        seconds = time.process_time() - clock
        path = folder / f"tiles-{tiles}/model.safetensors"
        share, tokens = accuracy(path, folder / "judged", shown)
        rows[f"--tiles {tiles}"] = {
            "right of 8": share,
            "tokens of a picture": tokens,
            "final loss": found["final_loss"],
            "CPU s of the steps": found["train_cpu_seconds"],
            "CPU s of all": seconds,
        }
    return run.report(folder, rows, "python vlm/train.py --tiles 4 --data CHAT.json")


if __name__ == "__main__":
    run.cli(main, Config)
