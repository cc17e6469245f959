"""Limits of devices: peaks looked up by name, rates measured."""

import pytest
import torch

from questctl.kernels import devices


@pytest.mark.parametrize(
    ("name", "memory_gbs"),
    [
        ("NVIDIA H100 80GB HBM3", 3352),
        ("NVIDIA H100 PCIe", 2039),
        ("NVIDIA H200", 4800),
        ("NVIDIA L40S", 864),
        ("NVIDIA L4", 300),
        ("NVIDIA A100-SXM4-40GB", 1555),
    ],
)
def test_a_listed_gpu_has_its_sheet(name, memory_gbs):
    peak = devices.find_peak(name)
    assert peak is not None
    assert peak.memory_gbs == memory_gbs
    assert peak.source


@pytest.mark.parametrize("name", ["NVIDIA H1000", "NVIDIA L40", "NVIDIA A100", "AMD EPYC", ""])
def test_an_unlisted_device_has_none(name):
    assert devices.find_peak(name) is None


def test_sheets_are_dense_rates():
    for name, peak in devices.PEAKS.items():
        ratio = 4 if "GeForce" in name else 2  # consumer parts halve bf16 with fp32 accumulation
        assert peak.tops["int8"] == pytest.approx(ratio * peak.tops["bf16"], rel=0.02)
        assert peak.tops["fp32"] < peak.tops["bf16"]


def test_calibration_measures_this_machine(monkeypatch):
    monkeypatch.setitem(devices.COPY_BYTES, "cpu", 1 << 22)
    monkeypatch.setitem(devices.MATMUL_SIZE, "cpu", 128)
    found = devices.calibrate(torch.device("cpu"), seconds=0.01)
    assert found.copy_gbs > 0.1
    assert set(found.tops) == {"fp32", "bf16", "int8"}
    assert all(rate > 0 for rate in found.tops.values())
    assert found.threads == torch.get_num_threads()
    assert found.sheet is None
    assert found.to_json()["device"] == devices.device_name(torch.device("cpu")) != ""


def test_a_product_that_the_device_lacks_is_noted(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no int8 here\nsecond line")

    monkeypatch.setitem(devices.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(devices.MATMUL_SIZE, "cpu", 64)
    monkeypatch.setattr(torch, "_int_mm", refuse)
    found = devices.calibrate(torch.device("cpu"), seconds=0.001)
    assert "int8" not in found.tops
    assert found.notes == ["int8 matmul: no int8 here"]


def test_the_best_of_two_calibrations_is_the_limit():
    one = devices.Calibration("x", 1, 10.0, {"fp32": 1.0, "bf16": 4.0})
    two = devices.Calibration("x", 1, 12.0, {"fp32": 0.5, "int8": 3.0})
    best = one.best(two)
    assert (best.copy_gbs, best.tops) == (12.0, {"fp32": 1.0, "bf16": 4.0, "int8": 3.0})


def test_a_device_that_is_picked_is_the_current_one(monkeypatch) -> None:
    """Triton launches on the current device: without this, rank 3 would launch on GPU 0."""
    from questctl.errors import UsageError
    from questctl.training.distributed import World
    from questctl.training.loop import pick_device

    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("auto", World(3, 4, 3)) == torch.device("cuda:3")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:3"), torch.device("cuda:1")]
    with pytest.raises(UsageError, match="'cuda:4' is not on this machine, which has 4 CUDA devices"):
        pick_device("cuda:4")
    assert pick_device("cpu") == torch.device("cpu")
    assert len(current) == 2
