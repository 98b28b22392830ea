"""From a config to a running session."""
