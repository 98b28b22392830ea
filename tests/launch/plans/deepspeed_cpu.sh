# OMP_NUM_THREADS=4: cores 8, processes 2
mkdir -p -- runs/launch
printf %s 'localhost slots=2
' > runs/launch/hostfile-dc822bb2
OMP_NUM_THREADS=4 /venv/bin/python -m deepspeed.launcher.runner --hostfile=runs/launch/hostfile-dc822bb2 --no_ssh --node_rank=0 --master_addr=127.0.0.1 --master_port=40001 --module dist_train
