#!/usr/bin/env bash
# All figures of RESULTS.md but those of a GPU, into a folder: bash benchmarks/all.sh [DATA_ROOT] [OUT].
# Takes about 30 minutes on two idle cores. DATA_ROOT also has mnist_png.tar.gz, for the images in files, and
# tinyshakespeare/input.txt.
# Lightning is needed for the peers alone: pip install 'lightning==2.6.*'
set -euo pipefail
cd "$(dirname "$0")/.."
root=${1:-data}
out=${2:-runs/benchmarks}
mkdir -p "$out"
export PYTHONPATH=$PWD
DIST_TRAIN_DATA=$(cd "$root" && pwd)
export DIST_TRAIN_DATA
same=(--config configs/fashion_mnist.yaml --data.root "$root" --model.activation ReLU --train.device cpu)

run() { # NAME COMMAND...: its output, also in a file
    echo "== $1: ${*:2}"
    "${@:2}" 2>&1 | tee "$out/$1.txt"
}

run speed python -m dist_train bench "${same[@]}" --train.threads 1 --repeats 30 --starts 2 \
    --json "$out/speed.json" --plot "$out/speed.png"
run resnet python -m dist_train bench --data.name synthetic \
    --data.args '{n: 1024, n_test: 8, shape: [3, 32, 32], classes: 10}' --model.name torchvision.models:resnet18 \
    --model.args.num_classes 10 --optim.name SGD --optim.lr 0.05 --optim.momentum 0.9 --train.device cpu \
    --train.threads 1 --backends single --batch-sizes 64 --steps 2 --repeats 10 --starts 0 --json "$out/resnet.json"
run libraries python -m dist_train bench "${same[@]}" --backends fsdp2,accelerate,deepspeed:0,deepspeed:2,deepspeed:3 \
    --batch-sizes 64 --repeats 24 --json "$out/libraries.json" --plot "$out/libraries.png"
# Many short slices, with a checkpoint policy that is asked at every step.
run overhead python -m dist_train bench "${same[@]}" --backends single --train.threads 1 --batch-sizes 1 --steps 50 \
    --repeats 200 --starts 0 --checkpoint.every_steps 1000000000 --json "$out/overhead.json"
run peers python benchmarks/peers.py "${same[@]}" --train.threads 1 --repeats 24
run startup python benchmarks/startup.py --repeats 3
run checkpoint torchrun --standalone --nproc_per_node=2 benchmarks/checkpoint.py
run files python benchmarks/files.py --repeats 15
run memory python benchmarks/memory.py
run muon torchrun --standalone --nproc_per_node=2 benchmarks/muon.py
run ordered python benchmarks/ordered.py
run decoder python benchmarks/decoder.py --data.root "$root"
