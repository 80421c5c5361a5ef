"""Training state: what a run saves to go on bit for bit, its networks, optimizers, losses and seconds, in one file."""

from dataclasses import asdict

from utils import checkpoint, figures, run


class TrainingState:
    """The state of a training run, in state.safetensors of its folder; with --resume it is loaded from there.

    parts: modules and optimizers by name. `losses` has one entry for every step done, `clock` counts the seconds of all
    runs together. Raises UserError if the file is damaged or of a run with other flags.
    """

    def __init__(self, folder, cfg, clock, **parts):
        self.folder = folder
        self.path = folder / "state.safetensors"
        self.cfg = cfg
        self.clock = clock
        self.parts = parts
        self.losses = []
        if cfg.resume:
            before = checkpoint.load_state(self.path, cfg, **parts)
            self.losses = before["losses"]
            self.clock = run.Clock(before["seconds"])

    def save(self):
        """Write all of it, and the random state with it."""
        values = {"losses": self.losses, "seconds": self.clock(), "config": asdict(self.cfg)}
        checkpoint.save_state(self.path, **self.parts, **values)

    def final_loss(self):
        """Mean loss of the last hundred steps."""
        last = self.losses[-100:]
        return sum(last) / len(last)

    def draw_losses(self, label):
        """loss.png, smoothed over fifty steps; label: what the loss is."""
        losses = {"loss": self.losses}
        figures.curves(self.folder / "loss.png", losses, "step", label, smooth=50)
