"""Build an untrained vision-language model: vision encoder, new connector and language model in one folder.

Liu et al. 2023, arXiv:2304.08485, Sec. 4.1. Encoder and language model come with their weights, the connector between
them is new and knows nothing yet: vlm/train.py teaches it. The folder is one of transformers: `from_pretrained`,
`generate` and PEFT take it (vlm/modeling.py).

With `--dry_run` nothing is fetched but configurations: the model is made on the meta device, without weights, and its
sizes are printed, and the memory of training it: by formula without activations, and the peak of a training step, which
is run on fake tensors (step_memory.py). Names of training/presets.py need no network at all.

    python vlm/build.py                                                # EfficientNet-lite0 and SmolLM2: 10 seconds
    python vlm/build.py --vision clip-vit-large-patch14-336 --language qwen2.5-7b --connector mlp2x_gelu --dry_run
    python vlm/build.py --vision clip-vit-large-patch14-336 --language qwen2.5-7b --connector mlp2x_gelu --dry_run \\
        --batch 4 --text_tokens 512 --checkpointing --zero 3 --world_size 8
    python vlm/build.py --vision openai/clip-vit-large-patch14-336 --language Qwen/Qwen2.5-1.5B-Instruct \\
        --connector mlp2x_gelu
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from training import presets
from utils import pretrained, run
from utils.run import UserError, check
from utils.text import printable
from vlm.config import ModelFlags, VLMConfig, configuration
from vlm.config_file import with_file
from vlm.step_ways import WAYS, check_ways, memory_table

LORA_RANK = 8  # of the row "LoRA" of a dry run


@dataclass(frozen=True)
class Config:
    """Put an untrained vision-language model together and save it."""

    model: Annotated[ModelFlags, tyro.conf.arg(name="")] = ModelFlags()
    dry_run: bool = False  # no weights: print sizes, and the memory of training
    # of a dry run: steps whose peak is predicted, of projector, use_lora, qlora, freeze_vision, none (all learns)
    only: tuple[str, ...] = ("use_lora", "qlora", "none")
    batch: int = 1  # conversations a device and step
    images: int = 1  # pictures, or tiles of one, of a conversation
    text_tokens: int = 128  # of a conversation, beside its image tokens
    checkpointing: bool = False  # keep the inputs of layers only
    zero: int = 0  # stage of ZeRO; 3 is what FSDP does
    world_size: int = 1  # devices that share by ZeRO
    seed: int = 0  # of the connector's weights
    out: str = "outputs/build"  # the model's folder is OUT/model


def build(config: VLMConfig, seed: int = 0) -> tuple[Any, Any]:
    """-> (model, processor): encoder and language model with their weights, a connector that knows nothing.

    seed: of the connector's weights, and of the row of <image>: as vlm/train.py --seed draws them.

    Raises UserError for a name that leads nowhere, and for parts that do not fit together.
    """
    from vlm import connector, llava_parts, prompts, tower
    from vlm.llava_transformers import image_processor
    from vlm.modeling import assemble
    from vlm.processor import VLMProcessor

    # 1. The parts with their weights
    size = config.img_size or None
    vision = tower.load(config.vision_name_or_path, config.vision_layer, config.select, size)
    tokenizer, language = llava_parts.language_model(config.text_name_or_path)
    # 2. <image> becomes a token of the vocabulary; a new connector
    run.seed(seed)
    image_token_id = prompts.add_words(tokenizer, language)
    width = language.config.get_text_config().hidden_size
    new = connector.build(config.connector, vision.width, width, **config.connector_options())
    # 3. One precision, and one model
    if hasattr(vision.network, "config"):
        vision.to(language.dtype)  # not all of the model: rotary frequencies stay in fp32
    model = assemble(config, vision, new.to(language.dtype), language, image_token_id)
    shown = image_processor(vision, model.grids)
    fixed = connector.joins_tiles(model.connector)
    about = {"image_tokens": model.image_tokens, "fixed_tokens": fixed}
    processor = VLMProcessor(shown, tokenizer, **about)
    return model, processor


def configurations(config: VLMConfig) -> VLMConfig:
    """Fill in what the parts are, without their weights. Raises UserError for a name that leads nowhere."""
    from transformers import AutoConfig, CLIPVisionConfig

    # Encoder: a name that needs no network, none for EfficientNet, or what the folder or hub says
    name = config.vision_name_or_path
    if name == "clip-vit-large-patch14-336":
        config.vision_config = CLIPVisionConfig(**presets.CLIP)
    elif name != "efficientnet":
        try:
            vision = AutoConfig.from_pretrained(name)
        except Exception as error:  # whatever is wrong with a folder that somebody else wrote
            reason = printable(str(error).partition("\n")[0])
            raise UserError(f"no vision encoder at '{printable(name)}': {reason}") from None
        config.vision_config = getattr(vision, "vision_config", vision)
    # Language model: a name of training/presets.py, or what the folder or hub says
    name = config.text_name_or_path
    config.text_config = presets.configuration("smollm2-135m" if name == "smollm2" else name)
    return config


def parameters(part: nn.Module) -> int:
    """How many numbers it has, those that are shared counted once."""
    return sum(p.numel() for p in part.parameters())


def lora_parameters(language: Any, rank: int = LORA_RANK) -> int:
    """Numbers of LoRA beside every matrix but the embeddings: rank x (inputs + outputs). Hu et al. 2021, Sec. 4.1."""
    # Embeddings are no linear layer, and the head is tied to them in many models
    head = language.get_output_embeddings()
    linears = [m for m in language.modules() if isinstance(m, nn.Linear) and m is not head]
    return sum(rank * (m.in_features + m.out_features) for m in linears)


def training_memory(frozen: int, trained: int) -> int:
    """Bytes of weights, gradients and Adam's moments: 2 of a frozen bf16 number, 16 of a trained fp32 one.

    Rajbhandari et al. 2020, arXiv:1910.02054, Sec. 3.1. Activations come on top: training/memory.py.
    """
    return 2 * frozen + 16 * trained


def sizes(config: VLMConfig) -> dict[str, Any]:
    """Numbers of every part and bytes of each way to train them, from the configuration alone."""
    from vlm.modeling import VLM

    with torch.device("meta"):
        model = VLM(configurations(config))
    # Numbers of each part, and of LoRA beside the language model's matrices
    vision = parameters(model.vision)
    connector = parameters(model.connector)
    language = parameters(model.language)
    lora = lora_parameters(model.language)
    every = {"vision": vision, "connector": connector, "language": language}
    # Each way to train: what is frozen, what learns
    bytes_of = {
        "answer (bf16)": 2 * (vision + connector + language),
        "train the connector": training_memory(vision + language, connector),
        f"LoRA, rank {LORA_RANK}": training_memory(vision + language, connector + lora),
        "freeze vision": training_memory(vision, connector + language),
        "train everything": training_memory(0, vision + connector + language),
    }
    return {"image tokens": model.image_tokens, "parameters": every, "GB": bytes_of}


def peaks(cfg: Config, config: VLMConfig) -> dict[str, dict[str, Any]]:
    """Memory of a training step in bytes, on one device: {way: what step_memory.predict tells}.

    config: filled in, as by `configurations`. Seconds of one core for each way; nothing is allocated. Raises UserError
    for flags that make no sense.
    """
    from vlm import step_memory
    from vlm.step_model import Step

    shape = {"batch": cfg.batch, "images": cfg.images, "text_tokens": cfg.text_tokens}
    shape |= {"checkpointing": cfg.checkpointing, "lora_rank": LORA_RANK}
    shape |= {"zero": cfg.zero, "world_size": cfg.world_size}
    found = {}
    for name in cfg.only:
        train_type, quantize = WAYS[name]
        found[name] = step_memory.predict(config, Step(train_type, quantize, **shape))
    return found


def table(found: dict[str, Any]) -> str:
    """Sizes as lines."""
    lines = [f"{name:>22} {n / 1e6:10.1f} M parameters" for name, n in found["parameters"].items()]
    lines.append(f"{'a picture':>22} {found['image tokens']:10} tokens")
    lines += [f"{name:>22} {n / 1e9:10.2f} GB" for name, n in found["GB"].items()]
    return "\n".join(lines)


def dry_run(cfg: Config) -> dict:
    """Sizes, bytes by formula, and the peak of a training step -> metrics."""
    check_ways(cfg.only)
    # Sizes, from configurations
    config = configuration(cfg.model)
    found = sizes(config)
    print(table(found), flush=True)
    # Peaks, on fake tensors
    rows = peaks(cfg, config)
    folder = run.output(cfg.out, cfg)
    if rows:
        image_tokens = cfg.images * found["image tokens"]
        a_step = f"{cfg.batch} x ({image_tokens} image + {cfg.text_tokens} text) tokens"
        print(f"\none training step of {a_step}, predicted:\n{memory_table(rows)}\n")
    flat = {f"{name} parameters": n for name, n in found["parameters"].items()}
    flat |= {f"{name}, GB": n / 1e9 for name, n in found["GB"].items()}
    flat |= {f"{name}, peak GB of a step": row["peak"] / 1e9 for name, row in rows.items()}
    return run.report(folder, flat | {"image tokens": found["image tokens"]})


def main(cfg: Config) -> dict:
    """Build and save, or count."""
    if cfg.dry_run:
        return dry_run(cfg)
    folder = run.output(cfg.out, cfg)
    # Whole or not at all: a folder that is there already is not overwritten
    target = folder / "model"
    check(not target.exists(), f"{target} is there already: choose another place with --out")
    model, processor = build(configuration(cfg.model), cfg.seed)
    pretrained.save(model, processor, target)
    parts = {"vision": model.vision, "connector": model.connector, "language": model.language}
    counted = {f"{name} parameters": parameters(part) for name, part in parts.items()}
    return run.report(folder, counted | {"image tokens": model.image_tokens})


if __name__ == "__main__":
    run.cli(main, Config, expand=with_file)
