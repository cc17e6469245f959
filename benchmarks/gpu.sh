#!/usr/bin/env bash
# Check and measure every kernel on this machine's GPU, and store all results in one folder.
#
#   benchmarks/gpu.sh [FOLDER]        FOLDER: benchmarks/results/<gpu>-<date> unless given
#
# It needs Python ≥ 3.11, torch ≥ 2.11 and Triton ≥ 3.6, but no network, and takes under 8 minutes on one H100. If typer, pydantic
# and rich are installed too, the training step, decode and prefill are measured as well. A wrong result is a FAIL row without a
# speed, and the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(mktemp -d)}
unset TRITON_INTERPRET

gpu=$($python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$gpu" ]; then
  echo "benchmarks/gpu.sh: torch sees no CUDA GPU here; 'questctl bench' measures the CPU." >&2
  exit 2
fi
out=${1:-benchmarks/results/$gpu-$(date +%F)}
mkdir -p "$out"
failed=0

step() { # step NAME SECONDS COMMAND…: run a command for at most SECONDS, store its output, remember a failure
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { echo "== $name: exit code $code" | tee -a "$out/$name.txt"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.sm,power.limit,temperature.gpu --format=csv >"$out/gpu.csv" 2>&1

# Kernel targets in the order of their table: rotation · quantize · backward · fused · one-bit rate · products · layers · few rows · one row.
step elementwise 90 $python -m questctl.kernels hadamard quantize fake-quantize mask-rotate rmsnorm-quantize silu-mul-quantize \
  rotary pack unpack --seconds 0.1 --json "$out/elementwise.json" --csv "$out/elementwise.csv"
step one-bit 15 $python -m questctl.kernels one-bit-rate --seconds 0.1 --json "$out/one-bit.json"
step products 75 $python -m questctl.kernels int-gemm int-linear --seconds 0.05 --json "$out/products.json" --csv "$out/products.csv"
step few-rows 75 $python -m questctl.kernels packed-gemm packed-gemm-16 --seconds 0.05 \
  --json "$out/few-rows.json" --csv "$out/few-rows.csv"
if $python -c 'import typer, pydantic, rich' 2>/dev/null; then
  questctl=($python -c 'from questctl.cli.app import main; main()')
  step train-step 100 "${questctl[@]}" bench train-step quantizer --preset 100M \
    --set train.micro_batch=16 --seconds 2 --json "$out/train-step.json"
  llama=(--bits 4 --set model.vocab_size=32000 --seconds 0.3) # the vocabulary of Llama 2
  step decode 30 "${questctl[@]}" bench decode --preset 1600M "${llama[@]}" --json "$out/decode.json"
  step decode-7b 35 "${questctl[@]}" bench decode --preset 1600M --set model.n_layer=32 --set model.d_model=4096 \
    --set model.n_head=32 "${llama[@]}" --json "$out/decode-7b.json"
  step prefill 55 "${questctl[@]}" bench prefill --preset 1600M "${llama[@]}" --json "$out/prefill.json"
fi
echo "== results in $out"
exit "$failed"
