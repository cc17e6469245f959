"""Estimates of vocabulary and tokens of a corpus that is not prepared yet, for costs that are shown in advance.

    vocabulary     bin: its meta.json or `?vocab=` · synthetic: its options · text: the tokenizer's name (byte: 256, bpe:V: V)
    tokens         exact for prepared tokens, for synthetic: and for bin:; for text at most its number of bytes
    passes         D / tokens of the training part: how often a run of D tokens reads each of them

A token stands for at least one byte, so the bytes are an upper bound. The bytes of compressed files (gz, zst, parquet) and of
data sets streamed from the hub are not known in advance. Nothing is fetched, trained or written, and importing this module does
not import numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..config import DataConfig, RunConfig, human_count

if TYPE_CHECKING:
    from .tokens import Dataset, Meta

FEW_PASSES = 4  # up to four passes over a text are nearly as good as new text (Muennighoff et al., arXiv 2305.16264)
BYTES = 256  # ids of the byte tokenizer; costs assume as many if the vocabulary is unknown


@dataclass(frozen=True)
class CorpusEstimate:
    """Vocabulary and training tokens of a corpus; None if they are unknown until it is prepared."""

    vocab_size: int | None
    train_tokens: int | None
    exact: bool = False  # otherwise `train_tokens` is an upper bound
    vocab_exact: bool = True  # otherwise `vocab_size` is an upper bound
    val_tokens: int | None = field(default=None, compare=False)  # approximate, unless `exact`
    doubts: tuple[str, ...] = field(default=(), compare=False)  # sentences about the tokens, whatever run reads them

    @property
    def ids(self) -> str:
        """The size of the vocabulary as text, such as `256 ids`."""
        if self.vocab_size is None:
            return f"not known before the text is prepared; counted as {BYTES} ids"
        return f"{'' if self.vocab_exact else 'at most '}{self.vocab_size:,} ids"

    @classmethod
    def of(cls, data: Dataset) -> CorpusEstimate:
        """The exact numbers of a prepared dataset."""
        return cls.of_meta(data.meta)

    @classmethod
    def of_meta(cls, meta: Meta) -> CorpusEstimate:
        """The exact numbers of prepared tokens."""
        return cls(meta.vocab_size, meta.train.tokens, exact=True, val_tokens=meta.val.tokens, doubts=tuple(meta.doubts))

    def warnings(self, config: RunConfig) -> list[str]:
        """All warnings about the text before the run is trained, in whole sentences."""
        return [sentence for sentence in (self.repetition_warning(config), self.evaluation_warning(config)) if sentence] + [
            *self.doubts
        ]

    def evaluation_warning(self, config: RunConfig) -> str:
        """A warning if the text has fewer validation tokens than the run is to evaluate; otherwise empty."""
        if self.val_tokens is None:
            return ""
        return evaluation_warning(
            config.data.source, self.val_tokens, config.data.seq_len, config.train.eval_tokens, exact=self.exact
        )

    def passes(self, config: RunConfig) -> float | None:
        """How often the run reads its text, its trunk's tokens included; a lower bound unless `exact`, None if unknown."""
        return config.tokens / self.train_tokens if self.train_tokens else None

    def passes_text(self, config: RunConfig) -> str:
        """`passes` as text, such as `at least 2.5 passes over the text`; empty if unknown."""
        n = self.passes(config)
        return "" if n is None else f"{'' if self.exact else 'at least '}{n:.3g} passes over the text"

    def repetition_warning(self, config: RunConfig) -> str:
        """A warning if the run reads its text more than `FEW_PASSES` times; otherwise empty."""
        if (self.passes(config) or 0) <= FEW_PASSES:
            return ""
        most = "" if self.exact else "at most "
        return (
            f"data.source: {config.data.source} has {most}{human_count(self.train_tokens or 0)} training tokens, and "
            f"{human_count(config.tokens)} are {self.passes_text(config)}. Beyond {FEW_PASSES} a repeated token teaches less "
            "than a new one (arXiv 2305.16264), and scaling laws assume new ones."
        )


def evaluation_warning(source: str, n_tokens: int, seq_len: int, asked: int, *, exact: bool = True) -> str:
    """A warning if fewer than `asked` of `n_tokens` tokens can be evaluated in windows of `seq_len`; otherwise empty."""
    from .sampler import evaluated_tokens

    evaluated = evaluated_tokens(n_tokens, seq_len, asked)
    if evaluated >= max(1, asked // seq_len) * seq_len:
        return ""
    about = "" if exact else "about "
    return (
        f"data.source: {source} has {about}{n_tokens:,} validation tokens, so a loss is measured on {about}{evaluated:,} where "
        f"{asked:,} are asked for (train.eval_tokens), and is less certain; a larger data.val_fraction or text has more."
    )


def vocabulary(data: DataConfig) -> int | None:
    """The number of token ids of a corpus, for bpe:V an upper bound; None if it is unknown until the corpus is prepared.

    Raises UsageError and DataError as `prepare` does for malformed sources and tokenizer names and for missing token files.
    """
    from . import corpora, tokenizers
    from .tokens import prepared

    if data.source.partition(":")[0] not in ("bin", "synthetic"):
        return tokenizers.vocabulary(data.tokenizer)
    corpus = corpora.parse(data.source)
    if isinstance(corpus, corpora.Markov):
        return corpus.vocab_size
    assert isinstance(corpus, corpora.TokenFiles)
    if (vocab_size := corpus.description()[1]) is not None:
        return vocab_size
    meta = prepared(data.source, data.tokenizer, val_fraction=data.val_fraction, dedup=data.dedup)
    return meta.vocab_size if meta else None


def estimate_corpus(data: DataConfig) -> CorpusEstimate:
    """Estimate a corpus without preparing it.

    Raises UsageError and DataError as `prepare` does for malformed sources and tokenizer names and for missing files.
    """
    from . import corpora, readers
    from .tokens import prepared

    corpus = corpora.parse(data.source)
    if (meta := prepared(data.source, data.tokenizer, val_fraction=data.val_fraction, dedup=data.dedup)) is not None:
        return CorpusEstimate.of_meta(meta)
    ids, val = vocabulary(data), data.val_fraction
    learned = data.tokenizer.startswith("bpe")  # trained on a small text, it may have fewer ids than named
    if isinstance(corpus, corpora.Markov):
        held_out = round(val * corpus.tokens)
        return CorpusEstimate(ids, corpus.tokens - held_out, exact=True, val_tokens=held_out)
    if isinstance(corpus, corpora.TokenFiles):
        n, of_val = corpus.sizes()
        held_out = round(val * n) if of_val is None else of_val
        return CorpusEstimate(ids, n if of_val is not None else n - held_out, exact=True, val_tokens=held_out)
    if isinstance(corpus, corpora.HubText):
        return CorpusEstimate(ids, corpus.max_tokens, vocab_exact=not learned)
    packed = isinstance(corpus, corpora.ChatFiles) or any(
        path.suffix in (*readers.DECOMPRESSORS, ".parquet") for _, path in corpus.files
    )
    tokens = None if packed else corpus.size + len(corpus.files)  # one more for the end of each document
    of_text = round(val * tokens) if tokens is not None and data.tokenizer == "byte" else None
    return CorpusEstimate(ids, tokens, vocab_exact=not learned, val_tokens=of_text)
