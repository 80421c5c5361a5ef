"""Masked autoencoder (MAE): three quarters of the patches are masked, and reconstructed from the rest.

He et al. 2021, arXiv:2111.06377, in the order of its Section 3. Patches are hidden at random; the encoder, a vision
transformer, reads those that are left and nothing else; a small decoder gets its words back with one shared word for
"hidden" in every gap, and draws the pixels. After training the decoder is thrown away. Section numbers are the paper's.

Shapes: B images of C x H x W, patches of P x P pixels, N = (H/P)(W/P) tokens, of which K are kept; D and E are the
widths of encoder and decoder.
Differences from the paper: 732 photos of 64 x 64 instead of 1.3 million of 224 x 224; a network of 1.2 million weights;
pixels between -1 and 1 instead of standardised colours. What it claims is measured by `mae_claims.py`.

    python papers/mae.py                                     # train, draw, probe, fine-tune: 3 min on two CPU cores
    python papers/mae.py --pretrained                        # with the weights that come with the book
    python papers/mae.py --pretrained --data FOLDER          # draw your own pictures
    python papers/mae.py --norm-pix --ratio 0.5
    python papers/mae.py --size B --patch 16 --image-size 224 --batch 512 --steps 100000 --data FOLDER   # for a GPU
"""

from dataclasses import asdict, dataclass, replace

import torch
from einops import rearrange
from torch import nn

from papers import photos, vit
from utils import checkpoint, data, figures, run
from utils.run import check

WEIGHTS = vit.WEIGHTS
RATIOS = (0.25, 0.5, 0.75, 0.9)  # that are drawn side by side
# Width E, blocks, heads
DECODERS = {"light": (64, 2, 4), "heavy": (128, 6, 4), "paper": (512, 8, 16)}


@dataclass(frozen=True)
class Config:
    """Train a masked autoencoder on photos of fruit, show what it draws, and ask what its encoder has learned."""

    ratio: float = 0.75  # part of the patches that is hidden
    norm_pix: bool = False  # draw each patch with its own mean and spread taken out
    steps: int = 400  # training steps
    batch: int = 96  # photos a step
    lr: float = 2e-3  # peak learning rate
    size: str = "tiny"  # of the encoder: tiny, or ViT's B, L, H
    decoder: str = "light"  # light, heavy, or the paper's
    patch: int = 8  # side of a patch in pixels
    image_size: int = 64  # side of a photo in pixels
    data: str = ""  # a folder of pictures of your own; empty: photos of fruit
    tune: int = 100  # steps of fine-tuning, and of training from nothing beside it; 0: neither
    pretrained: bool = False  # begin with the shipped weights, and skip the training
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/mae"


def patchify(imgs, p):
    """Images (B,C,H,W) -> patches (B,N,P*P*C), row by row; within a patch pixel by pixel, colours together."""
    check(
        imgs.shape[2] % p == 0 and imgs.shape[3] % p == 0,
        f"{tuple(imgs.shape[2:])} pixels are no patches of {p}",
    )
    return rearrange(imgs, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(x, p, grid=None):
    """Patches (B,N,P*P*C) -> images (B,C,H,W), for a grid of (rows, columns); a square one if it is not given."""
    h, w = grid or (round(x.shape[1] ** 0.5),) * 2
    check(h * w == x.shape[1], f"{x.shape[1]} patches do not fill {h} rows of {w}")
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p)


def sincos_2d(dim, grid_h, grid_w, cls_token=False):
    """Where a patch stands, as sines and cosines of its column, then of its row: (N,dim), or (1+N,dim) behind zeros.

    Appendix A.1, "sine-cosine version"; column first, as in the authors' code. dim is a multiple of four.
    """
    check(
        dim % 4 == 0,
        f"sines and cosines of two coordinates need a multiple of 4 numbers, not {dim}",
    )
    frequency = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(grid_h), torch.arange(grid_w), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (column, row)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()
    return torch.cat([torch.zeros(1, dim), table]) if cls_token else table


def random_masking(x, ratio, noise=None):
    """Keep the patches with the smallest noise: (B,N,D) -> visible (B,K,D), mask (B,N) with 0 keep and 1 removed, and
    ids_restore (B,N), where each patch went. K = int(N (1 - ratio)). Sec. 3, "Masking"."""
    b, n, d = x.shape
    keep = int(n * (1 - ratio))
    check(0 <= ratio < 1 and keep > 0, f"a ratio of {ratio} leaves none of {n} patches")
    noise = torch.rand(b, n, device=x.device) if noise is None else noise
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)  # the inverse of a permutation is its argsort
    visible = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, d))
    return visible, (ids_restore >= keep).float(), ids_restore


class MAE(nn.Module):
    """images (B,C,H,W) -> loss, drawn patches (B,N,P*P*C), mask (B,N). Fig. 1."""

    def __init__(
        self,
        image=64,
        patch=8,
        channels=3,
        width=128,
        depth=6,
        heads=4,
        decoder=(64, 2, 4),
        norm_pix=False,
    ):
        super().__init__()
        narrow, blocks, eyes = decoder
        self.patch, self.norm_pix, self.grid = patch, norm_pix, (image // patch, image // patch)
        self.embed = vit.PatchEmbedding(patch, channels, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(
            sincos_2d(width, *self.grid, cls_token=True)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList([vit.Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_decoder = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        self.decoder_position = nn.Parameter(
            sincos_2d(narrow, *self.grid, cls_token=True)[None], requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList([vit.Block(narrow, eyes) for _ in range(blocks)])
        self.decoder_norm = nn.LayerNorm(narrow, eps=1e-6)
        self.to_pixels = nn.Linear(narrow, patch**2 * channels)
        self.initialise()

    def initialise(self):
        """Appendix A.1: Xavier for matrices, that of the patches among them; small normals for the two tokens."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.embed.projection.weight.flatten(1))
        nn.init.normal_(self.cls, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward_encoder(self, x, ratio, noise=None):
        """Images -> states of the class token and the K visible patches (B,1+K,D), mask, ids_restore. "MAE encoder"."""
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        position = vit.resize_positions(self.position, self.grid, grid)
        # Before the masking: afterwards nobody knows who stood where
        x = self.embed(x) + position[:, 1:]
        x, mask, ids_restore = random_masking(x, ratio, noise)
        x = torch.cat([(self.cls + position[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, x, ids_restore, grid=None):
        """States (B,1+K,D) -> patches (B,N,P*P*C): fill the gaps, put all in order, read, draw. "MAE decoder"."""
        x = self.to_decoder(x)
        gaps = self.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        # As they were after the shuffle: visible, then hidden
        patches = torch.cat([x[:, 1:], gaps], 1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], 1) + vit.resize_positions(
            self.decoder_position, self.grid, grid or self.grid
        )
        for block in self.decoder_blocks:
            x = block(x)
        return self.to_pixels(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, imgs, pred, mask):
        """Mean squared error of hidden patches, and of those alone; 0 if there are none. "Reconstruction target"."""
        target = patchify(imgs, self.patch)
        if self.norm_pix:
            mean, spread = moments(target)
            target = (target - mean) / spread
        return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum().clamp(min=1)

    def forward(self, imgs, ratio=0.75, noise=None):
        latent, mask, ids_restore = self.forward_encoder(imgs, ratio, noise)
        grid = (imgs.shape[2] // self.patch, imgs.shape[3] // self.patch)
        pred = self.forward_decoder(latent, ids_restore, grid)
        return self.forward_loss(imgs, pred, mask), pred, mask


def moments(patches):
    """Mean and standard deviation of each patch: (B,N,1) twice. "Reconstruction target"."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
def draw(model, imgs, ratio, noise=None):
    """-> images (B,C,H,W): with holes, as drawn, and the drawn patches pasted among the visible ones.

    With `norm_pix` the network says nothing about mean and spread of a patch: they are taken from the photo.
    """
    _, pred, mask = model(imgs, ratio, noise)
    patches, hidden = patchify(imgs, model.patch), mask[..., None]
    if model.norm_pix:
        mean, spread = moments(patches)
        pred = pred * spread + mean
    grid = (imgs.shape[2] // model.patch, imgs.shape[3] // model.patch)
    views = (patches * (1 - hidden) + 0.6 * hidden, pred, patches * (1 - hidden) + pred * hidden)
    return [unpatchify(x, model.patch, grid).float() for x in views]


def train(model, images, cfg):
    """Steps on random crops; yields the loss. images uint8 (N,C,H,W), twice as large as the network's."""
    device = next(model.parameters()).device
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, cfg.lr, betas=(0.9, 0.95), weight_decay=0.05)  # Table 8
    pace = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, cfg.lr, total_steps=cfg.steps + 1, pct_start=0.1
    )
    for _ in range(cfg.steps):
        pick = torch.randint(len(images), (cfg.batch,))
        x = photos.crops(data.to_float(images[pick]).to(device), cfg.image_size)
        with run.autocast(device):
            value, _, _ = model(x, cfg.ratio)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        pace.step()
        yield value.item()


@torch.no_grad()
def features(model, images, size):
    """Photos uint8 (N,C,H,W) -> mean of the states of all patches, nothing hidden, (N,D)."""
    device = next(model.parameters()).device
    parts = photos.whole(images, size).split(128)
    shown = run.bar(parts, len(parts), name="look", delay=2)
    return torch.cat(
        [model.forward_encoder(x.to(device), 0)[0][:, 1:].mean(1).cpu() for x in shown]
    )


def build(image_size, patch, size="tiny", decoder="light", norm_pix=False, **_):
    check(size in vit.SIZES, f"there is no --size {size}; there are: {', '.join(vit.SIZES)}")
    check(decoder in DECODERS, f"there is no --decoder {decoder}; there are: {', '.join(DECODERS)}")
    check(patch > 0 and image_size >= patch and image_size % patch == 0,
          f"--patch {patch} does not divide --image-size {image_size}")  # fmt: skip
    return MAE(image_size, patch, 3, *vit.SIZES[size], decoder=DECODERS[decoder], norm_pix=norm_pix)


def load(path, device="cpu"):
    """Weights written by this script -> (model, its config as a dict)."""
    return checkpoint.load_model(path, build, device)


def tuned(start, cfg, fruit, learn, judge):
    """Train a ViT on labels, its encoder from `start` (a state of an MAE) or from nothing: -> accuracies. Sec. 4."""
    torch.manual_seed(cfg.seed)
    model = vit.build(cfg.image_size, cfg.patch, cfg.size, pool="mean")
    if start is not None:
        own = model.state_dict()
        model.load_state_dict({k: v for k, v in start.items() if k in own}, strict=False)
    model = model.to(run.device(cfg.device))
    rules = vit.Config(steps=cfg.tune, image_size=cfg.image_size, lr=1e-3)
    for _ in run.progress(
        vit.train(model, fruit.images[learn], fruit.fine[learn], rules), cfg.tune
    ):
        pass
    return photos.accuracies(
        vit.predict(model.eval(), fruit.images[judge], cfg.image_size), fruit, judge
    )


def judged(model, cfg, fruit, learn, judge):
    """What the encoder is worth on photos it has not seen, beside what needs no encoder: {name: accuracies}."""
    device = run.device(cfg.device)
    small, seen = (
        photos.whole(fruit.images, 32).flatten(1),
        features(model, fruit.images, cfg.image_size),
    )
    labelled = photos.imagenet(data.groceries(224).images, device)
    rows = {"majority": photos.majority(fruit, learn, judge)}
    for name, x in {"pixels": small, "this encoder": seen, "ImageNet features": labelled}.items():
        rows[f"probe of {name}"] = photos.probed(x, fruit, learn, judge)
    torch.manual_seed(cfg.seed)
    blank = features(build(**asdict(cfg)).to(device).eval(), fruit.images, cfg.image_size)
    rows["probe of an untrained encoder"] = photos.probed(blank, fruit, learn, judge)
    if cfg.tune:
        rows["trained from nothing"] = tuned(None, cfg, fruit, learn, judge)
        rows["fine-tuned"] = tuned(model.state_dict(), cfg, fruit, learn, judge)
    return rows


def pictures(model, images, cfg, folder):
    """Two figures: what is drawn at one ratio, and what at several."""
    device = next(model.parameters()).device
    x = photos.whole(images, cfg.image_size).to(device)
    noise = torch.rand(len(x), (cfg.image_size // cfg.patch) ** 2, device=device)
    drawn = dict(zip(("hidden", "drawn", "pasted"), draw(model, x, cfg.ratio, noise)))
    figures.rows(folder / "drawn.png", {"photo": x} | drawn, scale=0.9)
    views = {f"{r:.0%}, {name}": view for r in RATIOS for name, view in
             zip(("hidden", "pasted"), draw(model, x, r, noise)[::2])}  # fmt: skip
    figures.rows(folder / "ratios.png", {"photo": x} | views, scale=0.7)


def main(cfg: Config) -> dict:
    """Train (or load), draw photos that it has not seen, probe and fine-tune."""
    check(
        min(cfg.steps, cfg.batch) > 0 and 0 < cfg.lr < 1,
        "--steps and --batch must be at least 1, --lr 0 to 1",
    )
    check(cfg.image_size <= 1024, "--image-size must be at most 1024")
    check(0 < cfg.ratio < 1 and cfg.tune >= 0, "--ratio must be between 0 and 1, --tune at least 0")
    run.seed(cfg.seed)
    device, clock, metrics = run.device(cfg.device), run.Clock(), {}
    if cfg.pretrained:
        model, then = load(WEIGHTS, device)
        theirs = {k: then[k] for k in ("size", "decoder", "patch", "image_size", "norm_pix")}
        asked = [k for k in theirs if getattr(cfg, k) not in (theirs[k], getattr(Config(), k))]
        check(
            not asked,
            f"--pretrained weights have {', '.join(f'--{k} {theirs[k]}' for k in asked)}; leave it out",
        )
        cfg = replace(cfg, **theirs)
    else:
        model = build(**asdict(cfg)).to(device)
    for ratio in (cfg.ratio, *RATIOS):  # all that will be drawn
        random_masking(torch.zeros(1, model.grid[0] * model.grid[1], 1), ratio)
    fruit = None if cfg.data else data.groceries(2 * cfg.image_size)
    learn, judge = photos.split(fruit) if fruit else (slice(None), slice(None))
    images = fruit.images if fruit else data.image_folder(cfg.data, 2 * cfg.image_size)
    folder = run.output(cfg.out, cfg)
    if not cfg.pretrained:
        losses = list(run.progress(train(model, images[learn], cfg), cfg.steps))
        figures.curves(
            folder / "loss.png",
            {"loss": losses},
            "step",
            "squared error of hidden pixels",
            smooth=20,
        )
        checkpoint.write(folder / "model.safetensors", model.state_dict(), asdict(cfg))
        metrics = {"final_loss": sum(losses[-50:]) / len(losses[-50:]), "train_seconds": clock()}
    model.eval()
    unseen = images[judge]
    pictures(
        model, unseen[torch.linspace(0, len(unseen) - 1, min(8, len(unseen))).long()], cfg, folder
    )
    if fruit:
        metrics |= judged(model, cfg, fruit, learn, judge)
    return run.report(folder, metrics, then=f"open {folder}/drawn.png")


if __name__ == "__main__":
    run.cli(main, Config)
