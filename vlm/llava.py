"""LLaVA: image tokens, vision features through a connector, among the token embeddings of a language model.

Liu et al. 2023, arXiv:2304.08485 (a matrix as connector); 1.5: Liu et al. 2023, arXiv:2310.03744
(two layers); 1.6: Liu et al. 2024 (tiles, in anyres.py). A vision encoder turns a photo into
tokens, a connector turns these into vectors of the size of word embeddings, and where the text says
<image> they are put in. Nothing else is new: the language model reads on as it always has.

Shapes: pixels (B,3,S,S), features (B,N,D), text embeddings (B,T,E), where T counts N words <image>
for each photo.
Differences from the papers: by default EfficientNet-lite0 sees and SmolLM2 speaks, 4.7 and 134.5 M
parameters; any pair of transformers' models can be named. The weights that come with the book were
made by vlm/train.py, of 732 photos of fruit: they know fourteen kinds and nothing else, and call a
blue car a fruit, too. Beside each answer stands how likely the model itself finds it.

    python vlm/llava.py                                                     # held-out photos
    python vlm/llava.py --image PHOTO --prompt "What fruit is this?"        # one of your own
    python vlm/llava.py --image PHOTO PHOTO --chat                          # a conversation; --bits 8
    python vlm/llava.py --model llava-hf/llava-1.5-7b-hf --image PHOTO      # LLaVA's own, or any folder of one
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from deploy import decode
from utils import data, run
from utils.run import check
from vlm import anyres, chat_terminal, connector, fruit_photos, generation, llava_io, llava_parts
from vlm.image_tokens import merge
from vlm.prompt_sparsity import choose, places_for
from vlm.prompts import IMAGE

WEIGHTS = Path(__file__).parent / "weights" / "llava.safetensors"


@dataclass(frozen=True)
class Config:
    """Ask a language model that can see about photos."""

    image: tuple[str, ...] = ()  # photos of your own; none: held-out photos of fruit
    # of photos of your own <image> may name the places; it stands before the text if there is none
    prompt: str = "What fruit is this?"
    chat: bool = False  # several turns, typed or piped in (chat.py)
    bits: Literal[0, 4, 8] = 0  # of the language model's linear layers; 0: as they are
    # weights of vlm/train.py, a folder of --save, or LLaVA's own: folder or hub id
    model: str = str(WEIGHTS)
    tiles: int = 0  # of LLaVA-1.6, at most; 1: none; 0: as the model was trained
    samples: int = 8  # photos, if none is named
    max_new_tokens: int = 30  # longest answer
    # tokens of the longest prompt that is read, photo and all; two cores read 300 a second
    max_prompt: int = 512
    save: str = ""  # write the whole model there, as an ordinary folder
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/llava"


# Not what generation_config.json says: a penalty on repeated words forbids a second "apple"
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


class Llava(nn.Module):
    """A vision tower, a connector, a language model. Sec. 4.1."""

    def __init__(self, vision, join, language, image_id):
        super().__init__()
        self.vision = vision
        self.connector = join
        self.language = language
        self.image_id = image_id
        self.newline: Any = None  # 1.6: a token that ends a row of tiles
        self.grids: list[tuple] = []  # 1.6: the sizes that a photo is tiled to

    @property
    def count(self):
        """N, words <image> for a photo without tiles."""
        return connector.tokens(self.connector, self.vision.count)

    def image_features(self, pixels):
        """Image tokens of photos: (B,3,S,S) -> (B,N,E), H_v = W g(X_v). Eq. 1."""
        return self.project(self.vision(pixels))

    def project(self, features):
        """Vision features (B,N,D) -> (B,N,E), through the connector; those of a frozen tower are
        kept."""
        weight = next(self.connector.parameters(), features)
        return self.connector(features.to(weight.dtype))

    def count_of(self, size):
        """The same for a photo of `size` (H,W), with tiles, if the model has grids for them."""
        if not self.grids or connector.joins_tiles(self.connector):
            return self.count
        g = round(self.count**0.5)
        return anyres.count_tokens(size, self.vision.size, g, self.grids)

    def tile_features(self, pixels, size, candidates):
        """1.6: the whole photo and its tiles (1+T,3,S,S), of a photo of `size` (H,W) -> one
        sequence (1,N',E).

        Raises UserError for a connector whose tokens have no place, and so cannot be put together
        again.
        """
        llava_parts.check_map(self.vision, self.connector)
        return llava_parts.tile_tokens(self, self.vision(pixels), [size], candidates)

    def embed(self, input_ids, features=None, prompt_of=None):
        """Token embeddings of text and photos as one sequence: (B,T,E); prompt_of as in prompt_sparsity.choose."""
        # <image> may have no row in the table: any other, which merge overwrites
        places = input_ids == self.image_id
        text = self.language.get_input_embeddings()(input_ids.where(~places, 0))
        if features is None:
            return text
        features = choose(self.connector, features, places, text, prompt_of)
        return merge(text, features, places)

    def forward(self, input_ids, pixels=None, features=None, **more):
        """-> the output of the language model; `features`, if given, are those of
        `image_features`."""
        if pixels is not None:
            features = self.image_features(pixels)
        return self.language(inputs_embeds=self.embed(input_ids, features), **more)

    @torch.no_grad()
    def generate(self, input_ids, features=None, **more):
        """Answers (B, new tokens): greedy and without a penalty, if not asked for."""
        embeds = self.embed(input_ids, features)
        return self.language.generate(inputs_embeds=embeds, **GREEDY | more)


def build(
    vision,
    join,
    language,
    tokenizer,
    layer=-2,
    select="patch",
    words=(IMAGE,),
    on="cpu",
    size=None,
    options=None,
    tiles=(),
):
    """Names of a tower and a connector, and a language model -> Llava; the words are added to its
    vocabulary. tiles: the flags `tiles` and `image_grid_pinpoints`."""
    about = (layer, select, words, on, size, options, tiles)
    return assemble(llava_parts.build(vision, join, language, tokenizer, *about))


def assemble(parts):
    """llava_parts.Parts -> Llava."""
    model = Llava(parts.vision, parts.connector, parts.language, parts.image_id)
    model.newline = parts.newline
    model.grids = list(parts.grids)
    return model


def load(name, on="cpu"):
    """What `llava_io.load` reads: weights, a folder or a hub id -> tokenizer, Llava, frozen."""
    tokenizer, parts = llava_io.load(name, on)
    return tokenizer, assemble(parts).eval().requires_grad_(False)


def sizes(model):
    """Parameters by part, one line."""
    parts = {"vision": model.vision, "connector": model.connector, "language": model.language}
    millions = {name: sum(p.numel() for p in m.parameters()) / 1e6 for name, m in parts.items()}
    return ", ".join(f"{name} {count:.1f} M" for name, count in millions.items())


def check_flags(cfg):
    """Raises UserError for flags out of range, and files that are no picture."""
    numbers = cfg.samples > 0 and cfg.max_new_tokens > 0 and cfg.tiles >= 0
    check(numbers, "--samples and the like: at least 1; --tiles: at least 0")
    placed = cfg.image or IMAGE not in cfg.prompt
    asked = f"--prompt is a question; {IMAGE} in it is a place for an --image"
    check(cfg.prompt.strip() and placed, asked)
    there = cfg.save and Path(cfg.save).exists()
    check(not there, f"--save {cfg.save} is there already: name another")
    plain = not (cfg.bits or is_conversation(cfg))
    check(plain or not cfg.save, "--save goes with one --image, without --chat and --bits")
    chat_terminal.check_pictures(cfg.image)


def is_conversation(cfg):
    """Several turns or photos, or places for these in the prompt: chat.py reads them."""
    return cfg.chat or len(cfg.image) > 1 or IMAGE in cfg.prompt


def read_photos(cfg, model):
    """-> photos uint8 (3,H,W), and what they show: the one that is named, or held-out ones."""
    if cfg.image:
        return [chat_terminal.read_picture(cfg.image[0], model, cfg.tiles)], [""]
    fruit = data.groceries(348)
    heldout = [i for i, part in enumerate(fruit.split) if part == "test"]
    order = np.random.default_rng(cfg.seed).permutation(heldout)
    chosen = fruit_photos.one_of_each(fruit, order)[: cfg.samples]
    return [fruit.images[i] for i in chosen], [fruit_photos.name_of(fruit, i) for i in chosen]


def main(cfg: Config) -> dict:
    """Answer about a photo, or about held-out ones; write the model, if asked to."""
    check_flags(cfg)
    tokenizer, model = load(cfg.model, run.device(cfg.device))
    print(sizes(model))
    chat_terminal.low_bit(model, cfg.model, cfg.bits)
    if cfg.model == str(WEIGHTS):
        print("It was taught fruit only, and talks of anything else as if it were fruit.")
    if is_conversation(cfg):
        return chat_terminal.start(cfg, tokenizer, model)
    photos, truths = read_photos(cfg, model)
    # is the prompt short enough?
    tokens = places_for(model, generation.photo_embeddings(model, photos[0], cfg.tiles))
    length = generation.prompt_ids(tokenizer, model, cfg.prompt, tokens).shape[1]
    decode.check_length(model.language, length, cfg.max_new_tokens, cfg.max_prompt)
    folder = run.output(cfg.out, cfg)
    print(cfg.prompt)
    # generated answers
    answers = []
    probabilities = []
    for photo, truth in zip(photos, truths):
        streamer = generation.text_streamer(tokenizer) if cfg.image else None
        about = (cfg.prompt, cfg.max_new_tokens, cfg.tiles, streamer, cfg.max_prompt)
        answer, p = generation.answer_and_probability(tokenizer, model, photo, *about)
        answers.append(answer)
        probabilities.append(p)
        print(f"{answer:>28}  {100 * p:3.0f} % sure  {truth}".rstrip())
    fruit_photos.draw(folder / "answers.png", photos, answers, truths, cfg.prompt)
    if cfg.save:
        llava_io.save(model, tokenizer, cfg.save)
    metrics = {
        "prompt": cfg.prompt,
        "tokens_of_a_photo": tokens,
        "p of the answer": sum(probabilities) / len(probabilities),
    }
    return run.report(folder, metrics, "python vlm/train.py")


if __name__ == "__main__":
    run.cli(main, Config)
