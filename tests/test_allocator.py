"""The allocator keeps freed memory: page faults of a process that allocates and frees the same block repeatedly."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

AGAIN = """
import resource, sys
from questctl.training.allocator import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
for i in range(40):
    if i == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * 2**23
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "131072"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc")
@pytest.mark.parametrize(
    ("word", "variables", "kept"),
    [
        ("keep", {}, True),
        ("leave", MAPPED, False),
        ("keep", MAPPED, False),
    ],
)
def test_a_block_that_was_freed_is_had_again_without_a_fault(word, variables, kept):
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, word], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 20) == kept  # 20 blocks: a fault for each of their pages, however large these are
