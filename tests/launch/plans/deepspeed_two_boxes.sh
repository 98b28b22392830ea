# 8 processes: one a GPU; the same on all 2 machines
# OMP_NUM_THREADS=8: cores 64, processes 8
# DeepSpeed reaches the machines by pdsh and ssh
mkdir -p -- runs/launch
printf %s 'box1 slots=8
box2 slots=8
' > runs/launch/hostfile-28225650
printf %s 'NCCL_SOCKET_IFNAME=ib0
GLOO_SOCKET_IFNAME=ib0
OMP_NUM_THREADS=8
' > runs/launch/deepspeed-317e5aa0.env
NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 OMP_NUM_THREADS=8 DS_ENV_FILE=/root/runs/launch/deepspeed-317e5aa0.env /venv/bin/python -m deepspeed.launcher.runner --hostfile=runs/launch/hostfile-28225650 --master_addr=box1 --master_port=29500 --module dist_train
