# OMP_NUM_THREADS=4: cores 8, processes 2
OMP_NUM_THREADS=4 /venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=0 -m dist_train --config configs/accelerate.yaml
