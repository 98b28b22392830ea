"""From one config to the command that starts it: on this machine, on several, or through SLURM. Knows no torch."""
