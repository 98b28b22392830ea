# OMP_NUM_THREADS=2: cores 8, processes 4
OMP_NUM_THREADS=2 /venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=4 --max-restarts=2 -m dist_train --train.epochs 5
