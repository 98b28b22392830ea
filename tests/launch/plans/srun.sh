srun --nodes=2 --ntasks-per-node=4 --kill-on-bad-exit=1 /venv/bin/python -u -m dist_train
