"""Differences from a checkpoint that checkpoint.allow may name."""

# Config paths that change what is computed, and may be changed at a resume by one who says so.
BY_NAME = (
    *("train.seed", "train.draws", "task.name", "task.loss", "task.args", "train.grad_clip", "train.precision"),
    *("data.normalize", "data.one_hot", "data.transforms", "data.batch_transforms"),
    *("model.name", "model.activation", "model.dropout", "model.args", "model.frozen", "model.batch_statistics"),
    *("optim.lr", "optim.weight_decay", "optim.momentum", "optim.args"),
    *("optim.groups", "optim.no_decay", "optim.schedule", "optim.warmup_steps", "optim.warmup_share"),
    *("optim.lr_final", "optim.step_size", "optim.gamma", "optim.decay_steps", "optim.decay_share"),
    *("optim.restart_steps", "optim.restart_factor", "optim.power"),
)
# The same, where there was an average before, and there is one now.
AVERAGE = ("optim.ema", "optim.ema_start")
# The same, where the schedule runs over the whole of the training.
LENGTH = ("train.epochs", "train.max_steps")
ALLOWED = ("data", *BY_NAME, *AVERAGE, *LENGTH)
