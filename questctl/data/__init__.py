"""Text to token files to batches: `corpora` → `tokenizers` → `tokens` (memory-mapped files) → `sampler` (the data order)."""
