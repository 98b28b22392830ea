# 8 processes: one a GPU
# OMP_NUM_THREADS=8: cores 64, processes 8
OMP_NUM_THREADS=8 /venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=8 --max-restarts=0 -m dist_train --config configs/ddp.yaml
