"""Flamingo: gated cross-attention, with zero-initialised tanh gates, between the layers of a frozen language model.

Alayrac et al. 2022, arXiv:2204.14198; sections and figures are those of its second version. A
perceiver resampler makes a few visual tokens (latents) out of each photo; the new layers
(gated_cross_attention.py) attend to them. At zero the gates change nothing: training begins with
exactly the old language model. It is trained on interleaved image-text chains, photos and their
names, and evaluated by chains that lack their last name (few_shot.py).

Shapes: features (B,N,D) of a photo, latents (B,J,M,V) of J photos in a text, M each; text (B,T),
its states (B,T,E).
Differences from the paper: 1.9 M new parameters, not 10 000 M; 732 photos of fruit, not 2300 M
pictures; the resampler is one layer deep, with ReLU as in transformers' Idefics, and a photo has no
time that would need an embedding.

    python vlm/flamingo.py                     # 5 minutes on two cores
    python vlm/flamingo.py --pretrained        # weights of the book, no training
    python vlm/flamingo.py --every 10 --latents 4 --shots 0 1 8
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import nn

from deploy import decode
from utils import checkpoint, data, figures, pretrained, run
from utils.run import check
from vlm import connector, few_shot, flamingo_figures, fruit_photos, probe, tower
from vlm.gated_cross_attention import GatedCrossAttention, media_mask, visible
from vlm.prompts import IMAGE

WEIGHTS = Path(__file__).parent / "weights" / "flamingo.safetensors"
# What parameters are called in files that were written before they had the names of today
OLD_NAMES = {
    "words": "new_embeddings",
    "resampler.inlet.weight": "resampler.input_proj.weight",
    "resampler.inlet.bias": "resampler.input_proj.bias",
}


@dataclass(frozen=True)
class Config:
    """Teach a frozen language model to name fruit, and see what examples in the prompt are
    worth."""

    steps: int = 120  # training steps
    batch: int = 48  # photos a step, in chains that are all equally long
    longest: int = 5  # photos in the longest chain
    # photos in the shortest one; as many as in the longest: all chains are equally long
    shortest: int = 1
    lr: float = 2e-3  # of new layers; the gates' is ten times that
    every: int = 6  # a new layer before every so many-th layer of the language model
    latents: int = 16  # M, vectors that stand for a photo
    shots: tuple[int, ...] = (0, 2, 4)  # few-shot examples in the prompt
    judged: int = 300  # photos to be judged by; 0: all 1322
    language: str = "smollm2"  # the language model: smollm2, or a folder or hub id
    pretrained: bool = False  # start from the shipped weights and skip the training
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/flamingo"


class Flamingo(nn.Module):
    """A frozen language model, a resampler, and gated layers before every `every`-th layer of it.
    Fig. 3.

    new_ids: of <image> and <|endofchunk|>. Their two embeddings, for reading and for writing, are
    all of the vocabulary that is trained.
    """

    new_ids: torch.Tensor

    def __init__(self, language, new_ids, dim_in=1280, every=6, latents=16, latent_width=192):
        super().__init__()
        # the language model stays frozen
        self.language = language.requires_grad_(False)
        layers = decoder_layers(language)
        width = language.config.get_text_config().hidden_size
        count = len(layers)
        check(0 < every <= count, f"--every {every}: the language model has {count} layers")
        # new: perceiver resampler, photos to latents
        self.latents = latents
        self.resampler = connector.PerceiverResampler(
            dim_in, latent_width, 1, latents, heads=6, kv_heads=6, use_rmsnorm_swiglu=False
        )
        # new: a gated cross-attention layer before every `every`-th layer
        self.cross_layer_ids = range(0, count, every)
        self.cross = nn.ModuleList(
            GatedCrossAttention(width, latent_width) for _ in self.cross_layer_ids
        )
        # new: two token embeddings, which begin as random words of the table
        self.register_buffer("new_ids", torch.tensor(new_ids), persistent=False)
        table = language.get_input_embeddings().weight.float()
        drawn = torch.randn(len(new_ids), width)
        self.new_embeddings = nn.Parameter(table.mean(0) + table.std() * drawn)
        # latents and mask, while the language model reads; its layers call the new ones through hooks
        self.visual_context = None
        for i, cross in zip(self.cross_layer_ids, self.cross):
            hook = partial(self.cross_attention_hook, cross)
            layers[i].register_forward_pre_hook(hook, with_kwargs=True)

    def cross_attention_hook(self, cross, layer, args, kwargs):
        """Before a layer of the language model: what enters it goes through gated cross-attention
        first."""
        if self.visual_context is None:
            return None
        latents, mask = self.visual_context
        states = args[0]
        seen = cross(states.float(), latents, mask).to(states.dtype)
        return (seen, *args[1:]), kwargs

    def resample(self, features):
        """Perceiver resampler: features (B,J,N,D) -> latents (B,J,M,V). Sec. 2.1, Fig. 5."""
        latents = self.resampler(features.flatten(0, 1))  # (B*J,N,D) -> (B*J,M,V)
        return rearrange(latents, "(b j) m v -> b j m v", b=len(features))

    def embed(self, ids):
        """(B,T) -> (B,T,E): the embeddings of the language model, but for those of the new
        tokens."""
        is_new = ids[..., None] == self.new_ids  # (B,T,2)
        text = self.language.get_input_embeddings()(ids.where(~is_new.any(-1), 0))
        new = (is_new.float() @ self.new_embeddings).to(text.dtype)
        return torch.where(is_new.any(-1, keepdim=True), new, text)

    def states(self, ids, latents=None, before=0, cache=None):
        """Last hidden states of text with photos: (B,T), (B,J,M,V) -> (B,T,E).

        before: photos that stand before this text, in what the cache remembers. Raises UserError for
        more tokens <image> than photos: the last of them would see nothing, without a word.
        """
        if latents is not None:
            # cross-attention mask: which latents each token sees
            counts = media_mask(ids, self.new_ids[0], before)
            photos, per_photo = latents.shape[1:3]
            most = int(counts.max())
            check(most <= photos, f"a text has {most} words {IMAGE}, but {photos} photos")
            mask = visible(counts, photos, per_photo)
            self.visual_context = (latents.flatten(1, 2), mask)
        # the language model reads; its hooks find the visual context
        try:
            out = self.language.base_model(
                inputs_embeds=self.embed(ids), cache=cache, use_cache=cache is not None
            )
        finally:
            self.visual_context = None
        return out.last_hidden_state

    def head(self, states):
        """(...,E) -> logits (...,words): those of the new tokens by their own embeddings."""
        logits = self.language.get_output_embeddings()(states)
        new = (states.float() @ self.new_embeddings.T).to(logits.dtype)
        return logits.index_copy(-1, self.new_ids, new)

    def forward(self, ids, latents=None, before=0, cache=None):
        return self.head(self.states(ids, latents, before, cache))

    def gates(self):
        """tanh(alpha) of (attention, mlp) by layer: (2, layers)."""
        alphas = [torch.cat([layer.gate_attention, layer.gate_mlp]) for layer in self.cross]
        return torch.stack(alphas, 1).detach().tanh()

    def trainable_parameters(self):
        """All that is trained, by name."""
        return {k: p for k, p in self.named_parameters() if p.requires_grad}


def decoder_layers(language):
    """The layers of any causal language model of transformers."""
    count = language.config.get_text_config().num_hidden_layers
    return next(m for m in language.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def load(path, language, new_ids, on="cpu"):
    """Weights written by this script, in front of the same language model -> Flamingo, frozen."""
    tensors, meta = checkpoint.read(path)
    tensors = {OLD_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        model = Flamingo(language, new_ids, **meta).to(on)
        parts = model.trainable_parameters()
        if {name: p.shape for name, p in parts.items()} != shapes:
            raise KeyError(path)
    except (TypeError, KeyError):
        raise run.UserError(
            f"{path} belongs to another language model or script: leave out --pretrained"
        ) from None
    with torch.no_grad():
        for name, p in parts.items():
            p.copy_(tensors[name])
    return model.eval().requires_grad_(False)


def build(shipped, language, new_ids, shape, on):
    """The model with shipped weights, or with untrained new layers of this shape."""
    if shipped:
        return load(WEIGHTS, language, new_ids, on)
    return Flamingo(language, new_ids, **shape).to(on)


def check_flags(cfg):
    """Raises UserError for flags out of range, or for another network than that of the shipped
    weights."""
    counts = (cfg.steps, cfg.batch, cfg.longest, cfg.latents)
    check(min(counts) > 0 and cfg.lr > 0, "all numbers must be above 0")
    check(1 <= cfg.shortest <= cfg.longest, "--shortest must be at least 1 and at most --longest")
    check(cfg.judged >= 0 and cfg.every > 0, "--judged must be 0 or more, --every at least 1")
    check(cfg.shots and min(cfg.shots) >= 0, "--shots takes one number or more, none below 0")
    if not cfg.pretrained:
        return
    check(WEIGHTS.is_file(), f"there are no weights at {WEIGHTS}: leave out --pretrained")
    shipped = checkpoint.read(WEIGHTS)[1]
    for name, asked in (("every", cfg.every), ("latents", cfg.latents)):
        has = f"the weights have {shipped[name]}; leave out --{name} or --pretrained"
        check(shipped[name] == asked, f"--{name} {asked}: {has}")
    check(
        cfg.language == "smollm2",
        "the weights were learned in front of smollm2: leave out --language or --pretrained",
    )


def main(cfg: Config) -> dict:
    """Train (or load) the new layers, few-shot evaluation, figures of gates and image attention
    maps."""
    check_flags(cfg)
    run.seed(cfg.seed)
    on = run.device(cfg.device)
    clock = run.Clock()
    # frozen parts: language model with two new tokens, vision encoder
    if cfg.language == "smollm2":
        tokenizer, language = pretrained.smollm2(on)
    else:
        tokenizer, language = pretrained.language_model(cfg.language, on)
    new_ids = few_shot.add_words(tokenizer, language)
    start_id = few_shot.start_token(tokenizer)
    language.set_attn_implementation("eager")  # faster for short texts on a CPU
    vision_tower = tower.load("efficientnet", on=on)
    # photos, and their names as ids
    fruit = data.groceries(224)
    learn, chosen = fruit_photos.split(fruit, cfg.judged, cfg.seed)
    names = [fruit_photos.NAMES[kind] for kind in fruit.fine_names]
    chunks = [few_shot.chunk(tokenizer, name) for name in names]
    most_chunks = max(cfg.longest, 1 + max(cfg.shots))
    decode.check_length(language, 1 + max(map(len, chunks)) * most_chunks, 0)
    # model
    shape = {"dim_in": vision_tower.width, "every": cfg.every, "latents": cfg.latents}
    model = build(cfg.pretrained, language, new_ids, shape, on)
    folder = run.output(cfg.out, cfg)
    new = [*model.resampler.parameters(), *model.cross.parameters(), model.new_embeddings]
    metrics = {
        "parameters, frozen": sum(p.numel() for p in language.parameters()),
        "parameters, new": sum(p.numel() for p in new),
        "new layers before layers": ", ".join(map(str, model.cross_layer_ids)),
    }
    # vision features, once
    features = tower.vision_features(vision_tower, fruit.images[learn])
    kinds = fruit.fine[learn]
    heldout = tower.vision_features(vision_tower, fruit.images[chosen])
    # training
    gates = [model.gates().cpu()]
    if not cfg.pretrained:
        losses = []
        steps = few_shot.train(model, features, kinds, start_id, chunks, cfg, on)
        for value in run.progress(steps, cfg.steps):
            losses.append(value)
            gates.append(model.gates().cpu())
        metrics |= {"loss": sum(losses[-20:]) / len(losses[-20:]), "train_seconds": clock()}
        figures.curves(folder / "loss.png", {"loss": losses}, "step", "-log p of a word", smooth=10)
        checkpoint.write(folder / "model.safetensors", model.trainable_parameters(), shape)
    model.eval()
    # few-shot evaluation on held-out photos
    answers = {}
    for shots in cfg.shots:
        log_p = few_shot.evaluate(model, heldout, start_id, chunks, features, kinds, shots, cfg, on)
        answers[shots] = log_p
        metrics[f"{shots} examples"] = {
            "14 kinds": probe.share(log_p.argmax(-1) == fruit.fine[chosen]),
            "5 groups": probe.share(fruit_photos.grouped(log_p, fruit) == fruit.coarse[chosen]),
        }
    metrics |= probe.yardsticks(vision_tower, fruit, learn, chosen)
    # figure: gates, attention maps of some photos
    for name, line in zip(("gates of attention", "gates of feed-forward"), gates[-1]):
        metrics[name] = " ".join(f"{g:+.2f}" for g in line.tolist())
    some = fruit_photos.spread(torch.arange(len(chosen)))
    shown = heldout[some].float().to(on)
    maps = flamingo_figures.image_attention_map(model, shown, start_id).cpu()
    truths = [fruit_photos.name_of(fruit, i) for i in chosen[some]]
    photos = data.groceries(348).images[chosen[some]]
    log_p = answers[cfg.shots[0]][some]
    flamingo_figures.draw(
        folder / "flamingo.png", torch.stack(gates), photos, maps, names, truths, log_p
    )
    return run.report(folder, metrics, "python vlm/flamingo.py --shots 0 1 8 --pretrained")


if __name__ == "__main__":
    run.cli(main, Config)
