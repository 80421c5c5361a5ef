"""Figure of predicted memory: the peak of each stage of ZeRO, and the cost of longer texts."""

from dataclasses import replace

from training import zero
from training.memory_trace import exact
from utils import figures

COLOURS = zero.COLOURS | {"activations": "tab:purple", "temporary": "lightgray"}
LENGTHS = [256, 512, 1024, 2048, 4096]  # tokens of a text


def draw(path, cfg):
    """Left: the peak for every stage of ZeRO. Right: the peak over the length of the texts."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    draw_stages(left, cfg)
    draw_lengths(right, cfg)
    for axis in (left, right):
        axis.axhline(cfg.budget, color="black", linestyle=":", linewidth=1)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figures.close(figure, path)


def draw_stages(axis, cfg):
    """A stack for each stage of ZeRO: what is there at the peak."""
    n = max(8, cfg.world_size)
    for stage in range(4):
        found = exact(replace(cfg, zero=stage, world_size=n, precision="bf16-mixed"))
        # One bar, a colour for each tag
        bottom = 0.0
        for name, colour in COLOURS.items():
            size = found["at_peak"].get(name, 0) / 1e9
            axis.bar(stage, size, 0.7, bottom, color=colour, label=name if stage == 0 else None)
            bottom += size
        axis.text(stage, bottom, f"{bottom:.0f}", ha="center", va="bottom", fontsize=9)
    title = f"{cfg.model}, {cfg.method}, {n} devices"
    axis.set(title=title, ylabel="GB on one device", xlabel="stage of ZeRO")
    axis.set_xticks(range(4))


def draw_lengths(axis, cfg):
    """The peak of LoRA over the length of texts: eager attention, fused, with checkpointing."""
    ways = {
        "all attention weights": dict(attention="eager"),
        "fused attention": dict(attention="sdpa"),
        "fused, checkpointed": dict(attention="sdpa", checkpointing=True),
    }
    one_device = dict(method="lora", zero=0, world_size=1, precision="bf16", checkpointing=False)
    plain = replace(cfg, **one_device)
    # A line for each way, a step on fake tensors for each point
    for name, flags in ways.items():
        peaks = []
        for length in LENGTHS:
            found = exact(replace(plain, seq_len=length, **flags))
            peaks.append(found["peak"] / 1e9)
        axis.plot(LENGTHS, peaks, marker="o", markersize=3, label=name)
    # Doubled length, doubled memory: a straight line
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(LENGTHS, LENGTHS)
    axis.yaxis.set_major_formatter("{x:.0f}")
    title = f"{cfg.model}, LoRA, bf16, {cfg.batch} a batch"
    axis.set(title=title, xlabel="tokens of a text", ylabel="GB")
