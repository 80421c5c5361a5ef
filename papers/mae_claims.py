"""Claims and ablations of the masked autoencoder's paper, each as the smallest experiment that could refute it.

He et al. 2021, arXiv:2111.06377. A claim is measured by training twice or more, with one thing changed, and probing:
logistic regression on the mean of the encoder's states, on held-out photos of fruit. Speed is CPU time of a
step, forward and backward, one thread, in turns inside one process, as a ratio. What cannot be checked on a laptop:
that accuracy grows with size and schedule on ImageNet (Table 3, Fig. 7), and transfer to COCO and ADE20K (Sec. 5).

    python papers/mae_claims.py                   # every claim, briefly
    python papers/mae_claims.py --steps 400       # the table of papers/mae.md
    python papers/mae_claims.py --only speed
"""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from papers import mae, photos, vit
from papers.mae_evaluation import features
from papers.mae_figures import RATIOS
from utils import data, figures, run
from utils.run import check


@dataclass(frozen=True)
class Config:
    """Train masked autoencoders that differ in one thing, and compare what their encoders are worth and cost."""

    steps: int = 50  # of each training; the table of papers/mae.md has 400
    batch: int = 96  # photos a step
    only: str = ""  # claims whose name has this in it: ratio, decoder, pixels, tokens, speed
    repeat: int = 5  # timings of each kind of step
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/mae_claims"


class MaskTokensInEncoder(mae.MAE):
    """The other way: the encoder reads all patches, with a mask token in place of the masked ones. Table 1c."""

    def __init__(self, **rest):
        super().__init__(**rest)
        self.encoder_mask_token = nn.Parameter(0.02 * torch.randn(1, 1, self.cls.shape[-1]))

    def forward_encoder(self, x, ratio, noise=None):
        position = self.position
        x = self.embed(x)
        # mask tokens in place of the masked patches, positions for all
        _, mask, _ = mae.random_masking(x, ratio, noise)
        token = self.encoder_mask_token.to(x.dtype)
        x = torch.where(mask[..., None] == 1, token, x) + position[:, 1:]
        # the class token in front, then the blocks
        cls = (self.cls + position[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], 1)
        for block in self.blocks:
            x = block(x)
        # every patch is where it was
        here = torch.arange(x.shape[1] - 1, device=x.device)
        return self.norm(x), mask, here.expand(len(x), -1)


# What is compared, and what the paper says of it: linear probes on ImageNet of ViT-L, in percent
CLAIMS = {
    "ratio": "a high ratio teaches most: 58.9 at 0.2, 69.9 at 0.5, 73.5 at 0.75, 66.1 at 0.9 (Fig. 5)",
    "decoder": "a light decoder is enough: fine-tuned 84.8 with 1 block, 84.9 with 8; probed 65.5, 73.5 (Table 1a)",
    "pixels": "patches with mean and spread taken out help: 73.9 against 73.5 (Table 1d)",
    "tokens": "hidden words in the encoder harm: 59.6 against 73.5 (Table 1c)",
    "speed": "reading visible patches only is 3 times faster or more: 2.8 to 4.1 times at 0.75 (Table 2)",
}
COMPARED = {
    "ratio": ["ratio 0.25", "ratio 0.5", "plain", "ratio 0.9"],
    "decoder": ["plain", "heavy decoder"],
    "pixels": ["plain", "normalised pixels"],
    "tokens": ["plain", "hidden words in the encoder"],
    "speed": [],
}


def variants(cfg):
    """{name: (the network, the flags of its training)}; "plain" is the paper's choice, and differs in one from each."""
    plain = mae.Config(steps=cfg.steps, batch=cfg.batch, seed=cfg.seed)
    return {
        "ratio 0.25": (mae.MAE, replace(plain, ratio=0.25)),
        "ratio 0.5": (mae.MAE, replace(plain, ratio=0.5)),
        "plain": (mae.MAE, plain),
        "ratio 0.9": (mae.MAE, replace(plain, ratio=0.9)),
        "heavy decoder": (mae.MAE, replace(plain, decoder="heavy")),
        "normalised pixels": (mae.MAE, replace(plain, norm_pix=True)),
        "hidden words in the encoder": (MaskTokensInEncoder, plain),
    }


def network(kind, flags):
    """`mae.build`, for any kind of masked autoencoder."""
    width, depth, heads = vit.SIZES[flags.size]
    return kind(image=flags.image_size, patch=flags.patch, width=width, depth=depth, heads=heads,
                decoder=mae.DECODERS[flags.decoder], norm_pix=flags.norm_pix)  # fmt: skip


def worth(kind, flags, fruit, learn, judge, device):
    """Train, probe: accuracies with what one standard error of them is, and CPU seconds of a step."""
    # train
    torch.manual_seed(flags.seed)
    model = network(kind, flags).to(device)
    start = time.process_time()
    losses = list(run.progress(mae.train(model, fruit.images[learn], flags), flags.steps))
    seconds = (time.process_time() - start) / flags.steps
    # probe
    x = features(model.eval(), fruit.images, flags.image_size)
    row = photos.probed(x, fruit, learn, judge)
    error = (row["14 kinds"] * (1 - row["14 kinds"]) / len(judge)) ** 0.5
    return losses, row | {"standard error": error, "CPU seconds a step": seconds}


def speed(cfg, device):
    """How many times faster a step is than without masking: {what: {ratio: times}}."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(cfg.batch, 3, 64, 64, device=device)
    models = {name: mae.build(64, 8, decoder=name).to(device) for name in ("light", "heavy")}

    def seconds(work, ratio):
        start = clock(device)
        with run.autocast(device):
            out = work(ratio)
        out.float().square().mean().backward()
        return clock(device) - start

    # the encoder alone, and with each of the decoders
    kinds = {"encoder": lambda r: models["light"].forward_encoder(x, r)[0]}
    kinds |= {f"{name} decoder": lambda r, m=m: m(x, r)[1] for name, m in models.items()}
    found = {}
    for name, work in kinds.items():
        # once unmeasured, then all ratios in turn
        seconds(work, 0.0)
        times = []
        for _ in range(cfg.repeat):
            times.append([seconds(work, ratio) for ratio in (0.0, *RATIOS)])
        # column 0 is without masking
        found[name] = {}
        for i, ratio in enumerate(RATIOS, 1):
            found[name][f"{ratio:g}"] = statistics.median(t[0] / t[i] for t in times)
    torch.set_num_threads(threads)
    return found


def clock(device):
    """CPU seconds of this process; where a GPU works, seconds on the wall once it has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main(cfg: Config) -> dict:
    """Train every variant once, print each claim with what was found."""
    sizes = (cfg.steps, cfg.batch, cfg.repeat)
    check(min(sizes) > 0, "--steps, --batch and --repeat must be at least 1")
    claims = [name for name in CLAIMS if cfg.only in name]
    check(claims, f"there is no claim {cfg.only}; there are: {', '.join(CLAIMS)}")
    run.seed(cfg.seed)
    device = run.device(cfg.device)
    folder = run.output(cfg.out, cfg)
    fruit = data.groceries(128)
    learn, judge = photos.split(fruit)

    # train and probe every variant that the claims need
    rows: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    needed = {name for claim in claims for name in COMPARED[claim]}
    for name, (kind, flags) in variants(cfg).items():
        if name in needed:
            curves[name], rows[name] = worth(kind, flags, fruit, learn, judge, device)
            kinds, groups = rows[name]["14 kinds"], rows[name]["5 groups"]
            print(f"{name}: {kinds:.3f} of 14 kinds, {groups:.3f} of 5", flush=True)
    times = speed(cfg, device) if "speed" in claims else {}

    # each claim, and what was found
    for claim in claims:
        print(f"\n{claim}: {CLAIMS[claim]}")
        for name in COMPARED[claim]:
            values = [f"{k} {v:.3f}" for k, v in rows[name].items()]
            print("    " + "  ".join([f"{name:<28}", *values]))
        if claim == "speed":
            for name, row in times.items():
                values = [f"{v:.2f} times at {k}" for k, v in row.items()]
                print("    " + "  ".join([f"{name:<28}", *values]))
    print()
    draw(folder, curves, rows, times)
    return run.report(folder, rows | {f"speed, {name}": row for name, row in times.items()})


def draw(folder, curves, rows, times):
    """Losses, accuracies with two standard errors, and speed against the ratio."""
    if curves:
        figures.curves(folder / "loss.png", curves, "step", "loss", smooth=20, size=(6.4, 3.6))
        named = {}
        for name, row in rows.items():
            value = row["14 kinds"]
            error = 2 * row["standard error"]
            named[name] = (value, value - error, value + error)
        figures.bars(folder / "probe.png", named, x="accuracy of a linear probe, 14 kinds")
    if times:
        lines = {name: ([0, *map(float, row)], [1, *row.values()]) for name, row in times.items()}
        label = "part of the patches that is hidden"
        figures.curves(folder / "speed.png", lines, label, "times faster")


if __name__ == "__main__":
    run.cli(main, Config)
