"""A finding: one thing that a table, a fit or a verdict says, as a record of its kind, its sentence and its numbers.

Code that wants to know whether something was found asks for the kind; only people read the sentence:

    any(finding.kind == "at_bound" for finding in fit.warnings)

Kinds that a table gives (`Points.notes`): unfinished_runs, bits_column, unknown_data, near_sizes, several_rows_per_run,
several_optimizers, several_warmups.
Kinds that a fit gives (`Fit.warnings`), beside those of its table: few_sizes, one_ratio, one_D, no_reference, one_run,
one_size, schemes_merged, no_runs, no_number, not_converged, no_residual_dof, ill_conditioned, outliers, several_optima,
at_bound, fitted_values, clustered_residuals, few_clusters, best_law, no_best_law,
shares_ignored, few_shares, few_byte_ratios, widths_merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found: a `kind` that code can ask for, one `sentence` of at most 25 words, the answer first, and its `numbers`.

    `numbers` holds what the sentence says as values that JSON can hold (numbers, names, lists of them).
    """

    kind: str
    sentence: str
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.sentence

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        return {"kind": self.kind, "sentence": self.sentence, "numbers": dict(self.numbers)}


def of_kind(findings: Iterable[Finding], *kinds: str) -> list[Finding]:
    """The findings of these kinds, in order."""
    return [finding for finding in findings if finding.kind in kinds]
