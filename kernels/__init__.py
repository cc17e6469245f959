"""Kernels of low-bit models: plain-torch definitions, Triton kernels proven against them, and how fast both are.

    op.py       what one op is to tests and benchmark, and the names of all of them (no torch)
    jit.py      Triton where it is installed, and what the kernels share
    devices.py timing.py bench.py       peaks and calibration, interleaved timing, the correctness gate and the rows
    compile.py  every kernel built for a GPU that is not there;   __main__.py  the bench without the rest of the package

Every other file is one family of ops, top to bottom: reference → Triton kernel → custom op → public function → `Op` records.
Codes are *odd integers* ±1 … ±(2^b − 1) throughout: value = scale · code, no zero point, products exact in int32 in any order.
Nothing here imports the rest of questctl; importing the package itself imports neither torch nor Triton.
"""
