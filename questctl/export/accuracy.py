"""The accuracy of an export: the distance of its logits from those of its run, on validation tokens, and the bits it takes.

    max|Δ| = max |logit_export − logit_run|;   KL = mean over tokens of Σ p_run ln(p_run / p_export), in nats;
    argmax: share of tokens for which both have the same most likely next token

The export is read back from its files for the comparison. The run computes in fp32, and so do files in fp32. Files in bf16
compute in bf16, which moves inputs across the edges between levels: they are compared with the run's own pass in bf16, too.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

Logits = Callable[[torch.Tensor], torch.Tensor]  # tokens (B, T) → logits (B, T, V)
BATCH = 4  # sequences at a time


@dataclass(frozen=True)
class Agreement:
    """Logits of an export compared with those of the run, on `tokens` tokens; KL and losses in nats/token."""

    tokens: int
    max_abs_delta_logit: float
    kl: float
    argmax_agreement: float
    loss_run: float
    loss_export: float


@dataclass(frozen=True)
class AccuracyCard:
    """An export in numbers and sentences: its files, its size, its agreement with the run. Stored as `export_report.json`."""

    run: str
    format: str
    dtype: str  # number format of unquantized tensors; for gguf that of the file
    files: dict[str, int]  # name → bytes
    sha256: dict[str, str]  # name → hash of the file, as sha256sum prints it
    bits_per_linear_weight: float  # on disk, scales included, of the linear layers of the blocks
    bits_per_parameter: float  # of the whole weight file
    share_of_bf16: float  # size of the weight file over two bytes per parameter
    artifact_bytes: int  # the weight file with the tokenizer: what a runtime loads
    compressed_bytes: int  # the same after lossless compression by zlib at level 9
    agreement: Agreement  # with the training's forward pass
    weights_alone: Agreement | None  # with that pass without quantized inputs; only if the format cannot quantize inputs
    same_precision: Agreement | None  # with the nearer of these passes, computed in the files' bf16; None for files in fp32
    precision_alone: Agreement | None  # of that pass in bf16 with itself in fp32: the cost of bf16 without any export
    reproduces: list[str]
    does_not_reproduce: list[str]
    data_hash: str
    versions: dict[str, str]
    average: bool = False  # whether the weights are the average that optim.average kept

    def to_json(self) -> dict[str, Any]:
        """The content of `export_report.json`."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """Differences from the run that a user of the format may not expect: inputs that are not quantized there."""
        return self.does_not_reproduce[:1] if self.weights_alone is not None else []


@torch.no_grad()
def compare(run: Logits, export: Logits, windows: torch.Tensor) -> Agreement:
    """Evaluate both on windows (n, T + 1) of token ids; the statistics are computed in fp64."""
    delta = kl = same = loss_run = loss_export = 0.0
    for rows in windows.split(BATCH):
        tokens, targets = rows[:, :-1], rows[:, 1:].unsqueeze(-1)
        a, b = run(tokens).double(), export(tokens).double()
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        delta = max(delta, float((a - b).abs().max()))
        kl += float((p.exp() * (p - q)).sum())
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        loss_run -= float(p.gather(-1, targets).sum())
        loss_export -= float(q.gather(-1, targets).sum())
    n = windows[:, 1:].numel()
    return Agreement(n, delta, max(kl / n, 0.0), same / n, loss_run / n, loss_export / n)
