"""What is known of a text's tokens before there are any: for costs that are told before anything is prepared.

    vocabulary     bin: its meta.json or `?vocab=` · synthetic: its word · text: the tokenizer's word (byte: 256, bpe:V: V)
    tokens         those that are prepared already, of a chain, of a flat file; else at most as many as the text has bytes

A token stands for one byte or more, so bytes are an upper bound. Of packed files (gz, zst, parquet) and of what the hub
streams nobody knows the bytes. Nothing is fetched, trained or written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import DataConfig
from . import corpora, readers, tokenizers
from .tokens import prepared

BYTES = 256  # ids of the byte tokenizer; what an unknown vocabulary is counted as


@dataclass(frozen=True)
class Foreseen:
    """None: not known before the text is prepared."""

    vocab_size: int | None
    train_tokens: int | None
    exact: bool = False  # else there are that many training tokens at the most


def vocabulary(data: DataConfig) -> int | None:
    """Token ids of a text, of bpe:V at the most V; None where nobody knows before it is prepared.

    Raises UsageError and DataError as `prepare` does for words that cannot be meant and for token files that are not there.
    """
    if data.source.partition(":")[0] not in ("bin", "synthetic"):
        return tokenizers.vocabulary(data.tokenizer)
    corpus = corpora.parse(data.source)
    if isinstance(corpus, corpora.Markov):
        return corpus.vocab_size
    assert isinstance(corpus, corpora.TokenFiles)
    if (said := corpus.description()[1]) is not None:
        return said
    meta = prepared(data.source, data.tokenizer, val_fraction=data.val_fraction)
    return meta.vocab_size if meta else None


def foresee(data: DataConfig) -> Foreseen:
    """What is known of a text. Raises UsageError and DataError as `prepare` does for words and sources that cannot be."""
    corpus = corpora.parse(data.source)
    if (meta := prepared(data.source, data.tokenizer, val_fraction=data.val_fraction)) is not None:
        return Foreseen(meta.vocab_size, meta.train.tokens, exact=True)
    ids, val = vocabulary(data), data.val_fraction
    if isinstance(corpus, corpora.Markov):
        return Foreseen(ids, corpus.tokens - round(val * corpus.tokens), exact=True)
    if isinstance(corpus, corpora.TokenFiles):
        n = corpus.train.stat().st_size // np.dtype(corpus.description()[0]).itemsize
        return Foreseen(ids, n if corpus.val else n - round(val * n), exact=True)
    if isinstance(corpus, corpora.HubText):
        return Foreseen(ids, corpus.max_tokens)
    packed = any(path.suffix in (*readers.DECOMPRESSORS, ".parquet") for _, path in corpus.files)
    return Foreseen(ids, None if packed else corpus.size + len(corpus.files))  # and the ends of the documents
