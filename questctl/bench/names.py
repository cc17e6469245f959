"""Names of the benchmarks of whole models, as the command line and the result files spell them."""

QUANTIZER, TRAIN_STEP, PREFILL, DECODE = "quantizer", "train-step", "prefill", "decode"
