# OMP_NUM_THREADS=3: as the environment has it
NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 /venv/bin/python -m torch.distributed.run --nnodes=1 --nproc-per-node=2 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=localhost:12345 --rdzv-id=dist_train-12345 -m dist_train
