"""DPO, direct preference optimisation: learn from pairs, without a reward model. Rafailov et al.
2023, arXiv:2305.18290.

RLHF trains a reward model on pairs and then a policy on the reward model, held near the reference
model by a KL penalty. The best policy of that problem is known: p(y | x) is p_ref(y | x) exp(r(x, y)
/ beta), normalised (Eq. 4). Solved for r, the reward is beta log(p / p_ref), so the pairs can be
fitted by the policy itself. That is all of DPO: a logistic regression on log-probabilities.

The task: go on with the beginning of a tweet; VADER rates what was written, and of four samples of
the model the best and the worst are a pair (preference_data.py). The losses are in
preference_losses.py. The policy is the model with LoRA, the reference is the same model with its
adapters off: one copy of the weights.

Shapes: B pairs a step, so 2 B rows: chosen ones first; L tokens, V words of the vocabulary.
Differences from the paper: LoRA instead of all weights, AdamW instead of RMSprop, no SFT first.

    python finetune/dpo.py
    python finetune/dpo.py --kind ipo --beta 0.05
    python finetune/dpo.py --kind sft           # the baseline: learn the chosen ones, nothing else
"""

from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from finetune import adapters, llama2_full, llama2_lora, peft_io, preference_data, preference_scores
from finetune.completion_logps import draw, logps, reference
from finetune.lora_inject import inject
from finetune.preference_losses import Kind, implicit_reward, loss
from utils import checkpoint, figures, run

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # where LoRA goes


@dataclass(frozen=True)
class Config(preference_data.Training):
    """Tune a language model on preference pairs and compare it with itself before."""

    kind: Kind = "sigmoid"  # the loss: sigmoid is DPO
    beta: float = 0.1  # how much a log-ratio counts; IPO's tau, ORPO's weight
    gamma: float = 0.5  # SimPO's target margin
    smoothing: float = 0.1  # cDPO: the fraction of labels taken to be wrong
    out: str = "outputs/dpo"  # where the results go


def objective(model, cfg, history, ids, mask, completion):
    """The mean loss of a batch of pairs -> (); log-ratios of the batch are added to `history`."""
    # log-probabilities of the policy, and of the reference where the loss has one
    chosen, rejected = logps(model, ids, mask, completion).chunk(2)
    with reference(model):
        ref_chosen, ref_rejected = logps(model, ids, mask, completion).chunk(2)
    # one loss for each pair
    tokens = completion.sum(-1).chunk(2)
    about = {"tokens": tokens, "gamma": cfg.gamma, "smoothing": cfg.smoothing}
    each = loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta, cfg.kind, **about)
    # what to watch: both rewards, and how often the right one is larger
    won = implicit_reward(chosen.detach(), ref_chosen, 1.0)
    lost = implicit_reward(rejected.detach(), ref_rejected, 1.0)
    history["chosen"].append(float(won.mean()))
    history["rejected"].append(float(lost.mean()))
    history["accuracy"].append(float((won > lost).float().mean()))
    return each.mean()


def train(cfg, folder, device, model, tokenizer, pairs):
    """Train the adapters on the pairs -> history of loss and log-ratios, one entry a step."""
    groups = [llama2_full.param_group(llama2_full.trainable_parameters(model), 1.0)]
    optimizer = torch.optim.AdamW(groups, cfg.lr, weight_decay=0.0)
    history = {"loss": [], "chosen": [], "rejected": [], "accuracy": []}
    # what a checkpoint holds, and where a run that was broken off goes on
    state = folder / "state.safetensors"
    kept = {"weights": llama2_full.Trained(model), "optimizer": optimizer}
    if cfg.resume:
        history = checkpoint.load_state(state, cfg, **kept)["history"]
    about = {"config": asdict(cfg), "history": history}
    save = partial(checkpoint.save_state, state, **kept, **about)
    # the steps that are left
    model.train()
    done = len(history["loss"])
    batches = (draw(tokenizer, pairs, cfg, i) for i in range(done, cfg.steps))
    pair_loss = partial(objective, model, cfg, history)
    steps = llama2_full.train(pair_loss, batches, optimizer, cfg, device, done)
    for value in run.progress(steps, cfg.steps, done, cfg.save_every, save):
        history["loss"].append(value)
    if cfg.save_every:
        save()
    model.eval()
    return history


# The run


def check_flags(cfg):
    """Raises UserError for flags that make no sense."""
    preference_data.check_flags(cfg)
    run.check(cfg.beta > 0, "--beta must be above 0")
    run.check(0 <= cfg.smoothing < 0.5, "--smoothing must be at least 0 and below 0.5")


def draw_rewards(path, history, beta):
    """The implicit rewards of chosen and rejected ones while training, and how far apart they are."""
    chosen = beta * np.array(history["chosen"])
    rejected = beta * np.array(history["rejected"])
    named = {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}
    figures.curves(path, named, "step", "implicit reward", smooth=5)


def main(cfg: Config) -> dict:
    """Make the pairs, train on them, compare the policy with the reference; keep the adapter."""
    check_flags(cfg)
    device = run.device(cfg.device)
    tokenizer, model, pairs, held_out = preference_data.load(cfg, device)
    folder = run.output(cfg.out, cfg)
    run.seed(cfg.seed)
    # the policy: the model with adapters, which begin as nothing
    base = adapters.base_of(model)
    inject(model, TARGETS, cfg.rank, 2.0 * cfg.rank, cfg.dropout)
    history = train(cfg, folder, device, model, tokenizer, pairs)
    # against the model that wrote the pairs
    metrics = {"pairs": len(pairs), "final_loss": float(np.mean(history["loss"][-10:]))}
    metrics |= preference_scores.evaluate(model, tokenizer, held_out, cfg)
    # curves, texts, the adapter
    figures.curves(folder / "loss.png", {"loss": history["loss"]}, "step", cfg.kind, smooth=5)
    draw_rewards(folder / "rewards.png", history, cfg.beta)
    run.write_json(folder / "history.json", history)
    lora = llama2_lora.Config(rank=cfg.rank, alpha=2.0 * cfg.rank, targets=TARGETS)
    peft_io.save(model, folder / "adapter", lora, base)
    texts = metrics.pop("texts")
    run.write_json(folder / "texts.json", texts)
    for row in texts[:4]:
        print(f"{row['prompt']}\n    before {row['before']!r}\n    after  {row['after']!r}")
    return run.report(folder, metrics, then="python finetune/reward_model.py")


if __name__ == "__main__":
    run.cli(main, Config)
