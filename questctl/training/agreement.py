"""Check that a machine trains alike in every way of computing a step: by formula or by kernels, eager or compiled.

    loss  |L′ − L| / |L|          gradient  ‖g′ − g‖ / ‖g‖ of each parameter          medians over the steps

The first training is the definition: eager, by the formula of the quantizers. The others take the same steps, and begin each
from the weights and moments that the first had before it. Otherwise they would drift apart: a difference in the last bits can
round a value to the neighbouring level, a whole step of the grid away. Within a step, too, a few values may be rounded
differently and change gradients by a few percent. This happens in few steps, whereas a wrong kernel or a wrong graph shows in
most of them: hence the medians. A step is one of the training loop, from reading the batch to the optimizer.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import torch

from ..config import Layer, RunConfig, resolve
from ..errors import QuestError, UsageError
from ..kernels import native
from ..kernels.op import failures
from ..quant.components import Component
from ..quant.linear import quantized_layers
from ..quant.methods import METHODS
from ..quant.spec import KINDS, QuantSpec
from . import distributed
from .loop import Trainer, execution, pick_device
from .run_data import load_data

STEPS = 20
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}  # relative
GRADIENT_TOLERANCE = {"fp32": 0.02, "bf16": 0.3}  # relative; a gradient that is lost differs by 1
COLUMNS = ("scheme", "precision", "steps", "state", "of", "loss differs", "gradient differs")
AGREES, DIFFERS, FAILS, ABSENT = "agrees", "differs", "fails", "absent"
VALUES: dict[str, Any] = {
    "model.n_layer": 1,
    "model.d_model": 128,  # the rotations of the published sizes have blocks of 128
    "model.n_head": 4,
    "model.d_ff": 128,
    "data.source": "synthetic:markov?vocab=64&tokens=20000",
    "data.seq_len": 32,
    "train.batch_size": 4,
    "train.steps": STEPS,
    "optim.lr": 1e-3,
    "quant.block": 128,
}
FEW = ("quest-w4a4", "lsq-w4a4")  # the default families: one with fused kernels, and one without
BESIDE: tuple[dict[str, Any], ...] = (  # cases that no single method or component covers
    {"quant.method": "quest", "quant.bits": 1},  # another estimator
    {"quant.method": "quest", "quant.bits": 8},  # more bits than the kernels have
    {"quant.method": "quest", "quant.bits": 4, "quant.weight_only": True},
    {"quant.weights": "bf16", "quant.activations": "int4-h128-rms-trust"},  # the unquantized weight is rotated, too
    {"quant.method": "quest", "quant.bits": 4, "quant.gradients": "int8-absmax-ste"},
    {"quant.gradients": "sint4.sr-h16-absmax-ste"},
    {"quant.method": "nvfp4", "quant.bits": "fp4", "quant.gradients": "fp4.sr-e4m3.g16-ste", "quant.backward": "both"},
    {"quant.embedding": "int4-h128-rms-trust", "quant.head": "int4-h128-rms-trust", "quant.kv": "int4-h32-rms-trust"},
)


class Way(NamedTuple):
    """A way of computing steps."""

    compiled: bool = False
    fused: bool = False

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'eager'}, {'fused' if self.fused else 'reference'}"

    @property
    def keys(self) -> dict[str, str]:
        """The config keys that ask for it."""
        return {"train.compile": "on" if self.compiled else "off", "train.kernels": "fused" if self.fused else "reference"}


DEFINITION = Way()
OTHERS = (Way(compiled=True), Way(fused=True), Way(compiled=True, fused=True))


@dataclass(frozen=True)
class Agreement:
    """One way of computing the steps of one scheme, beside the definition.

    `state` is `agrees`, `differs`, `fails` (the compiler or a kernel raises `reason`; training goes on without the compiler) or
    `absent` (not available here, for `reason`). Errors are medians of relative errors over the steps. `parameter` is the first
    one, in the order of the model, whose gradient is beyond the tolerance, else the one that differs most; `gradient_error` is
    its error.
    """

    scheme: str
    weights: str
    activations: str
    gradients: str
    precision: str
    way: str
    state: str
    loss_error: float | None = None
    gradient_error: float | None = None
    parameter: str = ""
    reason: str = ""

    @property
    def cells(self) -> tuple[str | float | None, ...]:
        """The cells of a table with the columns `COLUMNS`."""
        where = self.reason or self.parameter
        return self.scheme, self.precision, self.way, self.state, where, self.loss_error, self.gradient_error

    @property
    def sentence(self) -> str:
        """What differs, and by how much."""
        specs = f"weights '{self.weights}', activations '{self.activations}', gradients '{self.gradients}'"
        what = f"the gradient of {self.parameter} by {self.gradient_error:.2g} of its norm, the loss by {self.loss_error:.2g}"
        return f"{self.scheme} in {self.precision}, {self.way}: differs from the formula, eager: {what} ({specs})."


def check_training(
    *, everything: bool = False, device: str = "auto", steps: int = STEPS, tell: Callable[[str], None] = lambda _: None
) -> list[Agreement]:
    """Train a tiny model for `steps` steps in each way of computing them that `device` has, and compare losses and gradients.

    Two families of specs are compared, which takes about two minutes on a CPU; with `everything`, all of `families` are. On a
    GPU each is trained in fp32 and in bf16. `tell` is called with the name of each family. Raises UsageError for a device that
    does not exist.
    """
    where = pick_device(device)
    agreements: list[Agreement] = []
    for name, values in families().items():
        if everything or name in FEW:
            for precision in ("fp32", "bf16") if where.type == "cuda" else ("fp32",):
                tell(f"{name} in {precision}")
                agreements += compare(values | {"train.precision": precision}, where, steps)
    return agreements


def raise_if_different(agreements: Sequence[Agreement]) -> None:
    """Raises QuestError naming the first scheme, way and parameter that differ from the definition."""
    if first := next((way for way in agreements if way.state == DIFFERS), None):
        raise QuestError(first.sentence)


# --- families ---------------------------------------------------------------------------------------------------------


def families() -> dict[str, dict[str, Any]]:
    """Config keys by scheme: each method, each component that no method has, and quantized gradients."""
    methods = [
        {"quant.method": name} | ({} if name == "bf16" else {"quant.bits": "4" if "4" in method.bits else method.bits[0]})
        for name, method in METHODS.items()
    ]
    by_label = {_config(values).quant.label: values for values in (*methods, *BESIDE)}
    used: set[object] = set()
    for values in by_label.values():
        quant = _config(values).quant
        for spec in (quant.weights, quant.activations, quant.gradients):
            used |= {idea for part in _parts(spec) for idea in (_idea(type(part), ""), _idea(type(part), part.variant))}
    for kind, classes in KINDS.items():
        for cls in classes:
            for variant in ("", *cls.variants):
                if (idea := _idea(cls, variant)) not in used:
                    used.add(idea)
                    values = _with_component(kind, cls, variant)
                    by_label[_config(values).quant.label] = values
    return by_label


def _parts(spec: QuantSpec) -> list[Component]:
    return [part for kind in KINDS if (part := getattr(spec, kind)) is not None]


def _idea(cls: type[Component], variant: str) -> object:
    """What a component adds: its class or, with a variant, the class that defines the variant, whatever the group size."""
    owner = next(c for c in cls.__mro__ if "variants" in vars(c)) if variant else cls
    return owner, variant.rstrip("0123456789")


def _with_component(kind: str, cls: type[Component], variant: str) -> dict[str, Any]:
    """The config keys of the first spec with this component that makes sense, for weights and inputs, or else for gradients."""
    usual: dict[str, tuple[str, ...]] = {
        "grid": ("int4", "ternary"),
        "basis": ("", "h16"),
        "scale": ("rms", "absmax"),
        "sparsity": ("",),
    }
    own = (_text(cls, variant),)
    for pieces in product(*({**usual, "estimator": ("ste", "clip1"), kind: own}[k] for k in KINDS)):
        text = "-".join(filter(None, pieces))
        fits = [operand for operand in ("weights", "activations", "gradients") if _parses(text, operand)]
        if "weights" in fits:
            return {"quant.weights": text, "quant.activations": text if "activations" in fits else "bf16"}
        if fits:
            return {"quant.gradients": text, "quant.backward": "both"}
    raise AssertionError(f"no spec has {own[0]}")


def _text(cls: type[Component], variant: str) -> str:
    """The text of a component with this variant and, if it takes a number, some number that it accepts."""
    for number in ("0.5", "2.5", "16"):
        text = re.sub("<[^>]*>", number, cls.forms[0]) + (f".{variant}" if variant else "")
        try:
            if cls.parse(text) is not None:
                return text
        except ValueError:
            continue
    raise AssertionError(f"{cls.forms[0]}: no number of these suits it")


def _parses(text: str, operand: str) -> bool:
    try:
        QuantSpec.parse(text, operand=operand)
    except UsageError:
        return False
    return True


def _config(values: Mapping[str, Any]) -> RunConfig:
    return resolve([Layer("doctor", {tuple(key.split(".")): value for key, value in (VALUES | dict(values)).items()})]).config


# --- comparison -------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a step computed: its loss, and the gradient of each parameter that has one."""

    loss: float
    gradients: dict[str, torch.Tensor]


class State(NamedTuple):
    """Copies of the weights and of the optimizer's state, by name."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


class Recorder(Trainer):
    """A Trainer that records the loss and the gradients of its last step."""

    last: Step

    def forward_backward(self, step: int) -> torch.Tensor:
        """As in `Trainer`; it also sets `last`."""
        reported = super().forward_backward(step)
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.last = Step(float(reported), gradients)
        return reported

    def state(self) -> State:
        """The state before the next step."""
        model, optimizer = self.model.state_dict(), self.optimizer.tensors()
        return State({k: v.clone() for k, v in model.items()}, {k: v.clone() for k, v in optimizer.items()})

    def continue_from(self, state: State) -> None:
        """Continue from the weights and the optimizer's state in `state`."""
        self.model.load_state_dict(state.model)
        self.optimizer.load(state.optimizer, self.counters.step)

    @property
    def is_compiled(self) -> bool:
        """Whether steps go through compiled code; false once the compiler has failed."""
        return self._forward is not self._plain


def compare(values: Mapping[str, Any], device: torch.device, steps: int = STEPS) -> Iterator[Agreement]:
    """Train the run of these config keys by the definition, and compare with it each other way that its layers support."""
    data = load_data(_config(values))

    def training(way: Way) -> Recorder:
        return Recorder(_config({**values, **way.keys}), data, device, stop=lambda: False)

    with execution(distributed.threads_each(), device):
        definition = training(DEFINITION)
        states: list[State] = []
        truth: list[Step] = []
        for _ in range(steps):
            states.append(definition.state())
            definition.step()
            truth.append(definition.last)
        quant, precision = definition.config.quant, definition.config.train.precision
        about = (definition.config.scheme, str(quant.weights), str(quant.activations), str(quant.gradients), precision)
        for way in OTHERS:
            reason = _why_absent(way, device)
            other = None if reason else training(way)
            if other is None:
                yield Agreement(*about, str(way), ABSENT, reason=reason)
            elif not way.fused or any(layer.input_quantizer.fused for layer in quantized_layers(other.model)):
                try:
                    steps_of_way, reason = _steps(other, states, way)
                except failures() as e:
                    steps_of_way, reason = [], _first_line(e)
                yield Agreement(*about, str(way), FAILS, reason=reason) if reason else _judged(about, way, truth, steps_of_way)


def _why_absent(way: Way, device: torch.device) -> str:
    if way.compiled and device.type == "cpu" and native.find_compiler() is None:
        return "torch.compile needs a C compiler"
    if way.fused:
        from ..kernels.jit import why_not

        return why_not(device) or ""
    return ""


def _steps(trainer: Recorder, states: Sequence[State], way: Way) -> tuple[list[Step], str]:
    """One step from each of these states; and why the compiler failed, if it did."""
    taken = []
    with warnings.catch_warnings(record=True) as caught, _compiling(way.compiled):
        warnings.simplefilter("always")
        for state in states:
            trainer.continue_from(state)
            trainer.step()
            taken.append(trainer.last)
            if way.compiled and not trainer.is_compiled:
                return taken, next(str(w.message) for w in caught if "torch.compile fails" in str(w.message))
    return taken, ""


def _compiling(compiled: bool) -> AbstractContextManager[Any]:
    """Let compiled code draw from torch's generator, as eager code does, and forget the graphs of other models."""
    if not compiled:
        return nullcontext()
    import torch._inductor.config as inductor

    torch.compiler.reset()
    patch: AbstractContextManager[Any] = inductor.patch(fallback_random=True)
    return patch


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:160]}"


def _judged(about: tuple[str, str, str, str, str], way: Way, truth: Sequence[Step], steps: Sequence[Step]) -> Agreement:
    """Compare the steps of another way with those of the definition."""
    precision = about[-1]
    loss = median(abs(b.loss - a.loss) / abs(a.loss) for a, b in zip(truth, steps, strict=True))
    errors = {
        name: median(_difference(a.gradients[name], b.gradients.get(name)) for a, b in zip(truth, steps, strict=True))
        for name in truth[0].gradients
    }
    beyond = [name for name, error in errors.items() if not error <= GRADIENT_TOLERANCE[precision]]
    parameter = beyond[0] if beyond else max(errors, key=lambda name: errors[name])
    state = DIFFERS if beyond or not loss <= LOSS_TOLERANCE[precision] else AGREES
    return Agreement(*about, str(way), state, loss, errors[parameter], parameter)


def _difference(right: torch.Tensor, other: torch.Tensor | None) -> float:
    """‖other − right‖ / ‖right‖; 0 where both are zero. A gradient that is missing is zero."""
    norm = right.norm()
    off = norm if other is None else (other - right).norm()
    return 0.0 if float(off) == 0.0 else float(off / norm)
