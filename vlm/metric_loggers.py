"""Metric loggers of vlm/train.py: TensorBoard's file, Weights & Biases' folder, which stays on this machine."""

from dataclasses import asdict


def metric_loggers(cfg, folder):
    """The loggers that the flags ask for -> functions of (step, loss)."""
    loggers = []
    if cfg.enable_tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(folder / "tensorboard")

        def to_tensorboard(step, value):
            board.add_scalar("loss", value, step)
            board.flush()

        loggers.append(to_tensorboard)
    if cfg.wandb.enable:
        import wandb  # pyright: ignore[reportMissingImports]

        about = {"project": cfg.wandb.project, "entity": cfg.wandb.entity or None}
        log = wandb.init(**about, dir=folder, mode="offline", config=asdict(cfg))
        loggers.append(lambda step, value: log.log({"loss": value}, step=step))
    return loggers
