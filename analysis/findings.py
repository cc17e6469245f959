"""A finding: one result or caveat of a table, a fit or a verdict, as a record of its kind, its sentence and its numbers.

Code checks the kind of a finding; the sentence is for people:

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
    """A finding: a `kind` for code, one `sentence` of at most 25 words with the answer first, and its `numbers`.

    `numbers` holds the content of the sentence as JSON values (numbers, names, lists of them).
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
