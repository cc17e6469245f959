"""Every kernel builds for A100 and H100 without a GPU, spills nothing, and uses the instructions that it was written for."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from shared_cache import computed_once, digest

from questctl.kernels import compile as compile_module
from questctl.kernels.compile import compile_ops
from questctl.kernels.jit import INTERPRETED
from questctl.kernels.op import OPS, KernelError, load

triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module")
def everything(request, tmp_path_factory):
    """The kernels of all operations for both architectures. Building them takes a minute: it is done once for each state of the
    sources, whatever the number of workers."""
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("compiled_kernels") if cache else tmp_path_factory.getbasetemp().parent / "compiled_kernels"
    versions = sys.version, triton.__version__, torch.__version__
    return computed_once(folder, "all", digest(Path(compile_module.__file__).parent.glob("*.py"), *versions), build)


def build():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "questctl.kernels.compile"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(params=[80, 90])
def built(request, everything):
    return request.param, [k for k in everything if k["arch"] == request.param]


def test_kernels_of_every_op_build_without_spills_within_shared_memory(built):
    arch, kernels = built
    assert {k["op"] for k in kernels} == {name for name in OPS if load(name).compile_shapes}
    limit = {80: 163, 90: 227}[arch] * 1024  # CUDA C++ programming guide, table of compute capabilities
    for k in kernels:
        assert k["arch"] == arch
        assert k["stack_bytes"] == 0, k
        assert k["shared_bytes"] <= limit, k
        assert 0 < k["registers"] <= 255, k


def test_products_use_integer_tensor_cores_and_dp4a(built):
    arch, kernels = built
    used = {}
    for k in kernels:
        used.setdefault(k["kernel"], []).append(" ".join(k["instructions"]))
    integer = r"wgmma" if arch == 90 else "mma.sync"
    for name in ("int_gemm_kernel", "skinny_kernel"):
        assert all(integer in text and ".s8.s8" in text for text in used[name]), used[name]
    assert all("dp4a" in text for text in used["gemv_kernel"])
    assert any(".b1.b1.s32.and.popc" in text for text in used["mma_rate_kernel"])
    for name in ("hadamard_kernel", "quantize_kernel", "mask_rotate_kernel"):
        assert all("mma" in text and "bf16" in text for text in used[name]), used[name]


def test_workers_share_one_build_and_a_changed_source_is_built_again(tmp_path):
    built, values = [], []

    def slowly():
        built.append(1)
        time.sleep(0.2)
        return [{"registers": len(built)}]

    source = tmp_path / "kernel.py"
    source.write_text("a = 1")
    workers = [
        threading.Thread(target=lambda: values.append(computed_once(tmp_path / "cache", "all", digest([source]), slowly)))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert values == [[{"registers": 1}]] * 3
    source.write_text("a = 2")
    assert computed_once(tmp_path / "cache", "all", digest([source]), slowly) == [{"registers": 2}]
    assert digest([source], "3.6") != digest([source], "3.7")


@pytest.mark.skipif(not INTERPRETED, reason="Triton is not interpreted here")
def test_an_interpreted_triton_is_refused():
    with pytest.raises(KernelError, match="TRITON_INTERPRET"):
        next(compile_ops(["pack"], 90))
