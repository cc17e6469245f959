"""Estimates of a corpus before it is prepared, for costs that are shown in advance: vocabulary, tokens, passes over the text.

    vocabulary     bin: its meta.json or `?vocab=` · synthetic: its options · text: the tokenizer's name (byte: 256, bpe:V: V)
    tokens         exact for prepared tokens, a chain and a flat file; else at most the number of bytes of the text
    passes         P = D / tokens of the training part: how often a run reads each of them

A token stands for one byte or more, so the bytes are an upper bound. The bytes of compressed files (gz, zst, parquet) and of
data sets streamed from the hub are not known in advance. Nothing is fetched, trained or written, and importing this module does
not import numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import DataConfig, RunConfig, human_count

if TYPE_CHECKING:
    from .tokens import Dataset

FEW_PASSES = 4  # up to four passes are nearly as good as new text (Muennighoff et al., arXiv 2305.16264)
BYTES = 256  # ids of the byte tokenizer; an unknown vocabulary counts as that many


@dataclass(frozen=True)
class CorpusEstimate:
    """Vocabulary and training tokens of a corpus; None where they are not known before it is prepared."""

    vocab_size: int | None
    train_tokens: int | None
    exact: bool = False  # else `train_tokens` is an upper bound
    vocab_exact: bool = True  # else `vocab_size` is an upper bound

    @property
    def ids(self) -> str:
        """The vocabulary in words."""
        if self.vocab_size is None:
            return f"not known before the text is prepared; counted as {BYTES} ids"
        return f"{'' if self.vocab_exact else 'at most '}{self.vocab_size:,} ids"

    @classmethod
    def of(cls, data: Dataset) -> CorpusEstimate:
        """The exact numbers of prepared tokens."""
        return cls(data.meta.vocab_size, len(data.train), exact=True)

    def passes(self, config: RunConfig) -> float | None:
        """How often the run reads its text; a lower bound unless `exact`. A branch counts its trunk's tokens."""
        return config.tokens / self.train_tokens if self.train_tokens else None

    def passes_text(self, config: RunConfig) -> str:
        """`passes` in words; empty where they are not known."""
        n = self.passes(config)
        return "" if n is None else f"{'' if self.exact else 'at least '}{n:.3g} passes over the text"

    def repetition_warning(self, config: RunConfig) -> str:
        """A warning if the run reads its text too often; else empty."""
        if (self.passes(config) or 0) <= FEW_PASSES:
            return ""
        most = "" if self.exact else "at most "
        return (
            f"data.source: {config.data.source} has {most}{human_count(self.train_tokens or 0)} training tokens, and "
            f"{human_count(config.tokens)} are {self.passes_text(config)}. Beyond {FEW_PASSES} a repeated token teaches less "
            "than a new one (arXiv 2305.16264), and scaling laws assume new ones."
        )


def vocabulary(data: DataConfig) -> int | None:
    """Number of token ids of a corpus, for bpe:V an upper bound; None where it is not known before preparation.

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
    """Estimate a corpus without preparing it.

    Raises UsageError and DataError as `prepare` does for words and sources that cannot be.
    """
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
