"""What a run's folder keeps of a data set of text: enough to write with its model where the text itself is gone."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config.tree import Config
from dist_train.data import text, tokenizers
from dist_train.data.sets import Data, Gathered
from dist_train.errors import ConfigError
from dist_train.run import assemble


def known_data(folder: Path, config: Config) -> Data:
    """The facts of a run's data set of tokens, with its tokenizer. Raises ConfigError where it has none.

    Args:
        folder: of the run.
        config: of the run.
    """
    if config.data.name == "text" and (folder / text.KEPT / tokenizers.FILE).is_file():
        args = config.data.args
        tokenizer = tokenizers.load(folder / text.KEPT)
        block = args.get("block", inspect.signature(text.text).parameters["block"].default)
        size = (args.get("vocab_size") if "tokens" in args else None) or tokenizer.vocab_size
        facts = {"vocab_size": size, "block": block, "tokenizer": tokenizer}
        return Data(Gathered(1, _gone, ""), facts=facts)
    data = None if config.data.name == "text" else assemble.read_data(config.data, config.data.download)
    if data is None or not {"tokenizer", "vocab_size", "block"} <= data.known().keys():
        raise ConfigError(
            f"run.dir: got {folder}, a run of data.name {config.data.name} without a tokenizer, expected that of a "
            f"language model of text; for example one of --config configs/decoder.yaml"
        )
    return data


def _gone(numbers: np.ndarray) -> Any:
    raise AssertionError("no sample is read")
