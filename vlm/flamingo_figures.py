"""Figures of vlm/flamingo.py: gates of each new layer, image attention maps on photos."""

from typing import Any

import torch
import torch.nn.functional as F

from utils import figures


@torch.no_grad()
def image_attention_map(model, features, start_id):
    """Image attention map: how much <image> attends to each place of photos (B,N,D) -> (B,N).

    An attention rollout through the latents: cross-attention weights of <image> over the latents,
    times the latents' weights over the image tokens.
    """
    found = []

    def keep_weights(cross, args):
        weights = cross.attention_weights(*args)  # (B,heads,T,M)
        found.append(weights[:, :, 1].mean(1))  # of <image>, mean over heads: (B,M)

    # read `<start> <image>`, and keep the weights of each gated layer
    hooks = [cross.register_forward_pre_hook(keep_weights) for cross in model.cross]
    prompt = torch.tensor([[start_id, int(model.new_ids[0])]], device=features.device)
    model.states(prompt.expand(len(features), -1), model.resample(features[:, None]))
    for hook in hooks:
        hook.remove()
    # text to latents, then latents to image tokens
    over_latents = torch.stack(found).mean(0)  # mean over layers: (B,M)
    return torch.einsum("bm,bmn->bn", over_latents, model.resampler.attention_map(features))


def draw_gates(ax, part, title):
    """Gates (steps + 1, layers): a line for each new layer while it learned; without training a bar
    for each."""
    import matplotlib.pyplot as plt

    layers = part.shape[1]
    colours = [plt.get_cmap("viridis")(i / layers) for i in range(layers)]
    if len(part) == 1:
        ax.bar(range(1, layers + 1), part[0], color=colours)
        ax.set_xlabel("new layer, in the order of the text", fontsize=8)
    else:
        for i, line in enumerate(part.T):
            ax.plot(line, color=colours[i])
            ax.text(1.02 * (len(part) - 1), line[-1], f"{i + 1}", fontsize=7, va="center")
        ax.set_xlabel("step (numbers: new layer)", fontsize=8)
    ax.axhline(0, color="gray", lw=0.5)
    ax.set_title(f"gates tanh(alpha) of {title}", fontsize=9)
    ax.tick_params(labelsize=7)


def draw_photo(ax, photo, attention, names, truth, log_p):
    """A photo (3,H,W) under its attention map (side,side), the two likeliest names above it, the
    true one below."""
    heat = F.interpolate(attention[None, None], photo.shape[1:], mode="bicubic")[0, 0]
    ax.imshow(photo.permute(1, 2, 0))
    ax.imshow(heat, cmap="inferno", alpha=0.45)
    ax.axis("off")
    text = {"transform": ax.transAxes, "ha": "center"}
    best = log_p.softmax(-1).topk(2)
    for line, (p, k) in enumerate(zip(best.values, best.indices)):
        colour = "tab:green" if names[k] == truth else "black"
        answer = f"{100 * p:.0f} % {names[k]}"
        ax.text(0.5, 1.16 - 0.12 * line, answer, fontsize=8, color=colour, **text)
    ax.text(0.5, -0.02, truth, fontsize=7, color="gray", va="top", **text)


def draw(path, gates, photos, maps, names, truths, log_p):
    """Above: the gates of each new layer. Below: photos, their image attention maps, the likeliest
    names."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9.2, 6.6), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.9))
    top, bottom = halves
    # gates (steps + 1, 2, layers)
    axes = top.subplots(1, 2, sharey=True)
    for ax, part, title in zip(axes, gates.unbind(1), ("attention", "feed-forward")):
        draw_gates(ax, part, title)
    # photos
    axes = bottom.subplots(2, 4).flat
    side = round(maps.shape[1] ** 0.5)
    for ax, photo, attention, truth, score in zip(
        axes, photos, maps.view(-1, side, side), truths, log_p
    ):
        draw_photo(ax, photo, attention, names, truth, score)
    return figures.close(figure, path)


def draw_shots(path, rows):
    """Few-shot accuracy of held-out classes: {(source, names, examples): right (trials,)}, 95 % intervals."""
    import matplotlib.pyplot as plt

    from vlm.flamingo_episodes import interval

    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.4), sharey=True, layout="constrained")
    styles = {
        "nonsense": ("tab:blue", "o-", "nonsense names"),
        "true": ("tab:green", "s-", "true names"),
        "shuffled names": ("tab:red", "x", "nonsense names, shuffled"),
        "other pictures": ("tab:orange", "^", "pictures of other classes"),
    }
    for ax, source in zip(axes, ("emoji", "fruit")):
        for shift, (names, (colour, style, label)) in enumerate(styles.items()):
            points = [
                (k[2], interval(right)) for k, right in rows.items() if k[:2] == (source, names)
            ]
            x = [shots + 0.12 * (shift - 1.5) for shots, _ in points]
            y = [p["accuracy"] for _, p in points]
            below = [max(0.0, p["accuracy"] - p["low"]) for _, p in points]
            above = [max(0.0, p["high"] - p["accuracy"]) for _, p in points]
            ax.errorbar(x, y, (below, above), fmt=style, color=colour, label=label, capsize=3, ms=5)
        ax.axhline(0.5, color="gray", lw=0.8, ls=":")
        ax.set(xlabel="examples in the prompt", ylim=(0.3, 1.03), xticks=(0, 2, 4))
        ax.set_title(f"{source} of classes never trained on, two ways", fontsize=9)
    axes[0].set_ylabel("accuracy (95 % interval)")
    axes[0].legend(fontsize=7, loc="lower center")
    return figures.close(figure, path)
