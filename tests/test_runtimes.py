"""Exports in the runtimes that people use: llama.cpp, transformers without questctl, vLLM; and the table that says so.

`make test-runtimes` builds the runtimes in `.runtimes/` (`QUESTCTL_RUNTIMES` names another folder) and runs this file, which
writes docs/reference/runtimes.md if `QUESTCTL_RUNTIME_TABLE` is set. A case trains a small model, exports it, and compares the
runtime with what the export should compute: the run itself, or the run without quantized inputs where the format has none. A
case that is refused has to be refused by a sentence of ours, before anything is written.

    KL = mean over tokens of Σ p ln(p / p_runtime) ≤ 1e-4 nats;   in bf16 ≤ 3 × the KL of the run in bf16 from itself in fp32
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from questctl.errors import QuestError
from questctl.training.provenance import cpu_model

pytestmark = pytest.mark.runtimes
HERE = Path(__file__).resolve().parent
RUNTIMES = Path(os.environ.get("QUESTCTL_RUNTIMES") or HERE.parent / ".runtimes")
TABLE = HERE.parent / "docs" / "reference" / "runtimes.md"
KL = 1e-4  # nats/token
NEW = 16  # tokens of greedy text
FILES = 100  # texts that are tokenized

SHAPE = {"model.d_model": 256, "model.n_head": 4, "model.d_ff": 512, "data.seq_len": 64, "train.batch_size": 16}
HARD = (
    "Ā Latvian: Āžēī, 日本\t\r\n\n  end",
    "x = 1234567, 12, 0x1F, 1e10",
    "it's  we'LL\n\n\n",
    "",
    " ",
    "<|endoftext|",
    "\x0b\x0c\x7f~",
)


@dataclass(frozen=True)
class Case:
    """An export in a runtime. `refused` is a piece of the sentence that refuses it."""

    runtime: str  # llama.cpp, transformers, vllm
    format: str
    dtype: str
    changes: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "byte"
    refused: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def quantizers(self) -> str:
        """The run's quantizers, as the table says them."""
        quant = tiny.config(SHAPE | self.changes).quant
        return str(quant.weights) + ("" if quant.activations.is_identity else f", inputs {quant.activations}")

    def __str__(self) -> str:
        words = self.runtime, self.format, self.dtype, self.quantizers, self.tokenizer, *self.options
        return "-".join(words).replace(", ", "+").replace(" ", "-")


def plain(word: str) -> dict[str, Any]:
    """A run with quantized weights alone."""
    return {"quant.weights": word}


def quest(bits: int, **more: Any) -> dict[str, Any]:
    """A run of the paper's method."""
    return {"quant.method": "quest", "quant.bits": bits, "quant.block": 64, **more}


ALONE = {"quant.weight_only": True}
CASES = [
    *(Case("llama.cpp", "gguf", dtype, plain("int4-rms-ste")) for dtype in ("f32", "f16", "q8_0", "exact", "q4_1", "q5_0")),
    *(Case("llama.cpp", "gguf", "exact", plain(f"int{bits}-rms-ste")) for bits in (1, 2, 3, 5, 6)),
    Case("llama.cpp", "gguf", "q1_0", plain("int1-rms-ste")),
    Case("llama.cpp", "gguf", "tq1_0", plain("ternary-absmean-ste")),
    Case("llama.cpp", "gguf", "exact", plain("ternary-absmean-ste")),
    Case("llama.cpp", "gguf", "exact", plain("int2-rms-2of4-ste")),
    Case("llama.cpp", "gguf", "exact", plain("sint4-absmax.g32-ste")),
    Case("llama.cpp", "gguf", "exact", plain("fp4-e8m0.g32-ste")),
    Case("llama.cpp", "gguf", "f32", quest(2, **ALONE)),
    Case("llama.cpp", "gguf", "f32", quest(4)),
    Case("llama.cpp", "gguf", "exact", plain("int4-rms-ste"), "bpe:300"),
    Case("llama.cpp", "gguf", "exact", plain("int4-rms-ste"), "bpe.llama3:4096"),
    Case("llama.cpp", "gguf", "exact", quest(4), refused="trained with a rotation"),
    Case("llama.cpp", "gguf", "exact", plain("lloyd2-rms-ste"), refused="no multiple of whole numbers"),
    Case("llama.cpp", "gguf", "f32", plain("int4-rms-ste"), "bpe:4096", refused="ends numbers after three digits"),
    *(Case("transformers", "hf", dtype, quest(bits)) for bits in (1, 2, 4) for dtype in ("fp32", "bf16")),
    Case("transformers", "hf", "fp32", quest(4), "bpe:4096"),
    Case("transformers", "hf", "fp32", {"quant.method": "nvfp4"}),
    Case("transformers", "hf-dense", "fp32", quest(2, **ALONE)),
    Case("transformers", "hf-dense", "bf16", quest(2, **ALONE)),
    Case("transformers", "compressed-tensors", "fp32", plain("int4-rms-ste")),
    Case("transformers", "compressed-tensors", "fp32", quest(3), options={"loader": True}),
    Case("transformers", "compressed-tensors", "bf16", {"quant.method": "nvfp4"}),
    Case("transformers", "compressed-tensors", "bf16", plain("fp4-e8m0.g32-ste")),
    Case("transformers", "compressed-tensors", "fp32", plain("fp4-e8m0.g32-ste"), refused="to bf16 alone"),
    Case("transformers", "compressed-tensors", "fp32", plain("lloyd2-rms-ste"), refused="no multiple of whole numbers"),
    Case("vllm", "hf", "fp32", quest(4), options={"eager": True}),
    Case("vllm", "hf", "fp32", quest(4), options={"eager": False}),
    Case("vllm", "hf-dense", "fp32", quest(2, **ALONE), options={"eager": True}),
    Case("vllm", "hf-dense", "bf16", quest(2, **ALONE), options={"eager": True}),
    Case("vllm", "compressed-tensors", "bf16", plain("int3-rms-ste"), options={"eager": True}),
]
ROWS: list[tuple[str, ...]] = []  # of the table


def interpreter(runtime: str) -> Path:
    """The Python of a runtime. Skips the test where it is not built."""
    if runtime == "transformers":
        pytest.importorskip("transformers")
        return Path(sys.executable)
    path = RUNTIMES / runtime / "bin" / "python"
    if not path.exists():
        pytest.skip(f"{runtime} is not built: make test-runtimes")
    return path


def ask(case: Case, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the runtime says; it runs in a folder without questctl."""
    python = interpreter(case.runtime)
    script = HERE / f"runtime_{case.runtime.partition('.')[0]}.py"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, script], input=json.dumps(job), env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The beginnings of a hundred files of the running Python's library, and texts that are hard to cut."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))[: FILES - len(HARD)]
    return [*(path.read_text(encoding="utf-8", errors="replace")[:3000] for path in files), *HARD]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, texts):
    """case → its finished run; each is trained once."""
    from questctl.store import RunStore
    from questctl.training.loop import train

    root, known = tmp_path_factory.mktemp("runs"), {}
    source = root / "text.txt"
    source.write_text("\n".join(texts), encoding="utf-8")

    def get(case: Case):
        more = {"data.source": f"file:{source}", "data.tokenizer": case.tokenizer, "train.steps": 40, **SHAPE, **case.changes}
        c = tiny.config(more)
        if c.run_id not in known:
            train(c, runs=root)
            known[c.run_id] = RunStore(root).run(c.run_id)
        return known[c.run_id]

    return get


def kl(expected: torch.Tensor, found: list[list[float]]) -> float:
    """KL(expected ‖ found) in nats/token; logits (T, V), of which vLLM gives the first T − 1 rows as log-probabilities."""
    q = torch.tensor(found, dtype=torch.float64).log_softmax(-1)
    p = expected[: len(q)].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_runtime_computes_what_the_run_computes(case, run_of, texts, tmp_path):
    from questctl.data.tokens import tokenizer_of
    from questctl.export import export_run
    from questctl.export.weights import dense_model, weights
    from questctl.training.loading import load

    interpreter(case.runtime)
    row = (case.format, case.dtype, case.quantizers, case.tokenizer)
    run, out = run_of(case), tmp_path / "out"
    if case.refused:
        with pytest.raises(QuestError, match=case.refused) as e:
            export_run(run, out, format=case.format, dtype=case.dtype, tokens=256)
        assert not out.exists()
        ROWS.append((case.runtime, *row, f"refused: {str(e.value).partition(': ')[2]}"))
        return
    card = export_run(run, out, format=case.format, dtype=case.dtype, tokens=1024)
    loaded = load(run)
    model, own = loaded.model.eval(), tokenizer_of(loaded.data)
    target = model if case.format == "hf" else dense_model(model, weights(model, loaded.config)).eval()
    val = loaded.data.val
    tokens = [[int(i) for i in val[at : at + n]] for at, n in ((0, 30), (100, 17))]
    job = {"model": str(out / "model.gguf" if case.format == "gguf" else out), "tokens": tokens, "prompt": tokens[1]}
    job |= {"new": NEW, "texts": texts, "dtype": {"fp32": "float32", "bf16": "bfloat16"}.get(case.dtype)} | case.options
    found = ask(case, job, tmp_path)

    distances = [
        kl(tiny.logits(target, torch.tensor([ids]))[0], logits) for ids, logits in zip(tokens, found["logits"], strict=True)
    ]
    limit = 3 * card.precision_alone.kl if card.precision_alone else KL
    assert max(distances) <= limit
    if "padded" in found:  # beside a longer sequence nothing changes but the order of sums
        for alone, padded in zip(found["logits"], found["padded"], strict=True):
            assert kl(torch.tensor(alone), padded) <= max(limit, 1e-6)
    different = sum(own.encode(text).tolist() != ids for text, ids in zip(texts, found["ids"], strict=True))
    assert different == 0
    ids = list(job["prompt"])
    for _ in range(NEW):
        ids.append(int(tiny.logits(target, torch.tensor([ids]))[0, -1].argmax()))
    same = next((i for i, (a, b) in enumerate(zip(ids[-NEW:], found["greedy"], strict=True)) if a != b), NEW)
    assert same > 0
    if case.dtype in ("f32", "fp32"):
        assert same == NEW
    how = {"loader": ", load_rotated.py", "eager": ", eager" if case.options.get("eager") else ", compiled"}
    name = f"{case.runtime} {found['version']}{''.join(how[key] for key in case.options)}"
    inputs = "" if case.format == "hf" or card.weights_alone is None else ", inputs not quantized"
    ROWS.append(
        (name, *row, f"runs{inputs}: KL {max(distances):.1e}, greedy {same} of {NEW}, {len(texts)} of {len(texts)} texts")
    )


INTRODUCTION = """# Exports in runtimes

This page is written by `make test-runtimes`, which builds the runtimes. For each row it trains a small model (40 steps, width
256), exports it, and compares what the runtime computes with the run, or with the run without quantized inputs where the format
has none. *KL* is the mean distance of the predicted distributions in nats/token, *greedy* the number of generated tokens that
are the same, and *texts* the number of texts that have the same tokens. A refusal is a sentence of questctl before a file is
written. What is not in the table has not been tried.

"""


@pytest.fixture(scope="module", autouse=True)
def table():
    """The page of all rows, written at the end if it is asked for."""
    yield
    if os.environ.get("QUESTCTL_RUNTIME_TABLE"):
        head = ("runtime", "format", "dtype", "quantizers", "tokenizer", "result")
        lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *ROWS)]
        where = f"Last written on {cpu_model()}, {platform.system()}, Python {platform.python_version()}.\n"
        TABLE.write_text(INTRODUCTION + where + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
