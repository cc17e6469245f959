"""The records of the ops: complete, readable without torch, with plausible costs."""

import subprocess
import sys

import pytest
import torch

from questctl.kernels.op import OPS, Check, load


@pytest.mark.parametrize("name", OPS)
def test_every_name_loads_its_record_and_the_record_is_complete(name):
    op = load(name)
    assert op.name == name
    assert op.summary
    for device, size in (("cpu", 4), ("cuda", 2)):
        for shape in op.bench_shapes(device):
            cost = op.cost(shape, size)
            assert cost.bytes > 0
            assert cost.operations >= 0
            names = [i.name for i in op.case(shape, torch.device(device)).implementations]
            assert len(set(names)) == len(names)
            assert op.baseline in names
    rows = {shape.get("R", shape.get("M", shape.get("N"))) for shape in op.test_shapes}
    assert rows >= {1, 63, 123}, "odd row counts"


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_random_real_and_reproducible(name):
    op = load(name)
    shape = op.test_shapes[1]
    first, again, other = (op.inputs(shape, torch.device("cpu"), seed) for seed in (0, 0, 1))
    tensors = [(a, b, c) for a, b, c in zip(first, again, other, strict=True) if isinstance(a, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b, _ in tensors)
    assert any(not torch.equal(a, c) for a, _, c in tensors)
    assert all(len(a.unique()) > 1 for a, _, _ in tensors if a.numel() > 1)


@pytest.mark.parametrize("name", OPS)
def test_bytes_of_the_cost_are_the_bytes_of_the_tensors(name):
    op = load(name)
    shape = op.test_shapes[2]
    inputs = op.inputs(shape, torch.device("cpu"), 0)
    output = op.function(*inputs)
    outputs = [output] if isinstance(output, torch.Tensor) else output
    moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs) if isinstance(t, torch.Tensor))
    hidden = {"fake-quantize": 1 / 8 * shape.get("R", 0) * shape.get("C", 0)}.get(name, 0)  # the saved mask
    small = 4 * max(shape.values())  # a gain or a scale is not worth a term
    assert abs(op.cost(shape, 4).bytes - moved - hidden) <= small


def test_a_check_passes_only_without_wrong_elements_and_with_a_finite_error():
    assert Check(1e-6, 1e-5).passed
    assert Check(0.0, 0.0, exact=True).passed
    assert not Check(1e-4, 1e-5).passed
    assert not Check(0.0, 1e-5, wrong=1).passed
    assert not Check(float("nan"), 1e-5).passed
    assert not Check(float("inf"), 1e-5).passed


def test_names_cost_no_torch():
    code = "import sys, questctl.kernels.op; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_without_triton_everything_imports_and_the_cpu_path_works():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from questctl.kernels.op import load, KernelError\n"
        "cpu = torch.device('cpu')\n"
        "for name in ('hadamard', 'fake-quantize', 'silu-mul-quantize', 'unpack', 'int-gemm', 'packed-gemm', 'int-linear'):\n"
        "    op = load(name); inputs = op.inputs(op.test_shapes[0], cpu, 0)\n"
        "    assert op.check(inputs, op.function(*inputs)).passed, name\n"
        "    try: op.triton(*inputs); raise SystemExit(name)\n"
        "    except KernelError as e: assert 'Triton' in str(e), e\n"
        "print('fine')"
    )
    environment = {"PATH": "", "OMP_NUM_THREADS": "1"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "fine"
