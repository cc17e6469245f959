"""The model card of an export (README.md): what was trained, how to load it, what the files reproduce and what they do not."""

from __future__ import annotations

from ..config import RunConfig
from ..data.tokenizers import NO_TOKENIZER
from ..data.tokens import Meta
from ..store import Result
from .accuracy import AccuracyCard, Agreement

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW"}

LOADING = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  # or, with questctl: import questctl.export.hf
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
ids = tokenizer("import os", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```

`modeling_quest.py` holds all the code; it needs torch and transformers. Weights stay packed in memory and are expanded, layer
by layer, at each use.""",
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

**Not with `AutoModelForCausalLM.from_pretrained` alone**: transformers ignores `transform_config` without a warning, the inputs
are not rotated, and the output of the model is noise.""",
    "gguf": """```python
from llama_cpp import Llama  # pip install llama-cpp-python

model = Llama(FOLDER + "/model.gguf")
print(model("import os", max_tokens=40)["choices"][0]["text"])
```""",
    "gguf without text": """```python
from llama_cpp import Llama  # pip install llama-cpp-python

model = Llama(FOLDER + "/model.gguf")
print([token for token, _ in zip(model.generate([1, 2, 3], temp=0), range(40))])
```

The file has no tokenizer: it takes and gives ids. llama.cpp aborts if it is given text.""",
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


def model_card(card: AccuracyCard, config: RunConfig, result: Result, meta: Meta, *, rotated: bool) -> str:
    """README.md of an export. `rotated` says that a compressed-tensors export carries rotations as transforms."""
    m, t, a = config.model, config.train, card.agreement
    textless = card.format == "gguf" and meta.tokenizer == NO_TOKENIZER
    library = "gguf" if card.format == "gguf" else "transformers"
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
        *(f"| {key} | `{spec}`, {spec.bits:g} bits |" for key, spec in config.quant.by_row.items()),
        f"| model | {m.n_layer} layers, width {m.d_model}, {m.n_head} heads, SwiGLU {m.d_ff}, {result.params_non_embedding:,} "
        f"non-embedding parameters of {result.params_total:,} |",
        f"| text | {meta.source}, tokenizer {meta.tokenizer}, {meta.vocab_size} ids |",
        f"| data hash | `{result.data_hash}` |",
        f"| training | {result.tokens:,} tokens in {t.steps:,} steps of {t.batch_size} × {config.data.seq_len}, "
        f"{OPTIMIZERS[config.optim.name]} to {config.optim.lr:g} ({config.optim.schedule}), seed {t.seed}, {t.precision} |",
        *([f"| average | of the weights, `{config.optim.average}` |"] if card.average else []),
        f"| validation loss | {result.loss:.4f} nats/token{per_byte} |",
        f"| training loss | {result.train_loss:.4f} nats/token |",
    ]
    agreement = [_row("the training forward", a)]
    if card.weights_alone is not None:
        agreement.append(_row("the same without quantized inputs", card.weights_alone))
    if card.same_precision is not None:
        agreement.append(_row(f"the nearest of these, in {card.dtype}", card.same_precision))
    missing = ["What it does not:", "", *(f"* {line}" for line in card.does_not_reproduce), ""]
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            "pipeline_tag: text-generation",
            "tags: [questctl, quantization]",
            "---",
            "",
            f"# {card.run}",
            "",
            f"A Llama trained by questctl{after}, in the format `{card.format}` ({card.dtype}).",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "## Loading",
            "",
            LOADING["rotated" if rotated else "gguf without text" if textless else card.format],
            "",
            "## What this file reproduces",
            "",
            *(f"* {line}" for line in card.reproduces),
            "",
            *(missing if card.does_not_reproduce else []),
            f"Read back and compared on {a.tokens:,} validation tokens:",
            "",
            "| against | max abs Δ logit | KL, nats/token | same argmax | loss of the run → of the export |",
            "|---|---|---|---|---|",
            *agreement,
            "",
            *(_own_rounding(card.dtype, card.precision_alone) if card.precision_alone else []),
            f"On disk {card.bits_per_linear_weight:.2f} bits for a weight of the blocks' linear layers, scales included; "
            f"{card.bits_per_parameter:.2f} for each parameter of the whole, {card.share_of_bf16:.2f} of what bf16 takes.",
            f"Weights and tokenizer together are {card.artifact_bytes:,} bytes, {card.compressed_bytes:,} after zlib.",
            "",
            "## Citation",
            "",
            CITATION,
            "",
            f"Made with questctl {card.versions['questctl']}.",
            "",
        ]
    )


def _own_rounding(dtype: str, a: Agreement) -> list[str]:
    return [f"The run's own forward pass in {dtype} is {a.kl:.2g} nats/token from the one in fp32, without any export.", ""]


def _row(against: str, a: Agreement) -> str:
    numbers = f"{a.max_abs_delta_logit:.2g} | {a.kl:.2g} | {a.argmax_agreement:.2%} | {a.loss_run:.4f} → {a.loss_export:.4f}"
    return f"| {against} | {numbers} |"
