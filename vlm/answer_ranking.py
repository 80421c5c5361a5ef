"""Answer ranking by likelihood: log p of several answers to one prompt, which is read once.

Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.5: a closed set of answers is ranked by the language
model's likelihood of each. The keys and values of the prompt stay in the cache; an answer is read
after them, scored, and taken out again.

Shapes: B prompts, C answers, V tokens in the vocabulary.
"""

import torch


def likelihoods(first_log_p, next_logits, cache, answers):
    """log p(answer | prompt) -> (B,C), the sum over the tokens of each answer.

    first_log_p (B,V): of the token behind the prompt; next_logits: ids (B,T) -> logits (B,T,V) of
    what follows each, read after what `cache` holds; answers: C lists of ids, each with the token
    that ends it.
    """
    scores = []
    for answer in answers:
        ids = torch.tensor([answer], device=first_log_p.device).expand(len(first_log_p), -1)
        # the first token follows the prompt, every other one the token before it
        log_p = next_logits(ids[:, :-1]).float().log_softmax(-1)
        rest = log_p.gather(2, ids[:, 1:, None])[..., 0]
        scores.append(first_log_p[:, ids[0, 0]] + rest.sum(1))
        # forget this answer: the next one follows the prompt, too
        cache.crop(1 - ids.shape[1])
    return torch.stack(scores, 1)
