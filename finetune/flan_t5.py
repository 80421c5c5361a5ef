"""LoRA on an encoder-decoder (T5, FLAN-T5): frozen weights in 16 bits or in int8, memory and time compared.

No accuracy is claimed here: without --model the weights are random, in the shape of flan-t5-small, which is all
that cost needs. An encoder reads the source, a decoder writes the target and looks at it by cross-attention
(Raffel et al. 2019, arXiv:1910.10683); FLAN-T5 is T5 tuned on instructions (Chung et al. 2022, arXiv:2210.11416).
LoRA (Hu et al. 2021, arXiv:2106.09685) sits at queries and values of all three attentions. Frozen weights take
two bytes each in bf16, one in int8 with a scale for each row (LLM.int8(): Dettmers et al. 2022, arXiv:2208.07339).

Shapes: B pairs, S source tokens, T target tokens, V words of the vocabulary.
Precision: products in bf16 (autocast). Not fp16: the feed-forward layers of T5 leave its range.

    python finetune/flan_t5.py                                  # LoRA beside bf16 weights
    python finetune/flan_t5.py --int8                           # beside int8 weights
    python finetune/flan_t5.py --int8 --backend bitsandbytes    # LLM.int8() of bitsandbytes
    python finetune/flan_t5.py --compare                        # all three in turn, and the table
    python finetune/flan_t5.py --model google/flan-t5-small     # any encoder-decoder, for a GPU
"""

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

from finetune import adapters, llama2_full, llama2_lora, peft_io
from finetune.llama2_qlora import by_bitsandbytes, cast, store
from finetune.lora_inject import inject
from finetune.peak_memory import process_peak, storage_bytes
from finetune.quantization import QuantLinear
from finetune.sentiment import IGNORE
from utils import data, pretrained, run
from utils.text import printable

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # the special tokens of T5, numbers 0, 1 and 2


@dataclass(frozen=True)
class Config:
    """Adapt an encoder-decoder with LoRA; how much memory and time a step takes."""

    # flan-t5-small's shape; or a local folder or hub id of an encoder-decoder
    model: str = "random"
    int8: bool = False  # frozen weights in int8 instead of bf16
    backend: Literal["ours", "bitsandbytes"] = "ours"  # who stores and multiplies int8
    compare: bool = False  # bf16, int8 and bitsandbytes' int8 in turn
    rank: int = 16  # r of LoRA
    alpha: float = 32.0  # updates are multiplied by alpha / r
    targets: tuple[str, ...] = ("q", "v")  # where LoRA goes
    pairs: int = 1024  # pairs of an epoch
    source: int = 128  # S, tokens of the text, at most
    target: int = 16  # T, tokens of its title, at most
    batch: int = 8  # pairs a step
    steps: int = 12  # training steps, by which an epoch is timed
    lr: float = 1e-3  # peak learning rate
    resume: bool = False  # go on from the last checkpoint in --out, bit for bit
    save_every: int = 0  # steps between checkpoints; 0: none are written
    seed: int = 0  # same seed, same numbers
    device: str = "auto"  # cpu, cuda, ...
    out: str = "outputs/flan_t5"  # where the results go


def titled_paragraphs():
    """Source and target of every pair: the first paragraph under a heading of the manuals, and the heading."""
    heading = re.compile(r"^(\S.*)\n([=\-~^])\2{3,}\n\n((?:[A-Za-z].*\n)+)", re.MULTILINE)
    pairs = []
    for _, page in data.docs():
        for title, _, paragraph in heading.findall(page):
            pairs.append((f"title: {' '.join(paragraph.split())}", title.strip()))
    return pairs


def train_tokenizer(texts, vocabulary=8000) -> Any:
    """A byte-pair tokenizer of these texts, with the special tokens of T5."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE(unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = [PAD, END, UNKNOWN]
    about = {"special_tokens": special, "show_progress": False}
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, **about))
    # an end behind every text, source and target
    made.post_processor = processors.TemplateProcessing(f"$A {END}", None, [(END, 1)])
    names = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def random_t5() -> Any:
    """An encoder-decoder with random weights in the shape of flan-t5-small: 77 M parameters."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 6}
    sizes |= {"num_layers": 8, "num_decoder_layers": 8}
    kinds = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    config: Any = T5Config(**sizes, **kinds)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config)
    # a head of its own, as FLAN-T5 has it
    head = torch.randn(config.vocab_size, config.d_model) / config.d_model**0.5
    model.lm_head.weight = torch.nn.Parameter(head)
    model.config.tie_word_embeddings = False
    return model


def load(cfg, texts):
    """-> tokenizer, encoder-decoder. Raises UserError for a model that is none, or is not there."""
    if cfg.model == "random":
        return train_tokenizer(texts), random_t5()
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    local = pretrained.local_only(cfg.model, "encoder-decoder")
    pretrained.check_weights(cfg.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.model, local_files_only=local)
        model = AutoModelForSeq2SeqLM.from_pretrained(cfg.model, local_files_only=local)
    # what others wrote: transformers raises what comes
    except Exception as error:
        reason = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        message = f"no encoder-decoder at '{printable(cfg.model)}': {reason}"
        raise run.UserError(message) from None
    return tokenizer, model


def make_batch(tokenizer, pairs, cfg, i):
    """Batch of step i -> ids and mask (B,S) of the sources, labels (B,T) of the targets, padding ignored."""
    draw = torch.Generator().manual_seed(cfg.seed * 1_000_003 + i)
    chosen = [pairs[j] for j in torch.randint(len(pairs), (cfg.batch,), generator=draw).tolist()]
    sources, targets = zip(*chosen)
    about = {"padding": True, "truncation": True, "return_tensors": "pt"}
    read = tokenizer(list(sources), max_length=cfg.source, **about)
    written = tokenizer(list(targets), max_length=cfg.target, **about)
    labels = written.input_ids.masked_fill(written.attention_mask == 0, IGNORE)
    return read.input_ids, read.attention_mask, labels


def shift_right(labels, start, pad):
    """What the decoder reads: a start token, then each target but the last, (B,T) -> (B,T). Raffel et al. 2019,
    Sec. 2.1: trained with teacher forcing."""
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start
    # ignored places hold a number that no embedding has
    return shifted.masked_fill(shifted == IGNORE, pad)


def loss(model, ids, mask, labels):
    """Mean of -log p(target token | source, targets before it), padding left out: (B,S), (B,S), (B,T) -> ()."""
    config = model.config
    before = shift_right(labels, config.decoder_start_token_id, config.pad_token_id)
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=before).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


class Int8Linear(QuantLinear):
    """A frozen int8 layer whose `weight` are its codes: T5 asks for the type of a weight at every pass, and
    need not have it dequantised for the answer."""

    @property
    def weight(self):
        return self.codes


def adapt(model, cfg):
    """Store the frozen weights in 16 or 8 bits and inject LoRA, in place -> names of the adapted layers."""
    cast(model, torch.bfloat16)
    if cfg.int8:
        store(model, 8, make=Int8Linear if cfg.backend == "ours" else by_bitsandbytes)
    return inject(model, cfg.targets, cfg.rank, cfg.alpha)


def experiment(cfg, folder, device, tokenizer, model, pairs):
    """Adapt and train -> a row of the table; the adapter of a real model is kept."""
    adapt(model, cfg)
    model.to(device)
    weights = storage_bytes([*model.parameters(), *model.buffers()])
    draw = partial(make_batch, tokenizer, pairs, cfg)
    found = llama2_full.fit(cfg, folder, device, model, partial(loss, model), draw)
    if cfg.model != "random":
        base = adapters.base_of(model)
        lora = llama2_lora.Config(rank=cfg.rank, alpha=cfg.alpha, targets=cfg.targets)
        peft_io.save(model, folder / "adapter", lora, base, task_type="SEQ_2_SEQ_LM")
    steps = -(-cfg.pairs // cfg.batch)
    return {
        "trained": found["trained"],
        "weights, MiB": weights / 2**20,
        "tensors, MiB": found["tensor_MiB"],
        "seconds a step": found["seconds_per_step"],
        "minutes an epoch": found["seconds_per_step"] * steps / 60,
        "loss": found["final_loss"],
    }


def check_flags(cfg):
    """Raises UserError for flags that make no sense."""
    least = min(cfg.pairs, cfg.batch, cfg.steps, cfg.source, cfg.target)
    run.check(least > 0, "--pairs, --batch, --steps, --source and --target start at 1")
    run.check(cfg.lr > 0, "--lr must be above 0")
    whole = cfg.backend == "ours" or cfg.int8 or cfg.compare
    run.check(whole, "--backend bitsandbytes stores int8: add --int8")
    run.check(not (cfg.compare and cfg.resume), "--compare begins anew: leave out --resume")


def main(cfg: Config) -> dict:
    """LoRA beside weights of 16 or 8 bits, or one after the other; writes memory and time."""
    check_flags(cfg)
    device = run.device(cfg.device)
    pairs = titled_paragraphs()[: cfg.pairs]
    texts = [text for pair in pairs for text in pair]
    arms = {f"int8, {cfg.backend}" if cfg.int8 else "bf16": cfg}
    if cfg.compare:
        arms = {
            "bf16": replace(cfg, int8=False),
            "int8, ours": replace(cfg, int8=True, backend="ours"),
            "int8, bitsandbytes": replace(cfg, int8=True, backend="bitsandbytes"),
        }
    metrics = {}
    folder = None
    for name, arm in arms.items():
        run.seed(cfg.seed)
        tokenizer, model = load(cfg, texts)
        folder = folder or run.output(cfg.out, cfg)
        metrics[name] = experiment(arm, folder, device, tokenizer, model, pairs)
    # where nothing else is measured, the largest size of the process counts, too
    if len(arms) == 1:
        metrics["process, MiB"] = process_peak() / 2**20
    return run.report(folder, metrics, then="python finetune/flan_t5.py --compare")


if __name__ == "__main__":
    run.cli(main, Config)
