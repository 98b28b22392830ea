# 8 processes: one a GPU; the same on all 2 machines
# OMP_NUM_THREADS=8: cores 64, processes 8
OMP_NUM_THREADS=8 /venv/bin/python -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=box1:1234 --rdzv-id=dist_train-1234 --rdzv-conf=is_host=0 -m dist_train --config configs/fsdp2.yaml
