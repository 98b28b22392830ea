"""Training and evaluation: the step, its times, the optimizer and its schedule."""
