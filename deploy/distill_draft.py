"""A draft model by knowledge distillation: two layers learn to guess what all thirty would say.

Distillation: Hinton et al. 2015, arXiv:1503.02531, here at temperature 1; for drafts: DistillSpec, Zhou et al. 2023,
arXiv:2310.08461, Sec. 3. The draft has the teacher's embedding, head and width, a few of its layers, and trains these
layers on manuals; pages that are held out tell how often its guesses would be kept. Most of a small draft's time goes
into its head, so that head knows the most frequent tokens only (FR-Spec, Zhao et al. 2025, arXiv:2502.14856, Sec. 3).

Different from DistillSpec: texts are those of people, none are written by the draft itself (on-policy); its loss is
the forward KL divergence alone. The teacher reads each text once: its last states are kept, and logits are a product
with the head away.

Shapes: B pieces of T tokens, E width, R tokens in the draft's vocabulary, V in the teacher's.

    python deploy/distill_draft.py                                       # 3 to 4 CPU minutes
    python deploy/distill_draft.py --loss cross-entropy --pieces 1600 --epochs 1    # from the data alone, as long
    python deploy/draft_study.py --draft outputs/distill_draft/draft     # acceptance and speed
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from deploy import decode, perplexity
from utils import data, pretrained, run
from utils.run import check


@dataclass(frozen=True)
class Config:
    """Distil a draft model for speculative decoding from a Llama."""

    model: str = "smollm2"  # the teacher: or a local folder, or a hub id
    layers: int = 2  # of the draft: the first ones of the teacher, and its last one
    vocabulary: int = 8192  # most frequent tokens of the manuals that the draft can say
    pieces: int = 256  # that the draft learns from
    length: int = 256  # tokens of a piece
    epochs: int = 4  # times that each piece is seen
    batch: int = 4  # pieces of a step
    lr: float = 2e-3
    loss: Literal["distillation", "cross-entropy"] = "distillation"
    held_out: int = 24  # pieces of held-out pages
    seed: int = 0
    device: str = "auto"
    out: str = "outputs/distill_draft"


def distillation_loss(draft_logits, teacher_logits):
    """KL(p || q) of the teacher's p and the draft's q, mean over tokens; (...,R) each. DistillSpec, Sec. 3, forward
    KL; Hinton et al., Sec. 2, at temperature 1."""
    log_p = teacher_logits.float().log_softmax(-1)
    log_q = draft_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def cross_entropy_loss(draft_logits, targets):
    """-log q of the next token of the text, mean over those that the draft can say: targets (...,), -1: it cannot."""
    rows = draft_logits.float().flatten(0, -2)
    return torch.nn.functional.cross_entropy(rows, targets.flatten(), ignore_index=-1)


def acceptance_rate(p, q):
    """Probability that a guess from q is kept: the sum of min(p, q), (...,V) -> (...,). Leviathan et al. 2022,
    arXiv:2211.17192, Theorem 3.5."""
    return torch.minimum(p, q).sum(-1)


def frequent_tokens(texts, count, vocabulary):
    """The `count` most frequent tokens of lists of ids, most frequent first: (count,)."""
    ids = torch.tensor([token for text in texts for token in text])
    # ties in the order of ids: the same tokens everywhere
    order = ids.bincount(minlength=vocabulary).argsort(descending=True, stable=True)
    return order[:count]


def source_layers(total, count):
    """Which of the teacher's `total` layers the draft's `count` layers start from: the first ones, and the last."""
    if count == 1:
        return [0]
    return [*range(count - 1), total - 1]


def draft_of(teacher, layers, tokens):
    """A Llama of transformers with copies of some of the teacher's layers; embedding, norm and head are the teacher's.
    Only its layers learn. tokens (R,): what it can say, kept in its config."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.draft_vocabulary = tokens.tolist()
    draft = type(teacher)(config).float()
    # everything but the layers
    outside = {k: v for k, v in teacher.state_dict().items() if ".layers." not in k}
    draft.load_state_dict(outside, strict=False)
    chosen = source_layers(teacher.config.num_hidden_layers, layers)
    for layer, source in zip(draft.model.layers, chosen):
        layer.load_state_dict(teacher.model.layers[source].state_dict())
    draft.requires_grad_(False)
    draft.model.layers.requires_grad_(True)
    return draft.to(teacher.device)


@torch.no_grad()
def teacher_states(teacher, pieces, batch=8):
    """What the teacher's head is given: pieces (N,T) -> (N,T,E), in the teacher's own type."""
    states = []
    for part in run.bar(pieces.split(batch), -(-len(pieces) // batch), name="teacher"):
        states.append(teacher.model(part, use_cache=False).last_hidden_state)
    return torch.cat(states)


def pieces_of(texts, count, length, seed=0):
    """`count` random pieces of `length` tokens of lists of ids: (count,length). Raises UserError if there are fewer."""
    found = []
    for text in texts:
        starts = range(0, len(text) - length + 1, length)
        found += [text[start : start + length] for start in starts]
    check(len(found) >= count, f"the manuals have {len(found)} pieces of {length} tokens: --pieces")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([found[i] for i in order[:count].tolist()])


def next_tokens(pieces, tokens, vocabulary):
    """Next token of each place as an index into the draft's vocabulary: (N,T) -> (N,T), -1 where it cannot say it."""
    places = torch.full((vocabulary,), -1)
    places[tokens] = torch.arange(len(tokens))
    targets = torch.full_like(pieces, -1)
    targets[:, :-1] = places[pieces[:, 1:]]
    return targets


def train(draft, head, pieces, wanted, cfg):
    """Yields the loss of each step. head (R,E): rows of the teacher's head; wanted: the teacher's states (N,T,E), or
    next tokens (N,T)."""
    parameters = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = step_count(cfg)
    warm = max(1, steps // 20)
    step = 0
    for _ in range(cfg.epochs):
        for rows in torch.randperm(len(pieces)).split(cfg.batch):
            # warm-up, then down to zero in a straight line
            rate = cfg.lr * min(1, (step + 1) / warm) * (1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with run.autocast(draft.device):
                states = draft.model(pieces[rows], use_cache=False).last_hidden_state
                logits = states @ head.T
                if cfg.loss == "distillation":
                    loss = distillation_loss(logits, wanted[rows].to(head.dtype) @ head.T)
                else:
                    loss = cross_entropy_loss(logits, wanted[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            yield loss.item()


def step_count(cfg):
    """Steps of a run: the last batch of an epoch may be smaller."""
    return cfg.epochs * -(-cfg.pieces // cfg.batch)


@torch.no_grad()
def evaluate(draft, teacher, tokens, pieces, batch=4):
    """Held-out pieces (N,T) -> acceptance rates (N,T) of draws at temperature 1, and whether argmax tokens agree."""
    head = teacher.get_output_embeddings().weight.float()
    rates = []
    agree = []
    for part in pieces.split(batch):
        p = (teacher.model(part).last_hidden_state.float() @ head.T).softmax(-1)
        # q is 0 where the draft has no token
        q = torch.zeros_like(p)
        states = draft.model(part).last_hidden_state.float()
        q[..., tokens] = (states @ head[tokens].T).softmax(-1)
        rates.append(acceptance_rate(p, q))
        agree.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(rates), torch.cat(agree).float()


def main(cfg: Config) -> dict:
    """Trains the draft and writes it as a folder of transformers; acceptance on held-out pages, before and after."""
    numbers = (cfg.layers, cfg.vocabulary, cfg.pieces, cfg.epochs, cfg.batch, cfg.held_out)
    check(min(numbers) > 0 and cfg.length > 1, "layers, pieces ... start at 1, --length at 2")
    check(cfg.lr > 0, "--lr must be above 0")
    run.seed(cfg.seed)
    device = run.device(cfg.device)

    tokenizer, teacher = decode.load(cfg.model, device)
    check_teacher(teacher, cfg)
    folder = run.output(cfg.out, cfg)
    # whole pages are held out
    texts = []
    for part in perplexity.split(data.docs()):
        texts.append(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)
    learned, held_out = texts
    known = teacher.config.vocab_size
    tokens = frequent_tokens(learned, cfg.vocabulary, known)
    pieces = pieces_of(learned, cfg.pieces, cfg.length).to(device)
    judged = pieces_of(held_out, cfg.held_out, cfg.length).to(device)
    # the same layers before they learn: early exit that skips the middle
    draft = draft_of(teacher, cfg.layers, tokens)
    rows = {"before": table_row(*evaluate(draft, teacher, tokens, judged))}
    if cfg.loss == "distillation":
        wanted = teacher_states(teacher, pieces)
    else:
        wanted = next_tokens(pieces.cpu(), tokens, known).to(device)
    head = teacher.get_output_embeddings().weight[tokens].float()
    losses = list(run.progress(train(draft, head, pieces, wanted, cfg), step_count(cfg)))
    rows["after"] = table_row(*evaluate(draft, teacher, tokens, judged))
    rows["loss, first and last"] = {"first": losses[0], "last": losses[-1]}
    pretrained.save(draft.bfloat16(), tokenizer, Path(folder) / "draft")
    then = f"python deploy/draft_study.py --draft {folder}/draft"
    return run.report(folder, rows, then=then)


def check_teacher(teacher, cfg):
    """Raises UserError for a teacher that this draft cannot be made of."""
    config = teacher.config
    check(config.model_type == "llama", f"a teacher of type {config.model_type}: a Llama is needed")
    total = config.num_hidden_layers
    check(cfg.layers <= total, f"--layers: the teacher has {total}")
    fits = cfg.vocabulary <= config.vocab_size
    check(fits, f"--vocabulary: the teacher has {config.vocab_size} tokens")
    fits = cfg.length <= config.max_position_embeddings
    check(fits, f"--length: the teacher has {config.max_position_embeddings} positions")


def table_row(rates, agree):
    """Means of what `evaluate` gives."""
    return {"acceptance rate": float(rates.mean()), "same argmax": float(agree.mean())}


if __name__ == "__main__":
    run.cli(main, Config)
