"""Files that survive: tensors and numbers in one safetensors file, whole or not at all, with a hash of every byte.

A run becomes shipped weights, in bf16, with its record: python -m utils.checkpoint outputs/ddpm models/weights/ddpm
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from utils.run import UserError, check, clean, cli, same_flags, write_json

# What building and filling a network raises if the file holds something else
WRONG = (TypeError, ValueError, AttributeError, LookupError)
WRONG += (ArithmeticError, RuntimeError, MemoryError)


def digest(tensors: dict[str, torch.Tensor], text: str) -> str:
    """sha256 over names, types, shapes and bytes of the tensors (contiguous, on the CPU), and the text."""
    sha = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        sha.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        sha.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write(path: str | Path, tensors: dict[str, torch.Tensor], meta: Any = None) -> Path:
    """Temporary name, fsync, rename: a kill at any moment leaves the old file or the new one, never half of one."""
    # The bytes of the file, with their hash in its header
    path = Path(path)
    text = json.dumps(meta)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    data = save(tensors, {"meta": text, "sha256": digest(tensors, text), "format": "pt"})
    # On the disk under another name; then one rename makes it visible
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        kept = "what was there before is untouched"
        raise UserError(f"cannot write {path}: {error.strerror}; {kept}") from None
    return path


def shared_mode(folder: str | Path) -> None:
    """Give the weights in a folder the mode that the umask asks for; the safetensors library writes them as 0600."""
    # What a plain new file gets here (the umask itself cannot be read without changing it)
    probe = Path(folder) / f".mode.{os.getpid()}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in Path(folder).rglob("*.safetensors"):
        path.chmod(mode)


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], Any]:
    """-> (tensors, meta). Raises UserError if the file is missing, cut short, not ours, or not what its hash says."""
    path = Path(path)
    check(path.is_file(), f"no checkpoint at {path}; train one first, or name another file")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        reason = str(error)[:80]
        raise UserError(
            f"{path} is not a whole safetensors file ({reason}); name another or train again"
        ) from None
    # The hash is over all that the file says, so a flipped bit anywhere is found
    text = header.get("meta", "")
    whole = header == {"meta": text, "sha256": digest(tensors, text), "format": "pt"}
    check(whole, f"{path} is damaged or not written by this project: name another or train again")
    return tensors, json.loads(text)


def load_model(path: str | Path, build: Callable[..., Any], device: Any = "cpu") -> tuple[Any, Any]:
    """-> (build(**meta) with the weights of the file, fp32, frozen; meta). Raises UserError for another network's."""
    tensors, meta = read(path)
    try:
        model = build(**meta)
        model.load_state_dict({k: v.float() for k, v in tensors.items()})
    except WRONG:
        raise UserError(
            f"{path} holds the weights of another network; name a file that this script wrote"
        ) from None
    return model.to(device).eval().requires_grad_(False), meta


def save_state(path: str | Path, **parts: Any) -> Path:
    """Save modules and optimizers (anything with a state_dict), plain values and the random state, bit for bit."""
    state: dict[str, Any] = {}
    for name, part in parts.items():
        state[name] = part.state_dict() if hasattr(part, "state_dict") else part
    # The draws to come belong to the state, too
    state["random"] = [torch.get_rng_state()]
    if torch.cuda.is_available():
        state["random"].append(torch.cuda.get_rng_state())
    # Tensors go into the file as tensors, all the rest as JSON into its header
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _take_out(state, "state", tensors)
    return write(path, tensors, skeleton)


def load_state(path: str | Path, flags: Any = None, **parts: Any) -> dict[str, Any]:
    """Load what `save_state` wrote into the given parts; returns the plain values.

    flags: the dataclass of the run, against the `config` that was saved. Raises UserError if it would learn otherwise.
    """
    tensors, skeleton = read(path)
    try:
        # Other flags are refused before anything is loaded
        state = _put_back(skeleton, tensors)
        if flags and "config" in state:
            same_flags(flags, state["config"], path)
        # Modules and optimizers
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))
        # Random numbers
        cpu, *cuda = state.pop("random")
        torch.set_rng_state(cpu)
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda[0])
    except WRONG as error:
        reason = clean(str(error)).partition("\n")[0] or type(error).__name__
        advice = "use the same or leave out --resume"
        raise UserError(f"{path} was made with other settings ({reason}); {advice}") from None
    if flags:
        write_json(Path(path).with_name("config.json"), asdict(flags))
    return state


def _take_out(x: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors out of nested dicts and lists into `tensors`; what is left can be written as JSON."""
    if isinstance(x, torch.Tensor):
        tensors[name] = x.clone()
        return {"tensor": name}
    if isinstance(x, dict):  # as pairs: JSON would turn the optimizer's integer keys into strings
        return {"dict": [[k, _take_out(v, f"{name}.{k}", tensors)] for k, v in x.items()]}
    if isinstance(x, (list, tuple)):
        return [_take_out(v, f"{name}.{i}", tensors) for i, v in enumerate(x)]
    return x


def _put_back(x: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_take_out`."""
    if isinstance(x, dict) and "tensor" in x:
        return tensors[x["tensor"]]
    if isinstance(x, dict):
        return {k: _put_back(v, tensors) for k, v in x["dict"]}
    if isinstance(x, list):
        return [_put_back(v, tensors) for v in x]
    return x


@dataclass(frozen=True)
class Config:
    """Turn the results of a long run into shipped weights: bf16, its config, numbers and loss curve beside them."""

    run: Annotated[Path, tyro.conf.Positional]  # the output folder of a run
    target: Annotated[Path, tyro.conf.Positional]  # e.g. models/weights/ddpm


def ship(cfg: Config) -> None:
    """Writes target.safetensors, target.json and target_loss.png. Raises UserError if the run did not train them."""
    # The record of the run: config, metrics
    paths = sorted(cfg.run.glob("*.json"))
    record = {path.stem: json.loads(path.read_text("utf-8")) for path in paths}
    if "train_seconds" not in record.get("metrics", {}) or not (cfg.run / "loss.png").is_file():
        raise UserError(
            f"{cfg.run} holds no finished training; a run with --pretrained has nothing to ship"
        )
    # The weights in bf16, the record and the loss curve beside them
    tensors, meta = read(cfg.run / "model.safetensors")
    tensors = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
    write(cfg.target.with_suffix(".safetensors"), tensors, meta)
    write_json(cfg.target.with_suffix(".json"), record)
    shutil.copy(cfg.run / "loss.png", cfg.target.with_name(cfg.target.name + "_loss.png"))


if __name__ == "__main__":
    cli(ship, Config)
