"""The configuration of one run: a frozen tree, the layers it is made from, the origin of every value, and the run id.

    defaults < preset < TOML file < QUESTCTL_* environment < --set key=value < flags        (later wins)

`--set` and flags are one command line: of one key the flag wins, but two keys that exclude each other are refused.

`resolve(layers)` merges flat `{dotted key: value}` layers and returns the frozen `RunConfig` with the origin of each value.
A few *shorthand* keys are conveniences of input only; they are expanded here and never stored, so that one experiment has one
spelling:  `preset` · `quant.method|bits|block|weight_only` → `quant.weights`, `quant.activations` · `train.tokens`,
`train.tokens_per_param` → `train.steps` · `model.ffn_multiple_of` → `model.d_ff`.

    run id = <parameters>-<scheme>-<tokens/parameter>x-s<seed>-<8 hex digits>

The digits are a SHA-256 over the canonical JSON of every field that changes the result. Fields that only say *how* a run is
executed (device, threads, logging, checkpoint interval) are marked `Execution` and stay out of it. Same id ⇔ same experiment.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticKnownError, core_schema

from ..errors import UsageError, unknown
from ..quant.methods import method_words, scheme_label
from ..quant.spec import IDENTITY, QuantSpec
from .amounts import human_count as human_count
from .amounts import parse_count as parse_count
from .presets import PRESETS

SCHEMA_VERSION = 1


class _ExecutionMark:
    """Marks a field that does not change what is computed, only how: it is left out of the run id."""


class _AttemptMark:
    """Marks an `Execution` field that a run may change each time it goes on; the others stay as the run began."""


class _LaterMark:
    """Marks a field that came after runs had been named: while it has its default, it stays out of the run id."""


NEAR = 5  # variables that are suggested for an unknown one, at the most
Execution, Attempt, Later = _ExecutionMark(), _AttemptMark(), _LaterMark()
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no silent conversion between types."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """A Llama: RMSNorm, rotary positions, SwiGLU, no bias, untied head (arXiv 2302.13971; sizes after arXiv 2502.05003)."""

    n_layer: Positive = Field(1, description="transformer blocks")
    d_model: Positive = Field(64, description="width of the residual stream")
    n_head: Positive = Field(2, description="attention heads; d_model / n_head is the even width of one")
    d_ff: Positive = Field(192, description="SwiGLU hidden width; left out: 8/3 d_model rounded up to model.ffn_multiple_of")
    vocab_size: int = Field(0, ge=0, description="token ids; 0 takes the vocabulary of the data")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in RMSNorm")
    init_std: float = Field(0.02, gt=0, description="normal init; residual projections get init_std / sqrt(2 n_layer)")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.d_model % (2 * self.n_head):
            raise ValueError(f"model.n_head: {self.n_head} heads do not cut d_model {self.d_model} into even widths.")
        return self

    @property
    def block_shapes(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block by name, each with the shape (N, K) of its weight: outputs, inputs."""
        d, f = self.d_model, self.d_ff
        return {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "gate": (f, d), "up": (f, d), "down": (d, f)}

    @property
    def linear_weights(self) -> int:
        """Weights in the linear layers of all blocks: those that can be quantized."""
        return self.n_layer * sum(n * k for n, k in self.block_shapes.values())

    @property
    def params_non_embedding(self) -> int:
        """Parameters without embedding and head, norms included: the N of scaling laws.

        `models.llama.count_parameters` counts the same from the modules and asserts that both agree.
        """
        return self.linear_weights + (2 * self.n_layer + 1) * self.d_model  # two norms a block, and the last one

    @property
    def rotation_block(self) -> int:
        """The largest Hadamard block up to 128 that divides both widths; 1 if they are odd."""
        return min(_largest_power_of_two(self.d_model), _largest_power_of_two(self.d_ff))


@dataclass(frozen=True)
class _SpecText:
    """Marks a field that holds a `QuantSpec`: it takes a spec or its text, and is written as text to JSON and TOML.

    `key` is what an error names; `operand` is what the field quantizes.
    """

    key: str
    operand: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        as_text = core_schema.plain_serializer_function_ser_schema(str, return_schema=core_schema.str_schema())
        return core_schema.no_info_plain_validator_function(self._validated, serialization=as_text)

    def _validated(self, value: object) -> QuantSpec:
        if not isinstance(value, str | QuantSpec):
            raise PydanticKnownError("string_type")
        return QuantSpec.parse(str(value), key=self.key, operand=self.operand)


class LayerQuant(Section):
    """The quantizer specs of single layers; a side left out has the spec of all layers."""

    weights: Annotated[QuantSpec, _SpecText("quant.overrides", "weights")] | None = Field(
        None, description="quantizer spec of the weight"
    )
    activations: Annotated[QuantSpec, _SpecText("quant.overrides", "activations")] | None = Field(
        None, description="quantizer spec of the layer's input"
    )


class QuantConfig(Section):
    """How the linear layers of the blocks are quantized; embedding, norms and head stay in full precision."""

    weights: Annotated[QuantSpec, _SpecText("quant.weights", "weights")] = Field(
        IDENTITY, description="quantizer spec of the weights, such as int4-h128-rms-trust; bf16: none"
    )
    activations: Annotated[QuantSpec, _SpecText("quant.activations", "activations")] = Field(
        IDENTITY, description="quantizer spec of the layers' inputs"
    )
    gradients: Annotated[QuantSpec, _SpecText("quant.gradients", "gradients")] = Field(
        IDENTITY, description="quantizer spec of the gradients of the layers' outputs, in the backward pass"
    )
    overrides: dict[str, LayerQuant] = Field(
        default_factory=dict,
        description="words for single layers by pattern, such as blocks.*.down; an exact name wins over a pattern",
    )

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Full-precision gradients are left out, of JSON and run id too: runs of before there was a choice stay the same."""
        return {key: value for key, value in serialize(self).items() if (key, value) != ("gradients", "bf16")}

    @property
    def label(self) -> str:
        """Short name of the scheme that groups runs, such as `quest-w4a4`.

        Quantized gradients add their word without its estimator, always ste: `quest-w4a4+g.int8-absmax`; layers with words of
        their own a mark: `quest-w4a4+1a2b`.
        """
        base = scheme_label(self.weights, self.activations)
        if not self.gradients.is_identity:
            base += f"+g.{str(self.gradients).removesuffix('-ste')}"
        if not self.overrides:
            return base
        text = json.dumps({k: v.model_dump() for k, v in self.overrides.items()}, sort_keys=True)
        return f"{base}+{hashlib.sha256(text.encode()).hexdigest()[:4]}"


class DataConfig(Section):
    """Which text, cut how. Every bit-width sees the same tokens in the same order."""

    source: str = Field(
        "pystdlib",
        min_length=1,
        description="pystdlib | pysite:[NAME,…] | file:PATH[:FIELD] | hf:NAME | bin:PATH | synthetic:markov",
    )
    tokenizer: str = Field("byte", min_length=1, description="byte | bpe:V | hf:NAME_OR_DIR")
    seq_len: Positive = Field(128, description="tokens per sequence")
    val_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents held out for validation")


class OptimConfig(Section):
    """AdamW and its learning-rate schedule (defaults: arXiv 2502.05003, whose schedule is torch's OneCycleLR)."""

    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; norms are not decayed")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup_frac: Fraction = Field(0.1, description="share of the steps that warm up")
    start_factor: Fraction = Field(0.01, description="first learning rate as a share of the peak")
    final_factor: Fraction = Field(0.1, description="last learning rate as a share of the peak")
    decay_frac: Fraction = Field(0.2, description="share of the steps that cool down (wsd)")
    warmup_steps: Annotated[float, Field(ge=0, description="steps that warm up; 0: by optim.warmup_frac"), Later] = 0.0
    decay_steps: Annotated[int, Field(ge=0, description="steps that cool down (wsd); 0: by optim.decay_frac"), Later] = 0

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        fractions = (0 if self.warmup_steps else self.warmup_frac) + (0 if self.decay_steps else self.decay_frac)
        if self.schedule == "wsd" and fractions > 1:
            raise ValueError(
                f"optim.decay_frac: warm-up {self.warmup_frac:g} and cool-down {self.decay_frac:g} together exceed the run."
            )
        return self

    def warmup_of(self, steps: int) -> float:
        """Length of the warm-up of a run of `steps`, in steps; need not be whole."""
        return self.warmup_steps or self.warmup_frac * steps

    def cooldown_of(self, steps: int) -> float:
        """Length of the cool-down (wsd) of a run of `steps`, in steps; need not be whole."""
        return self.decay_steps or self.decay_frac * steps


class TrainConfig(Section):
    """How long, how much at once, and how it is executed."""

    steps: Positive = Field(522, description="optimizer steps (or give train.tokens or train.tokens_per_param)")
    batch_size: Positive = Field(16, description="sequences per optimizer step")
    seed: int = Field(0, ge=0, lt=2**32, description="of the initial weights and of the data order")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast of the matrix products; weights stay fp32")
    eval_tokens: Positive = Field(131_072, description="validation tokens behind each reported loss")
    micro_batch: Annotated[int, Field(ge=0, description="sequences per backward pass; 0: all at once"), Execution] = 0
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto | cpu | cuda | cuda:N"), Execution, Attempt
    ] = "auto"
    parallel: Annotated[
        Literal["ddp", "fsdp"], Field(description="processes: ddp: each a whole model; fsdp: sharded"), Execution, Attempt
    ] = "ddp"
    threads: Annotated[int, Field(ge=0, description="CPU threads; 0: all cores, or what the run began with"), Execution] = 0
    compile: Annotated[Literal["auto", "on", "off"], Field(description="torch.compile; auto: on a GPU"), Execution] = "auto"
    kernels: Annotated[
        Literal["auto", "fused", "reference"],
        Field(description="quantized products: by fused integer kernels, or by the formula; auto: fused on a GPU"),
        Execution,
    ] = "auto"
    log_every: Annotated[Positive, Field(description="steps between metric lines"), Execution] = 10
    eval_every: Annotated[int, Field(ge=0, description="steps between validations; 0: at the end only"), Execution] = 0
    checkpoint_every: Annotated[int, Field(ge=0, description="steps between checkpoints; 0: four in a run"), Execution] = 0
    keep_steps: Annotated[
        str,
        Field(pattern=r"^([1-9]\d*(,[1-9]\d*)*)?$", description="steps whose checkpoints stay for branches, such as '300,600'"),
        Execution,
        Attempt,
    ] = ""
    health_every: Annotated[int, Field(ge=0, description="steps between looks at the masks; 0: twenty in a run"), Execution] = 0
    diverged_loss: Annotated[
        float, Field(ge=0, description="give up above this training loss (nats/token); 0: never"), Execution, Attempt
    ] = 0.0
    diverged_grad_norm: Annotated[
        float, Field(ge=0, description="give up above this gradient norm; 0: never"), Execution, Attempt
    ] = 0.0
    diverged_steps: Annotated[Positive, Field(description="how many steps in a row it must be above"), Execution, Attempt] = 10

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> Self:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"train.micro_batch: {self.micro_batch} does not divide train.batch_size {self.batch_size}.")
        return self


class PTQConfig(Section):
    """How a full-precision run was quantized after its training; written by `questctl quantize`, by no file or flag."""

    source: str = Field(min_length=1, description="run id of the full-precision run")
    method: Literal["rtn", "gptq"] = Field("rtn", description="rtn: round to nearest; gptq: with error compensation")
    calibration_tokens: int = Field(0, ge=0, description="training tokens that the inputs of the layers were taken from")
    damping: float = Field(0.0, ge=0, description="share of its mean diagonal added to the Hessian's diagonal (gptq)")


class BranchConfig(Section):
    """Where a run left another one (training/branch.py); written by `--branch-from` and sweep files, by no file or key."""

    source: str = Field(min_length=1, description="run id of the trunk")
    step: Positive = Field(description="steps that the trunk took")


class RunConfig(Section):
    """Everything that defines one run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    quant: QuantConfig = Field(default_factory=QuantConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    branch: BranchConfig | None = None  # absent from JSON and run id where there is none
    ptq: PTQConfig | None = None  # likewise

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: section for name, section in serialize(self).items() if section is not None}

    @model_validator(mode="after")
    def _rotations_divide(self) -> Self:
        for side in ("weights", "activations", "gradients"):
            block = getattr(self.quant, side).rotation
            for key, width in (("d_model", self.model.d_model), ("d_ff", self.model.d_ff)):
                if block and width % block:
                    raise ValueError(
                        f"quant.{side}: rotation block {block} does not divide model.{key} {width}; "
                        f"choose a block that does, such as quant.block={_largest_power_of_two(width)}."
                    )
        return self

    @property
    def scheme(self) -> str:
        """Short name that groups runs: `quest-w4a4`; quantized after training `ptq-gptq-w4a4`, without rotation `…-norot`.

        Methods that differ in their gradients alone are one scheme after training: their estimator is `ste` there.
        """
        label = self.quant.label
        if self.ptq is None:
            return label
        if label.startswith("ste-"):
            label = label.removeprefix("ste-") + "-norot"
        return f"ptq-{self.ptq.method}-{label.removeprefix('quarot-')}"

    @property
    def tokens(self) -> int:
        """Training tokens D of the whole run."""
        return self.train.steps * self.train.batch_size * self.data.seq_len

    @property
    def new_tokens(self) -> int:
        """Training tokens of this run's own steps: without those of the trunk that it left."""
        return self.tokens - (self.branch.step if self.branch else 0) * self.train.batch_size * self.data.seq_len

    @property
    def warmup_steps(self) -> float:
        """Length of the warm-up in steps; need not be whole."""
        return self.optim.warmup_of(self.train.steps)

    @property
    def cooldown_steps(self) -> float:
        """Length of the cool-down of the schedule wsd in steps; need not be whole."""
        return self.optim.cooldown_of(self.train.steps)

    def with_vocabulary(self, of_data: int | None) -> RunConfig:
        """This config with the vocabulary of its data filled in where `model.vocab_size` leaves it to them.

        `of_data` is their number of token ids, None where it is not known yet. What comes back is for building and costing a
        model: its run id is that of another experiment.
        """
        size = self.model.vocab_size or of_data or 0
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": size})})

    @property
    def remaining_quant(self) -> QuantConfig:
        """The specs that the stored weights of the run still need.

        They are all of them after training, since a run stores full-precision weights. A run that was quantized after training
        stores rounded weights: only its inputs are still to be quantized.
        """
        if self.ptq is None:
            return self.quant
        overrides = {pattern: layer.model_copy(update={"weights": None}) for pattern, layer in self.quant.overrides.items()}
        return self.quant.model_copy(update={"weights": IDENTITY, "overrides": overrides})

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that change the result, as plain JSON values."""
        return {"schema": SCHEMA_VERSION, **_without_execution(self)}

    @property
    def run_id(self) -> str:
        """Readable prefix and 8 hex digits of the hash of `identity`; the name of the run's folder."""
        n = self.model.params_non_embedding
        canonical = json.dumps(self.identity, sort_keys=True, separators=(",", ":"))
        digits = hashlib.sha256(canonical.encode()).hexdigest()[:8]
        return f"{human_count(n)}-{self.scheme}-{self.tokens / n:.3g}x-s{self.train.seed}-{digits}"

    def to_json(self) -> dict[str, Any]:
        """The whole tree with its schema version, as `config.json` holds it."""
        return {"schema": SCHEMA_VERSION, **self.model_dump(mode="json")}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, where: str = "config") -> RunConfig:
        """Read back `to_json`. Raises UsageError naming `where` and the key if the values are not a config of this schema."""
        if not isinstance(values, Mapping) or values.get("schema") != SCHEMA_VERSION:
            found = values.get("schema") if isinstance(values, Mapping) else type(values).__name__
            raise UsageError(f"{where}: schema {found!r} is not the schema {SCHEMA_VERSION} that this version reads.")
        return _validated({k: v for k, v in values.items() if k != "schema"}, where=f"{where}: ")


# --- where values come from -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One source of values, flat: `{"train.seed": 1, "quant.overrides.blocks.*.down.weights": …}` under tuple keys."""

    origin: str
    values: Mapping[tuple[str, ...], Any]

    @property
    def place(self) -> str:
        """What the user wrote it into: --set and all flags are one command line."""
        return "command line" if self.origin.startswith("--") else self.origin

    def said(self, key: tuple[str, ...]) -> str:
        """One of its keys as the user wrote it."""
        name = ".".join(key)
        return f"--set {name}" if self.origin == "--set" else self.origin if self.place != self.origin else name


@dataclass(frozen=True)
class Resolved:
    """A config, and for each dotted key where its value came from."""

    config: RunConfig
    origins: Mapping[str, str] = field(default_factory=dict)


SHORTHAND: dict[tuple[str, ...], str] = {
    ("preset",): "a model size and its recipe (questctl config presets)",
    ("quant", "method"): "a named method: quest, ste, lsq, bf16, …",
    ("quant", "bits"): "bits of the method, for weights and activations",
    ("quant", "block"): "rotation block of the method, a power of two",
    ("quant", "weight_only"): "true: activations stay in full precision",
    ("train", "tokens"): "training tokens, rounded to whole steps",
    ("train", "tokens_per_param"): "training tokens per non-embedding parameter, rounded to whole steps",
    ("model", "ffn_multiple_of"): "what d_ff is rounded up to",
}
_METHOD_KEYS = [("quant", k) for k in ("method", "bits", "weight_only", "block")]
_LENGTH_KEYS = [("train", k) for k in ("steps", "tokens", "tokens_per_param")]
_RESERVED_ENVIRONMENT = {"QUESTCTL_CACHE", "QUESTCTL_RUNS", "QUESTCTL_TEST_DATA", "QUESTCTL_TRACK"}


@cache
def known_keys() -> dict[tuple[str, ...], str]:
    """Every key of the tree and every shorthand, with its one-line description."""
    tree: dict[tuple[str, ...], str] = {
        (name, key): info.description or ""
        for name, section in RunConfig.model_fields.items()
        if isinstance(section.annotation, type)  # PTQConfig | None is none: it is not the user's to set
        for key, info in section.annotation.model_fields.items()
    }
    return {**tree, **SHORTHAND}


def file_layer(path: Path) -> Layer:
    """Read a TOML file. Raises UsageError naming the file (missing, unreadable, not TOML, unknown key)."""
    return Layer(f"file {path.name}", flatten(read_toml(path), where=str(path)))


def read_toml(path: Path) -> dict[str, Any]:
    """TOML file → dict. Raises UsageError with the file's name and the line of the mistake."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"{path}: cannot be read: {e.strerror}.") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: is not TOML: {e}.") from e


def env_layer(environ: Mapping[str, str] | None = None) -> Layer:
    """`QUESTCTL_TRAIN__SEED=1` → `train.seed = 1`: two underscores stand for the dot."""
    values: dict[tuple[str, ...], Any] = {}
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if name.startswith("QUESTCTL_") and name not in _RESERVED_ENVIRONMENT:
            key = tuple(name.removeprefix("QUESTCTL_").lower().split("__"))
            if key not in known_keys():
                raise UsageError(_unknown_variable(name))
            values[key] = parse_value(text)
    return Layer("environment", values)


def _unknown_variable(name: str) -> str:
    """One sentence with the variables of the nearest keys, and how their names are made."""
    names = [f"QUESTCTL_{'__'.join(key).upper()}" for key in known_keys()] + sorted(_RESERVED_ENVIRONMENT)
    plain = {re.sub("_+", "_", known): known for known in names}  # the commonest mistake is a single underscore
    word = re.sub("_+", "_", name)
    near = [plain[w] for w in ([word] if word in plain else difflib.get_close_matches(word, plain, n=NEAR))]
    hint = f"did you mean {' or '.join(near)}? Two" if near else "two"
    return f"{name}: names no key; {hint} underscores stand for the dot of a key, as in QUESTCTL_TRAIN__STEPS for train.steps."


def set_layer(assignments: Sequence[str]) -> Layer:
    """`--set a.b=v` items; keys as in TOML, so that a part with dots is quoted: quant.overrides."blocks.*.down".weights=…"""
    values: dict[tuple[str, ...], Any] = {}
    for item in assignments:
        left, equals, right = item.partition("=")
        if not equals:
            raise UsageError(f"--set {item}: is not of the form key=value.")
        try:
            nested: Any = tomllib.loads(f"{left.strip()} = 0")
        except tomllib.TOMLDecodeError as e:
            raise UsageError(
                f"--set {item}: '{left.strip()}' is not a dotted key; put parts with a * or a dot in quotes."
            ) from e
        path: list[str] = []
        while isinstance(nested, dict):
            ((part, nested),) = nested.items()
            path.append(part)
        values |= flatten(_nest({tuple(path): parse_value(right.strip())}), where="--set")
    return Layer("--set", values)


def parse_value(text: str) -> Any:
    """A TOML value where the text is one (1, 3e-4, true, "x", [1, 2]), else the text itself."""
    try:
        return tomllib.loads(f"v = {text}")["v"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text


def flatten(tree: Mapping[str, Any], *, where: str) -> dict[tuple[str, ...], Any]:
    """Nested dict → `{key path: value}`; raises UsageError for a key that is not known, naming `where`."""

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        inside = path[:2] == ("quant", "overrides")
        if isinstance(node, Mapping) and (len(path) == 0 or path in {k[:1] for k in known_keys() if len(k) > 1} or inside):
            for key, value in node.items():
                yield from walk(value, (*path, str(key)))
            return
        if inside and len(path) == 4 and path[3] not in LayerQuant.model_fields:
            raise UsageError(unknown(f"{where}: {'.'.join(path)}", path[3], LayerQuant.model_fields, what="key"))
        if inside and len(path) != 4:
            raise UsageError(f'{where}: quant.overrides: takes "PATTERN".weights=WORD or "PATTERN".activations=WORD.')
        if path not in known_keys() and not inside:
            raise UsageError(unknown(where, ".".join(path), map(".".join, known_keys()), what="key"))
        yield path, node

    return dict(walk(tree, ()))


def resolve(layers: Sequence[Layer], presets: Mapping[str, Mapping[str, Any]] = PRESETS) -> Resolved:
    """Merge the layers (later wins), expand the shorthands, validate once.

    `presets` maps a name to its nested values; by default the table of presets.py. Raises UsageError for unknown presets,
    methods, words, values out of range, and for two lengths given in one file or on one command line.
    """
    ranked: dict[tuple[str, ...], tuple[int, str, Any]] = {}  # key → (rank of its layer, origin, value)
    chosen = [(layer.origin, layer.values[("preset",)]) for layer in layers if ("preset",) in layer.values]
    if chosen:
        name = chosen[-1][1]
        if not isinstance(name, str) or name not in presets:
            raise UsageError(unknown("preset", name, presets, what="preset"))
        layers = [Layer(f"preset {name}", flatten(presets[name], where=f"preset {name}")), *layers]
    places = [layer.place for layer in layers]
    for layer in layers:
        rank = places.index(layer.place)
        beside = [other for other in layers if other.place == layer.place]
        lengths = {key: other.said(key) for other in beside for key in _LENGTH_KEYS if key in other.values}
        if len(lengths) > 1:
            raise UsageError(f"{layer.place}: {' and '.join(lengths.values())} both say how long to train; give one.")
        for key, value in layer.values.items():
            ranked[key] = (rank, layer.origin, value)
    ranked.pop(("preset",), None)
    _expand_ffn(ranked)
    if "command line" in places:
        _refuse_idle_bits(ranked, places.index("command line"))
    _expand_method(ranked)
    length = max((k for k in _LENGTH_KEYS if k in ranked), key=lambda k: ranked[k][0], default=None)
    rank, origin, amount = ranked[length] if length else (0, "", 0)
    for key in _LENGTH_KEYS:
        ranked.pop(key, None)
    config = _validated(_nest({k: v for k, (_, _, v) in ranked.items()}))
    origins = {".".join(k): o for k, (_, o, _) in ranked.items()}
    if length:
        steps, note = _steps(config, length[1], amount)
        train = {k: v for k, v in config.train.model_dump().items() if k != "steps"}
        config = _validated({**config.model_dump(), "train": {**train, "steps": steps}})
        origins["train.steps"] = origin + note
    _check_steps(config)
    return Resolved(config, {k: origins.get(k, "default") for k, _ in flat_items(config)})


def flat_items(config: RunConfig) -> list[tuple[str, Any]]:
    """`[("model.n_layer", 1), …]` in the order of the tree; overrides appear as `quant.overrides.PATTERN.weights`.

    Defaults that JSON leaves out are there too.
    """
    items: list[tuple[str, Any]] = []
    for section, values in config.model_dump(mode="json").items():
        fields = type(getattr(config, section)).model_fields
        for key, value in ((key, values[key] if key in values else _as_json(about.default)) for key, about in fields.items()):
            if (section, key) == ("quant", "overrides"):
                words = ((p, s, w) for p, layer in value.items() for s, w in layer.items() if w is not None)
                items += [(f"quant.overrides.{p}.{s}", w) for p, s, w in words]
            else:
                items.append((f"{section}.{key}", value))
    return items


def _as_json(default: Any) -> Any:
    """The default of a field as JSON holds it."""
    return str(default) if isinstance(default, QuantSpec) else default


def _expand_ffn(ranked: dict[tuple[str, ...], tuple[int, str, Any]]) -> None:
    """d_ff = 8/3 d_model rounded up, unless d_ff itself is given with d_model or after it."""
    multiple = ranked.pop(("model", "ffn_multiple_of"), None)
    width = ranked.get(("model", "d_model"))
    given = ranked.get(("model", "d_ff"))
    newest = max((x for x in (multiple, width) if x), key=lambda x: x[0], default=None)
    if newest is None or (given and given[0] >= newest[0]):
        return
    d_model = width[2] if width else ModelConfig.model_fields["d_model"].default
    step = multiple[2] if multiple else 256
    for key, value in (("model.d_model", d_model), ("model.ffn_multiple_of", step)):
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UsageError(f"{key}: {value!r} is not a positive whole number.")
    d_ff = -(-8 * d_model // (3 * step)) * step
    ranked[("model", "d_ff")] = (newest[0], f"{newest[1]} (8/3 d_model, multiple of {step})", d_ff)


def _refuse_idle_bits(ranked: Mapping[tuple[str, ...], tuple[int, str, Any]], rank: int) -> None:
    """Raises UsageError where the layer of this rank names both no quantization and bits, of which one is a mistake.

    In config files and sweep files, bits may stand beside bf16: they are for the other methods that come over it.
    """
    method, bits = (ranked.get(("quant", k)) for k in ("method", "bits"))
    if method and bits and method[0] == bits[0] == rank and method[2] == "bf16" and str(bits[2]) != "16":
        raise UsageError(f"quant.bits: {bits[2]} of bf16, which quantizes nothing; leave one of the two out.")


def _expand_method(ranked: dict[tuple[str, ...], tuple[int, str, Any]]) -> None:
    """method + bits + block → the two words, unless a word is given in the same place or a later one."""
    found = {k[1]: ranked.pop(k) for k in _METHOD_KEYS if k in ranked}
    if not found.keys() & {"method", "bits", "weight_only"}:
        return  # a preset's block alone asks for nothing
    if "method" not in found and "bits" not in found:
        raise UsageError("quant.weight_only: needs quant.method and quant.bits.")
    method = found["method"][2] if "method" in found else "quest"
    bits = found["bits"][2] if "bits" in found else None
    weight_only = found["weight_only"][2] if "weight_only" in found else False
    if not isinstance(weight_only, bool):
        raise UsageError(f"quant.weight_only: {weight_only!r} is neither true nor false.")
    words = method_words(method, bits, block=found["block"][2] if "block" in found else 128, weight_only=weight_only)
    rank = max(found[k][0] for k in found if k != "block")
    said = ", ".join(f"{k}={found[k][2]} ({found[k][1]})" for k in found)
    for side, word in zip(("weights", "activations"), words, strict=True):
        if ("quant", side) not in ranked or ranked[("quant", side)][0] < rank:
            ranked[("quant", side)] = (rank, said, word)


def _steps(config: RunConfig, unit: str, amount: Any) -> tuple[int, str]:
    """Optimizer steps for a length given in steps, tokens or tokens per parameter, and a note for its origin."""
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    if not number or not 0 < amount < float("inf") or (unit == "steps" and amount != int(amount)):
        raise UsageError(f"train.{unit}: {amount!r} is not a positive {'whole number' if unit == 'steps' else 'number'}.")
    if unit == "steps":
        return int(amount), ""
    tokens = amount * (config.model.params_non_embedding if unit == "tokens_per_param" else 1)
    return max(1, round(tokens / (config.train.batch_size * config.data.seq_len))), f" ({unit}={amount:g})"


def _check_steps(config: RunConfig) -> None:
    """Raises UsageError for phases or kept checkpoints beyond the end of the run."""
    steps, warm, cool = config.train.steps, config.warmup_steps, config.cooldown_steps
    if config.optim.schedule == "wsd" and warm + cool > steps * (1 + 1e-9):
        raise UsageError(f"optim: a warm-up of {warm:g} steps and a cool-down of {cool:g} exceed the run's {steps}.")
    last = max(map(int, filter(None, config.train.keep_steps.split(","))), default=0)
    if last > steps:
        raise UsageError(f"train.keep_steps: step {last} is beyond the end of the run, {steps}.")


def _nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def _validated(tree: Mapping[str, Any], where: str = "") -> RunConfig:
    """Build the tree; pydantic's report becomes one sentence with key, value and constraint."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        path = [str(p) for p in first["loc"]]
        key = ".".join(path)
        if first["type"] == "extra_forbidden":
            raise UsageError(where + unknown("config", key, map(".".join, known_keys()), what="key")) from e
        if first["type"] == "value_error":
            raise UsageError(where + str(first["ctx"]["error"])) from e  # our own sentence
        raise UsageError(where + broken(key, first)) from e


_SAID = {  # what pydantic calls a mistake → the sentence that a user can act on; others are clear as they are
    "string_pattern_mismatch": "takes {description}",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "finite_number": "must be finite",
    "greater_than": "must be greater than {gt}",
    "less_than": "must be less than {lt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than_equal": "must be {le} or less",
}


def broken(key: str, error: ErrorDetails) -> str:
    """One sentence for a value out of range under `key`, from pydantic's report of it."""
    kind = error["type"]
    context = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in error.get("ctx", {}).items()}
    if kind == "literal_error":
        return unknown(key, error["input"], re.findall(r"'([^']*)'", str(context["expected"])))
    if kind in ("missing", "extra_forbidden"):
        return f"{key}: {'is missing' if kind == 'missing' else 'is not a key that is known here'}."
    about = known_keys().get(tuple(map(str, error["loc"])), "")
    own = _SAID[kind].format(**context, description=about) if kind in _SAID else error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {error['input']!r}: {own}."


def execution_keys() -> set[str]:
    """Dotted keys of the fields that say how a run is executed; they stay out of the run id."""
    return _marked(Execution)


def attempt_keys() -> set[str]:
    """Those of `execution_keys` that every attempt of a run chooses anew; of the others a run keeps what it began with."""
    return _marked(Attempt)


def _marked(mark: object) -> set[str]:
    """Dotted keys of the fields with this mark."""
    return {
        f"{name}.{key}"
        for name, section in RunConfig.model_fields.items()
        if isinstance(section.annotation, type)
        for key, info in section.annotation.model_fields.items()
        if mark in info.metadata
    }


def _without_execution(config: RunConfig) -> dict[str, Any]:
    return {
        name: {k: v for k, v in values.items() if _counts(type(getattr(config, name)).model_fields[k], v)}
        for name, values in config.model_dump(mode="json").items()
    }


def _counts(info: FieldInfo, value: Any) -> bool:
    """Is a field with this value part of the run id?"""
    return Execution not in info.metadata and not (Later in info.metadata and value == info.default)


def _largest_power_of_two(width: int) -> int:
    return min(width & -width, 128)
