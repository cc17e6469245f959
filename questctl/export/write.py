"""Write a run as a folder of one format, read it back, and compare it with the run. On any error nothing is left behind.

weights.py → the format's writer → files in a temporary folder → the format's reader → accuracy.py → the folder gets its name
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors
import torch

from ..config import RunConfig
from ..data.sampler import validation_windows
from ..data.tokenizers import NO_TOKENIZER, Tokenizer
from ..data.tokens import tokenizer_of
from ..errors import MissingDependency, RunFailed, StorageError
from ..models.llama import Llama
from ..quant.spec import IDENTITY
from ..store import Run, write_json
from ..system import package_version
from ..training.loading import load
from ..training.loop import execution
from . import tokenizer
from .accuracy import AccuracyCard, Agreement, Logits, compare
from .check import Layer, gguf_table, in_vllm, layers, lost_inputs
from .model_card import model_card
from .weights import Weight, dense_model, model_in, tables, weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGES = {  # format → packages that write and read it, and the extra that installs them
    "hf": (("transformers",), "hf"),
    "hf-dense": (("transformers",), "hf"),
    "compressed-tensors": (("transformers", "compressed_tensors"), "export"),
    "gguf": (("gguf",), "export"),
}
KL_LIMIT = 0.01  # nats/token from the pass to reproduce; a larger KL is a bug, not rounding


def require_packages(format: str) -> None:
    """Raises MissingDependency, with the line that installs it, for a package that the format needs."""
    names, extra = PACKAGES[format]
    for name in (*names, *(("tokenizers",) if format != "gguf" else ())):
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise MissingDependency(
                f"export: {format} needs {name.replace('_', '-')}, which is not installed: pip install 'questctl[{extra}]'."
            ) from e


def export(run: Run, format: str, out: Path, *, dtype: str, tokens: int, average: bool) -> AccuracyCard:
    """Write the finished `run` to the folder `out` and compare it on `tokens` validation tokens.

    `export_run` has checked the request. See there for the errors; after one, `out` does not exist.
    """
    require_packages(format)
    config, result = run.config(), run.require_result("export")
    if average and result.loss_average is not None:
        per_byte = result.bits_per_byte and result.bits_per_byte * result.loss_average / result.loss
        result = replace(result, loss=result.loss_average, bits_per_byte=per_byte)
    with execution(int(run.env().get("threads") or 1), torch.device("cpu")):
        loaded = load(run, average=average)
        loaded.model.eval()
        layer_weights = weights(loaded.model, config)
        plain = dense_model(loaded.model, layer_weights)
        windows = torch.from_numpy(validation_windows(loaded.data.val, config.data.seq_len, tokens))
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True)
            rotated = format == "compressed-tensors" and any(w.layer.rotates for w in layer_weights.values())
            with _quiet():
                job = Job(temporary, loaded.model, plain, config, layer_weights, dtype, tokenizer_of(loaded.data))
                target = WRITERS[format](job)
                distances = compared(format, job, target, windows)
            if not distances.nearest.kl < KL_LIMIT:
                raise RunFailed(
                    f"export: {format}, read back, is {distances.nearest.kl:.2g} nats/token from {run.name}: the files are not "
                    "what they should be, and are not kept."
                )
            does, does_not = statements(format, dtype, config, loaded.data.meta.tokenizer)
            written = sorted(temporary.iterdir())
            files = {p.name: p.stat().st_size for p in written}
            hashes = {p.name: _sha256(p) for p in written}
            linear, total = _sizes(format, temporary)
            inner = sum(w.dense.numel() for w in layer_weights.values())
            names = ("questctl", "torch", *(n.replace("_", "-") for n in PACKAGES[format][0]))
            card = AccuracyCard(
                run.name,
                format,
                dtype,
                files,
                hashes,
                8 * linear / inner,
                8 * total / result.params_total,
                total / (2 * result.params_total),
                sum(path.stat().st_size for path in loaded_files(format, temporary)),
                sum(map(compressed_size, loaded_files(format, temporary))),
                *distances,
                does,
                does_not,
                loaded.data.data_hash,
                {name: package_version(name) for name in names},
                average,
            )
            write_json(temporary / "export_report.json", card.to_json())
            text = model_card(card, config, result, loaded.data.meta, rotated=rotated)
            (temporary / "README.md").write_text(text, encoding="utf-8")
            os.replace(temporary, out)
        except OSError as e:
            raise StorageError(f"{out}: cannot be written: {e.strerror or e}.") from e
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return card


class Compared(NamedTuple):
    """The four agreements of an `AccuracyCard`."""

    agreement: Agreement
    weights_alone: Agreement | None
    same_precision: Agreement | None
    precision_alone: Agreement | None

    @property
    def nearest(self) -> Agreement:
        """The agreement with the forward pass that the files should reproduce."""
        return self.same_precision or self.weights_alone or self.agreement


def compared(format: str, job: Job, target: Logits, windows: torch.Tensor) -> Compared:
    """Compare the model read back with the run, and with passes of the run that lack what the files cannot store."""
    dense = format != "hf" and lost_inputs(job.config) is not None
    agreement = compare(job.model, target, windows)
    alone = compare(job.plain, target, windows) if dense else None
    if job.dtype != "bf16":
        return Compared(agreement, alone, None, None)
    whole = job.model if format == "hf" else job.plain
    rounded = model_in(job.model, job.weights, torch.bfloat16) if format == "hf" else copy.deepcopy(job.plain).bfloat16()
    return Compared(agreement, alone, compare(rounded, target, windows), compare(whole, rounded, windows))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and load reports of packages that read the files; the model read is compared anyway."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def statements(format: str, dtype: str, config: RunConfig, tokens: str) -> tuple[list[str], list[str]]:
    """The parts of the run that the export reproduces, and those that it does not, as sentences."""
    does, does_not = [], []
    quantized = [layer for layer in layers(config).values() if not layer.weights.is_identity]
    rotated = any(layer.rotates for layer in quantized)
    exact = dtype in ("fp32", "f32")
    rows = list(config.quant.by_row)
    if format == "hf":
        does.append("Quantized weights and quantized inputs of every layer, by the training's own code.")
        does += [f"Of what is read by row, {' and '.join(rows)}: codes, and the training's quantizer."] if rows else []
    elif format == "gguf" and dtype not in ("f32", "f16", "q8_0"):
        does.append("The levels of every quantized weight, with its scale rounded to fp16; everything else in F32.")
    else:
        does.append("The values of every quantized weight" + ("." if exact else f", rounded to {dtype}."))
    if lost := None if format == "hf" else lost_inputs(config):
        does_not.append(lost)
    if dense := _dense_tables(config, format, dtype):
        does_not.append(f"Written as plain values, since no type of {format} fits: {' and '.join(dense)}.")
    if not exact and format != "gguf":
        does_not.append(
            f"Embedding, norms, head and layers in full precision are rounded to {dtype}, and so is what flows between layers."
        )
    if format == "compressed-tensors" and rotated:
        does.append("The rotation of the inputs, as `transform_config`, with load_rotated.py.")
        does_not.append("transformers alone ignores `transform_config` without a warning; what it computes from here is noise.")
    if format == "compressed-tensors":
        does_not += in_vllm(config, dtype)
    if format == "gguf":
        does_not.append("llama.cpp rounds the inputs of quantized blocks to 8 bits in its own way; this comparison does not.")
    if config.train.precision == "bf16":
        does_not.append("The run was trained under bf16 autocast; this comparison is in fp32 on both sides.")
    if tokens != NO_TOKENIZER:
        does.append(f"The tokenizer ({tokens}), with the same ids.")
    else:
        does_not.append("No tokenizer: that of the run's text is not known; ids have to come from elsewhere.")
    return does, does_not


def _dense_tables(config: RunConfig, format: str, dtype: str) -> list[str]:
    """Those of embedding and head that are quantized in the run, but written as values beside layers stored as codes."""
    if format not in ("compressed-tensors", "gguf") or dtype in ("f32", "f16", "q8_0"):
        return []
    specs = {key: spec for key, spec in config.quant.by_row.items() if key != "kv"}
    layers = {key: Layer(spec, IDENTITY, config.model.d_model, spec.basis) for key, spec in specs.items()}
    return [key for key, layer in layers.items() if format != "gguf" or gguf_table(key, layer) is None]


# --- one writer per format: it writes the files and returns the logits of the model read back from them --------------------


@dataclass(frozen=True)
class Job:
    """The input of every writer; `plain` is the model with dense weights in plain linear layers."""

    folder: Path
    model: Llama
    plain: Llama
    config: RunConfig
    weights: Mapping[str, Weight]
    dtype: str
    tokenizer: Tokenizer | None


def _tokenizer_files(job: Job) -> dict[str, Any]:
    """Write the tokenizer's files, and return the entries of config.json that belong to them."""
    entries = tokenizer.write(job.folder, job.tokenizer, job.config.data.seq_len)
    return entries | tokenizer.copy_from_source(job.folder, job.config)


def _hf(job: Job) -> Logits:
    from . import hf

    hf.write_hf(job.folder, job.model, job.config, job.weights, job.dtype, _tokenizer_files(job))
    return _logits(hf.load(job.folder))


def _hf_dense(job: Job) -> Logits:
    from . import hf

    hf.write_dense(job.folder, job.plain, job.config, job.dtype, _tokenizer_files(job))
    return _logits(hf.load(job.folder))


def _compressed_tensors(job: Job) -> Logits:
    from . import compressed_tensors

    compressed_tensors.write(job.folder, job.model, job.config, job.weights, job.dtype, _tokenizer_files(job))
    return _logits(compressed_tensors.load(job.folder))


def _gguf(job: Job) -> Logits:
    from . import gguf

    gguf.write(job.folder, job.plain, job.config, job.weights, job.dtype, job.tokenizer, tables(job.model))
    return gguf.read(job.folder, job.plain)


WRITERS: dict[str, Callable[[Job], Logits]] = {
    "hf": _hf,
    "hf-dense": _hf_dense,
    "compressed-tensors": _compressed_tensors,
    "gguf": _gguf,
}


def _logits(model: PreTrainedModel) -> Logits:
    def logits(tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(tokens, use_cache=False).logits
        return out.float()

    return logits


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def loaded_files(format: str, folder: Path) -> list[Path]:
    """The files that a runtime loads: weights and tokenizer, which are one file in GGUF."""
    if format == "gguf":
        from . import gguf

        return [folder / gguf.FILE]
    return [path for name in ("model.safetensors", "tokenizer.json") if (path := folder / name).exists()]


def compressed_size(path: Path) -> int:
    """The bytes of a file after zlib at level 9, read in pieces."""
    packer, size = zlib.compressobj(9), 0
    with path.open("rb") as f:
        while piece := f.read(1 << 20):
            size += len(packer.compress(piece))
    return size + len(packer.flush())


def _sizes(format: str, folder: Path) -> tuple[int, int]:
    """Bytes of the linear layers of the blocks, and of the whole weight file."""
    if format == "gguf":
        from . import gguf

        path, sizes = folder / gguf.FILE, gguf.sizes(folder)
        linear = [n for name, n in sizes.items() if name.startswith("blk.") and "norm" not in name]
    else:
        path = folder / "model.safetensors"
        with safetensors.safe_open(path, framework="pt") as f:
            sizes = {name: f.get_tensor(name).nbytes for name in f.keys()}  # noqa: SIM118
        linear = [n for name, n in sizes.items() if "_proj." in name]
    return sum(linear), path.stat().st_size
