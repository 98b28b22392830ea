# OMP_NUM_THREADS=8: cores 8, processes 1
# on laptop:
OMP_NUM_THREADS=8 /venv/bin/python -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=laptop:29500 --rdzv-id=dist_train-29500 --rdzv-conf=is_host=1 -m dist_train
# on node 1:
OMP_NUM_THREADS=8 /venv/bin/python -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=laptop:29500 --rdzv-id=dist_train-29500 --rdzv-conf=is_host=0 -m dist_train
