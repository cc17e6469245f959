"""From text to batches: sources of documents, tokenizers, memory-mapped token files, and the order in which they are read.

`corpora` reads documents, `tokenizers` turns them into ids, `tokens` stores the ids in memory-mapped files, and `sampler` says
which sequences each training step reads.
"""
