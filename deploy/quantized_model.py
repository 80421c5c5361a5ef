"""A quantised linear layer as it is stored, and a folder of a model with such layers.

Codes are packed without loss of a bit: eight codes of b bits are b bytes. Scales are float16, zero
points bytes where they are integers. The folder holds `model.safetensors` (with a hash of every
byte) and `config.json`, which is that of transformers with a `quantization_config` in it.

Shapes: weight (out, in), scales and zeros (out, groups).
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from deploy.quantizers import dequantize, int8_matmul
from utils import checkpoint
from utils.run import UserError, check, write_json
from utils.text import printable, read_text

METHOD = "vlm-action"  # quant_method in config.json: no other library reads this folder


def pack(codes, bits):
    """Codes (n,) below 2^bits, n a multiple of 8 -> bytes (n bits / 8,), uint8.

    Eight codes of 3 or 4 bits make one number of 8 b bits, the first code in its lowest bits; its
    bytes follow.
    """
    if bits == 8:
        return codes.to(torch.uint8)
    code_shifts = bits * torch.arange(8, device=codes.device, dtype=torch.int32)
    words = (codes.view(-1, 8).int() << code_shifts).sum(1, keepdim=True, dtype=torch.int32)
    byte_shifts = 8 * torch.arange(bits, device=codes.device, dtype=torch.int32)
    return (words >> byte_shifts & 255).to(torch.uint8).flatten()


def unpack(packed, bits):
    """The inverse of `pack`: bytes (n bits / 8,) -> codes (n,), uint8."""
    if bits == 8:
        return packed
    byte_shifts = 8 * torch.arange(bits, device=packed.device, dtype=torch.int32)
    words = (packed.view(-1, bits).int() << byte_shifts).sum(1, keepdim=True, dtype=torch.int32)
    code_shifts = bits * torch.arange(8, device=packed.device, dtype=torch.int32)
    return (words >> code_shifts & 2**bits - 1).to(torch.uint8).flatten()


class QuantizedLinear(nn.Module):
    """x -> x W^T + bias, with W as packed codes; frozen.

    channels (in,): what activations are divided by first, or None (SmoothQuant, AWQ).
    activation_bits: 16, or 8 for products of integers, which want a group to be a whole row.
    Raises UserError for a weight that eight codes do not divide.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    channels: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, codes, scales, zeros, bits, channels=None, bias=None, activation_bits=16):
        super().__init__()
        shape = " x ".join(map(str, codes.shape))
        check(codes.numel() % 8 == 0, f"a weight of {shape} cannot be packed eight codes at a time")
        self.out_features, self.in_features = codes.shape
        self.bits = bits
        self.activation_bits = activation_bits
        # Zero points that are codes are kept as bytes; those of HQQ are real numbers
        as_bytes = zeros.to(torch.uint8)
        whole = bool((as_bytes == zeros).all())
        self.register_buffer("codes", pack(codes.flatten(), bits))
        self.register_buffer("scales", scales.half())
        self.register_buffer("zeros", as_bytes if whole else zeros.half())
        self.register_buffer("channels", None if channels is None else channels.half())
        self.register_buffer("bias", bias)

    def grid(self):
        """-> codes (out, in), scales, zeros (out, groups), float32."""
        codes = unpack(self.codes, self.bits).view(self.out_features, self.in_features)
        return codes, self.scales.float(), self.zeros.float()

    def dequantize(self):
        """The weight that the layer multiplies by, channel scales not undone: (out, in), float32."""
        return dequantize(*self.grid())

    def forward(self, x):
        if self.channels is not None:
            x = x / self.channels.to(x.dtype)
        if self.activation_bits == 8:
            y = int8_matmul(x.flatten(0, -2), *self.grid()).unflatten(0, x.shape[:-1]).to(x.dtype)
        else:
            y = F.linear(x, self.dequantize().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


def quantized_layers(model):
    """{name: layer} of a model's quantised linear layers."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def stored(model):
    """{name: tensor} as a file holds them: tied weights are one tensor with two names, kept once."""
    kept = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            kept[name] = tensor
        seen.add(tensor.data_ptr())
    return kept


def stored_bytes(model):
    """Bytes of all tensors of the model as a file holds them."""
    return sum(tensor.nbytes for tensor in stored(model).values())


def bits_per_weight(model):
    """Bits that a weight of the quantised layers takes, scales and zero points included."""
    total = 0
    weights = 0
    for layer in quantized_layers(model).values():
        total += sum(8 * x.nbytes for n, x in layer.named_buffers() if n != "bias")
        weights += layer.in_features * layer.out_features
    return total / max(weights, 1)


def description(model):
    """What config.json says of the model: that of transformers, and how its layers are stored."""
    layers = {}
    for name, layer in quantized_layers(model).items():
        layers[name] = {"bits": layer.bits, "activation_bits": layer.activation_bits}
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["quantization_config"] = {"quant_method": METHOD, "layers": layers}
    return config


def is_ours(folder):
    """Whether the folder holds what `save` writes."""
    try:
        config = json.loads(read_text(Path(folder) / "config.json"))
        return config["quantization_config"]["quant_method"] == METHOD
    except (UserError, ValueError, LookupError, TypeError, RecursionError):
        return False


def check_target(folder):
    """Raises UserError if `save` would have to replace something that it has not written."""
    folder = Path(folder)
    free = not folder.exists() or is_ours(folder)
    check(free, f"--save {printable(folder)} is there, and no quantised model: name a new folder")


def save(model, tokenizer, folder):
    """Write weights, config and tokenizer, whole or not at all; an earlier quantised model goes.

    Raises UserError if the folder holds something else, or cannot be written.
    """
    check_target(folder)
    folder = Path(folder)
    config = description(model)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            # Everything under another name, then one rename
            ready = Path(temporary) / "ready"
            tokenizer.save_pretrained(ready)
            checkpoint.write(ready / "model.safetensors", stored(model), config)
            write_json(ready / "config.json", config)
            # readable by all who may read other new files
            checkpoint.shared_mode(ready)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(ready, folder)
    except OSError as error:
        raise UserError(f"cannot write {printable(folder)}: {error.strerror}") from None


def empty_layer(layer, name, how, tensors):
    """A quantised layer of the shapes that the file holds, in place of a linear one."""
    codes = torch.zeros(layer.out_features, layer.in_features, dtype=torch.uint8)
    scales = torch.zeros_like(tensors[f"{name}.scales"])
    made = QuantizedLinear(codes, scales, torch.zeros_like(scales), how["bits"])
    made.activation_bits = how["activation_bits"]
    for part in ("zeros", "channels", "bias"):
        tensor = tensors.get(f"{name}.{part}")
        made.register_buffer(part, None if tensor is None else torch.zeros_like(tensor))
    return made


def load(folder, device="cpu"):
    """A folder that `save` wrote -> tokenizer, model (frozen).

    Raises UserError, one line, if it is no such folder, or its files do not belong together.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    ours = is_ours(folder)
    check(ours, f"{printable(folder)} holds no quantised model; --save writes one")
    # The header of the weights repeats config.json: whoever changed one of them is found
    tensors, meta = checkpoint.read(folder / "model.safetensors")
    config = json.loads(read_text(folder / "config.json"))
    one = json.dumps(config, sort_keys=True) == json.dumps(meta, sort_keys=True)
    apart = "config.json and model.safetensors do not belong together"
    check(one, f"{printable(folder)}: {apart}; save the model again")
    try:
        layers = config.pop("quantization_config")["layers"]
        kind = config.pop("model_type")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
        for name, how in layers.items():
            layer = empty_layer(model.get_submodule(name), name, how, tensors)
            model.set_submodule(name, layer)
        # Tied weights have one name in the file
        lost = set(model.load_state_dict(tensors, strict=False, assign=True).missing_keys)
        model.tie_weights()
        tied = set(model.state_dict()) - set(stored(model))
        check(lost <= tied, f"{printable(folder)} lacks {', '.join(sorted(lost - tied)[:3])}")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (*checkpoint.WRONG, OSError) as error:
        reason = printable(str(error).partition("\n")[0])
        raise UserError(f"{printable(folder)} does not load: {reason}; save it again") from None
    return tokenizer, model.eval().requires_grad_(False).to(device)
