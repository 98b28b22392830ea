# OMP_NUM_THREADS=4: cores 8, processes 2
mkdir -p -- runs/launch
printf %s 'localhost slots=2
' > runs/launch/hostfile-dc822bb2
printf %s 'compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
mixed_precision: '"'"'no'"'"'
num_machines: 1
num_processes: 2
rdzv_backend: static
use_cpu: true
mpirun_config:
  mpirun_hostfile: runs/launch/hostfile-dc822bb2
' > runs/launch/accelerate-71b518ac.yaml
OMP_NUM_THREADS=4 /venv/bin/python -m accelerate.commands.launch --config_file runs/launch/accelerate-71b518ac.yaml --main_process_port=40001 -m dist_train
