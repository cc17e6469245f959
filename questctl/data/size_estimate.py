"""What is known of a text's tokens before there are any: for costs that are told before anything is prepared.

    vocabulary     bin: its meta.json or `?vocab=` · synthetic: its word · text: the tokenizer's word (byte: 256, bpe:V: V)
    tokens         those that are prepared already, of a chain, of a flat file; else at most as many as the text has bytes
    passes         P = D / tokens of the training part: how often a run reads each of them

A token stands for one byte or more, so bytes are an upper bound. Of packed files (gz, zst, parquet) and of what the hub
streams nobody knows the bytes. Nothing is fetched, trained or written, and importing this costs no numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import DataConfig, RunConfig, human_count

if TYPE_CHECKING:
    from .tokens import Dataset

FEW_PASSES = 4  # up to so many are nearly as good as new text (Muennighoff et al., arXiv 2305.16264)
BYTES = 256  # ids of the byte tokenizer; what an unknown vocabulary is counted as


@dataclass(frozen=True)
class CorpusEstimate:
    """None: not known before the text is prepared."""

    vocab_size: int | None
    train_tokens: int | None
    exact: bool = False  # else there are that many training tokens at the most
    vocab_exact: bool = True  # else there are that many ids at the most

    @property
    def ids(self) -> str:
        """The vocabulary in words."""
        if self.vocab_size is None:
            return f"not known before the text is prepared; counted as {BYTES} ids"
        return f"{'' if self.vocab_exact else 'at most '}{self.vocab_size:,} ids"

    @classmethod
    def of(cls, data: Dataset) -> CorpusEstimate:
        """Of tokens that are there."""
        return cls(data.meta.vocab_size, len(data.train), exact=True)

    def passes(self, config: RunConfig) -> float | None:
        """How often the run reads its text; at the least, unless `exact`. A branch counts its trunk's tokens."""
        return config.tokens / self.train_tokens if self.train_tokens else None

    def said(self, config: RunConfig) -> str:
        """`passes` in words; empty where nobody knows."""
        n = self.passes(config)
        return "" if n is None else f"{'' if self.exact else 'at least '}{n:.3g} passes over the text"

    def repeated(self, config: RunConfig) -> str:
        """A warning where a run reads its text too often; else empty."""
        if (self.passes(config) or 0) <= FEW_PASSES:
            return ""
        most = "" if self.exact else "at most "
        return (
            f"data.source: {config.data.source} has {most}{human_count(self.train_tokens or 0)} training tokens, and "
            f"{human_count(config.tokens)} are {self.said(config)}. Beyond {FEW_PASSES} a repeated token teaches less than a "
            "new one (arXiv 2305.16264), and scaling laws assume new ones."
        )


def vocabulary(data: DataConfig) -> int | None:
    """Token ids of a text, of bpe:V at the most V; None where nobody knows before it is prepared.

    Raises UsageError and DataError as `prepare` does for words that cannot be meant and for token files that are not there.
    """
    from . import corpora, tokenizers
    from .tokens import prepared

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


def estimate_corpus(data: DataConfig) -> CorpusEstimate:
    """What is known of a text. Raises UsageError and DataError as `prepare` does for words and sources that cannot be."""
    from . import corpora, readers
    from .tokens import prepared

    corpus = corpora.parse(data.source)
    if (meta := prepared(data.source, data.tokenizer, val_fraction=data.val_fraction)) is not None:
        return CorpusEstimate(meta.vocab_size, meta.train.tokens, exact=True)
    ids, val = vocabulary(data), data.val_fraction
    learned = data.tokenizer.startswith("bpe")  # of a small text it may have fewer
    if isinstance(corpus, corpora.Markov):
        return CorpusEstimate(ids, corpus.tokens - round(val * corpus.tokens), exact=True)
    if isinstance(corpus, corpora.TokenFiles):
        n = corpus.train.stat().st_size * 8 // int(corpus.description()[0].removeprefix("uint"))
        return CorpusEstimate(ids, n if corpus.val else n - round(val * n), exact=True)
    if isinstance(corpus, corpora.HubText):
        return CorpusEstimate(ids, corpus.max_tokens, vocab_exact=not learned)
    packed = any(path.suffix in (*readers.DECOMPRESSORS, ".parquet") for _, path in corpus.files)
    tokens = None if packed else corpus.size + len(corpus.files)  # with the ends of the documents
    return CorpusEstimate(ids, tokens, vocab_exact=not learned)
