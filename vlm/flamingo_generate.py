"""Generation with Flamingo: an interleaved prompt of pictures and text, with examples before it, answered word by word.

Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.5 and Fig. 2. `<image>` in a prompt stands for a picture;
an example is `<image> TEXT<|endofchunk|>`, and the answer ends with `<|endofchunk|>`, too. vlm/flamingo.py
calls it with --image and --prompt.

Shapes: ids (1,T) of the prompt with J words <image>, pictures uint8 (J,3,S,S), features (1,J,N,D),
latents (1,J,M,V).
"""

import torch

from deploy import decode
from utils import data, run
from utils.images import open_image
from utils.run import check
from utils.text import clean, plain
from vlm import few_shot, tower
from vlm.few_shot import END
from vlm.prompts import IMAGE


def check_flags(cfg):
    """Raises UserError, one line, for pictures and prompts that do not belong together, and
    files that are no picture."""
    asked = cfg.image or cfg.shots
    check(
        cfg.prompt or not asked,
        "--image and --shots: --prompt is missing, such as '<image>the color is'",
    )
    if not cfg.prompt:
        return
    words = cfg.prompt.count(IMAGE)
    check(words, f"--prompt: write {IMAGE} where the picture stands, such as '{IMAGE}the color is'")
    given = f"--prompt has {words} {IMAGE}, --image names {len(cfg.image)} pictures"
    check(words == len(cfg.image), f"{given}: as many of one as of the other")
    check(cfg.max_new_tokens > 0, "--max_new_tokens must be above 0")
    for shot in cfg.shots:
        _, colon, text = shot.partition(":")
        check(colon and text.strip(), f"--shots {shot}: an example is PICTURE:TEXT")
        check(
            IMAGE not in text,
            f"--shots {shot}: its picture stands before the text, without {IMAGE}",
        )
    # a file that is no picture is said before the weights are read
    for path in picture_paths(cfg):
        open_image(path)


def interleaved_ids(tokenizer, start_id, shots, prompt):
    """Ids (1,T) of `<start>`, the texts of the examples, each a chunk, then the prompt.

    Behind each <image> stands one space, as in training; none stands at the end, since words begin
    with theirs. Other special tokens in what somebody typed are letters.
    """
    ids = [start_id]
    for text in shots:
        ids += few_shot.chunk(tokenizer, plain(text.strip(), tokenizer))
    written = []
    for part in prompt.split(IMAGE):
        # <|endofchunk|> ends a chunk within the prompt
        texts = [plain(text, tokenizer) for text in part.split(END)]
        written.append(END.join(texts).strip())
    text = f"{IMAGE} ".join(written).rstrip()
    ids += tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([ids])


@torch.no_grad()
def generate(model, ids, latents, end_ids, max_new_tokens=20):
    """Greedy decoding: ids (1,T) with J words <image>, latents (1,J,M,V) -> yields new ids, up to one of
    `end_ids`, which is yielded, too. Raises UserError for more <image> than pictures."""
    from transformers import DynamicCache

    image_id = int(model.new_ids[0])
    photos = int((ids == image_id).sum())
    cache = DynamicCache()
    states = model.states(ids, latents, cache=cache)
    for _ in range(max_new_tokens):
        # a new <image> would have no picture
        logits = model.head(states[:, -1]).float()
        logits[:, image_id] = -torch.inf
        token = logits.argmax(-1)
        yield int(token)
        if int(token) in end_ids:
            return
        # the new token sees the last picture of the prompt
        states = model.states(token[:, None], latents, photos, cache)


def ends(tokenizer, model):
    """Ids that end an answer: <|endofchunk|>, and what ends a text of the language model."""
    return {int(model.new_ids[1]), *decode.ends(tokenizer, model.language)}


def answer(tokenizer, model, vision_tower, start_id, pictures, prompt, shots=(), max_new_tokens=20):
    """Pieces of the generated answer, as they come. pictures uint8 (J,3,S,S): of the examples, then of
    the prompt; shots: the examples' texts. Raises UserError for a prompt longer than the model's positions."""
    ids = interleaved_ids(tokenizer, start_id, shots, prompt).to(model.new_ids.device)
    decode.check_length(model.language, ids.shape[1], max_new_tokens)
    # vision features, in bf16 as in training, and their latents
    features = tower.encode(vision_tower, pictures.split(4))
    latents = model.resample(features[None].float().to(ids.device))
    end_ids = ends(tokenizer, model)
    tokens = generate(model, ids, latents, end_ids, max_new_tokens)
    return decode.pieces(tokens, tokenizer)


def picture_paths(cfg):
    """Files of the examples' pictures, then of the prompt's."""
    examples = [shot.partition(":")[0] for shot in cfg.shots]
    return [*examples, *cfg.image]


def read_pictures(cfg, size):
    """Pictures of the examples, then of the prompt -> uint8 (J,3,size,size). Raises UserError for a file that
    cannot be read."""
    return torch.stack([data.square(open_image(path), size) for path in picture_paths(cfg)])


def speak(cfg, tokenizer, model, vision_tower, start_id):
    """The command: prints the answer while it is generated, and writes it with its prompt."""
    # what is wrong with pictures or prompt ends it before anything is written
    pictures = read_pictures(cfg, vision_tower.size)
    shots = [shot.partition(":")[2] for shot in cfg.shots]
    about = (pictures, cfg.prompt, shots, cfg.max_new_tokens)
    pieces = answer(tokenizer, model, vision_tower, start_id, *about)
    folder = run.output(cfg.out, cfg)
    # examples and prompt, then the answer word by word
    for text in shots:
        print(f"{IMAGE} {text.strip()}{END}")
    print(clean(cfg.prompt), end="", flush=True)
    written = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        written += piece
    print()
    metrics = {"prompt": cfg.prompt, "answer": written.strip(), "examples": len(shots)}
    return run.report(folder, metrics, "python vlm/flamingo_train.py --pretrained")
