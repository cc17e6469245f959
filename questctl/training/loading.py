"""Loading of trained runs: the model with its weights, the text that it was trained on, and its loss on a text.

    runs/<id>/ → config.json + model.safetensors → Llama;   the same corpus, verified by its hash → Dataset

A run stores full-precision weights, which its quantizers round at every use. A run that was quantized after training stores the
rounded weights instead, in the model's own basis, so that only its inputs remain to be quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..config import RunConfig
from ..data.packing import windows_of
from ..data.tokens import Dataset
from ..errors import DataError
from ..evaluate.loss import Loss, evaluate
from ..models.llama import Llama, build_model
from ..store import Run, checkpoint_name, checkpoint_steps
from . import checkpoint
from .run_data import load_data


@dataclass(frozen=True)
class LoadedRun:
    """A run's config, its model with trained weights, and its text."""

    run: Run
    config: RunConfig
    model: Llama
    data: Dataset


class PartialWeights(NamedTuple):
    """The checkpoint whose weights are used for a run that is not finished, and the state of that run."""

    state: str
    step: int
    steps: int

    def sentence(self, name: str) -> str:
        """A warning that the weights of run `name` are not final."""
        weights = f"these are the weights of its checkpoint of step {self.step:,} of {self.steps:,}"
        return f"{name}: is not finished: {weights} ({self.state})."


def unfinished(run: Run) -> PartialWeights | None:
    """The checkpoint that `load_model` uses for a run that is not finished; None if it is finished or has no checkpoint."""
    step = None if run.model_path.exists() else _newest(run)
    return None if step is None else PartialWeights(run.state(), step, run.config().train.steps)


def _newest(run: Run) -> int | None:
    return max(checkpoint_steps(run.checkpoints_path), default=None)


def load(run: Run, *, average: bool = False, device: torch.device | str = "cpu") -> LoadedRun:
    """Load the model and the text of `run`; `average` is that of `load_model`.

    Raises DataError if its weights are missing or damaged, and UsageError if its text has changed.
    """
    model, config = load_model(run, average=average, device=device), run.config()
    return LoadedRun(run, config, model, load_data(config, run))


def load_model(run: Run, *, step: int | None = None, average: bool = False, device: torch.device | str = "cpu") -> Llama:
    """The model of `run` with its final weights or, with `step`, with those of a checkpoint that it still has.

    With `average`, the weights are the average that `optim.average` kept. A run that is not finished has the weights of its
    newest checkpoint. Raises DataError if they are missing or damaged.
    """
    config, tensors = run.config(), _averages(run) if average else _tensors(run, step)
    try:
        shape = config.model.model_copy(update={"vocab_size": len(tensors["embed.weight"])})
        model = build_model(shape, config.remaining_quant, config.train.seed, rotate_back=config.rotate_back)
        model.load_state_dict(tensors)
    except (KeyError, RuntimeError) as e:
        raise DataError(f"{run.path}: its weights do not fit its config: {e}.") from e
    return model.to(device)


def mean_loss(model: nn.Module, config: RunConfig) -> Loss:
    """The function that maps what `packing.parts` returns, each (B, T), to the mean loss () of `model` in nats/token.

    It computes in the precision of the run.
    """

    def loss(tokens: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            out: torch.Tensor = model(tokens, *others)
        return out

    return loss


def loss_on(model: nn.Module, config: RunConfig, data: Dataset, *, part: str = "val", max_tokens: int | None = None) -> float:
    """The loss in nats/token on the windows of `part` (val or train). The defaults give the loss of the run's result."""
    t = config.train
    return evaluate(
        mean_loss(model, config),
        windows_of(data, part, config.data),
        seq_len=config.data.seq_len,
        max_tokens=max_tokens or t.eval_tokens,
        batch_size=t.micro_batch or t.batch_size,
        device=next(model.parameters()).device,
    )


def _averages(run: Run) -> dict[str, torch.Tensor]:
    if not run.average_path.exists():
        raise DataError(f"{run.name}: has no average of its weights; a finished run with optim.average has.")
    return checkpoint.load_tensors(run.average_path)


def _tensors(run: Run, step: int | None) -> dict[str, torch.Tensor]:
    if step is None and run.model_path.exists():
        try:
            return checkpoint.load_tensors(run.model_path, run.model_sha256())
        except DataError as e:
            raise DataError(f"{e}; restore it, or remove the run (questctl runs rm) to make it anew.") from e
    step = _newest(run) if step is None else step
    if step is None:
        raise DataError(f"{run.name}: has no weights yet ({run.state()}); questctl train continues it.")
    return checkpoint.load(run.checkpoints_path / checkpoint_name(step)).model
