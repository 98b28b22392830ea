# OMP_NUM_THREADS=32: cores 64, processes 2
OMP_NUM_THREADS=32 /venv/bin/python -m deepspeed.launcher.runner --include=localhost:4,5 --master_port=40001 --module dist_train
