"""The limits of a device: dense datasheet peaks, and copy and matmul rates measured in the same run as the kernels.

Rooflines use the measured rates, since no kernel reaches the rates of the datasheet. These are shown as well, to check the
calibration: a power cap or a busy machine shows as a low share.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .op import Unit

if TYPE_CHECKING:
    import torch

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # bytes read, and as many written: far more than L2 and L3 hold
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
FP32_SIZE = {"cuda": 4096, "cpu": 1024}  # fp32 products are ten times slower and reach their full rate at this size
ROTATE_BYTES = {"cuda": 200 << 20, "cpu": 64 << 20}  # inputs used in turn exceed this, to come from memory: 4× an H100's L2


@dataclass(frozen=True)
class Peak:
    """Datasheet rates of a GPU without sparsity: TFLOP/s or TOP/s by unit, and GB/s of memory."""

    memory_gbs: float
    tops: dict[Unit, float]
    source: str


def _peak(memory_gbs: float, fp32: float, bf16: float, int8: float, source: str) -> Peak:
    return Peak(memory_gbs, {"fp32": fp32, "bf16": bf16, "int8": int8}, source)


PEAKS: dict[str, Peak] = {  # by the name torch reports; a longer name wins over its prefix
    "NVIDIA A100-SXM4-80GB": _peak(2039, 19.5, 312, 624, "NVIDIA A100 datasheet, 2021"),
    "NVIDIA A100-SXM4-40GB": _peak(1555, 19.5, 312, 624, "NVIDIA A100 datasheet, 2021"),
    "NVIDIA A100 80GB PCIe": _peak(1935, 19.5, 312, 624, "NVIDIA A100 datasheet, 2021"),
    "NVIDIA H100 80GB HBM3": _peak(3352, 66.9, 989.4, 1978.9, "NVIDIA H100 architecture whitepaper, table of H100 SXM5"),
    "NVIDIA H100 PCIe": _peak(2039, 51.2, 756, 1513, "NVIDIA H100 architecture whitepaper, table of H100 PCIe"),
    "NVIDIA H200": _peak(4800, 66.9, 989.4, 1978.9, "NVIDIA H200 datasheet, SXM"),
    "NVIDIA L40S": _peak(864, 91.6, 362.05, 733, "NVIDIA L40S datasheet"),
    "NVIDIA L4": _peak(300, 30.3, 121, 242.5, "NVIDIA L4 datasheet, halved from its sparse rates"),
    "NVIDIA A10": _peak(600, 31.2, 125, 250, "NVIDIA A10 datasheet"),
    "NVIDIA GeForce RTX 4090": _peak(1008, 82.6, 165.2, 660.6, "NVIDIA Ada GPU architecture whitepaper, fp32 accumulation"),
    "NVIDIA GeForce RTX 3090": _peak(936, 35.6, 71, 284, "NVIDIA GA102 whitepaper, fp32 accumulation"),
}


@dataclass(frozen=True)
class Calibration:
    """Rates measured on one device in this run: GB/s of a copy (reads and writes), TFLOP/s or TOP/s of a square matmul.

    Units in which the device cannot multiply are absent from `tops`. `sheet` is the datasheet peak of a listed device.
    """

    device: str
    threads: int
    copy_gbs: float
    tops: dict[Unit, float]
    sheet: Peak | None = None
    notes: list[str] = field(default_factory=list)

    def best(self, other: Calibration) -> Calibration:
        """The higher of each rate, since other load on the machine can only lower a rate."""
        tops = {unit: max(rates.tops[unit] for rates in (self, other) if unit in rates.tops) for unit in self.tops | other.tops}
        return replace(self, copy_gbs=max(self.copy_gbs, other.copy_gbs), tops=tops)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the head of a results file."""
        return asdict(self)


def device_name(device: torch.device) -> str:
    """The name of a GPU, such as 'NVIDIA H100 80GB HBM3', or of the CPU with its widest vector instructions."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        model = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} {torch.backends.cpu.get_cpu_capability()}"


def find_peak(name: str) -> Peak | None:
    """The datasheet peak of a device by its name; None if it is not listed, as any CPU."""
    fits = [key for key in PEAKS if name == key or name.startswith(f"{key} ")]
    return PEAKS[max(fits, key=len)] if fits else None


def calibrate(device: torch.device, *, seconds: float = 0.5) -> Calibration:
    """Measure the copy rate and the matmul rates of `device`, on a CPU about `seconds` for each of the four.

    The fastest round counts, since these are limits, and other load on the machine can only slow a round down.
    """
    import torch

    from .timing import CannotTime, measure

    generator = torch.Generator(device).manual_seed(0)
    source = torch.randint(0, 255, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device, generator=generator)
    target = torch.empty_like(source)
    copy_us = measure({"copy": lambda i: target.copy_(source)}, device, seconds=seconds)["copy"].best_us
    n = MATMUL_SIZE[device.type]
    codes = torch.randint(-127, 128, (2, n, n), dtype=torch.int8, device=device, generator=generator)
    half = torch.randn(2, n, n, device=device, generator=generator).to(torch.bfloat16)
    small = FP32_SIZE[device.type]
    real = torch.randn(2, small, small, device=device, generator=generator)
    calls: dict[Unit, Any] = {
        "fp32": lambda i: real[0] @ real[1].T,
        "bf16": lambda i: half[0] @ half[1].T,
        "int8": lambda i: torch._int_mm(codes[0], codes[1].T),
    }
    tops: dict[Unit, float] = {}
    notes: list[str] = []
    for unit, call in calls.items():
        try:
            size = small if unit == "fp32" else n
            tops[unit] = 2e-6 * size**3 / measure({unit: call}, device, seconds=seconds)[unit].best_us
        except CannotTime as e:  # this device or build of torch does not have the product
            notes.append(f"{unit} matmul: {e.reason}")
    name = device_name(device)
    return Calibration(name, torch.get_num_threads(), 2e-3 * COPY_BYTES[device.type] / copy_us, tops, find_peak(name), notes)
