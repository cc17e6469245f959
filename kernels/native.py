"""The operations of a CPU training step other than products, in few passes: C code compiled on demand, definitions in torch.

    round_rows   s = norm·factor;   u = z/s;   y = s·sign(u)·min(⌊|u|⌋ + ½, top)
    norm_rows    r = 1/√(mean(x²) + eps);      y = (x·r)·gain                       and its backward pass
    turn_rows    y = x·cos + x′·sin, x′ being x with the halves of a head exchanged and its backward pass

A small model on a CPU spends much of its time in passes over memory and in calling operations. Torch takes nine passes to round
a row, the C code one. Both give the same bits (native.c says why), so results do not depend on which of them ran. This is
checked on samples before the library is used for the first time in a process.

A C compiler is found by its usual names, or by the variable CC. The library is kept in `$QUESTCTL_CACHE/native`, else in
`~/.cache/questctl/native`, under a name that depends on its source, compiler and processor. Without a compiler (`CC=none`)
torch's operations run instead. All tensors here are fp32 on a CPU, and no gradients are recorded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
COMPILERS = ("cc", "gcc", "clang")
# Contracting a·b + c into one rounding would change bits. The other two flags let floorf and min become single instructions.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
COMPILE_S = 60  # limit; it takes a third of a second
SMALLEST_SCALE = 2.0**-120  # keeps 1/s and z/s finite: rows with a smaller scale count as zero
# The C code runs on the calling thread. With more threads than this, torch's passes are divided among enough of them.
MOST_THREADS = 4

ADDRESS, SIZE, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "round_rows": [ADDRESS] * 4 + [SIZE] * 2 + [REAL] * 2,
    "norm_rows": [ADDRESS] * 5 + [SIZE] * 2 + [REAL],
    "norm_rows_terms": [ADDRESS] * 6 + [SIZE] * 2,
    "norm_rows_backward": [ADDRESS] * 7 + [SIZE] * 2,
    "turn_rows": [ADDRESS] * 4 + [SIZE] * 8,
}


def usable(name: str) -> ctypes.CDLL | None:
    """The library, if its function of this name may be used now; None if torch's operations should run.

    Torch's operations are faster if they are divided among many threads.
    """
    return checked().get(name) if torch.get_num_threads() <= MOST_THREADS else None


# --- rounding ---------------------------------------------------------------------------------------------------------


def round_rows_reference(z: Tensor, norm: Tensor, factor: float, top: float, *, keep: bool) -> tuple[Tensor | None, Tensor]:
    """z (…, K), norm (…, 1) → u (None unless `keep`) and y, both (…, K)."""
    s = norm * factor
    u = z * s.clamp_min(SMALLEST_SCALE).reciprocal()
    y = u.abs().floor_().clamp_(max=top - 0.5).add_(0.5).copysign_(u).mul_(s)
    return (u if keep else None), y


def round_rows(
    z: Tensor, norm: Tensor, factor: float, top: float, *, keep: bool, lib: ctypes.CDLL | None = None
) -> tuple[Tensor | None, Tensor]:
    """`round_rows_reference` of a contiguous z; if u is kept, it takes the memory of z."""
    lib = lib or usable("round_rows")
    if lib is None or not z.numel():
        return round_rows_reference(z, norm, factor, top, keep=keep)
    y, rows, at = torch.empty_like(z), norm.numel(), z.data_ptr()
    lib.round_rows(at, norm.data_ptr(), at if keep else None, y.data_ptr(), rows, z.numel() // rows, factor, top - 0.5)
    return (z if keep else None), y


def _rounded_sample(lib: ctypes.CDLL | None) -> list[Tensor | None]:
    """Ties, zeros of both signs, a row without a scale, an infinity and a NaN."""
    z = torch.linspace(-9.7, 9.7, 7 * 37).view(7, 37)
    z[0, :6] = torch.tensor([1.0, -1.0, 2.0, -3.0, 0.0, -0.0])
    z[1] = 0.0
    z[2, 5], z[3, 7] = float("inf"), float("nan")
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    norm[0] = 1.0
    outputs: list[Tensor | None] = []
    for bits in (1, 2, 4, 8):
        factor, top = 1.0 if bits < 8 else 2.0**-7, (2**bits - 1) / 2
        for keep in (True, False):
            if lib is None:
                outputs += round_rows_reference(z, norm, factor, top, keep=keep)
            else:
                outputs += round_rows(z.clone(), norm, factor, top, keep=keep, lib=lib)
    return outputs


# --- RMSNorm ----------------------------------------------------------------------------------------------------------


def norm_rows(x: Tensor, gain: Tensor, eps: float, lib: ctypes.CDLL) -> tuple[Tensor, Tensor]:
    """Contiguous x (…, K), gain (K,) → y (…, K) and r (…, 1), with the bits of `torch.rms_norm`."""
    mean_square = x.pow(2).mean(-1, keepdim=True)
    r, y = torch.empty_like(mean_square), torch.empty_like(x)
    lib.norm_rows(*_at(x, mean_square, gain, r, y), r.numel(), x.shape[-1], eps)
    return y, r


def norm_rows_backward(
    g: Tensor, x: Tensor, r: Tensor, gain: Tensor, elsewhere: Tensor | None, lib: ctypes.CDLL
) -> tuple[Tensor, Tensor]:
    """g, the gradient of y → those of x and gain; that of x is added to `elsewhere`, its gradient from other uses."""
    g, rows, cols = g.contiguous(), r.numel(), x.shape[-1]
    from_elsewhere = None if elsewhere is None else elsewhere.contiguous()
    grad_x, of_gain = torch.empty_like(x), torch.empty_like(x)
    lib.norm_rows_terms(*_at(g, x, r, gain, grad_x, of_gain), rows, cols)
    grad_r = grad_x.sum(-1, keepdim=True)
    address = None if from_elsewhere is None else from_elsewhere.data_ptr()
    lib.norm_rows_backward(*_at(g, x, r, gain, grad_r), address, grad_x.data_ptr(), rows, cols)
    return grad_x, of_gain.sum(tuple(range(x.ndim - 1)))


def _norm_sample(lib: ctypes.CDLL | None) -> list[Tensor | None]:
    x = (torch.arange(3 * 5 * 24).view(3, 5, 24) * 0.7).sin().mul_(3)
    g, elsewhere, gain = x.roll(7, -1) + 0.1, x.roll(1, 0), 1 + 0.3 * x[0, 0]
    if lib is not None:
        y, r = norm_rows(x, gain, 1e-5, lib)
        return [y, *norm_rows_backward(g, x, r, gain, None, lib), *norm_rows_backward(g, x, r, gain, elsewhere, lib)]
    outputs = []
    for other in (None, elsewhere):  # of scalars: gradients of other outputs make torch import sympy, which takes a second
        with torch.enable_grad():
            own, weight = x.clone().requires_grad_(), gain.clone().requires_grad_()
            inner = own.expand_as(x)
            y = torch.rms_norm(inner, gain.shape, weight, 1e-5)
            ((y * g).sum() if other is None else (y * g).sum() + (inner * other).sum()).backward()
        outputs += [y.detach(), own.grad, weight.grad] if other is None else [own.grad, weight.grad]
    return outputs


# --- rotary positions -------------------------------------------------------------------------------------------------


def turn_rows(x: Tensor, cos: Tensor, sin: Tensor, lib: ctypes.CDLL, *, back: bool = False) -> Tensor:
    """x (B, H, T, W), contiguous tables (T, W) → x·cos + x′·sin or, `back`, its transpose x·cos + (x·sin)′; (B, H, T, W)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    b, h, t, w = x.shape
    y = torch.empty(b, t, h, w)
    lib.turn_rows(*_at(x, cos, sin, y), b, t, h, w // 2, x.stride(0), x.stride(2), x.stride(1), back)
    return y.transpose(1, 2)


def _turned_sample(lib: ctypes.CDLL | None) -> list[Tensor | None]:
    x = (torch.arange(2 * 3 * 2 * 24).view(2, 3, 2, 24) * 0.9).sin().transpose(1, 2)
    angle = torch.arange(3 * 24).view(3, 24) * 0.3
    cos, sin, g = angle.cos(), angle.sin(), x.roll(5, -1)
    if lib is not None:
        return [turn_rows(x, cos, sin, lib), turn_rows(g, cos, sin, lib, back=True)]
    with torch.enable_grad():
        own = x.detach().requires_grad_()
        y = torch.addcmul(own * cos, own.roll(12, -1), sin)
        (y * g).sum().backward()
        return [y.detach(), own.grad]


# --- the library ------------------------------------------------------------------------------------------------------


def _at(*tensors: Tensor) -> list[int]:
    return [t.data_ptr() for t in tensors]


@cache
def checked() -> dict[str, ctypes.CDLL]:
    """Function name → the compiled native.c, for the functions that give the bits of their definition on this machine."""
    lib = library()
    samples = {"round_rows": _rounded_sample, "norm_rows": _norm_sample, "turn_rows": _turned_sample}
    # The first use may be in inference mode, which records no gradients, in autocast, where definitions round to bf16, or in a
    # block with activation checkpointing, where hooks count the tensors that are saved.
    modes = torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False)
    with modes[0], modes[1], modes[2], torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        return {} if lib is None else {name: lib for name, sample in samples.items() if _same_bits(sample(lib), sample(None))}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled native.c, compiled now if it is not yet; None without a compiler, or if it or the loader fails."""
    with suppress(OSError, subprocess.SubprocessError):
        lib = ctypes.CDLL(str(compiled_library()))
        for name, arguments in SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = arguments, None
        return lib
    return None


def _same_bits(ours: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> bool:
    for a, b in zip(ours, right, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif not torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32)):
            return False
    return True


def compiled_library() -> Path:
    """The file of the library, compiled now if it is not yet. Raises OSError or SubprocessError if it cannot be."""
    source = SOURCE.read_bytes()
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    made_from = [source, " ".join((compiler, *FLAGS)).encode(), processor().encode()]
    path = cache_folder() / f"native-{hashlib.sha256(b'|'.join(made_from)).hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as folder:  # other processes may make the same library
        made = Path(folder) / path.name
        words = [compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
        subprocess.run(words, check=True, capture_output=True, timeout=COMPILE_S, stdin=subprocess.DEVNULL)
        os.replace(made, path)
    return path


def find_compiler() -> str | None:
    """The C compiler that `CC` names or, without that variable, the first of the usual ones; None if there is none."""
    named = os.environ.get("CC")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, COMPILERS)), None)


def cache_folder() -> Path:
    """The folder of compiled libraries."""
    if base := os.environ.get("QUESTCTL_CACHE"):
        return Path(base) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "questctl" / "native"


def processor() -> str:
    """The target of the compiler, since machines with other instructions may share a home folder."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return platform.machine()
