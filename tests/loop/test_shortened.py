"""A run cut short is a good config still, whatever its schedule waits for."""

from pathlib import Path

import pytest

from dist_train.bench.lead import Cell
from dist_train.config.load import load
from dist_train.ranks.launcher import Launcher
from dist_train.run.check import check
from dist_train.tools.parity import for_parity

CONFIG = str(Path(__file__).parents[2] / "configs/decoder.yaml")  # warms up over 50 steps
WSD = ["--optim.schedule", "wsd", "--optim.decay_steps", "100", "--optim.lr_final", "0"]


@pytest.mark.parametrize("argv", [[], WSD, ["--optim.ema", "0.9", "--optim.ema_start", "100"]])
def test_what_is_measured_or_compared_may_wait_longer_than_it_runs(argv: list[str]):
    config = load(["--config", CONFIG, *argv])
    short = for_parity(config, 20)
    assert short.optim.warmup_steps == 20 and short.train.max_steps == 20
    for one in (short, Cell("single", 1, config).with_batch(8, 1)):
        check(one, Launcher(), writes=False)
    assert for_parity(config, 400).optim == config.optim
