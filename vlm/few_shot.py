"""Few-shot prompts of Flamingo: interleaved image-text batches, training on them, names ranked by likelihood.

Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.4 and 2.5. A text is a chain of photos, each with its
name: `<start> <image> NAME<|endofchunk|> <image> NAME<|endofchunk|> ...`. Training draws such
chains; a few-shot prompt is one that lacks its last name.

Shapes: features (B,J,N,D) of J photos in each of B texts, or (B,N,D) of one photo each; ids (B,T).
Examples in the prompt do not help: names before a photo were drawn at random and say nothing about
it. Four of them harm, because such a chain is as long as the longest in training, which it hardly
saw: 21.8 names a step stand at place one, 1.8 at place five. With --shortest 5 all chains are
equally long: no drop, but fewer right names without examples.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from deploy import decode
from utils import run
from vlm import answer_ranking, prompts
from vlm.prompts import IMAGE

END = "<|endofchunk|>"


def add_words(tokenizer, language):
    """New tokens <image> and <|endofchunk|> -> their ids. The embedding table may grow, and no row
    is lost."""
    prompts.add_words(tokenizer, language, (IMAGE, END))
    return tokenizer.convert_tokens_to_ids([IMAGE, END])


def chunk(tokenizer, name):
    """`<image> NAME<|endofchunk|>` -> ids; all but the first are supervised. Sec. 2.4."""
    return tokenizer(f"{IMAGE} {name}{END}", add_special_tokens=False).input_ids


def start_token(tokenizer):
    """The id that every text begins with, an attention sink.

    Language models pile up on their first token what belongs nowhere (Xiao et al. 2023,
    arXiv:2309.17453), and there SmolLM2's states are a hundred times as large: no photo would count
    beside them.
    """
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def interleaved_batch(random, start_id, chunks, kinds, batch, longest, shortest=1):
    """Interleaved image-text batch: about `batch` photos drawn at random, as chains of J photos,
    each with its name.

    -> ids (B,T), which of them are supervised (B,T), which photos (B,J). J is drawn from `shortest`
    to `longest`; chunks: ids by kind; kinds (photos,).
    """
    # one length for all chains of the batch, then the photos
    size = random.integers(shortest, longest + 1)
    photos = random.integers(len(kinds), size=(max(1, batch // size), size))
    # <start> <image> NAME <end> <image> NAME <end> ...
    texts = []
    for chain in photos:
        ids = [start_id]
        for photo in chain:
            ids += chunks[kinds[photo]]
        texts.append(torch.tensor(ids))
    # padding on the right, where no token attends to it
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=start_id)
    # neither <image> is a target, nor padding
    supervised = (ids != start_id) & (ids != chunks[0][0])
    return ids, supervised, torch.from_numpy(photos)


def patch_dropout(features):
    """Keep a random half of the image tokens of photos (B,J,N,D): 732 photos are soon learned by
    heart."""
    count = features.shape[2]
    kept = torch.randperm(count)[: (count + 1) // 2]
    return features[:, :, kept]


def loss(model, ids, supervised, features):
    """Mean of -log p(token | tokens before it, the photo it sees). Eq. 1. Logits of supervised
    tokens only."""
    states = model.states(ids, model.resample(features))  # (B,T,E)
    # the state of a token predicts the next one
    is_target = supervised[:, 1:]
    states = states[:, :-1][is_target]  # (targets,E)
    targets = ids[:, 1:][is_target]
    return F.cross_entropy(model.head(states).float(), targets)


def train(model, features, kinds, start_id, chunks, cfg, on):
    """The loop; yields the loss of each step. features (photos,N,D), kinds (photos,)."""
    # parameter groups: gates learn ten times as fast as the rest, LoRA at a rate of its own
    gates = []
    for layer in model.cross:
        gates += [layer.gate_attention.alpha, layer.gate_mlp.alpha]
    gate_ids = {id(alpha) for alpha in gates}
    learns = {k: p for k, p in model.trainable_parameters().items() if id(p) not in gate_ids}
    lora = [p for name, p in learns.items() if ".lora_" in name]
    rest = [p for name, p in learns.items() if ".lora_" not in name]
    groups = [{"params": rest, "top": cfg.lr}, {"params": gates, "top": 10 * cfg.lr}]
    if lora:
        groups.append({"params": lora, "top": cfg.lora_lr})
    optimizer = torch.optim.AdamW(groups, cfg.lr)
    random = np.random.default_rng([cfg.seed, 1])
    shortest = getattr(cfg, "shortest", 1)
    for step in range(cfg.steps):
        # learning rate of this step: warm-up times a cosine to zero
        warmup = min(1, (step + 1) / 20)
        decay = (1 + math.cos(math.pi * step / cfg.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * warmup * decay
        # a batch of interleaved photos and names
        ids, supervised, photos = interleaved_batch(
            random, start_id, chunks, kinds, cfg.batch, cfg.longest, shortest
        )
        seen = patch_dropout(features[photos]).float()
        # forward pass and loss, matrix products in bf16
        with run.autocast(on):
            value = loss(model, ids.to(on), supervised.to(on), seen.to(on))
        # backward pass, gradient clipping
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_([*rest, *gates, *lora], 1.0)
        optimizer.step()
        yield value.item()


@torch.no_grad()
def name_likelihoods(model, features, start_id, chunks, shots=(), examples=None):
    """log p(NAME<|endofchunk|> | examples, <image>) for photos (B,N,D) -> (B,C). Sec. 2.5, Fig. 8.

    shots: kinds of the examples, whose features are examples (S,N,D). The prompt is read once, each
    name after it. Raises UserError if examples, photo and name are longer than the language model's
    positions.
    """
    from transformers import DynamicCache

    on = features.device
    # photos: the examples, the same for all, then the one that is asked about
    photos = features[:, None]
    if examples is not None and len(shots):
        photos = torch.cat([examples.expand(len(features), -1, -1, -1), photos], 1)
    latents = model.resample(photos)  # (B,S+1,M,V)
    # prompt: <start>, the chunks of the examples, <image>
    prompt = [start_id]
    for kind in shots:
        prompt += chunks[kind]
    prompt += chunks[0][:1]
    decode.check_length(model.language, len(prompt), max(map(len, chunks)) - 1)
    # read the prompt once
    cache = DynamicCache()
    ids = torch.tensor([prompt], device=on).expand(len(features), -1)
    states = model.states(ids, latents, cache=cache)
    first_log_p = model.head(states[:, -1]).float().log_softmax(-1)

    # each name after it
    def next_logits(ids):
        return model(ids, latents, len(shots) + 1, cache)

    names = [ids[1:] for ids in chunks]
    return answer_ranking.likelihoods(first_log_p, next_logits, cache, names)


def evaluate(model, features, start_id, chunks, train_features, train_kinds, shots, cfg, on):
    """Few-shot evaluation: likelihoods (photos,C) of the names, after so many examples.

    The examples are drawn anew from the training photos for every 20 photos.
    """
    random = np.random.default_rng([cfg.seed, 2])
    log_p = []
    for part in features.split(20):
        # support examples: photos, and the kinds that they are of
        pick = random.integers(len(train_kinds), size=shots)
        kinds = train_kinds[pick].tolist()
        with run.autocast(on):
            examples = train_features[pick].float().to(on)
            part = part.float().to(on)
            score = name_likelihoods(model, part, start_id, chunks, kinds, examples)
        log_p.append(score.cpu())
    return torch.cat(log_p)
