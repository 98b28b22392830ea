# 8 processes: one a GPU
# OMP_NUM_THREADS=8: cores 64, processes 8
mkdir -p -- runs/launch
printf %s 'compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: '"'"'no'"'"'
num_machines: 1
num_processes: 8
rdzv_backend: static
use_cpu: false
' > runs/launch/accelerate-67cce53e.yaml
OMP_NUM_THREADS=8 /venv/bin/python -m accelerate.commands.launch --config_file runs/launch/accelerate-67cce53e.yaml --main_process_port=40001 -m dist_train --config configs/accelerate.yaml
