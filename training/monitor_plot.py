"""Figure of a monitored command: cores, GPU, memory and bytes over time, on a ground of what it was bound by."""

from training import monitor_bounds
from utils import figures

COLOURS = {
    monitor_bounds.COMPUTE: "tab:green",
    monitor_bounds.MEMORY: "tab:purple",
    monitor_bounds.OVERHEAD: "tab:red",
    monitor_bounds.DATA: "tab:orange",
    monitor_bounds.IDLE: "tab:gray",
}


def panels(samples):
    """{label of an axis: {name of a curve: numbers}}."""
    found = {
        "cores": {
            "all": [x["cores"] for x in samples],
            "data-loader workers": [x["worker_cores"] for x in samples],
            "wanted, not had": [x["queued"] for x in samples],
        },
        "MB a second": {
            "from disk": [x["storage_read"] / 1e6 for x in samples],
            "read(2)": [x["read_calls"] / 1e6 for x in samples],
            "network, in": [x["received"] / 1e6 for x in samples],
        },
        "GB": {"memory": [x["rss"] / 1e9 for x in samples]},
    }
    devices = [monitor_bounds.device(x) for x in samples]
    if any(devices):
        shown = [x or {"gpu": 0, "gpu_memory": 0} for x in devices]
        found["share of time"] = {
            "a kernel ran": [x["gpu"] for x in shown],
            "device memory in use": [x["gpu_memory"] for x in shown],
        }
    return found


def draw(path, samples):
    """Write the figure -> its path."""
    import matplotlib.pyplot as plt

    shown = panels(samples)
    size = (7.5, 1.6 * len(shown) + 0.6)
    figure, axes = plt.subplots(len(shown), 1, figsize=size, sharex=True)
    t = [x["t"] for x in samples]
    start = t[0] - samples[0]["seconds"]
    for ax, (label, curves) in zip(axes, shown.items()):
        # The ground: a colour for each bound, named once
        named = set()
        for part in monitor_bounds.segments(samples):
            bound = part["bound"]
            name = bound if ax is axes[0] and bound not in named else None
            ax.axvspan(part["from"], part["to"], color=COLOURS[bound], alpha=0.2, lw=0, label=name)
            named.add(bound)
        # The curves: a sample is the mean of its interval
        for name, numbers in curves.items():
            ax.step([start, *t], [numbers[0], *numbers], label=name, lw=1.2)
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[-1].set_xlabel("seconds")
    return figures.close(figure, path)
