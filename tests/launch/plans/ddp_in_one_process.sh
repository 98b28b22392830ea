# 1 process: no GPU was found; --nproc 4 starts 4
# OMP_NUM_THREADS=8: cores 8, processes 1
OMP_NUM_THREADS=8 /venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=1 --max-restarts=0 -m dist_train --config configs/ddp.yaml
