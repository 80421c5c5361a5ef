"""Configuration of a vision-language model, its training and its engines: nested dataclasses.

tyro makes flags of them (`--connector mlp2x_gelu --lora.r 16`), a file fills them (config_file.py). Flags of the common
trainers (transformers, LLaVA, DeepSpeed examples) are aliases: `--learning_rate` is `--lr`. `VLMConfig`, the
configuration of a model of transformers, is in config.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg

TrainType = Literal["use_lora", "projector", "freeze_vision", "none", "lora_frozen_projector"]


# Fields of PerceiverConfig, and arguments of vlm.connector.PerceiverResampler
RESAMPLER_NAMES = {
    "depth": "depth",
    "n_latents": "latents",
    "n_heads": "heads",
    "n_query_groups": "kv_heads",
    "head_dim": "head_dim",
    "concat_latents_kv": "concat_latents_kv",
    "hidden_size": "hidden_size",
    "attention_dropout": "attention_dropout",
}


# Connectors that PerceiverConfig is for: of a picture, of all its tiles
RESAMPLERS = ("perceiver", "tile_perceiver")


@dataclass(frozen=True)
class PerceiverConfig:
    """Perceiver resampler (RESAMPLERS). Alayrac et al. 2022, arXiv:2204.14198, Sec. 2.1."""

    depth: int = 2  # layers
    n_latents: int = 16  # learned queries: so many image tokens come out
    n_heads: int = 8  # of the queries
    n_query_groups: int = 8  # heads of keys and values; fewer: grouped-query attention
    head_dim: int = 32  # of each head
    concat_latents_kv: bool = True  # the latents are among keys and values, too
    hidden_size: int | None = None  # width inside; None: that of the language model
    attention_dropout: float = 0.0  # dropout rate of attention weights

    def options(self) -> dict[str, Any]:
        """As `vlm.connector.PerceiverResampler` names them."""
        return {theirs: getattr(self, ours) for ours, theirs in RESAMPLER_NAMES.items()}

    @staticmethod
    def of(options: dict[str, Any]) -> dict[str, Any]:
        """The other way round: fields from the resampler's own names."""
        return {
            ours: options[theirs] for ours, theirs in RESAMPLER_NAMES.items() if theirs in options
        }


def connector_options(perceiver: PerceiverConfig | None, plugins: Sequence[str]) -> dict[str, Any]:
    """Options of a connector: those of the resampler, if it is one, and token sparsification before it."""
    options = perceiver.options() if perceiver else {}
    if plugins:
        options["sparsity_plugins"] = tuple(plugins)
    return options


@dataclass(frozen=True)
class ModelFlags:
    """Parts of a model by their names: the flags of a `VLMConfig`, without the import of transformers."""

    # vision encoder: efficientnet, or a folder or hub id
    vision_name_or_path: Annotated[str, arg(aliases=["--vision"])] = "efficientnet"
    # language model: smollm2, or a folder or hub id
    text_name_or_path: Annotated[str, arg(aliases=["--language", "--text"])] = "smollm2"
    connector: str = "pool3"  # see vlm/connector.py
    perceiver: PerceiverConfig = PerceiverConfig()  # of perceiver and tile_perceiver
    # fewer tokens before the connector: topk_norm16, random16, pool4, bilinear4
    sparsity_plugins: tuple[str, ...] = ()
    # of the encoder's hidden states
    vision_layer: Annotated[int, arg(aliases=["--layer"])] = -2
    select: Literal["patch", "all"] = "patch"  # patches only, or the class token and others, too
    img_size: int = 0  # side of the pictures; 0: that of the encoder
    # any-resolution tiles of LLaVA-1.6: a photo is seen whole and in at most so many; 0: whole only
    tiles: int = 0
    # instead of tiles: sizes to choose from, height and width of each, such as 336 672 672 336
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    # eager, sdpa, flash_attention_2; None: eager on a CPU, else what transformers chooses
    attn_implementation: str | None = None

    def connector_options(self) -> dict[str, Any]:
        """What `vlm.connector.build` is given besides names and widths."""
        perceiver = self.perceiver if self.connector in RESAMPLERS else None
        return connector_options(perceiver, self.sparsity_plugins)


@dataclass(frozen=True)
class DataConfig:
    """Conversations to learn from, and how they become batches."""

    # chat.json, JSON lines, or tar shards, one or several; none: photos of fruit
    data_path: Annotated[tuple[str, ...], arg(aliases=["--data"])] = ()
    weights: tuple[float, ...] = ()  # of several files: how often each is drawn
    # where the pictures are: a folder, or tar shards; empty: beside the first file
    image_folder: str = ""
    download: bool = False  # pictures may be addresses of the web
    # read rows and pictures when a batch needs them; so do workers, weights, shards, several files
    lazy: bool = False
    dataloader_num_workers: int = 0  # processes that read ahead
    dataloader_prefetch_factor: int = 2  # batches that each of them reads ahead
    dataloader_pin_memory: bool = False  # page-locked, for copies to a GPU
    dataloader_persistent_workers: bool = False  # they stay for the next iteration
    emoji: int = 0  # pictures of emoji besides the photos of fruit
    views: int = 4  # of each picture: its middle, and random pieces
    # of samples: paragraphs of manuals, so that it does not forget how to read
    text_share: float = 0.05
    # chat template: plain, vicuna, llava_llama_2, mistral_instruct, chatml, or a Jinja file; empty: the
    # tokenizer's own, for smollm2 chatml
    template: str = ""
    # tokens of the longest conversation; 0: as many as the language model has positions
    model_max_length: int = 0
    packing: bool = True  # several conversations in one row, none sees another
    # all of a step with pictures or all without, about equally long
    group_by_modality_length: bool = False

    @property
    def paths(self) -> list[str]:
        """Files of rows."""
        named = [self.data_path] if isinstance(self.data_path, str) else self.data_path
        return [path for path in named if path]

    @property
    def is_lazy(self) -> bool:
        """Does anything ask for data that is read while training?"""
        asked = (self.lazy, self.dataloader_num_workers, self.weights, self.download)
        rows = all(path.endswith(".json") for path in self.paths)
        return any(asked) or len(self.paths) > 1 or not rows


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, by which steps."""

    # none: nothing is frozen
    train_type: TrainType = "use_lora"
    # what does not learn besides: parts (vision, connector, newline, language), or regular expressions
    # that names of parameters begin with, such as language.model.layers.[0-9][.]
    freeze: tuple[str, ...] = ()
    # weights to go on from: a folder or hub id of a LLaVA, or a model.safetensors of this script
    ckpt_path: Annotated[str, arg(aliases=["--model"])] = ""
    # LoRA to go on with: a folder of PEFT's, such as OUT/adapter; its rank, alpha and targets are taken
    adapter: str = ""
    # B
    batch_size: Annotated[int, arg(aliases=["--per-device-train-batch-size"])] = 16
    gradient_accumulation_steps: int = 1  # A
    steps: Annotated[int, arg(aliases=["--max-steps"])] = 120  # optimizer steps of both stages
    # instead of steps: passes over the data
    epochs: Annotated[float, arg(aliases=["--num-train-epochs"])] = 0
    align_steps: int = 0  # steps of the first stage, in which the connector learns alone
    lr: Annotated[float, arg(aliases=["--learning-rate"])] = 1e-3  # of new parts: the connector
    # of what was trained before, or is added to it by LoRA; whole models (freeze_vision, none): 5e-5
    lr_pretrained: Annotated[float, arg(aliases=["--learning-rate-pretraining-components"])] = 1e-3
    min_lr: float = 0.0  # where the schedule ends
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, arg(aliases=["--num-warmup-steps"])] = 12  # a line up
    warmup_ratio: float = 0.0  # instead of warmup_steps: a fraction of all steps
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    # largest norm of a step's gradients; 0: no clipping
    grad_clip: Annotated[float, arg(aliases=["--max-grad-norm"])] = 1.0
    # of matrix products and of what is frozen; fp16 with loss scaling, on GPUs
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    gradient_checkpointing: bool = False  # keep no activations, compute them again
    # steps between checkpoints; 0: none
    save_steps: Annotated[int, arg(aliases=["--save-every"])] = 0
    # checkpoints that are kept, the last ones, each under the number of its step; 0: one, and no number
    save_total_limit: int = 0
    log_steps: Annotated[int, arg(aliases=["--logging-steps"])] = 1  # steps between logged losses
    resume: bool = False  # go on from the last checkpoint in --out
    judged: int = 300  # photos to be judged by; 0: all 1322
    # processes, where neither torchrun nor deepspeed starts them
    ranks: int = 1
    local_rank: int = -1  # launchers give it; the environment says the same
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class LoraConfig:
    """LoRA in the language model, under PEFT's names. Hu et al. 2021, arXiv:2106.09685."""

    r: Annotated[int, arg(aliases=["--lora-rank", "--lora-r"])] = 8  # rank
    # updates are multiplied by alpha / r; 0: alpha = 2 r
    lora_alpha: Annotated[float, arg(aliases=["--lora-alpha"])] = 0
    # dropout rate of an update's inputs
    lora_dropout: Annotated[float, arg(aliases=["--lora-dropout"])] = 0.0
    # ends of names, or regular expressions
    target_modules: Annotated[tuple[str, ...], arg(aliases=["--lora-targets"])] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    @property
    def alpha(self) -> float:
        """Alpha, or twice the rank."""
        return self.lora_alpha or 2 * self.r


@dataclass(frozen=True)
class QuantConfig:
    """Frozen matrices of the language model in few bits (QLoRA). Dettmers et al. 2023, arXiv:2305.14314."""

    bits: Annotated[Literal[0, 4, 8], arg(aliases=["--bits"])] = 0  # 0: as they are
    codebook: Literal["nf4", "fp4", "int4"] = "nf4"  # the 16 values of 4 bits
    double_quant: bool = True  # the scales of 4 bits are quantised, too
    backend: Literal["ours", "bitsandbytes"] = "ours"


@dataclass(frozen=True)
class FSDPConfig:
    """Fully sharded data parallelism, PyTorch's FSDP2. Zhao et al. 2023, arXiv:2304.11277."""

    enable: Annotated[bool, arg(aliases=["--fsdp"])] = False
    # classes to shard one by one; none: the layers of the language model, and of a tower that learns
    transformer_cls: tuple[str, ...] = ()
    # of gathered weights: as --precision says for products, or cast when gathered
    precision: Literal["autocast", "bf16"] = "autocast"
    offload: bool = False  # shards wait in the host's memory (GPUs)


@dataclass(frozen=True)
class DeepSpeedConfig:
    """DeepSpeed's engine. Rajbhandari et al. 2020, arXiv:1910.02054."""

    # -1: without DeepSpeed
    stage: Annotated[Literal[-1, 0, 1, 2, 3], arg(aliases=["--zero-stage"])] = -1
    offload: Literal["none", "optimizer", "parameters"] = "none"  # what waits in the host's memory
    config: str = ""  # a JSON file of DeepSpeed's own; empty: training/configs/zero*.json


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, offline: nothing leaves the machine."""

    enable: Annotated[bool, arg(aliases=["--enable-wandb"])] = False
    project: str = "llava"
    entity: str = ""
