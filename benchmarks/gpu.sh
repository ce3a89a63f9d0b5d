#!/bin/bash
# Everything that a GPU is asked, in one call of less than ten minutes: speed of training,
# embedding, metrics and search beside PyTorch, memory, determinism.
#
#     pip install "jax[cuda12]" torch faiss-cpu && bash benchmarks/gpu.sh | tee gpu.txt
#     bash benchmarks/gpu.sh --small      # tries every part on a CPU, with next to no data
#
# Each part has a limit of its own, and a part that fails leaves the others alone. PYTHON is the
# interpreter; the status is 1 if a part failed.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
failed=0

part() {  # seconds, arguments
  local limit=$1
  shift
  echo -e "\n### $*"
  timeout "$limit" "$python" "$@" || { echo "### failed or took over $limit s"; failed=1; }
}

if [ "$1" = --small ]; then
  part 600 benchmarks/training.py step --backbone=resnet10 --batch=4 --size=32 --rounds=1
  part 600 benchmarks/training.py embed --backbone=resnet10 --batch=4 --size=32 --rounds=1
  part 600 benchmarks/training.py memory --batches 8 --rounds=1
  part 600 benchmarks/on_device.py --items=2000 --dim=16 --queries=200 --rounds=1
  part 600 benchmarks/input_pipeline.py --images=256 --rounds=1
  XLA_FLAGS="$XLA_FLAGS --xla_gpu_deterministic_ops=true" \
    part 600 benchmarks/training.py step --backbone=resnet10 --batch=4 --size=32 --rounds=1 --alone
  exit $failed
fi
nvidia-smi
part 120 benchmarks/training.py step --batch=128 --dtype=bfloat16
part 100 benchmarks/training.py step --batch=128 --dtype=float32
part 50 benchmarks/training.py step --backbone=efficientnet_lite0 --batch=128 --dtype=bfloat16
part 60 benchmarks/training.py embed --batch=256 --dtype=bfloat16
part 40 benchmarks/training.py embed --backbone=efficientnet_lite0 --batch=256 --dtype=bfloat16
# What determinism costs, beside the first table.
XLA_FLAGS="$XLA_FLAGS --xla_gpu_deterministic_ops=true" \
  part 50 benchmarks/training.py step --batch=128 --dtype=bfloat16 --alone
part 60 benchmarks/training.py step --batch=4096 --chunk=128 --dtype=bfloat16 --rounds=1 --alone
part 60 benchmarks/on_device.py --items=60502 --dim=1536 --queries=60502
part 90 benchmarks/on_device.py --items=1000000 --dim=512 --queries=10000
part 60 benchmarks/input_pipeline.py
exit $failed
