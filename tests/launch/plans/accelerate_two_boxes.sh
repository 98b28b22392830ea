# 8 processes: one a GPU; the same on all 2 machines
# OMP_NUM_THREADS=8: cores 64, processes 8
# on each machine: the file, then its command
mkdir -p -- runs/launch
printf %s 'compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: '"'"'no'"'"'
num_machines: 2
num_processes: 16
rdzv_backend: static
use_cpu: false
' > runs/launch/accelerate-40b3bb09.yaml
# on box1:
OMP_NUM_THREADS=8 /venv/bin/python -m accelerate.commands.launch --config_file runs/launch/accelerate-40b3bb09.yaml --machine_rank=0 --main_process_ip=box1 --main_process_port=29500 -m dist_train
# on box2:
OMP_NUM_THREADS=8 /venv/bin/python -m accelerate.commands.launch --config_file runs/launch/accelerate-40b3bb09.yaml --machine_rank=1 --main_process_ip=box1 --main_process_port=29500 -m dist_train
