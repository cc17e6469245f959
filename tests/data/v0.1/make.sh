#!/usr/bin/env bash
# Write all files of this folder with questctl 0.1.0 (commit c5088b8): bash make.sh, in an empty folder with table.csv in it.
set -e
export OMP_NUM_THREADS=1
cat > tiny.toml <<'TOML'
[model]
n_layer = 1
d_model = 16
n_head = 2
d_ff = 16
[data]
source = "synthetic:markov?vocab=16&tokens=20000"
seq_len = 16
[train]
steps = 12
batch_size = 8
log_every = 2
eval_tokens = 256
checkpoint_every = 4
threads = 1
[optim]
lr = 1e-2
TOML
cat > sweep.toml <<'TOML'
name = "two-seeds"
[base]
model = { n_layer = 1, d_model = 16, n_head = 2, d_ff = 16 }
data = { source = "synthetic:markov?vocab=16&tokens=20000", seq_len = 16 }
train = { steps = 4, batch_size = 8, log_every = 2, eval_tokens = 256, threads = 1 }
[matrix]
train.seed = [0, 1]
TOML
# two finished runs, and the first one quantized after training
questctl train -c tiny.toml -q bf16 --runs runs --quiet
questctl train -c tiny.toml -q quest -b 4 --set quant.block=16 --runs runs --quiet
questctl quantize 2K-bf16-0.835x-s0-34ce62c8 -q int4-h16-rms-ste --calibration-tokens 256 --runs runs
# a run that was stopped after step 6, and the loss that the same run has when nothing stops it
python - <<'PYTHON'
import json
from pathlib import Path
from questctl.config import Layer, file_layer, resolve
from questctl.errors import Preempted
from questctl.training import train
changes = {("train", "seed"): 7, ("quant", "method"): "quest", ("quant", "bits"): 2, ("quant", "block"): 16}
config = resolve([file_layer(Path("tiny.toml")), Layer("changes", changes)]).config
steps = iter(range(100))
try:
    train(config, runs="runs", stop=lambda: next(steps) >= 6)
except Preempted as e:
    print(e)
result = train(config, runs="undisturbed")
expected = {"run": result.run, "loss": result.loss, "train_loss": result.train_loss}
Path("expected.json").write_text(json.dumps(expected, indent=2) + "\n")
PYTHON
rm -rf undisturbed runs/2K-quest-w2a2-0.835x-s7-1d5ab925/checkpoints/step-00000004
# a sweep of two runs, of which one is still to be trained
questctl sweep sweep.toml --runs swept --jobs 1 --quiet
questctl runs rm 2K-bf16-0.278x-s1 --runs swept --yes
# runs trained elsewhere, and a fit of them
questctl runs import table.csv --data-hash abc --runs external
questctl fit-scaling external --bootstrap 0 --out fitted
rm -f fitted/*.png fitted/*.svg fitted/*.pdf
