# 1 process: backend.name is single
# OMP_NUM_THREADS=64: cores 64, processes 1
OMP_NUM_THREADS=64 /venv/bin/python -m dist_train --config configs/single.yaml
