"""Answers after a prompt with image tokens: embeddings of the prompt, ranking of given answers, greedy decoding.

What all scores of this chapter share. Shapes: image tokens (B,M,E) of B pictures, prompt (B,T,E), C answers.
"""

import torch

from deploy import decode
from utils.run import check
from vlm import answer_ranking, generation, prompts
from vlm.fruit_photos import QUESTION
from vlm.llava import GREEDY
from vlm.prompt_sparsity import places_for


def embed_prompt(tokenizer, model, prompt, seen):
    """Image tokens (B,M,E) of one picture each, as a whole or with its tiles, and a question -> embeddings of
    the prompt (B,T,E)."""
    ids = generation.prompt_ids(tokenizer, model, prompt, places_for(model, seen)).to(seen.device)
    return model.embed(ids.expand(len(seen), -1), seen)


@torch.no_grad()
def rank_answers(tokenizer, model, embeds, answers, prompt=QUESTION):
    """log p(answer and the end of it | prompt) of the prompt's embeddings (B,T,E) -> (B,C). The prompt is read once,
    each answer after it.

    Raises UserError for an answer without a word, or a tokenizer without a word that ends an answer.
    """
    # answers as ids, each with its end
    targets = []
    for answer in answers:
        check(answer.strip(), f"a name of no words cannot be scored: {answer!r}")
        ids = generation.answer_ids(tokenizer, prompt, answer)
        decode.check_length(model.language, embeds.shape[1], len(ids))
        targets.append(ids)
    # read the question once
    out = model.language(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    first_log_p = out.logits[:, -1].float().log_softmax(-1)

    # each answer after it
    def next_logits(ids):
        return model.language(input_ids=ids, cache=out.cache, use_cache=True).logits

    return answer_ranking.likelihoods(first_log_p, next_logits, out.cache, targets)


@torch.no_grad()
def generate_answers(tokenizer, model, embeds, max_new_tokens=12):
    """Generated answers after the prompt's embeddings (B,T,E), greedy decoding -> texts."""
    decode.check_length(model.language, embeds.shape[1], max_new_tokens)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    new = model.language.generate(
        inputs_embeds=embeds, attention_mask=mask,
        max_new_tokens=max_new_tokens, eos_token_id=prompts.ends(tokenizer, model.language) or None,
        pad_token_id=tokenizer.pad_token_id, **GREEDY,
    )  # fmt: skip
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
