#!/usr/bin/env bash
# Check and measure every kernel on this machine's GPU, and store all results in one folder.
#
#   benchmarks/gpu.sh [correctness|speed|training] [FOLDER]      all three unless one is named
#
# FOLDER is benchmarks/results/<gpu>-<date> unless given. Each part should take less than nine minutes on one H200. Every operation
# has a process and a time limit of its own, so that an error which the GPU does not recover from loses that operation alone, and
# writes its JSON after each case. An operation whose <name>.done is there is not measured again: repeat the command to go on.
#
# It needs Python ≥ 3.11, torch ≥ 2.11 and Triton ≥ 3.6, but no network. With typer, pydantic and rich the training step, decode and
# prefill are measured as well; README.md lists the wheels to carry. A wrong result is a FAIL row without a speed. The exit code is
# then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
unset TRITON_INTERPRET

part=all
case "${1:-}" in correctness | speed | training) part=$1; shift ;; esac
gpu=$($python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$gpu" ]; then
  echo "benchmarks/gpu.sh: torch sees no CUDA GPU here; 'questctl bench' measures the CPU." >&2
  exit 2
fi
out=${1:-benchmarks/results/$gpu-$(date +%F)}
mkdir -p "$out"
failed=0

step() { # step NAME SECONDS COMMAND…: run a command for at most SECONDS, store its output, remember a failure
  local name=$1 limit=$2 code
  shift 2
  [ -e "$out/$name.done" ] && return
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  code=${PIPESTATUS[0]}
  case $code in 0 | 1) touch "$out/$name.done" ;; esac # 1: measured, and something is wrong
  [ "$code" -eq 0 ] || { echo "== $name: exit code $code" | tee -a "$out/$name.txt"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.sm,power.limit,temperature.gpu --format=csv >"$out/gpu.csv" 2>&1
elementwise="hadamard quantize fake-quantize mask-rotate rmsnorm-quantize silu-mul-quantize rotary pack unpack"
products="int-gemm int-linear packed-gemm packed-gemm-16 one-bit-rate"

if [ $part = all ] || [ $part = correctness ]; then
  for op in $elementwise $products; do
    step "check-$op" 40 $python -m questctl.kernels "$op" --check-only --json "$out/check-$op.json"
  done
fi
if [ $part = all ] || [ $part = speed ]; then
  # In the order of their targets' table: rotation · quantize · backward · fused · products · few rows · one-bit rate.
  for op in $elementwise; do step "$op" 30 $python -m questctl.kernels "$op" --seconds 0.1 --json "$out/$op.json"; done
  for op in $products; do step "$op" 60 $python -m questctl.kernels "$op" --seconds 0.05 --json "$out/$op.json"; done
fi
if [ $part = all ] || [ $part = training ]; then
  if $python -c 'import typer, pydantic, rich' 2>/dev/null; then
    questctl=($python -c 'from questctl.cli.app import main; main()')
    step quantizer 40 "${questctl[@]}" bench quantizer --preset 100M --seconds 1 --json "$out/quantizer.json"
    step train-step 200 "${questctl[@]}" bench train-step --preset 100M --set train.micro_batch=64 --set data.seq_len=512 \
      --seconds 2 --json "$out/train-step.json"
    llama=(--bits 4 --set model.vocab_size=32000 --seconds 0.3) # the vocabulary of Llama 2
    step decode 60 "${questctl[@]}" bench decode --preset 1600M "${llama[@]}" --json "$out/decode.json"
    step decode-7b 60 "${questctl[@]}" bench decode --preset 1600M --set model.n_layer=32 --set model.d_model=4096 \
      --set model.n_head=32 "${llama[@]}" --json "$out/decode-7b.json"
    step prefill 80 "${questctl[@]}" bench prefill --preset 1600M "${llama[@]}" --json "$out/prefill.json"
  else
    echo "== training step, decode and prefill: not measured, as typer, pydantic or rich is absent" | tee "$out/absent.txt"
  fi
fi
tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
echo "== results in $out and $out.tar.gz"
exit "$failed"
