"""Generated answers about a photo: prompt, image tokens, greedy decoding, the probability of the answer.

Shapes: photo uint8 (3,H,W), ids (1,T), image tokens (1,N,E).
"""

import torch

from deploy import decode
from utils.run import check
from vlm import anyres, prompts
from vlm.prompt_sparsity import places_for
from vlm.prompts import IMAGE


def prompt_ids(tokenizer, model, prompt, tokens):
    """Prompt of a question about one photo of so many tokens, which stands before the text -> ids
    (1,T).

    Raises UserError if the question has a picture of its own, or is longer than the language model
    can read.
    """
    check(IMAGE not in prompt, f"a question is words; {IMAGE} is put before it")
    ids, _ = prompts.chat(tokenizer, [(f"{IMAGE}\n{prompt}", None)], tokens)
    decode.check_length(model.language, len(ids), 0)
    return torch.tensor([ids])


def answer_ids(tokenizer, prompt, answer):
    """An answer and the token that ends it -> ids (list), as they follow this prompt: its supervised tokens.

    Raises UserError for a tokenizer without a word that ends an answer.
    """
    # the whole conversation, and of it what would be learned
    ids, supervised = prompts.chat(tokenizer, [(f"{IMAGE}\n{prompt}", answer)], 1)
    return [i for i, is_target in zip(ids, supervised) if is_target]


@torch.no_grad()
def photo_embeddings(model, image, tiles=0):
    """A photo, uint8 (3,H,W) -> image tokens, as embeddings of the language model (1,N,E).

    tiles: at most so many; 1: none; 0: as the model was trained, those of its grids or none.
    """
    vision_tower = model.vision
    size = vision_tower.size
    on = next(model.language.parameters()).device
    if tiles > 1 or (tiles == 0 and model.grids):
        # any-resolution tiles: grids of at most so many of the encoder's squares
        grids = model.grids or anyres.candidates(size, tiles)
        if tiles:
            grids = [grid for grid in grids if grid[0] * grid[1] <= tiles * size**2]
        pixels = vision_tower.pixels(anyres.tiles(image, size, grids).to(on))
        return model.tile_features(pixels, image.shape[1:], grids)
    # one picture, without tiles
    square = anyres.resize(image, (size, size))[None]
    return model.image_features(vision_tower.pixels(square.to(on)))


@torch.no_grad()
def answer(
    tokenizer, model, image, prompt, max_new_tokens=30, tiles=0, streamer=None, max_prompt=512
):
    """Generated answer about a photo, uint8 (3,H,W)."""
    return answer_and_probability(
        tokenizer, model, image, prompt, max_new_tokens, tiles, streamer, max_prompt
    )[0]


@torch.no_grad()
def answer_and_probability(
    tokenizer, model, image, prompt, max_new_tokens=30, tiles=0, streamer=None, max_prompt=512
):
    """Generated answer about a photo, uint8 (3,H,W), and p(answer | photo, prompt), its end
    included."""
    # prompt, with as many <image> as the photo has tokens
    seen = photo_embeddings(model, image, tiles)
    ids = prompt_ids(tokenizer, model, prompt, places_for(model, seen)).to(seen.device)
    decode.check_length(model.language, ids.shape[1], max_new_tokens, max_prompt)
    # greedy decoding, up to a token that ends an answer
    new = model.generate(
        ids,
        seen,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        eos_token_id=prompts.ends(tokenizer, model.language) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    # its probability, in one reading
    log_p = decode.log_probs(model.language, new, inputs_embeds=model.embed(ids, seen))
    text = tokenizer.decode(new[0], skip_special_tokens=True).strip()
    return text, float(log_p.sum().exp())


def text_streamer(tokenizer):
    """Prints tokens as they come."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True)
