"""From text to batches: `corpora` reads documents, `tokenizers` turns them into ids, `tokens` stores the ids in memory-mapped
files, and `sampler` decides which ids each training step sees.
"""
