#!/bin/bash
# Everything that a GPU is asked, in one call of about ten minutes: speed of training,
# embedding, metrics and search beside PyTorch, memory, determinism.
#
#     pip install "jax[cuda12]" torch && bash benchmarks/gpu.sh | tee gpu.txt
#     bash benchmarks/gpu.sh --from=6     # the sixth part and what follows, after a call cut short
#     bash benchmarks/gpu.sh --small      # tries every part on a CPU, with next to no data
#
# Our programs are compiled first, all at the same time, so that most of the ten minutes are left
# for what is timed, one part after the other. Each part has a limit of its own, and a part that
# fails leaves the others alone. PYTHON is the interpreter; the status is 1 if a part failed.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
failed=0 number=0 from=1
compiled=$(mktemp -d)
trap 'rm -rf "$compiled"' EXIT
export JAX_COMPILATION_CACHE_DIR=$compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
deterministic="--xla_gpu_deterministic_ops=true"

part() {  # seconds, arguments
  local limit=$1
  shift
  number=$((number + 1))
  [ $number -ge $from ] || return
  echo -e "\n### $number: $* ${XLA_FLAGS:+(XLA_FLAGS=$XLA_FLAGS)}"
  timeout "$limit" "$python" "$@" || { echo "### failed or took over $limit s"; failed=1; }
  echo "### $SECONDS s since the start"
}

compile() {  # the part that needs it, arguments
  [ "$1" -ge $from ] || return
  shift
  timeout 200 "$python" "$@" --rounds=1 --against >/dev/null 2>&1 &
}

if [ "$1" = --small ]; then
  tiny="--backbone=resnet10 --batch=4 --size=32 --rounds=1"
  compile 1 benchmarks/training.py step $tiny
  wait
  part 600 benchmarks/training.py step $tiny
  part 600 benchmarks/training.py embed $tiny
  part 600 benchmarks/training.py memory --batches 256 --rounds=1
  part 600 benchmarks/on_device.py --items=2000 --dim=16 --queries=200 --rounds=1
  part 600 benchmarks/input_pipeline.py --images=256 --rounds=1
  [ "$JAX_PLATFORMS" = cpu ] || XLA_FLAGS="$XLA_FLAGS $deterministic" part 600 benchmarks/training.py step $tiny
  exit $failed
fi

case $1 in
  --from=*) from=${1#--from=} ;;
  ?*) echo "unknown: $1"; exit 2 ;;
esac
resnet="--batch=128 --dtype=bfloat16"
lite="--backbone=efficientnet_lite0 --batch=128 --dtype=bfloat16"
chunked="--batch=4096 --chunk=128 --dtype=bfloat16 --rounds=2 --queued=1"
nvidia-smi
compile 1 benchmarks/training.py step $resnet
compile 2 benchmarks/training.py step $lite
compile 4 benchmarks/training.py embed --batch=256 --dtype=bfloat16
compile 5 benchmarks/training.py embed $lite --batch=256
compile 6 benchmarks/training.py step --batch=128
XLA_FLAGS="$XLA_FLAGS $deterministic" compile 7 benchmarks/training.py step $resnet
compile 9 benchmarks/training.py step $chunked
wait
echo "### compiled after $SECONDS s"
part 110 benchmarks/training.py step $resnet
part 110 benchmarks/training.py step $lite
part 120 benchmarks/on_device.py --items=60502 --dim=1536 --queries=60502
part 80 benchmarks/training.py embed --batch=256 --dtype=bfloat16
part 80 benchmarks/training.py embed $lite --batch=256
part 60 benchmarks/training.py step --batch=128 --against "eager, channels last"
# What determinism costs, beside the first table.
XLA_FLAGS="$XLA_FLAGS $deterministic" part 50 benchmarks/training.py step $resnet --against
part 120 benchmarks/on_device.py --items=1000000 --dim=512 --queries=10000 --rounds=1
part 80 benchmarks/training.py step $chunked --against
part 60 benchmarks/input_pipeline.py
exit $failed
