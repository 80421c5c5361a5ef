"""Figure of the pretraining: bits per byte over tokens and seconds, beside the n-gram baselines."""

from utils import figures


def draw_curve(path, found, ngrams, cfg):
    """Bits per byte over tokens and over seconds of training; a line for each n-gram."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.2, 4.6))
    # The Llama
    million = cfg.batch * cfg.length / 1e6
    steps, bits = zip(*found["scores"])
    axis.plot([i * million for i in steps], bits, "o-")
    # The n-grams
    for name, value in ngrams.items():
        axis.axhline(value, color="gray", linestyle="--", linewidth=0.8)
        place = dict(xycoords=("axes fraction", "data"), fontsize=7, va="center")
        axis.annotate(name, (1.01, value), **place)
    axis.set(xscale="log", yscale="log")
    axis.set(xlabel="million tokens", ylabel="bits per byte, pages held out")
    # Seconds above
    rate = found["speed"] / 1e6
    above = axis.secondary_xaxis("top", functions=(lambda x: x / rate, lambda x: x * rate))
    above.set_xlabel("seconds of training, at the median pace")
    for scale in (axis.xaxis, axis.yaxis, above.xaxis):
        scale.set_major_formatter("{x:g}")
    axis.set_yticks([1.5, 2, 3, 4, 5], minor=False)
    axis.yaxis.set_minor_formatter("")
    axis.grid(alpha=0.3)
    return figures.close(figure, path)
