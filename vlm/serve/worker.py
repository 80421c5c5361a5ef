"""Model worker: a vision-language model behind OpenAI's protocol. Questions on one photo share its blocks.

The server is that of deploy/serve.py; here a conversation with photos becomes a prompt. Image tokens enter the engine
as embeddings and count in the hash of a block by the hash of their photo (Kwon et al. 2023, arXiv:2309.06180, Sec. 4.4,
with the name of what a token shows in place of its id), so that a second question on a photo finds it in the cache.
A photo is nine tokens for the weights that come with the book: blocks of 8 or fewer can hold them.

    python vlm/serve/worker.py --port 8001                # the shipped weights, http://127.0.0.1:8001/v1
    python vlm/serve/worker.py --once                     # one request of its own, with a held-out photo
    python vlm/serve/worker.py --model outputs/my_llava --image PHOTO --once
"""

import hashlib
import io
from collections import OrderedDict
from dataclasses import dataclass

import torch
from PIL import Image

from deploy import serve
from utils import data, images, run
from utils.run import check
from vlm import generation, llava, prompts
from vlm.prompt_sparsity import check_not_read
from vlm.prompts import IMAGE
from vlm.serve.content import data_url, question

SIDE = 448  # of the middle square of a photo, as in training


@dataclass(frozen=True)
class Config(serve.Config):
    """Serve a vision-language model by OpenAI's protocol."""

    # weights of vlm/train.py, a folder, or a hub id of LLaVA
    model: str = str(llava.WEIGHTS)
    name: str = "llava"
    image: str = ""  # of --once; empty: a held-out photo of fruit
    prompt: str = "What fruit is this?"  # of --once
    out: str = "outputs/vlm_serve"


class PhotoTokens:
    """Image tokens of photos, of the last `most` ones kept by the hash of their bytes."""

    def __init__(self, model, most=32):
        self.model = model
        self.most = most
        self.kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, photo):
        """Bytes of a picture -> name (its hash), image tokens (N,E). Raises UserError for what is none."""
        name = hashlib.sha256(photo).hexdigest()
        if name not in self.kept:
            pixels = data.square(images.open_image(io.BytesIO(photo)), SIDE)
            # tiles: 1, the middle square alone
            self.kept[name] = generation.photo_embeddings(self.model, pixels, tiles=1)[0]
        self.kept.move_to_end(name)
        if len(self.kept) > self.most:
            self.kept.popitem(last=False)
        return name, self.kept[name]


def as_questions(turns):
    """[(role, [text or bytes])] -> [(question with <image>, answer or None)], system text, photos in their order.

    Raises UserError for turns that do not alternate, and for photos that are not the user's.
    """
    pairs = []
    system = []
    photos = []
    for role, parts in turns:
        # the word <image> in a text is no photo
        words = [IMAGE if isinstance(x, bytes) else x.replace(IMAGE, "< image>") for x in parts]
        found = [x for x in parts if isinstance(x, bytes)]
        check(role == "user" or not found, "photos come in messages of the user")
        photos += found
        if role == "system":
            system += words
        elif role == "user":
            check(not pairs or pairs[-1][1] is not None, "user and assistant take turns")
            pairs.append(("\n".join(words), None))
        else:
            check(pairs and pairs[-1][1] is None, "user and assistant take turns")
            pairs[-1] = (pairs[-1][0], "\n".join(words))
    check(pairs and pairs[-1][1] is None, "the last message is the user's")
    return pairs, "\n".join(system), photos


def photo_chat(tokenizer, model):
    """The chat of a model with eyes, as deploy/service.py takes it: [(role, [text or bytes])] -> ids, {place:
    embedding (E,)}, {place: name}."""
    tokens_of = PhotoTokens(model)

    def chat(turns):
        pairs, system, photos = as_questions(turns)
        ids, _ = prompts.chat(tokenizer, pairs, model.count, system)
        # the image tokens of all photos, one after the other
        shown = []
        for photo in photos:
            name, tokens = tokens_of(photo)
            shown += [((name, i), tokens[i]) for i in range(len(tokens))]
        places = [place for place, token in enumerate(ids) if token == model.image_id]
        check(len(places) == len(shown), "the prompt has another number of image tokens")
        embeds = {place: embedding for place, (_, embedding) in zip(places, shown)}
        names = {place: name for place, (name, _) in zip(places, shown)}
        # <image> may have no row in the table of embeddings; no such row is used
        ids = [0 if place in embeds else token for place, token in enumerate(ids)]
        return ids, embeds, names

    return chat


def load(cfg: Config):
    """-> tokenizer, language model in float32, further arguments of deploy's Service."""
    tokenizer, model = llava.load(cfg.model, run.device(cfg.device))
    check_not_read(model, "a server")
    # the connector keeps the precision that it was trained in
    model.language.float()
    eos = prompts.ends(tokenizer, model.language)
    more = {"chat": photo_chat(tokenizer, model), "eos": eos}
    return tokenizer, serve.low_bit(model.language, cfg), more


def held_out_photo():
    """A photo of fruit from the test split -> PIL image."""
    fruit = data.groceries(348)
    number = fruit.split.index("test")
    return Image.fromarray(fruit.images[number].permute(1, 2, 0).numpy())


def main(cfg: Config) -> dict:
    """Serve until SIGTERM or Ctrl-C."""
    photo = None
    if cfg.once:
        # what is no picture is refused before anything is loaded
        photo = images.open_image(cfg.image) if cfg.image else held_out_photo()
    content = question(data_url(photo), cfg.prompt) if photo else ""
    return serve.serve(cfg, load, content)


if __name__ == "__main__":
    run.cli(main, Config)
