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


# Products on both architectures, each of their shapes on one of them: every second on H100, the last and largest among them. Of
# each other op the largest shape, on A100 and H100 by turns.
IN_TURN = """
import json
from dataclasses import asdict, replace
from questctl.kernels import compile
from questctl.kernels.op import OPS, load

def chosen(name, arch):
    shapes = load(name).compile_shapes  # those of one-bit-rate are two instructions
    if "gemm" in name:
        return shapes[-2::-2] or shapes if arch == 80 else shapes[::-2]
    return shapes if name == "one-bit-rate" else shapes[-1:] if list(OPS).index(name) % 2 == (arch == 90) else ()

for arch in (80, 90):
    compile.load = lambda name: replace(load(name), compile_shapes=chosen(name, arch))
    for compiled in compile.compile_ops(list(OPS), arch):
        print(json.dumps(asdict(compiled)))
"""
SOME, ALL = "ops in turn", "all shapes"
WORDS = {SOME: ["-c", IN_TURN], ALL: ["-m", "questctl.kernels.compile"]}


@pytest.fixture(scope="module", params=[SOME, pytest.param(ALL, marks=pytest.mark.slow)])
def everything(request, tmp_path_factory):
    """The kernels of all operations for both architectures. Building all their shapes takes a minute: it is done once for each
    state of the sources, whatever the number of workers."""
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("compiled_kernels") if cache else tmp_path_factory.getbasetemp().parent / "compiled_kernels"
    words = WORDS[request.param]
    key = digest(Path(compile_module.__file__).parent.glob("*.py"), sys.version, triton.__version__, torch.__version__, *words)
    return computed_once(folder, request.param.replace(" ", "_"), key, lambda: build(words))


def build(words):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(params=[80, 90])
def built(request, everything):
    return request.param, [k for k in everything if k["arch"] == request.param]


def test_every_op_is_built(request, everything):
    wanted = {name for name in OPS if load(name).compile_shapes}
    assert {k["op"] for k in everything} == wanted
    if ALL in request.node.name:
        assert {(k["op"], k["arch"]) for k in everything} == {(name, arch) for name in wanted for arch in (80, 90)}


def test_kernels_of_every_op_build_without_spills_within_shared_memory(built):
    arch, kernels = built
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
    for name in {"hadamard_kernel", "quantize_kernel", "mask_rotate_kernel"} & used.keys():
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
