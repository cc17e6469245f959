"""Texts → ids by several processes, in order.

The first `INLINE_BYTES` of text are encoded where they are, so that a small corpus starts no process; so are all that only
need their bytes. After that each core has a worker: a fresh interpreter that reads pickled texts from a pipe and writes ids
back. It ends when the pipe does, so that however this process ends, none is left behind; it shares no state and needs no
fork, which a process with threads could not do safely.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import StorageError
from ..system import cpu_count
from .tokenizers import ByteTokenizer, Tokenizer, dtype_name

INLINE_BYTES = 4_000_000
Ids = NDArray[np.unsignedinteger]

_SERVE = "import sys; sys.path[:] = {path!r}; from questctl.data.encode import serve; serve()"


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """Ids (n,) of each text, its end included, in the dtype that holds the vocabulary."""
    dtype = dtype_name(tokenizer.vocab_size)
    return [np.append(tokenizer.encode(text).astype(dtype, copy=False), np.array([tokenizer.end], dtype)) for text in texts]


class Encoder:
    """`submit(texts)` → a future of `encode(tokenizer, texts)`; a context manager, which ends the workers."""

    def __init__(self, tokenizer: Tokenizer, workers: int = 0) -> None:
        self.tokenizer = tokenizer
        self.workers = 0 if isinstance(tokenizer, ByteTokenizer) else workers or cpu_count()
        self._inline = 0
        self._pool: ThreadPoolExecutor | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    @property
    def ahead(self) -> int:
        """Batches that may wait at a time without anything standing still."""
        return self.workers + 1 if self._pool else 0

    def submit(self, texts: Sequence[str]) -> Future[list[Ids]]:
        """Begin to encode; the result is there at once as long as the text is little."""
        if self._pool is None and (self.workers < 2 or self._inline < INLINE_BYTES):
            self._inline += sum(map(len, texts))
            done: Future[list[Ids]] = Future()
            done.set_result(encode(self.tokenizer, texts))
            return done
        if self._pool is None:
            self._start()
        assert self._pool is not None
        return self._pool.submit(self._ask, texts)

    def _start(self) -> None:
        command = [sys.executable, "-c", _SERVE.format(path=[p or os.getcwd() for p in sys.path])]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        for _ in range(self.workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            assert process.stdin is not None
            pickle.dump(self.tokenizer, process.stdin)
            self._processes.append(process)
            self._free.put(process)
        self._pool = ThreadPoolExecutor(self.workers, "encode")

    def _ask(self, texts: Sequence[str]) -> list[Ids]:
        process = self._free.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(list(texts), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as e:
            raise StorageError(f"a process that tokenizes ended (exit code {process.wait()}); the same command goes on.") from e
        finally:
            self._free.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            if kind is not None:
                for process in self._processes:
                    process.kill()
            self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            process.wait()


def serve() -> None:
    """A worker: from stdin the tokenizer, then lists of texts, until the pipe ends; ids go to stdout."""
    import signal

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; the pipe then ends
    tokenizer = pickle.load(requests)
    with suppress(EOFError, BrokenPipeError):
        while True:
            texts = pickle.load(requests)
            try:
                answer: Any = encode(tokenizer, texts)
            except Exception as e:  # is raised where it was asked for
                answer = e
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
