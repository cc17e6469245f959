"""Export a finished run to formats that other programs read: `export_run(…)` → `AccuracyCard`.

    run → check.py → weights.py: levels, scales → one writer per format → read back → accuracy.py → model_card.py

`hf` keeps quantized weights and inputs (`questctl.export.hf` registers it with transformers, and each export holds the same
code in one file). `hf-dense`, `compressed-tensors` and `gguf` carry only the weights. check.py refuses runs that a format would
silently compute differently, before torch is imported or anything is written.
"""

from __future__ import annotations

from ..lazy import lazy_names
from .formats import FORMATS, Format

__all__ = ["FORMATS", "Format", "export_run"]


__getattr__ = lazy_names(__name__, {"export_run": "api"})
