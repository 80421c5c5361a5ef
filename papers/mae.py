"""Masked autoencoder (MAE): three quarters of the patches are masked, and reconstructed from the rest.

He et al. 2021, arXiv:2111.06377, in the order of its Section 3. Patches are masked at random; the encoder, a vision
transformer, reads those that are left and nothing else; a small decoder gets its states back with one shared mask token
in every gap, and draws the pixels. After training the decoder is thrown away. Section numbers are the paper's.

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
from torch import nn

from papers import photos, vit
from papers.mae_evaluation import evaluate
from papers.mae_figures import RATIOS, pictures
from papers.patches import moments, patchify
from utils import checkpoint, data, figures, run
from utils.run import check

WEIGHTS = vit.WEIGHTS
# width E, blocks, heads
DECODERS = {"light": (64, 2, 4), "heavy": (128, 6, 4), "paper": (512, 8, 16)}


@dataclass(frozen=True)
class Config:
    """Train a masked autoencoder on photos of fruit, show what it draws, and ask what its encoder has learned."""

    ratio: float = 0.75  # masking ratio: part of the patches that is hidden
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


def sincos_2d(dim, grid_h, grid_w, cls_token=False):
    """Position embedding: sines and cosines of a patch's column, then of its row: (N,dim), or (1+N,dim) behind zeros.

    Appendix A.1, "sine-cosine version"; column first, as in the authors' code. dim is a multiple of four.
    """
    needed = "sines and cosines of two coordinates need a multiple of 4 numbers"
    check(dim % 4 == 0, f"{needed}, not {dim}")
    frequency = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(grid_h), torch.arange(grid_w), indexing="ij")
    parts = []
    for axis in (column, row):
        angle = axis.flatten()[:, None] * frequency
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, 1).float()
    # the class token has no place
    return torch.cat([torch.zeros(1, dim), table]) if cls_token else table


def random_masking(x, ratio, noise=None):
    """Random masking, Sec. 3: keep the patches with the smallest noise, K = int(N (1 - ratio)) of them.

    (B,N,D) -> visible (B,K,D), mask (B,N) with 0 keep and 1 removed, and ids_restore (B,N), where each patch went.
    """
    b, n, d = x.shape
    keep = int(n * (1 - ratio))
    check(0 <= ratio < 1 and keep > 0, f"a ratio of {ratio} leaves none of {n} patches")
    if noise is None:
        noise = torch.rand(b, n, device=x.device)
    # a random order, and the way back
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)  # the inverse of a permutation is its argsort
    # the first K of that order are visible
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
        self.patch = patch
        self.norm_pix = norm_pix
        self.grid = (image // patch, image // patch)
        # encoder; positions are fixed
        self.embed = vit.PatchEmbedding(patch, channels, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        table = sincos_2d(width, *self.grid, cls_token=True)
        self.position = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList([vit.Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # decoder, narrower and not as deep
        narrow, blocks, decoder_heads = decoder
        self.to_decoder = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        table = sincos_2d(narrow, *self.grid, cls_token=True)
        self.decoder_position = nn.Parameter(table[None], requires_grad=False)
        decoder_blocks = [vit.Block(narrow, decoder_heads) for _ in range(blocks)]
        self.decoder_blocks = nn.ModuleList(decoder_blocks)
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
        # positions before the masking: afterwards the order is lost
        x = self.embed(x) + position[:, 1:]
        x, mask, ids_restore = random_masking(x, ratio, noise)
        # the class token in front, then the blocks
        cls = (self.cls + position[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, x, ids_restore, grid=None):
        """States (B,1+K,D) -> patches (B,N,P*P*C), with mask tokens for those that are missing. "MAE decoder"."""
        x = self.to_decoder(x)
        # a mask token for each patch that is missing
        gaps = self.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        # as they were after the shuffle, visible, then masked; and back in their places
        patches = torch.cat([x[:, 1:], gaps], 1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        position = vit.resize_positions(self.decoder_position, self.grid, grid or self.grid)
        x = torch.cat([x[:, :1], patches], 1) + position
        for block in self.decoder_blocks:
            x = block(x)
        return self.to_pixels(self.decoder_norm(x))[:, 1:]

    def forward_loss(self, imgs, pred, mask):
        """Mean squared error of masked patches, and of those alone; 0 if there are none. "Reconstruction target"."""
        target = patchify(imgs, self.patch)
        if self.norm_pix:
            mean, spread = moments(target)
            target = (target - mean) / spread
        error = ((pred - target) ** 2).mean(-1)
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def forward(self, imgs, ratio=0.75, noise=None):
        latent, mask, ids_restore = self.forward_encoder(imgs, ratio, noise)
        grid = (imgs.shape[2] // self.patch, imgs.shape[3] // self.patch)
        pred = self.forward_decoder(latent, ids_restore, grid)
        return self.forward_loss(imgs, pred, mask), pred, mask


def train(model, images, cfg):
    """Steps on random crops; yields the loss. images uint8 (N,C,H,W), twice as large as the network's."""
    device = next(model.parameters()).device
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, cfg.lr, betas=(0.9, 0.95), weight_decay=0.05)  # Table 8
    total = cfg.steps + 1
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, total_steps=total, pct_start=0.1)
    for _ in range(cfg.steps):
        # random crops of random photos
        pick = torch.randint(len(images), (cfg.batch,))
        x = photos.crops(data.to_float(images[pick]).to(device), cfg.image_size)
        # forward pass and loss, matrix products in bf16
        with run.autocast(device):
            value, _, _ = model(x, cfg.ratio)
        # backward pass, long gradients clipped
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        pace.step()
        yield value.item()


def build(image_size, patch, size="tiny", decoder="light", norm_pix=False, **_):
    """The masked autoencoder of these flags. Raises UserError if there is none."""
    check(size in vit.SIZES, f"there is no --size {size}; there are: {', '.join(vit.SIZES)}")
    check(decoder in DECODERS, f"there is no --decoder {decoder}; there are: {', '.join(DECODERS)}")
    divides = patch > 0 and image_size >= patch and image_size % patch == 0
    check(divides, f"--patch {patch} does not divide --image-size {image_size}")
    return MAE(image_size, patch, 3, *vit.SIZES[size], decoder=DECODERS[decoder], norm_pix=norm_pix)


def load(path, device="cpu"):
    """Weights written by this script -> (model, its config as a dict)."""
    return checkpoint.load_model(path, build, device)


def load_shipped(cfg, device):
    """The shipped weights -> (model, cfg with its flags). Raises UserError if cfg asks for another network."""
    model, meta = load(WEIGHTS, device)
    flags = {k: meta[k] for k in ("size", "decoder", "patch", "image_size", "norm_pix")}
    asked = [k for k in flags if getattr(cfg, k) not in (flags[k], getattr(Config(), k))]
    theirs = ", ".join(f"--{k} {flags[k]}" for k in asked)
    check(not asked, f"--pretrained weights have {theirs}; leave it out")
    return model, replace(cfg, **flags)


def main(cfg: Config) -> dict:
    """Train (or load), draw held-out photos, probe and fine-tune."""
    sizes = min(cfg.steps, cfg.batch) > 0 and 0 < cfg.lr < 1
    check(sizes, "--steps and --batch must be at least 1, --lr 0 to 1")
    check(cfg.image_size <= 1024, "--image-size must be at most 1024")
    check(0 < cfg.ratio < 1 and cfg.tune >= 0, "--ratio must be between 0 and 1, --tune at least 0")
    run.seed(cfg.seed)
    device = run.device(cfg.device)
    clock = run.Clock()
    metrics = {}

    # model; every ratio that will be drawn must leave a patch
    if cfg.pretrained:
        model, cfg = load_shipped(cfg, device)
    else:
        model = build(**asdict(cfg)).to(device)
    for ratio in (cfg.ratio, *RATIOS):
        random_masking(torch.zeros(1, model.grid[0] * model.grid[1], 1), ratio)

    # data: photos of fruit in the data set's own split, or pictures without one
    if cfg.data:
        fruit = None
        images = data.image_folder(cfg.data, 2 * cfg.image_size)
        learn = judge = slice(None)
    else:
        fruit = data.groceries(2 * cfg.image_size)
        images = fruit.images
        learn, judge = photos.split(fruit)
    folder = run.output(cfg.out, cfg)

    # train
    if not cfg.pretrained:
        losses = list(run.progress(train(model, images[learn], cfg), cfg.steps))
        label = "squared error of hidden pixels"
        figures.curves(folder / "loss.png", {"loss": losses}, "step", label, smooth=20)
        checkpoint.write(folder / "model.safetensors", model.state_dict(), asdict(cfg))
        metrics = {"final_loss": sum(losses[-50:]) / len(losses[-50:]), "train_seconds": clock()}
    model.eval()

    # draw eight held-out photos, measure on all of them
    unseen = images[judge]
    some = torch.linspace(0, len(unseen) - 1, min(8, len(unseen))).long()
    pictures(model, unseen[some], cfg, folder)
    if fruit:
        metrics |= evaluate(model, build, cfg, fruit, learn, judge)
    return run.report(folder, metrics, then=f"open {folder}/drawn.png")


if __name__ == "__main__":
    run.cli(main, Config)
