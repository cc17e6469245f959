"""A run read back: its weights in its model, the text that it saw, and the loss of a model on that text.

    runs/<id>/ → config.json + model.safetensors → Llama;   the same corpus, its hash compared → Dataset

What a run stores are the full-precision weights, which its quantizers round again at every use. A run that was quantized after
training stores the rounded weights instead, in the model's own basis, so that there only the inputs are still quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..config import RunConfig
from ..data.tokens import Dataset
from ..errors import DataError
from ..evaluate.loss import Loss, evaluate
from ..models.llama import Llama, build_model
from ..store import Run, checkpoint_name, checkpoint_steps
from . import checkpoint
from .run_data import load_data


@dataclass(frozen=True)
class LoadedRun:
    """A run's config, its model with its weights, and its text."""

    run: Run
    config: RunConfig
    model: Llama
    data: Dataset


class PartialWeights(NamedTuple):
    """The checkpoint whose weights stand for a run that is not finished."""

    state: str
    step: int
    steps: int

    def sentence(self, name: str) -> str:
        """A warning for people that the weights of run `name` are not final."""
        weights = f"these are the weights of its checkpoint of step {self.step:,} of {self.steps:,}"
        return f"{name}: is not finished: {weights} ({self.state})."


def unfinished(run: Run) -> PartialWeights | None:
    """What to say of the weights that `load_model` gives; None of a finished run, and of one that has none."""
    step = None if run.model_path.exists() else _newest(run)
    return None if step is None else PartialWeights(run.state(), step, run.config().train.steps)


def _newest(run: Run) -> int | None:
    return max(checkpoint_steps(run.checkpoints_path), default=None)


def load(run: Run, *, device: torch.device | str = "cpu") -> LoadedRun:
    """Weights and text of `run`. Raises DataError (no weights yet, or damaged) or UsageError (another text)."""
    model, config = load_model(run, device=device), run.config()
    return LoadedRun(run, config, model, load_data(config, run))


def load_model(run: Run, *, step: int | None = None, device: torch.device | str = "cpu") -> Llama:
    """The model of `run` with its final weights or, with `step`, those of a checkpoint that it still has.

    A run that is not finished gives the weights of its newest checkpoint. Raises DataError if there are none, or damaged ones.
    """
    config, tensors = run.config(), _tensors(run, step)
    try:
        shape = config.model.model_copy(update={"vocab_size": len(tensors["embed.weight"])})
        model = build_model(shape, config.remaining_quant, config.train.seed)
        model.load_state_dict(tensors)
    except (KeyError, RuntimeError) as e:
        raise DataError(f"{run.path}: its weights are not those of its config: {e}.") from e
    return model.to(device)


def mean_loss(model: nn.Module, config: RunConfig) -> Loss:
    """(tokens, targets) (B, T) → the mean loss () of `model` in nats/token, in the precision of the run."""

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            out: torch.Tensor = model(tokens, targets)
        return out

    return loss


def loss_on(model: nn.Module, config: RunConfig, data: Dataset, *, part: str = "val", max_tokens: int | None = None) -> float:
    """Loss in nats/token on the windows of `part`, val or train; by default the number that a run's result reports."""
    t, tokens = config.train, data.val if part == "val" else data.train
    return evaluate(
        mean_loss(model, config),
        tokens,
        seq_len=config.data.seq_len,
        max_tokens=max_tokens or t.eval_tokens,
        batch_size=t.micro_batch or t.batch_size,
        device=next(model.parameters()).device,
    )


def _tensors(run: Run, step: int | None) -> dict[str, torch.Tensor]:
    if step is None and run.model_path.exists():
        try:
            return checkpoint.load_tensors(run.model_path, run.model_sha256())
        except DataError as e:
            raise DataError(f"{e}; restore it, or remove the run (questctl runs rm) to make it anew.") from e
    step = _newest(run) if step is None else step
    if step is None:
        raise DataError(f"{run.name}: has no weights yet ({run.state()}); questctl train goes on with it.")
    return checkpoint.load(run.checkpoints_path / checkpoint_name(step)).model
