"""Kernels of low-bit models: definitions in plain torch, Triton kernels that are tested against them, and their benchmark.

    op.py       the record that describes an op to tests and benchmark, and the names of all ops (without torch)
    jit.py      Triton, if it is installed, and what all kernels share
    devices.py  timing.py               peaks and calibration; interleaved timing
    bench.py    rows.py    plots.py     the correctness check and its driver; result rows and their files; figures
    native.py   native.c                the operations of a CPU step other than products, in few passes: C compiled on demand
    compile.py  builds every kernel without a GPU         __main__.py  the benchmark without the rest of the package

Every other file is one family of ops, in this order: reference, Triton kernel, custom op, public function, `Op` records. Codes
are always odd integers ±1 … ±(2^b − 1): value = scale · code without a zero point, and products are exact in int32 in any
order. No file here imports the rest of questctl. Importing the package itself imports neither torch nor Triton.
"""
