"""Checkpoints: whole or absent, the same for every backend, resumed at any world size."""
