"""The sections of a config (model, quant, data, optim, train) and the whole of them: a frozen tree that defines one run."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError, core_schema

from ..errors import UsageError, unknown
from ..quant.methods import rows_label, scheme_label
from ..quant.spec import IDENTITY, OPERANDS, ROWS, QuantSpec
from . import schedule
from .amounts import human_count
from .averages import FORMS as AVERAGES
from .averages import checked_average
from .identity import (
    SCHEMA_VERSION,
    Attempt,
    Execution,
    Later,
    OfLearnedScales,
    Place,
    Unwritten,
    identity_digits,
    identity_of,
    marked_keys,
    named,
    stored_of,
    values_before,
)
from .knots import format_knots, parse_knots
from .rope import SCALING_FORMS, checked_scaling
from .validation import validated

CHECKPOINTS = 4  # of a run, if train.checkpoint_every is not set
LOGITS_AT_ONCE = 2**24  # numbers, 64 MiB in fp32; a loss in such parts takes as long as the plain one (benchmarks/memory.py)
TIED_HEAD = "quant.head: with model.tied the head is the embedding; set quant.embedding, which is for both."
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """The base of all sections: frozen; unknown keys are refused, and values are not converted between types."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `Unwritten` fields that have their default."""
        fields = type(self).model_fields
        return {k: v for k, v in serialize(self).items() if not (Unwritten in fields[k].metadata and v == fields[k].default)}


class ModelConfig(Section):
    """The shape of a Llama: RMSNorm, rotary positions, SwiGLU, no bias, untied head (arXiv 2302.13971, 2502.05003).

    The keys from `n_kv_head` on are for Llama 3, Mistral, Qwen2 and Qwen3. At their defaults they stay out of config.json and
    run id.
    """

    n_layer: Positive = Field(1, description="transformer blocks")
    d_model: Positive = Field(64, description="width of the residual stream")
    n_head: Positive = Field(2, description="attention heads; d_model / n_head, the width of one, is even")
    d_ff: Positive = Field(192, description="SwiGLU hidden width; if left out, 8/3 d_model rounded up to model.ffn_multiple_of")
    vocab_size: int = Field(0, ge=0, description="number of token ids; 0: that of the data")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in RMSNorm")
    init_std: float = Field(
        0.02, gt=0, description="standard deviation of initial weights; residual projections: init_std / sqrt(2 n_layer)"
    )
    n_kv_head: Annotated[
        int, Field(ge=0, description="heads of keys and values, each shared by n_head / n_kv_head; 0: n_head"), Later, Unwritten
    ] = 0
    head_width: Annotated[
        int, Field(ge=0, multiple_of=2, description="width of an attention head; 0: d_model / n_head"), Later, Unwritten
    ] = 0
    tied: Annotated[bool, Field(description="whether the head multiplies by the embedding's weights"), Later, Unwritten] = False
    base_width: Annotated[
        int,
        Field(
            ge=0, description="d_model for which optim.lr and init_std were chosen, from which they are transferred; 0: none"
        ),
        Later,
        Unwritten,
    ] = 0
    bias: Annotated[
        Literal["none", "qkv", "qkvo"], Field(description="which layers of the attention add a bias"), Later, Unwritten
    ] = "none"
    qk_norm: Annotated[bool, Field(description="whether each head of q and k passes an RMSNorm"), Later, Unwritten] = False
    rope_scaling: Annotated[
        str,
        BeforeValidator(checked_scaling),
        Field(description=f"stretched rotary positions: {' | '.join(SCALING_FORMS)}; empty: none"),
        Later,
        Unwritten,
    ] = ""
    window: Annotated[
        int, Field(ge=0, description="newest tokens that a token attends to, itself included; 0: all"), Later, Unwritten
    ] = 0

    family: Annotated[
        Literal["llama", "mistral", "qwen2", "qwen3"],
        Field(description="the architecture under whose name exports write the model"),
        Later,
        Unwritten,
    ] = "llama"
    init: Annotated[
        str,
        Field(description="checkpoint that the weights begin with: RUN_FOLDER | HF_FOLDER | FILE.gguf | hf:NAME; empty: drawn"),
        Place,
        Later,
        Unwritten,
    ] = ""
    init_sha256: Annotated[
        str,
        Field(pattern=r"^([0-9a-f]{64})?$", description="SHA-256 of the weights of model.init, which is filled in"),
        Later,
        Unwritten,
    ] = ""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if not self.head_width and self.d_model % (2 * self.n_head):
            raise ValueError(f"model.n_head: {self.n_head} heads do not divide d_model {self.d_model} into even widths.")
        if self.n_head % self.kv_heads:
            raise ValueError(f"model.n_kv_head: {self.n_kv_head} does not divide model.n_head {self.n_head}.")
        if self.base_width and self.tied:
            raise ValueError(
                "model.base_width: with model.tied the head is the embedding, to which the rule gives another learning rate; "
                "leave one of them out."
            )
        return self

    @property
    def narrower(self) -> float:
        """model.base_width / d_model: the share by which this model is narrower than the one whose rates it takes; else 1."""
        return self.base_width / self.d_model if self.base_width else 1.0

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def width_of_head(self) -> int:
        """W, the width of one attention head."""
        return self.head_width or self.d_model // self.n_head

    @property
    def block_shapes(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block by name, each with the shape (N, K) of its weight: outputs, inputs."""
        d, f, w = self.d_model, self.d_ff, self.width_of_head
        q, kv = self.n_head * w, self.kv_heads * w
        return {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q), "gate": (f, d), "up": (f, d), "down": (d, f)}

    @property
    def biased(self) -> tuple[str, ...]:
        """The linear layers of a block that add a bias."""
        return {"none": (), "qkv": ("q", "k", "v"), "qkvo": ("q", "k", "v", "o")}[self.bias]

    @property
    def linear_weights(self) -> int:
        """Weights in the linear layers of all blocks: those that can be quantized."""
        return self.n_layer * sum(n * k for n, k in self.block_shapes.values())

    @property
    def params_non_embedding(self) -> int:
        """Parameters without embedding and head, norms included: the N of scaling laws.

        `models.llama.count_parameters` counts the same from the modules and asserts that both agree.
        """
        biases = sum(self.block_shapes[name][0] for name in self.biased)
        of_heads = 2 * self.width_of_head if self.qk_norm else 0
        # two norms a block, and the last one
        return self.linear_weights + (2 * self.n_layer + 1) * self.d_model + self.n_layer * (biases + of_heads)

    def module_sizes(self, vocab_size: int) -> dict[str, int]:
        """The number of parameters of each module that has its own, by names such as `blocks.0.down`."""
        d, heads = self.d_model, self.width_of_head
        norms = {"attention_norm": d, "ffn_norm": d, **({"q_norm": heads, "k_norm": heads} if self.qk_norm else {})}
        linear = {name: n * k + n * (name in self.biased) for name, (n, k) in self.block_shapes.items()}
        blocks = {f"blocks.{i}.{name}": n for i in range(self.n_layer) for name, n in {**linear, **norms}.items()}
        return {"embed": vocab_size * d, **blocks, "norm": d, **({} if self.tied else {"head": vocab_size * d})}

    def params_embedding(self, vocab_size: int) -> int:
        """Parameters of embedding and head for a vocabulary: tied ones count once."""
        return (1 if self.tied else 2) * vocab_size * self.d_model

    def forward_flops(self, seq_len: int, vocab_size: int) -> int:
        """Operations of the matrix products of a forward pass per token; `models.llama.count_flops` counts the same."""
        weights = self.linear_weights + vocab_size * self.d_model
        return 2 * weights + 4 * seq_len * self.n_head * self.width_of_head * self.n_layer

    def width_of_row(self, key: str) -> int:
        """The width of the rows that `quant.embedding`, `quant.head` or `quant.kv` quantizes."""
        return self.width_of_head if key == "kv" else self.d_model

    @staticmethod
    def loss_rows(vocab_size: int) -> int:
        """Tokens whose logits the loss holds at a time (models/loss.py): at most `LOGITS_AT_ONCE` logits."""
        return max(1, LOGITS_AT_ONCE // vocab_size)

    @property
    def rotation_block(self) -> int:
        """The largest Hadamard block up to 128 that divides the inputs of all layers; 1 if one of their widths is odd."""
        return min(_largest_power_of_two(width) for _, width in self.block_shapes.values())


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


_LaterSpec = Annotated[QuantSpec, Later, Unwritten]


class QuantConfig(Section):
    """How the linear layers of the blocks are quantized and, if asked for, embedding, head and cache. Norms never are."""

    weights: Annotated[QuantSpec, _SpecText("quant.weights", "weights")] = Field(
        IDENTITY, description="quantizer spec of the weights, such as int4-h128-rms-trust; bf16: none"
    )
    activations: Annotated[QuantSpec, _SpecText("quant.activations", "activations")] = Field(
        IDENTITY, description="quantizer spec of the layers' inputs"
    )
    gradients: Annotated[QuantSpec, _SpecText("quant.gradients", "gradients")] = Field(
        IDENTITY, description="quantizer spec of the gradients of the layers' outputs, in the backward pass"
    )
    backward: Annotated[
        Literal["once", "both"],
        Field(
            description="quant.gradients rounds once: the gradient, or both: the operands of each product of the backward pass"
        ),
        Later,
        Unwritten,
    ] = "once"
    overrides: dict[str, LayerQuant] = Field(
        default_factory=dict,
        description="specs for single layers by pattern, such as blocks.*.down; an exact name wins over a pattern",
    )

    start: Annotated[
        schedule.Place,
        BeforeValidator(lambda value: schedule.parse_place(value, key="quant.start")),
        Field(description="where quantization begins: a share of the run below 1, a step, or cooldown (wsd); 0: at once"),
        Later,
        Unwritten,
    ] = 0.0
    stages: Annotated[
        str,
        BeforeValidator(lambda value: ", ".join(map(str, schedule.parse_stages(value))) if isinstance(value, str) else value),
        Field(description="quantizers before quant.start, such as '0.25:quest-w8a8, 0.5:quest-w4a4' (config/schedule.py)"),
        Later,
        Unwritten,
    ] = ""
    embedding: Annotated[_LaterSpec, _SpecText("quant.embedding", "embedding")] = Field(
        IDENTITY, description="quantizer spec of the embedding, a token's vector at a time; with model.tied of the head, too"
    )
    head: Annotated[_LaterSpec, _SpecText("quant.head", "head")] = Field(
        IDENTITY, description="quantizer spec of the head's weight, a token's vector at a time; its inputs stay as they are"
    )
    kv: Annotated[_LaterSpec, _SpecText("quant.kv", "kv")] = Field(
        IDENTITY, description="quantizer spec of keys (after the rotary embedding) and values, the vector of a head at a time"
    )

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out full precision of gradients and the default schedule: run ids from before these fields must stay."""
        absent = [("gradients", "bf16"), ("backward", "once"), ("start", 0.0), ("stages", "")]
        absent += [(key, "bf16") for key in ROWS]
        return {key: value for key, value in serialize(self).items() if (key, value) not in absent}

    @model_validator(mode="after")
    def _backward_has_gradients(self) -> Self:
        if self.backward == "both" and self.gradients.is_identity:
            raise ValueError("quant.backward: both needs quant.gradients, such as fp4.sr-ue4m3.g16-ste.")
        return self

    @property
    def at_once(self) -> QuantConfig:
        """The same quantizers from the first step on."""
        return self.model_copy(update={"start": 0.0, "stages": ""})

    @property
    def by_row(self) -> dict[str, QuantSpec]:
        """The specs of embedding, head and cache by their keys, without those in full precision."""
        return {key: spec for key in ROWS if not (spec := getattr(self, key)).is_identity}

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized at all."""
        sides = [self.weights, self.activations, self.gradients, *self.by_row.values()]
        sides += [spec for layer in self.overrides.values() for spec in (layer.weights, layer.activations) if spec]
        return not all(spec.is_identity for spec in sides)

    @property
    def label(self) -> str:
        """Short name of the scheme, which groups runs, such as `quest-w4a4`.

        Quantized gradients add their spec without the estimator, which is always ste: `quest-w4a4+g.int8-absmax`. Embedding,
        head and cache (e, h, kv) add theirs, whatever the rotation's block: `quest-w4a4+eh.int4-h-rms-trust+kv.int8-rms-ste`.
        Overrides add four hex digits of their hash: `quest-w4a4+1a2b`.
        """
        base = scheme_label(self.weights, self.activations)
        if not self.gradients.is_identity:
            base += f"+g.{str(self.gradients).removesuffix('-ste')}" + "-both" * (self.backward == "both")
        base += rows_label(self.by_row)
        if not self.overrides:
            return base
        text = json.dumps({k: v.model_dump() for k, v in self.overrides.items()}, sort_keys=True)
        return f"{base}+{hashlib.sha256(text.encode()).hexdigest()[:4]}"


class DataConfig(Section):
    """The text and how it is tokenized and cut. Runs of every bit-width read the same tokens in the same order."""

    source: str = Field(
        "pystdlib",
        min_length=1,
        description="pystdlib[:clean] | pysite:[NAME,…] | file:PATH[:FIELD] | chat:PATH | hf:NAME | bin:PATH | "
        "synthetic:markov",
    )
    tokenizer: str = Field("byte", min_length=1, description="byte | bpe:V | bpe.llama3:V | hf:NAME_OR_DIR | gguf:FILE")
    seq_len: Positive = Field(128, description="tokens per sequence")
    val_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents held out for validation")
    dedup: Annotated[
        Literal["auto", "exact", "near"],
        Field(
            description="kept out of validation text: copies of documents (exact), also of passages (near); auto: near, but "
            "exact for pystdlib and for text prepared before"
        ),
        Later,
        Unwritten,
    ] = "auto"
    packing: Annotated[
        Literal["stream", "documents"],
        Field(
            description="stream: windows of the text as one stream; documents: whole documents, none of which attends to "
            "another, as chat: always has them"
        ),
        Later,
        Unwritten,
    ] = "stream"

    @model_validator(mode="before")
    @classmethod
    def _chat_is_packed(cls, values: Any) -> Any:
        """Conversations are always packed, so the key is dropped: one experiment has one spelling."""
        if isinstance(values, Mapping) and str(values.get("source", "")).startswith("chat:"):
            if values.get("packing") == "stream":
                raise ValueError("data.packing: stream cuts conversations; chat: always has whole ones, leave it out.")
            return {key: value for key, value in values.items() if key != "packing"}
        return values


NEWTON_SCHULZ_STEPS = 5  # of Muon
SAFE_LR = 2e-3  # AdamW needs no long warm-up up to here: 107K parameters, batch 8 x 128 (table in docs/how-to/train.md)
WARMUP_PER_LR = 16_000  # above it, AdamW needs WARMUP_PER_LR times the learning rate as steps of warm-up


class OptimConfig(Section):
    """Optimizer and learning-rate schedule. Defaults are those of arXiv 2502.05003, whose schedule is torch's OneCycleLR."""

    name: Annotated[
        Literal["adamw", "muon"],
        Field(description="muon: Muon for the weights of the blocks' linear layers, AdamW for all other parameters"),
        Later,
        Unwritten,
    ] = "adamw"
    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    embedding_lr: Annotated[
        float, Field(gt=0, description="learning rate of the embedding, as a factor of optim.lr"), Later, Unwritten
    ] = 1.0
    hidden_lr: Annotated[
        float, Field(gt=0, description="learning rate of the blocks' linear layers, as a factor of optim.lr"), Later, Unwritten
    ] = 1.0
    head_lr: Annotated[
        float, Field(gt=0, description="learning rate of the head, as a factor of optim.lr"), Later, Unwritten
    ] = 1.0
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of AdamW's second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of AdamW's second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices; norms have none")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    schedule: Literal["cosine", "wsd", "constant", "knots"] = Field(
        "cosine", description="learning rate after the warm-up: cosine decay, warm-up-stable-decay, constant, or optim.knots"
    )
    warmup_frac: Fraction = Field(0.1, description="share of the steps that warm up")
    start_factor: Fraction = Field(0.01, description="first learning rate as a share of the peak")
    final_factor: Fraction = Field(0.1, description="last learning rate as a share of the peak")
    decay_frac: Fraction = Field(0.2, description="share of the steps that cool down (wsd)")
    warmup_steps: Annotated[float, Field(ge=0, description="steps that warm up; 0: by optim.warmup_frac"), Later] = 0.0
    decay_steps: Annotated[int, Field(ge=0, description="steps that cool down (wsd); 0: by optim.decay_frac"), Later] = 0
    knots: Annotated[
        str,
        BeforeValidator(lambda value: format_knots(parse_knots(value)) if isinstance(value, str) else value),
        Field(description="points SHARE:FACTOR of the schedule knots: share of the steps after the warm-up, factor of lr"),
        Later,
        Unwritten,
    ] = ""
    scale_calibrations: Annotated[
        int,
        Field(
            ge=0, description="how often learned scales are set from data during the warm-up; 0: before the first step alone"
        ),
        OfLearnedScales(before=0),
    ] = 10
    freeze: Annotated[
        str,
        Field(description="modules that are not trained, as patterns with commas, such as 'embed, blocks.0.*, *norm'"),
        Later,
        Unwritten,
    ] = ""
    scale_update: Annotated[
        Literal["relative", "absolute"],
        Field(description="steps of learned scales: relative: shares of the scale, which stays positive; absolute: amounts"),
        OfLearnedScales(before="absolute"),
    ] = "relative"
    scale_lr: Annotated[
        float, Field(gt=0, description="learning rate of learned scales, as a factor of optim.lr"), OfLearnedScales(before=1.0)
    ] = 10.0

    cage: Annotated[
        float,
        Field(ge=0, description="CAGE: strength of the pull of quantized weights to their levels, such as 10; 0: none"),
        Later,
        Unwritten,
    ] = 0.0
    cage_from: Annotated[
        float, Field(ge=0, lt=1, description="CAGE: share of the run after which the pull rises from 0"), Later, Unwritten
    ] = 0.8
    reset_ratio: Annotated[
        float,
        Field(ge=0, description="OsciReset: travel of a weight's level over its own that resets it, such as 4; 0: none"),
        Later,
        Unwritten,
    ] = 0.0
    reset_window: Annotated[Positive, Field(description="OsciReset: steps over which travel is summed"), Later, Unwritten] = 200
    average: Annotated[
        str,
        BeforeValidator(checked_average),
        Field(description=f"average of the weights, evaluated beside them: {AVERAGES}; empty: none"),
        Later,
        Unwritten,
    ] = ""

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        fractions = (0 if self.warmup_steps else self.warmup_frac) + (0 if self.decay_steps else self.decay_frac)
        if self.schedule == "wsd" and fractions > 1:
            raise ValueError(
                f"optim.decay_frac: warm-up {self.warmup_frac:g} and cool-down {self.decay_frac:g} together exceed the run."
            )
        if bool(parse_knots(self.knots)) != (self.schedule == "knots"):
            raise ValueError(
                "optim.knots: is empty, and optim.schedule=knots needs points such as 0.7:1, 1:0.1."
                if self.schedule == "knots"
                else f"optim.knots: is for optim.schedule=knots, not {self.schedule}."
            )
        return self

    def warmup_of(self, steps: int) -> float:
        """Length of the warm-up of a run of `steps`, in steps; need not be whole."""
        return self.warmup_steps or self.warmup_frac * steps

    def cooldown_of(self, steps: int) -> float:
        """Length of the cool-down (wsd) of a run of `steps`, in steps; need not be whole."""
        return self.decay_steps or self.decay_frac * steps


def _steps_as_text(value: object) -> object:
    """Steps as TOML has them (300 or [300, 600]) or as text, in the form that a config stores."""
    if isinstance(value, list | tuple) and all(isinstance(step, int) for step in value):
        return ",".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.replace(" ", "") if isinstance(value, str) else value


class TrainConfig(Section):
    """How long a run is, its batches, and how it is executed."""

    steps: int = Field(
        522, ge=0, description="optimizer steps (or give train.tokens or train.tokens_per_param); 0: take model.init as it is"
    )
    batch_size: Positive = Field(16, description="sequences per optimizer step; law:FILE: by fit-knobs")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the initial weights and of the order of the data")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: matrix products in bf16 by autocast; weights stay fp32"
    )
    eval_tokens: Positive = Field(131_072, description="validation tokens behind each reported loss")
    micro_batch: Annotated[int, Field(ge=0, description="sequences per backward pass; 0: all at once"), Execution] = 0
    checkpoint_activations: Annotated[
        bool,
        Field(description="keep the inputs of blocks alone, and compute the rest again in the backward pass"),
        Execution,
        Attempt,
        Unwritten,
    ] = False
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto | cpu | cuda | cuda:N"), Execution, Attempt
    ] = "auto"
    parallel: Annotated[
        Literal["ddp", "fsdp"],
        Field(description="several processes: ddp: each has the whole model; fsdp: sharded"),
        Execution,
        Attempt,
    ] = "ddp"
    threads: Annotated[
        int, Field(ge=0, description="CPU threads; 0: all cores, or as many as the run began with"), Execution
    ] = 0
    compile: Annotated[
        Literal["auto", "on", "off"],
        Field(description="use of torch.compile; auto: on a GPU, and on a CPU where a long run saves much more than it takes"),
        Execution,
    ] = "auto"
    kernels: Annotated[
        Literal["auto", "fused", "reference"],
        Field(description="quantized products by fused integer kernels or by the reference formula; auto: fused on a GPU"),
        Execution,
    ] = "auto"
    log_every: Annotated[Positive, Field(description="steps between metric lines"), Execution] = 10
    eval_every: Annotated[int, Field(ge=0, description="steps between validations; 0: at the end only"), Execution] = 0
    checkpoint_every: Annotated[int, Field(ge=0, description="steps between checkpoints; 0: four in a run"), Execution] = 0
    keep_steps: Annotated[
        str,
        BeforeValidator(_steps_as_text),
        Field(
            pattern=r"^([1-9]\d*(,[1-9]\d*)*)?$", description="steps whose checkpoints are kept for branches, such as '300,600'"
        ),
        Execution,
        Attempt,
    ] = ""
    health_every: Annotated[
        int, Field(ge=0, description="steps between measurements of the masks; 0: twenty in a run"), Execution
    ] = 0
    diverged_loss: Annotated[
        float, Field(ge=0, description="stop the run above this training loss (nats/token); 0: never"), Execution, Attempt
    ] = 0.0
    diverged_grad_norm: Annotated[
        float, Field(ge=0, description="stop the run above this gradient norm; 0: never"), Execution, Attempt
    ] = 0.0
    diverged_steps: Annotated[
        Positive, Field(description="steps in a row that must be above the limit"), Execution, Attempt
    ] = 10

    @property
    def steps_between_checkpoints(self) -> int:
        """train.checkpoint_every or, without it, a part of the run."""
        return self.checkpoint_every or -(-self.steps // CHECKPOINTS)

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> Self:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"train.micro_batch: {self.micro_batch} does not divide train.batch_size {self.batch_size}.")
        return self


class TeacherConfig(Section):
    """A frozen model whose predictions the run learns from beside the text (training/teacher.py). Without a source: none.

    At their defaults the keys stay out of config.json and run id; so do all keys of a teacher with weight 0.
    """

    source: Annotated[
        str,
        Field(description="the teacher: RUN_FOLDER | HF_FOLDER | FILE.gguf | hf:NAME | init: model.init; empty: none"),
        Place,
    ] = ""
    sha256: str = Field(
        "", pattern=r"^([0-9a-f]{64})?$", description="SHA-256 of the weights of teacher.source, which is filled in"
    )
    weight: Fraction = Field(
        0.5, description="share w of the teacher in what is minimized: (1-w) cross-entropy + w temperature^2 divergence"
    )
    temperature: float = Field(1.0, gt=0, description="by which the logits of both models are divided in the divergence")
    top_k: int = Field(
        0, ge=0, description="ids that the divergence tells apart, the teacher's likeliest; all others are one; 0: all ids"
    )
    precision: Literal["run", "fp32", "bf16"] = Field(
        "run", description="of the teacher's weights and products; run: train.precision. Quantized weights stay packed"
    )


class PTQConfig(Section):
    """How a full-precision run was quantized after training. `questctl quantize` writes it; no file or flag can set it."""

    source: str = Field(min_length=1, description="run id of the full-precision run")
    method: Literal["rtn", "gptq"] = Field("rtn", description="rtn: round to nearest; gptq: round with error compensation")
    calibration_tokens: int = Field(0, ge=0, description="training tokens from which the inputs of the layers were taken")
    damping: float = Field(0.0, ge=0, description="share of its mean diagonal added to the Hessian's diagonal (gptq)")


class BranchConfig(Section):
    """Where a run branched from another one (training/branch.py). Set by `--branch-from` and by trunks of sweeps, by no key."""

    source: str = Field(min_length=1, description="run id of the trunk")
    step: Positive = Field(description="steps of the trunk that it continues")


class RunConfig(Section):
    """Everything that defines one run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    quant: QuantConfig = Field(default_factory=QuantConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)  # without a source it is left out of JSON and run id
    branch: BranchConfig | None = None  # None is left out of JSON and run id
    ptq: PTQConfig | None = None  # None is left out of JSON and run id

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        absent = {"teacher"} if self.teacher == TeacherConfig() else set()
        return {name: section for name, section in serialize(self).items() if section is not None and name not in absent}

    @model_validator(mode="after")
    def _tied_head_has_no_rate(self) -> Self:
        if self.model.tied and self.optim.head_lr != 1:
            raise ValueError("optim.head_lr: with model.tied the head is the embedding; set optim.embedding_lr, for both.")
        return self

    @model_validator(mode="after")
    def _untrained_begins_with_something(self) -> Self:
        if self.train.steps == 0 and not self.model.init:
            raise ValueError("train.steps: 0 takes a checkpoint as it is, and none is given; name one with --init.")
        return self

    @model_validator(mode="after")
    def _rotations_divide(self) -> Self:
        for side in OPERANDS:
            block = getattr(self.quant, side).rotation
            m = self.model
            for key, width in (("d_model", m.d_model), ("d_ff", m.d_ff), ("head_width · n_head", m.n_head * m.width_of_head)):
                if block and width % block:
                    raise ValueError(
                        f"quant.{side}: rotation block {block} does not divide model.{key} {width}; "
                        f"choose a block that does, such as quant.block={_largest_power_of_two(width)}."
                    )
        for key, spec in self.quant.by_row.items():
            width = m.width_of_row(key)
            if spec.rotation and width % spec.rotation:
                raise ValueError(
                    f"quant.{key}: rotation block {spec.rotation} does not divide the width {width}; choose a block that does, "
                    f"such as h{_largest_power_of_two(width)}."
                )
        if m.tied and not self.quant.head.is_identity:
            raise ValueError(TIED_HEAD)
        return self

    @property
    def scheme(self) -> str:
        """Short name that groups runs: `quest-w4a4`, or `ptq-gptq-w4a4` for a run quantized after training.

        For a run that begins with a checkpoint, four digits of the checkpoint's hash are added, since its losses follow another
        law: `bf16+init.1a2b`. For a run with a teacher they are those of the hash of its section: `bf16+teacher.3c4d`. CAGE and
        resets are named, `quest-w4a4+cage10`, and a run that is quantized late says when: `quest-w4a4+s0.8`. Without a rotation
        a run quantized after training ends in `-norot`. Methods that differ only in how gradients pass are one scheme there,
        since rounding after training has no gradients: all estimators are `ste`.
        """
        label = self.quant.label
        if self.model.init_sha256:
            label += f"+init.{self.model.init_sha256[:4]}"
        if self.teacher.sha256:
            label += f"+teacher.{identity_digits(self.identity['teacher'])[:4]}"
        if self.ptq is None:
            return label + self._corrections_label + self._schedule_label
        if label.startswith("ste-"):
            label = label.removeprefix("ste-") + "-norot"
        return f"ptq-{self.ptq.method}-{label.removeprefix('quarot-')}"

    @property
    def is_quantized(self) -> bool:
        """Whether the run is quantized, in its training or after it."""
        return self.quant.quantizes or self.ptq is not None

    @property
    def label(self) -> str:
        """The name of the scheme in a study: its quantizers, the corrections of its weights, and when quantization begins.

        The share of the run is rounded to hundredths, so that runs of all lengths have the same label, although steps are
        whole.
        """
        return self.quant.label + self._corrections_label + self._start_label(2)

    @property
    def _corrections_label(self) -> str:
        """`+cage10` and `+reset4` if weights are pulled to their levels or reset to them."""
        o = self.optim
        cage = f"+cage{o.cage:g}" if o.cage and self.quant.quantizes else ""
        return cage + (f"+reset{o.reset_ratio:g}" if o.reset_ratio and self.quant.quantizes else "")

    @property
    def _schedule_label(self) -> str:
        """`+s0.8` if quantization begins after 0.8 of the run; with four hex digits for the stages before it, if any."""
        return self._start_label(3)

    def _start_label(self, digits: int) -> str:
        q = self.quant
        if q.start == 0:
            return ""
        share = schedule.step_of(q.start, self.train.steps, self.cooldown_steps) / self.train.steps
        shown = f"{share:.{digits}g}"
        return f"+s{shown}" + (f"+{hashlib.sha256(q.stages.encode()).hexdigest()[:4]}" if q.stages else "")

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run: the D of scaling laws."""
        return self.train.steps * self.train.batch_size * self.data.seq_len

    @property
    def tokens_per_param(self) -> float:
        """Training tokens per non-embedding parameter."""
        return self.tokens / self.model.params_non_embedding

    @property
    def new_tokens(self) -> int:
        """Training tokens of this run's own steps, without those of the steps that a branch shares with its trunk."""
        return self.tokens - (self.branch.step if self.branch else 0) * self.train.batch_size * self.data.seq_len

    @property
    def stages(self) -> list[tuple[int, QuantConfig]]:
        """The precision schedule: the quantization from each of these steps on; the first begins at step 0.

        Raises UsageError if the steps do not rise, or do not lie before the end of the run.
        """
        q, steps, final = self.quant, self.train.steps, self.quant.at_once
        if q.start == schedule.COOLDOWN and self.optim.schedule != "wsd":
            raise UsageError(f"quant.start: {q.start} needs optim.schedule=wsd, not {self.optim.schedule}.")
        cool = self.cooldown_steps
        places = [*((s.start, s.weights, s.activations) for s in schedule.parse_stages(q.stages)), (q.start, None, None)]
        named = [("quant.stages", schedule.step_of(place, steps, cool)) for place, *_ in places[:-1]]
        named.append(("quant.start", schedule.step_of(q.start, steps, cool)))
        schedule.check_order(named, steps)
        plain = QuantConfig()
        earlier = [plain.model_copy(update={"weights": w, "activations": a}) for _, w, a in places[:-1]]
        stages = [(step, quant) for (_, step), quant in zip(named, [*earlier, final], strict=True)]
        return stages if stages[0][0] == 0 else [(0, plain), *stages]

    @property
    def quant_in_steps(self) -> QuantConfig:
        """`quant` with the places of its schedule as steps, so that it means the same in a run of another length."""
        q, steps, cool = self.quant, self.train.steps, self.cooldown_steps
        if q.start == 0:
            return q
        stages = [s._replace(start=float(schedule.step_of(s.start, steps, cool))) for s in schedule.parse_stages(q.stages)]
        start = float(schedule.step_of(q.start, steps, cool))
        return q.model_copy(update={"start": start, "stages": ", ".join(map(str, stages))})

    @property
    def rotate_back(self) -> bool:
        """Whether the weights were trained without quantization before they are quantized (`rotate_back` of `QuantLinear`)."""
        return self.quant.start != 0 or bool(self.model.init_sha256)

    @property
    def teacher_precision(self) -> str:
        """The precision in which a teacher computes, also that of its weights unless they are packed: fp32 or bf16."""
        return self.train.precision if self.teacher.precision == "run" else self.teacher.precision

    @property
    def full_precision_tokens(self) -> int:
        """Training tokens before anything is quantized: 0 if quantization begins at once, all tokens of a bf16 run."""
        if not self.quant.quantizes:
            return self.tokens
        first = next(step for step, quant in self.stages if quant.quantizes)
        return first * self.train.batch_size * self.data.seq_len

    @property
    def warmup_steps(self) -> float:
        """Length of the warm-up in steps; need not be whole."""
        return self.optim.warmup_of(self.train.steps)

    @property
    def warmup_warning(self) -> str:
        """A warning if AdamW's warm-up is shorter than its learning rate needs, though the run has room for it; else empty."""
        o, steps = self.optim, self.train.steps
        least = WARMUP_PER_LR * o.lr
        if o.name != "adamw" or o.lr <= SAFE_LR or self.warmup_steps >= least or 4 * least > steps:
            return ""
        return (
            f"optim.warmup_steps: a warm-up of {self.warmup_steps:.3g} of {steps} steps is short for AdamW at learning rate "
            f"{o.lr:g}: small models with fewer than {least:.3g} steps ended up to .2 nats/token higher. Give more steps, a "
            "lower rate, or optim.name=muon."
        )

    @property
    def cooldown_steps(self) -> float:
        """Length of the cool-down of the schedule wsd in steps; need not be whole."""
        return self.optim.cooldown_of(self.train.steps)

    @property
    def frozen(self) -> frozenset[str]:
        """The modules that `optim.freeze` names. Raises UsageError if a pattern matches none, or none is left to train."""
        if not self.optim.freeze:
            return frozenset()
        names = list(self.model.module_sizes(0))
        patterns = [pattern.strip() for pattern in self.optim.freeze.split(",") if pattern.strip()]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
                raise UsageError(unknown("optim.freeze", pattern, kinds, what="module"))
        frozen = frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
        if len(frozen) == len(names):
            raise UsageError(f"optim.freeze: {self.optim.freeze}: leaves nothing to train.")
        return frozen

    def frozen_sizes(self, vocab_size: int) -> dict[str, int]:
        """The modules that are not trained, each with the number of its parameters."""
        frozen = self.frozen
        return {name: n for name, n in self.model.module_sizes(vocab_size).items() if name in frozen} if frozen else {}

    @property
    def optimizer_flops(self) -> int:
        """Operations of matrix products in one step of the optimizer, 2 per multiply-add: none for AdamW.

        In Muon a step of Newton–Schulz multiplies (n, m) by (m, n), (n, n) by (n, n), and (n, n) by (n, m), n ≤ m.
        """
        if self.optim.name != "muon":
            return 0
        frozen = [name.rpartition(".")[2] for name in self.frozen]
        layers = {name: self.model.n_layer - frozen.count(name) for name in self.model.block_shapes}
        shapes = {name: (min(shape), max(shape)) for name, shape in self.model.block_shapes.items()}
        return NEWTON_SCHULZ_STEPS * sum(layers[name] * 2 * n * n * (2 * m + n) for name, (n, m) in shapes.items())

    def optimizer_values(self, vocab_size: int) -> int:
        """Numbers in the optimizer's state: two moments of each parameter, or one momentum of a weight that Muon trains."""
        m, frozen = self.model, self.frozen_sizes(vocab_size)
        values = 2 * (m.params_non_embedding + m.params_embedding(vocab_size) - sum(frozen.values()))
        if self.optim.name != "muon":
            return values
        parts = [name.rpartition(".")[2] for name in frozen]
        return values - m.linear_weights + sum(math.prod(m.block_shapes[part]) for part in parts if part in m.block_shapes)

    def with_vocabulary(self, of_data: int | None) -> RunConfig:
        """This config with the vocabulary of its data, unless `model.vocab_size` sets one.

        `of_data` is the number of token ids of the data, None if it is not known yet. Use the returned config only to build a
        model or to count its cost: its run id is that of another experiment.
        """
        size = self.model.vocab_size or of_data or 0
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": size})})

    @property
    def learns_scales(self) -> bool:
        """Whether training moves a learned scale. Quantization after training sets such scales but does not train them."""
        layers = self.quant.overrides.values()
        specs = [
            self.quant.weights,
            self.quant.activations,
            *(s for layer in layers for s in (layer.weights, layer.activations)),
        ]
        return self.ptq is None and any(s is not None and s.scale is not None and s.scale.learned for s in specs)

    @property
    def remaining_quant(self) -> QuantConfig:
        """The specs that the stored weights of the run still need.

        After training these are all specs, since a run stores full-precision weights. A run that was quantized after training
        stores rounded weights: only its inputs are still to be quantized.
        """
        if self.ptq is None:
            return self.quant
        overrides = {pattern: layer.model_copy(update={"weights": None}) for pattern, layer in self.quant.overrides.items()}
        return self.quant.model_copy(update={"weights": IDENTITY, "overrides": overrides})

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that change the result, as plain JSON values; a checkpoint counts by its hash, wherever it lies."""
        fields = identity_of(self, learns_scales=self.learns_scales)
        if self.model.init and self.data.tokenizer in (f"{kind}{self.model.init}" for kind in ("", "hf:", "gguf:")):
            fields["data"]["tokenizer"] = "init"
        return fields

    @property
    def run_id(self) -> str:
        """The name of the run and of its folder: a readable prefix and 8 hex digits of the hash of `identity`."""
        return self.run_id_by_seed()(self.train.seed)

    def run_id_by_seed(self) -> Callable[[int], str]:
        """The function that maps a seed to the run id of this config with that seed."""
        size = human_count(self.model.params_non_embedding)
        return partial(named, f"{size}-{self.scheme}-{self.tokens_per_param:.3g}x", self.identity)

    def to_json(self) -> dict[str, Any]:
        """The whole tree with the version of its schema, as `config.json` holds it."""
        return stored_of(self, learns_scales=self.learns_scales)

    @property
    def experiment(self) -> dict[str, Any]:
        """`to_json` without how the run is executed: the same for every execution, and readable by `from_json`."""
        return stored_of(self, learns_scales=self.learns_scales, execution=False)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, where: str = "config") -> RunConfig:
        """Read back what `to_json` wrote. Raises UsageError naming `where` and the key for values of another schema.

        Keys of learned scales that an earlier version did not write have the values by which that version trained.
        """
        if not isinstance(values, Mapping) or values.get("schema") != SCHEMA_VERSION:
            schema = values.get("schema") if isinstance(values, Mapping) else type(values).__name__
            raise UsageError(f"{where}: schema {schema!r} is not the schema {SCHEMA_VERSION} that this version reads.")
        config = validated(cls, {k: v for k, v in values.items() if k != "schema"}, where=f"{where}: ")
        if not config.learns_scales:
            return config
        missing = {
            name: {key: value for key, value in before.items() if key not in values.get(name, {})}
            for name, before in values_before(cls).items()
        }
        return config.model_copy(
            update={name: getattr(config, name).model_copy(update=update) for name, update in missing.items() if update}
        )


def execution_keys() -> set[str]:
    """Dotted keys of the fields that say how a run is executed; they stay out of the run id."""
    return marked_keys(RunConfig, Execution)


def attempt_keys() -> set[str]:
    """Those of `execution_keys` that every attempt of a run chooses anew; the others keep their first value."""
    return marked_keys(RunConfig, Attempt)


def _largest_power_of_two(width: int) -> int:
    return min(width & -width, 128)
