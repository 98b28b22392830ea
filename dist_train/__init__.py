"""A training run, described once, with the same result under every backend and at every world size."""

__version__ = "0.1.0"
