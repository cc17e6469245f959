"""How far an export is from its run: on real validation tokens, in bits on disk, and in words; as JSON and as a model card.

    max|Δ| = max |logit_export − logit_run|;   KL = mean over tokens of Σ p_run ln(p_run / p_export), nats;   argmax: share of
    tokens with the same most likely successor

The export is read back from its files for it. Both sides compute in fp32.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..config import RunConfig
from ..data.tokens import Meta
from ..store import Result

Logits = Callable[[torch.Tensor], torch.Tensor]  # tokens (B, T) → logits (B, T, V)
BATCH = 4  # sequences at a time


@dataclass(frozen=True)
class Agreement:
    """Logits of an export against those of a forward pass of the run, on `tokens` tokens; losses in nats/token."""

    tokens: int
    max_abs_delta_logit: float
    kl: float
    argmax_agreement: float
    loss_run: float
    loss_export: float


@dataclass(frozen=True)
class Report:
    """`export_report.json`."""

    run: str
    format: str
    dtype: str  # of what is not quantized; for gguf of the file
    files: dict[str, int]  # name → bytes
    sha256: dict[str, str]  # name → hash of the file, which sha256sum tells
    bits_per_linear_weight: float  # on disk, scales included: of the layers of the blocks
    bits_per_parameter: float  # of the whole weight file
    share_of_bf16: float  # the weight file over two bytes for each parameter
    agreement: Agreement  # with the training forward
    weights_alone: Agreement | None  # where inputs are not quantized: with the same forward without quantized inputs
    reproduces: list[str]
    does_not_reproduce: list[str]
    data_hash: str
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


@torch.no_grad()
def compare(run: Logits, export: Logits, windows: torch.Tensor) -> Agreement:
    """Both on windows (n, T + 1) of token ids, statistics in fp64."""
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


# --- the model card ---------------------------------------------------------------------------------------------------

LOADING = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  # or, with questctl: import questctl.export.hf
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
ids = tokenizer("import os", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```

`modeling_quest.py` is all the code there is; it needs torch and transformers. Weights stay packed in memory and are expanded,
layer by layer, at each use.""",
    "hf-dense": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER)
```""",
    "compressed-tensors": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER)  # needs compressed-tensors
```""",
    "rotated": """```python
from load_rotated import load  # of this folder

model = load(FOLDER)  # needs transformers and compressed-tensors
```

**Not with `AutoModelForCausalLM.from_pretrained` alone**: transformers passes over `transform_config` without a word, the
inputs are not rotated, and what the model says is noise.""",
    "gguf": """```
llama-cli -m model.gguf -p "import os"
```""",
}
CITATION = """```bibtex
@inproceedings{panferov2025quest,
  title = {QuEST: Stable Training of LLMs with 1-Bit Weights and Activations},
  author = {Panferov, Andrei and Chen, Jiale and Tabesh, Soroush and Castro, Roberto L. and Nikdan, Mahdi and Alistarh, Dan},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  note = {arXiv:2502.05003}
}
```"""


def card(report: Report, config: RunConfig, result: Result, meta: Meta, *, rotated: bool) -> str:
    """README.md of an export; `rotated` where compressed-tensors has transforms."""
    m, t, a = config.model, config.train, report.agreement
    library = "gguf" if report.format == "gguf" else "transformers"
    after = f", quantized after training ({config.ptq.method}) from {config.ptq.source}" if config.ptq else ""
    overrides = [
        f"| {pattern} | weights {o.weights or 'as above'}, activations {o.activations or 'as above'} |"
        for pattern, o in config.quant.overrides.items()
    ]
    per_byte = f", {result.bits_per_byte:.4f} bits/byte" if result.bits_per_byte else ""
    rows = [
        f"| weights | `{result.weights}`, {result.w_stored_bits:g} bits |",
        f"| activations | `{result.activations}`, {result.a_stored_bits:g} bits |",
        *overrides,
        f"| model | {m.n_layer} layers, width {m.d_model}, {m.n_head} heads, SwiGLU {m.d_ff}, {result.params_non_embedding:,} "
        f"non-embedding parameters of {result.params_total:,} |",
        f"| text | {meta.source}, tokenizer {meta.tokenizer}, {meta.vocab_size} ids |",
        f"| data hash | `{result.data_hash}` |",
        f"| training | {result.tokens:,} tokens in {t.steps:,} steps of {t.batch_size} × {config.data.seq_len}, AdamW to "
        f"{config.optim.lr:g} ({config.optim.schedule}), seed {t.seed}, {t.precision} |",
        f"| validation loss | {result.loss:.4f} nats/token{per_byte} |",
        f"| training loss | {result.train_loss:.4f} nats/token |",
    ]
    agreement = [_row("the training forward", a)]
    if report.weights_alone is not None:
        agreement.append(_row("the same without quantized inputs", report.weights_alone))
    missing = ["What it does not:", "", *(f"* {line}" for line in report.does_not_reproduce), ""]
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            "pipeline_tag: text-generation",
            "tags: [questctl, quantization]",
            "---",
            "",
            f"# {report.run}",
            "",
            f"A Llama trained by questctl{after}, in the format `{report.format}` ({report.dtype}).",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "## Loading",
            "",
            LOADING["rotated" if rotated else report.format],
            "",
            "## What this file reproduces",
            "",
            *(f"* {line}" for line in report.reproduces),
            "",
            *(missing if report.does_not_reproduce else []),
            f"Read back and compared on {a.tokens:,} validation tokens:",
            "",
            "| against | max abs Δ logit | KL, nats/token | same argmax | loss of the run → of the export |",
            "|---|---|---|---|---|",
            *agreement,
            "",
            f"On disk {report.bits_per_linear_weight:.2f} bits for a weight of the blocks' linear layers, scales included; "
            f"{report.bits_per_parameter:.2f} for each parameter of the whole, {report.share_of_bf16:.2f} of what bf16 takes.",
            "",
            "## Citation",
            "",
            CITATION,
            "",
            f"Made with questctl {report.versions['questctl']}.",
            "",
        ]
    )


def _row(against: str, a: Agreement) -> str:
    numbers = f"{a.max_abs_delta_logit:.2g} | {a.kl:.2g} | {a.argmax_agreement:.2%} | {a.loss_run:.4f} → {a.loss_export:.4f}"
    return f"| {against} | {numbers} |"
