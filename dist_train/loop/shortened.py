"""A run cut short, to measure it or to hold it against others."""

import dataclasses

from dist_train.config.tree import Config


def shortened(config: Config, steps: int) -> Config:
    """The config with so many optimizer steps. Of a schedule's steps, and of those before weights are averaged, there
    are no more than that."""
    o, train = config.optim, config.train
    optim = dataclasses.replace(
        o,
        warmup_steps=min(o.warmup_steps, steps),
        decay_steps=None if o.decay_steps is None else min(o.decay_steps, steps),
        ema_start=min(o.ema_start, steps - 1),
    )
    train = dataclasses.replace(train, epochs=max(train.epochs, steps), max_steps=steps)
    return dataclasses.replace(config, optim=optim, train=train)
