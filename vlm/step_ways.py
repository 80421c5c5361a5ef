"""The ways to train whose step is predicted by step_cost.py and build.py, and a table of their memory."""

from typing import Any

from utils.run import check

WAYS = {  # name: --train_type, and whether the language model is in 4 bits
    "projector": ("projector", False),
    "use_lora": ("use_lora", False),
    "qlora": ("use_lora", True),
    "freeze_vision": ("freeze_vision", False),
    "none": ("none", False),
}
KINDS = ("weights", "gradients", "optimizer", "activations", "peak")


def check_ways(names: tuple[str, ...]) -> None:
    """Raises UserError for a name of --only that is no way to train."""
    unknown = set(names) - WAYS.keys()
    check(not unknown, f"--only {' '.join(sorted(unknown))}: there are {', '.join(WAYS)}")


def memory_table(rows: dict[str, dict[str, Any]]) -> str:
    """Bytes, as step_memory.predict tells them -> GB by kind, a line for each way."""
    lines = [f"{'GB':>14}" + "".join(f"{name:>14}" for name in KINDS)]
    for way, found in rows.items():
        lines.append(f"{way:>14}" + "".join(f"{found[name] / 1e9:14.3f}" for name in KINDS))
    return "\n".join(lines)
