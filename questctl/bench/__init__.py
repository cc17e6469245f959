"""Benchmarks of whole models: the quantizer, the training step, prefill and decode of a Llama of a preset's size."""

QUANTIZER, TRAIN_STEP, PREFILL, DECODE = "quantizer", "train-step", "prefill", "decode"
