"""Tokenize texts in several processes, with the results in the order of the texts.

Starting processes takes longer than tokenizing a small corpus, so the first `INLINE_BYTES` of text are encoded in this process;
the byte tokenizer never needs another one. After that each CPU has a worker: a fresh interpreter that reads pickled texts from
a pipe and writes ids back. A worker ends when its pipe closes, so none survives this process, however that ends. Workers are
not forked, because forking a process that has threads is unsafe.
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
from .tokenizers import ByteTokenizer, Tokenizer, dtype_name, pieces

INLINE_BYTES = 4_000_000
Ids = NDArray[np.unsignedinteger]

_SERVE = "import sys; sys.path[:] = {path!r}; from questctl.data.encode import serve; serve()"


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """The ids (n,) of each text, each followed by the tokenizer's `end`, in the smallest dtype that holds the vocabulary."""
    dtype, out = dtype_name(tokenizer.vocab_size), []
    end = np.array([tokenizer.end], dtype).tobytes()
    for text in texts:
        data = bytearray()  # a long text takes the memory of its ids, and not of all that a tokenizer makes of it on the way
        for piece in pieces(tokenizer, text):
            data += tokenizer.encode(piece).astype(dtype, copy=False).tobytes()
        data += end
        out.append(np.frombuffer(data, dtype))
    return out


class Encoder:
    """Runs `encode` in worker processes. A context manager, which ends the workers on exit."""

    def __init__(self, tokenizer: Tokenizer, workers: int = 0) -> None:
        self.tokenizer = tokenizer
        self.workers = 0 if isinstance(tokenizer, ByteTokenizer) else workers or cpu_count()
        self._inline = 0
        self._pool: ThreadPoolExecutor | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    @property
    def ahead(self) -> int:
        """The number of batches to keep submitted so that no worker is idle."""
        return self.workers + 1 if self._pool else 0

    def submit(self, texts: Sequence[str]) -> Future[list[Ids]]:
        """Start to encode `texts`. The future is done at once for the first `INLINE_BYTES` of text."""
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
            raise StorageError(f"a tokenizer process ended (exit code {process.wait()}); repeat the command to resume.") from e
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
    """Run a worker: read the tokenizer and then lists of texts from stdin until it closes, and write their ids to stdout."""
    import signal

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent process, which closes the pipe
    tokenizer = pickle.load(requests)
    with suppress(EOFError, BrokenPipeError):
        while True:
            texts = pickle.load(requests)
            try:
                answer: Any = encode(tokenizer, texts)
            except Exception as e:  # the parent process raises it
                answer = e
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
