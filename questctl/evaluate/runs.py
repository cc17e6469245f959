"""Evaluate a trained run by one call: its loss on a text, its accuracy on tasks, or the text that it generates from a prompt.

A run that is not finished is evaluated with the weights of its newest checkpoint. Precision and threads are those of the
training, so that the loss of a finished run is reproduced to the last digit. Packed weights consist of integer codes of the
trained bits and their scales (`questctl.quant.packed`). Torch is imported only after the arguments have been checked.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from ..config import RunConfig
from ..errors import DataError, StorageError, UsageError, unknown
from ..store import Run, open_run

if TYPE_CHECKING:
    import torch

    from ..data.tokenizers import Tokenizer
    from ..data.tokens import Dataset
    from ..models.llama import Llama
    from ..quant.packed import PackedSize
    from ..training.loading import PartialWeights

logger = logging.getLogger(__name__)

Part = Literal["val", "train"]
Product = Literal["values", "integers", "bytes"]
PARTS = ("val", "train")
PRODUCTS = ("values", "integers", "bytes")
LOGITS = 2**24  # of a batch that two models predict side by side: 64 MiB in fp32, each


def evaluate_run(
    run: Run | Path | str,
    *,
    data: str | None = None,
    part: Part | str = "val",
    max_tokens: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    shots: int = 0,
    packed: bool = False,
    product: Product | str | None = None,
    average: bool = False,
    reference: str | None = None,
    record: bool = True,
) -> dict[str, Any]:
    """Measure the loss of a run on a text or, with `tasks`, its accuracies.

    `run` is a Run, its folder, or a name in the default folder of runs (a unique end of it will do). `data` is a value of
    `data.source`; the default is the run's own text, of which `part` selects the side of the split. `max_tokens` limits the
    evaluated tokens; the default is the run's own limit. `tasks`, `limit` and `shots` are those of
    `questctl.evaluate.tasks.evaluate`. `packed` packs the weights first and multiplies them by `product`: `values` (the loss of
    the unpacked weights to the last bit; default on a CPU), `integers` (default on a GPU) or `bytes` (the same sums from a byte
    per weight). `average` uses the average of the weights that `optim.average` kept instead of the last weights. `reference`
    is a checkpoint as `model.init` takes it, such as the one that the run began with: the run's predictions on the text are
    compared with its predictions. `record` appends the measurement to the run's evaluations.jsonl, or logs a warning if that
    cannot be written.

    Returns a JSON object: `run`; `data`, `part`, `data_hash`, `loss` (nats/token), `bits_per_byte` and the evaluated `tokens`,
    or `tasks` (task → metric → value), `limit` and `shots`; `unfinished` (state, step, steps) if the weights are those of a
    checkpoint; `packed` (layers and bytes) if they are packed; `average`, true, if they are an average. With a reference, also
    `reference`: its `name`, the mean `kl` = KL(reference ‖ run) in nats/token, and `agreement`, the share of the positions
    where both find the same id the likeliest.

    Logs a warning if the text has fewer tokens than are to be evaluated.

    Raises UsageError for arguments that do not fit the run, DataError for a missing or damaged run, text or task file, and
    MissingDependency for tasks without lm-eval.
    """
    run = open_run(run)
    if part not in PARTS:
        raise UsageError(unknown("--part", part, PARTS))
    _check_product(packed, product)
    config = run.config()
    if reference and tasks:
        raise UsageError("--reference: compares predictions on a text; leave out --tasks.")
    how = _How(packed, product, average, reference)
    measured = _accuracies(run, config, tasks, limit, shots, how) if tasks else _loss(run, config, data, part, max_tokens, how)
    if record:
        try:
            run.add_evaluation(measured)
        except StorageError as e:  # a run in an archive, or one of another user
            logger.warning("%s: the measurement is not kept: %s", run.name, e)
    return measured


class _How(NamedTuple):
    """The choice of the weights to evaluate, and of how they are multiplied."""

    packed: bool
    product: str | None
    average: bool
    reference: str | None


def _loss(run: Run, config: RunConfig, data: str | None, part: str, max_tokens: int | None, how: _How) -> dict[str, Any]:
    from ..data.packing import windows_of
    from ..data.size_estimate import evaluation_warning
    from ..training.loading import loss_on
    from ..training.run_data import load_data, load_other
    from .loss import bits_per_byte, evaluated_tokens

    text = load_other(config, run, data) if data else load_data(config, run)
    model = _Model(run, config, how.average)
    if text.meta.vocab_size > model.vocab_size:
        ids = f"has {text.meta.vocab_size} ids, but {run.name} has {model.vocab_size}"
        raise UsageError(f"--data: {data} {ids}; name a text with the same tokenizer.")
    size = model.pack(how.product) if how.packed else None
    with model.execution():
        loss = loss_on(model.model, config, text, part=part, max_tokens=max_tokens)
        compared = _compared(model, how.reference, text, part, max_tokens) if how.reference else {}
    shard = text.meta.val if part == "val" else text.meta.train
    seq_len, asked = config.data.seq_len, max_tokens or config.train.eval_tokens
    if few := evaluation_warning(text.meta.source, shard.tokens, seq_len, asked):
        logger.warning("%s: %s", run.name, few)
    return {
        "run": run.name,
        "data": text.meta.source,
        "part": part,
        "data_hash": text.data_hash,
        "loss": loss,
        "bits_per_byte": bits_per_byte(loss, shard.bytes_per_token),
        "tokens": evaluated_tokens(windows_of(text, part, config.data), seq_len, asked),
        **compared,
        **_present(unfinished=model.unfinished, packed=size, average=how.average),
    }


def _compared(model: _Model, name: str, text: Dataset, part: str, max_tokens: int | None) -> dict[str, Any]:
    """The entry `reference` of an evaluation. Raises DataError for a missing checkpoint, UsageError for one with other ids."""
    import torch

    from ..config.sections import TeacherConfig
    from ..data.packing import IGNORED, windows_of
    from ..data.tokens import tokenizer_of
    from ..pretrained import open_source
    from ..training.run_data import check_teacher
    from ..training.teacher import Teacher, divergence
    from .loss import means

    key, about = "--reference", TeacherConfig(source=name, sha256=open_source(name, "--reference").sha256)
    config = model.config.model_copy(update={"teacher": about})
    check_teacher(config, text.meta.vocab_size, tokenizer_of(text), key)
    reference = Teacher(config, model.device).model

    def compare(tokens: torch.Tensor, targets: torch.Tensor, first: torch.Tensor | None = None) -> torch.Tensor:
        with model.precision():
            ours = model.model(tokens, None, first)
        theirs, counted = reference(tokens, None, first).float().flatten(0, 1), targets.flatten() != IGNORED
        ours = ours.float().flatten(0, 1)
        alike = ours.argmax(-1) == theirs[:, : ours.shape[1]].argmax(-1)
        return torch.stack([divergence(ours, theirs, about)[0][counted].mean(), alike[counted].float().mean()])

    kl, agreement = means(
        compare,
        windows_of(text, part, config.data),
        seq_len=config.data.seq_len,
        max_tokens=max_tokens or config.train.eval_tokens,
        batch_size=max(1, LOGITS // (config.data.seq_len * model.vocab_size)),
        device=model.device,
    ).tolist()
    return {"reference": {"name": name, "kl": kl, "agreement": agreement}}


def _accuracies(run: Run, config: RunConfig, tasks: Sequence[str], limit: int | None, shots: int, how: _How) -> dict[str, Any]:
    from ..training.run_data import run_tokenizer
    from .tasks import evaluate, require_lm_eval

    require_lm_eval()
    tokenizer = run_tokenizer(config, run)
    if tokenizer is None:
        raise UsageError(f"--tasks: {run.name} was trained on token ids, but tasks consist of text.")
    model = _Model(run, config, how.average)
    size = model.pack(how.product) if how.packed else None
    with model.execution():
        metrics = evaluate(model.model, tokenizer, tasks, max_length=config.data.seq_len, limit=limit, shots=shots)
    return {
        "run": run.name,
        "tasks": metrics,
        "limit": limit,
        "shots": shots,
        **_present(unfinished=model.unfinished, packed=size, average=how.average),
    }


@dataclass(frozen=True)
class Generation:
    """A text that a run has generated from a prompt."""

    run: str
    prompt: str
    text: str  # the continuation of the prompt; for a run trained on token ids, the ids separated by blanks
    tokens: tuple[int, ...]  # the ids of `text`
    ended: bool  # whether the run ended the text before the limit of tokens
    of_ids: bool  # whether the run was trained on token ids without a tokenizer
    beyond: int | None  # the length of the training sequences, if prompt and limit of tokens together exceed it
    unfinished: PartialWeights | None  # if the weights are those of a checkpoint
    packed: PackedSize | None  # if the weights were packed
    average: bool  # whether they are the average that optim.average kept

    @property
    def whole(self) -> str:
        """Prompt and text together."""
        return f"{self.prompt} {self.text}" if self.of_ids else self.prompt + self.text

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `questctl generate --json` prints."""
        return {
            "run": self.run,
            "prompt": self.prompt,
            "text": self.text,
            "tokens": list(self.tokens),
            "ended": self.ended,
            **_present(unfinished=self.unfinished, packed=self.packed, average=self.average),
        }


def generate_text(
    run: Run | Path | str,
    prompt: str,
    *,
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    packed: bool = False,
    product: Product | str | None = None,
    average: bool = False,
) -> Generation:
    """Generate at most `max_tokens` tokens of text after `prompt`.

    `run`, `packed`, `product` and `average` are as in `evaluate_run`; `temperature`, `top_k` and `seed` as in
    `questctl.evaluate.generate.generate`: temperature 0 takes the likeliest token. For a run that was trained on token ids, the
    prompt consists of ids, separated by blanks. Raises UsageError for an empty prompt, and DataError for ids outside the
    model's vocabulary.
    """
    from ..training.run_data import run_tokenizer

    run = open_run(run)
    _check_product(packed, product)
    config = run.config()
    tokenizer = run_tokenizer(config, run)
    ids = _prompt_ids(prompt, tokenizer)
    model = _Model(run, config, average)
    if not all(0 <= i < model.vocab_size for i in ids):
        raise DataError(f"TEXT: id {max(ids, key=abs)} is not one of the {model.vocab_size} ids of {run.name}.")
    size = model.pack(product) if packed else None

    from .generate import generate

    end = tokenizer.end if tokenizer else None
    with model.execution(), model.precision():
        generated = list(
            generate(model.model, ids, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed, end=end)
        )
    return Generation(
        run.name,
        prompt,
        tokenizer.decode(generated) if tokenizer else " ".join(map(str, generated)),
        tuple(generated),
        len(generated) < max_tokens,
        tokenizer is None,
        config.data.seq_len if len(ids) + max_tokens > config.data.seq_len else None,
        model.unfinished,
        size,
        average,
    )


def _prompt_ids(prompt: str, tokenizer: Tokenizer | None) -> list[int]:
    """The ids of a prompt, which without a tokenizer consists of ids. Raises UsageError if it is empty or malformed."""
    try:
        ids = [int(i) for i in (tokenizer.encode(prompt) if tokenizer else prompt.split())]
    except ValueError:
        raise UsageError(f"TEXT: '{prompt}': the run was trained on token ids; write ids, such as '3 1 4'.") from None
    if not ids:
        raise UsageError("TEXT: is empty; give at least one character.")
    return ids


class _Model:
    """The model of a run on the device of its training, with the precision and the execution settings of its training."""

    def __init__(self, run: Run, config: RunConfig, average: bool = False) -> None:
        from ..training.loading import load_model, unfinished
        from ..training.loop import pick_device

        self.run, self.config = run, config
        self.device = pick_device(config.train.device)
        self.unfinished = unfinished(run)
        self.model: Llama = load_model(run, average=average, device=self.device)

    @property
    def vocab_size(self) -> int:
        """The number of ids in the model's vocabulary."""
        return self.model.config.vocab_size

    def pack(self, product: str | None) -> PackedSize:
        """Pack the weights. Raises UsageError if the model has no layer that can be packed."""
        from ..quant.packed import freeze, packed_size

        default = "integers" if self.device.type == "cuda" else "values"
        size = packed_size(freeze(self.model, cast(Product, product or default)))
        if not size.layers:
            raise UsageError(
                f"--packed: {self.run.name} has no layer whose weights are trained to be quantized; there is nothing to pack."
            )
        return size

    def execution(self) -> AbstractContextManager[None]:
        """The number of threads and the kernels of the training, which determine the last digits on a CPU."""
        from ..training.loop import execution

        return execution(int(self.run.env().get("threads") or 1), self.device)

    def precision(self) -> torch.autocast:
        """The precision of the training."""
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")


def _check_product(packed: bool, product: str | None) -> None:
    if product is not None and product not in PRODUCTS:
        raise UsageError(unknown("--product", product, PRODUCTS))
    if product is not None and not packed:
        raise UsageError(f"--product {product}: applies only to packed weights; add --packed.")


def _present(*, unfinished: PartialWeights | None, packed: PackedSize | None, average: bool) -> dict[str, Any]:
    """The entries `unfinished`, `packed` and `average` of a JSON object, without those that do not apply."""
    records = {name: value._asdict() for name, value in (("unfinished", unfinished), ("packed", packed)) if value is not None}
    return records | ({"average": True} if average else {})
