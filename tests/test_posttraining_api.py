"""The public calls on a finished run: accepted arguments, and what is refused before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import questctl
from questctl.config import QuantConfig
from questctl.errors import DataError, UsageError
from questctl.quant.spec import QuantSpec
from questctl.store import RunStore, open_run

PRELUDE = "import json, sys, questctl\nfrom pathlib import Path\nfolder, out = Path(sys.argv[1]), Path(sys.argv[2])\n"
LAST = "\nassert not [name for name in sys.modules if name.startswith('questctl.cli')]\n"


def script(code, *args):
    """Run the code in a fresh interpreter, with `folder` and `out` from the arguments."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code + LAST, *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_mistakes_are_told_before_torch_is_loaded(source, tmp_path):
    code = """
from questctl.errors import UsageError
calls = [
    lambda: questctl.quantize_run(folder, "int9-rms-ste"),
    lambda: questctl.quantize_run(folder, "quest"),
    lambda: questctl.quantize_run(folder, "int4-h64-rms-ste"),
    lambda: questctl.allocate_bits(folder, 9.0),
    lambda: questctl.probe_run(folder, ["int4-rms-ste", "int4-ste"]),
    lambda: questctl.export_run(folder, out / "model", format="onnx"),
    lambda: questctl.benchmark(["hadamrd"]),
]
for call in calls:
    try:
        call()
    except UsageError:
        continue
    raise AssertionError(call)
assert "torch" not in sys.modules and not list(out.iterdir())
"""
    script(code, source.path, tmp_path)


def test_a_run_is_a_run_a_folder_or_a_name(source, monkeypatch, tmp_path):
    assert open_run(source) is source
    assert open_run(str(source.path)).path == source.path
    monkeypatch.setenv("QUESTCTL_RUNS", str(source.path.parent))
    assert open_run(source.name[-8:]).path == source.path
    with pytest.raises(DataError, match="nosuchrun"):
        open_run("nosuchrun")
    run = RunStore(tmp_path).run(source.name)
    run.create(source.config())
    with pytest.raises(DataError, match=r"export: .* is not finished"):
        questctl.export_run(run, tmp_path / "out", format="gguf")


def test_specs_and_configs_are_taken_as_they_are(source):
    spec = QuantSpec.parse("int4-rms-ste")
    by_spec = questctl.quantize_run(source, spec, activations="bf16", method="rtn")
    by_config = questctl.quantize_run(source, QuantConfig(weights=spec), method="rtn")
    assert by_spec.result == by_config.result
    with pytest.raises(UsageError, match="is quantized"):
        questctl.quantize_run(by_spec.run, spec)
