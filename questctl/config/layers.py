"""Where the values of a config come from: layers of flat keys, their precedence, and the shorthands that are expanded.

    defaults < preset < TOML file < QUESTCTL_* environment < --set key=value < flags        (later wins)

`--set` and flags are one command line: if both give a key the flag wins, but two keys that exclude each other are refused.

`resolve(layers)` merges flat `{dotted key: value}` layers into the frozen `RunConfig` and records the origin of each value.
A few shorthand keys exist in the input only. They are expanded here and never stored, so that one experiment has one spelling:

    preset                                     → all keys of the preset
    quant.method, bits, block, weight_only     → quant.weights, quant.activations
    train.tokens, train.tokens_per_param       → train.steps
    model.ffn_multiple_of                      → model.d_ff
    data.tokenizer = "init"                    → the tokenizer of the checkpoint
    teacher.source = "init"                    → the checkpoint

If `model.init` names a checkpoint, the section `model`, the hash of the weights and, unless it is named, the tokenizer follow
from the checkpoint. The hash of the teacher follows from `teacher.source`. `optim.lr` and `train.batch_size` may be given by a
law (`knob_laws`).
"""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UsageError, unknown
from ..pretrained import TEACHER, Source, open_source
from ..quant.methods import method_specs
from ..quant.spec import QuantSpec
from . import knob_laws
from .presets import CONTINUED, PRESETS
from .schedule import parse_stages
from .sections import LayerQuant, ModelConfig, RunConfig
from .validation import keys_of, validated

logger = logging.getLogger(__name__)
SUGGESTIONS = 5  # most names suggested for an environment variable that does not exist
RATE, BATCH = knob_laws.KNOB_OF  # keys that a fitted law may give
ALL_KEYS = "questctl config explain"  # lists them
MISTYPED = 2  # a variable that differs by at most this many letters from that of a key is mistyped


@dataclass(frozen=True)
class Layer:
    """Values from one origin, such as a file or a flag, under flat keys: `{("train", "seed"): 1, …}`.

    A key is the path to a value in the tree: `("quant", "overrides", "blocks.*.down", "weights")`.
    """

    origin: str
    values: Mapping[tuple[str, ...], Any]

    @property
    def place(self) -> str:
        """Where the user wrote the values: `--set` and all flags are one command line."""
        return "command line" if self.origin.startswith("--") else self.origin

    def as_written(self, key: tuple[str, ...]) -> str:
        """One of the keys as the user wrote it: `--set train.steps`, `--steps`, or `train.steps` in a file."""
        name = ".".join(key)
        return f"--set {name}" if self.origin == "--set" else self.origin if self.place != self.origin else name


@dataclass(frozen=True)
class Resolved:
    """A config, and the origin of the value of each dotted key."""

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
    """Every key that a user can set, shorthands included, with its one-line description."""
    return {**keys_of(RunConfig), **SHORTHAND}


def file_layer(path: Path) -> Layer:
    """The layer of a TOML file. Raises UsageError naming the file if it cannot be read, is not TOML, or has an unknown key."""
    tree = read_toml(path)
    if command := command_for(tree):
        raise UsageError(f"{path}: is no config but a sweep file; {command} {path} trains it.")
    return Layer(f"file {path.name}", flatten(tree, where=str(path)))


def command_for(tree: Mapping[str, Any]) -> str:
    """The command that takes a TOML file with this content, if it is a sweep file; '' for a config."""
    return "questctl study" if "study" in tree else "questctl sweep" if tree.keys() & {"matrix", "include", "base"} else ""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UsageError with the file's name and, for a mistake in the TOML, its line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"{path}: cannot be read: {e.strerror}.") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: is not TOML: {e}.") from e


def env_layer(environ: Mapping[str, str] | None = None) -> Layer:
    """The layer of environment variables: `QUESTCTL_TRAIN__SEED=1` is `train.seed = 1`; two underscores stand for the dot.

    A variable that begins with QUESTCTL_ and names no key may belong to another program, such as a cluster's `QUESTCTL_HOME`.
    It is ignored, and the log says so once per process. A variable that differs from that of a key by at most `MISTYPED`
    letters was meant for that key. It is refused, because ignoring it would train another model than the user asked for.

    Raises UsageError for such a mistyped variable.
    """
    values: dict[tuple[str, ...], Any] = {}
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if name.startswith("QUESTCTL_") and name not in _RESERVED_ENVIRONMENT:
            key = tuple(name.removeprefix("QUESTCTL_").lower().split("__"))
            if key in known_keys():
                values[key] = parse_value(text)
            else:
                _refuse_or_warn(name)
    return Layer("environment", values)


@cache  # one warning per process
def _refuse_or_warn(name: str) -> None:
    """Warn of a variable that names no key. Raises UsageError if it is a mistyped one, with the keys that may be meant."""
    candidates = [f"QUESTCTL_{'__'.join(key).upper()}" for key in known_keys()] + sorted(_RESERVED_ENVIRONMENT)
    distances = {candidate: edit_distance(name.upper(), candidate) for candidate in candidates}
    nearest = sorted(candidates, key=lambda candidate: distances[candidate])
    near = [candidate for candidate in nearest if distances[candidate] <= MISTYPED]
    if near:
        raise UsageError(
            f"{name}: names no key; did you mean {' or '.join(near[:SUGGESTIONS])}? Two underscores stand for the dot of a "
            "key, as in QUESTCTL_TRAIN__STEPS for train.steps."
        )
    logger.warning("%s: names no key and is ignored; the nearest variable is %s.", name, nearest[0])


def edit_distance(a: str, b: str) -> int:
    """The least number of letters to insert, delete or replace that turns `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def set_layer(assignments: Sequence[str]) -> Layer:
    """The layer of `--set key=value` items.

    Keys are written as in TOML: a part that contains dots is quoted, as in `quant.overrides."blocks.*.down".weights=…`. Raises
    UsageError for an item of another form and for an unknown key.
    """
    values: dict[tuple[str, ...], Any] = {}
    for item in assignments:
        key_text, equals, value_text = item.partition("=")
        if not equals:
            raise UsageError(f"--set {item}: is not of the form key=value.")
        try:
            nested: Any = tomllib.loads(f"{key_text.strip()} = 0")
        except tomllib.TOMLDecodeError as e:
            raise UsageError(
                f"--set {item}: '{key_text.strip()}' is not a dotted key; put parts with a * or a dot in quotes."
            ) from e
        path: list[str] = []
        while isinstance(nested, dict):
            ((part, nested),) = nested.items()
            path.append(part)
        values |= flatten(_nest({tuple(path): parse_value(value_text.strip())}), where="--set")
    return Layer("--set", values)


def parse_value(text: str) -> Any:
    """The TOML value that a text is (1, 3e-4, true, "x", [1, 2]); other texts stand for themselves, without quotes."""
    try:
        return tomllib.loads(f"v = {text}")["v"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text


def flatten(tree: Mapping[str, Any], *, where: str) -> dict[tuple[str, ...], Any]:
    """Nested tables → `{key path: value}`. Raises UsageError, which begins with `where`, for an unknown key."""

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        inside = path[:2] == ("quant", "overrides")
        if isinstance(node, Mapping) and (len(path) == 0 or path in {k[:1] for k in known_keys() if len(k) > 1} or inside):
            for key, value in node.items():
                yield from walk(value, (*path, str(key)))
            return
        if inside and len(path) == 4 and path[3] not in LayerQuant.model_fields:
            raise UsageError(unknown(f"{where}: {'.'.join(path)}", path[3], LayerQuant.model_fields, what="key"))
        if inside and len(path) != 4:
            raise UsageError(f'{where}: quant.overrides: takes "PATTERN".weights=SPEC or "PATTERN".activations=SPEC.')
        if path not in known_keys() and not inside:
            raise UsageError(
                unknown(
                    where,
                    ".".join(path),
                    {".".join(k): about for k, about in known_keys().items()},
                    what="key",
                    all_by=ALL_KEYS,
                )
            )
        yield path, node

    return dict(walk(tree, ()))


def resolve(layers: Sequence[Layer], presets: Mapping[str, Mapping[str, Any]] = PRESETS) -> Resolved:
    """Merge the layers (later ones win), expand the shorthands, and validate the result.

    `presets` maps names to nested values; the default is the table of presets.py. Raises UsageError for unknown presets and
    methods, for quantizer specs and values that are not allowed, and for two lengths in one file or on one command line;
    DataError for a checkpoint to begin with that is not here or cannot be read.
    """
    ranked: dict[tuple[str, ...], tuple[int, str, Any]] = {}  # key → (rank of its layer, origin, value)
    source = _source(layers)
    chosen = [(layer.origin, layer.values[("preset",)]) for layer in layers if ("preset",) in layer.values]
    if source and (not chosen or chosen[-1][0] == "default"):
        layers = [Layer("continued training", flatten(CONTINUED, where="presets.CONTINUED")), *layers]
    elif chosen:
        name = chosen[-1][1]
        if not isinstance(name, str) or name not in presets:
            raise UsageError(unknown("preset", name, presets, what="preset"))
        layers = [Layer(f"preset {name}", flatten(presets[name], where=f"preset {name}")), *layers]
    if source:
        layers = _with_source(source, layers)
    places = [layer.place for layer in layers]
    for layer in layers:
        rank = places.index(layer.place)
        beside = [other for other in layers if other.place == layer.place]
        lengths = {key: other.as_written(key) for other in beside for key in _LENGTH_KEYS if key in other.values}
        if len(lengths) > 1:
            raise UsageError(f"{layer.place}: {' and '.join(lengths.values())} both say how long to train; give one.")
        for key, value in layer.values.items():
            ranked[key] = (rank, layer.origin, value)
    ranked.pop(("preset",), None)
    _expand_ffn(ranked)
    if "command line" in places:
        _refuse_idle_bits(ranked, places.index("command line"))
    _expand_method(ranked)
    _expand_teacher(ranked, places.index("command line") if "command line" in places else -1)
    length = max((k for k in _LENGTH_KEYS if k in ranked), key=lambda k: ranked[k][0], default=None)
    rank, origin, amount = ranked[length] if length else (0, "", 0)
    for key in _LENGTH_KEYS:
        ranked.pop(key, None)
    laws = {key: ranked.pop(key) for key in knob_laws.KNOB_OF if key in ranked and knob_laws.is_law(ranked[key][2])}
    config = validated(RunConfig, _nest({k: v for k, (_, _, v) in ranked.items()}))
    origins = {".".join(k): o for k, (_, o, _) in ranked.items()}
    if batch := laws.get(BATCH):
        if length is None or length[1] == "steps":
            raise UsageError(
                "train.batch_size: a batch by law needs the length in tokens: train.tokens or train.tokens_per_param."
            )
        config = _by_law(config, BATCH, batch, _tokens(config, length[1], amount), origins)
    if length:
        steps, note = _steps(config, length[1], amount)
        train = {k: v for k, v in config.train.model_dump().items() if k != "steps"}
        config = validated(RunConfig, {**config.model_dump(), "train": {**train, "steps": steps}})
        origins["train.steps"] = origin + note
    if rate := laws.get(RATE):
        config = _by_law(config, RATE, rate, config.tokens, origins)
    if config.quant.start and not config.quant.quantizes:  # bf16 in a sweep whose schemes start at several places
        config = config.model_copy(update={"quant": config.quant.at_once})
    _check_steps(config)
    assert config.frozen is not None  # raises for a pattern that matches nothing
    return Resolved(config, {k: origins.get(k, "default") for k, _ in flat_items(config)})


def _by_law(
    config: RunConfig, key: tuple[str, str], ranked: tuple[int, str, str], tokens: float, origins: dict[str, str]
) -> RunConfig:
    """The config with `key` set by its law for `tokens` of training; the origin is added to `origins`."""
    N, (_, origin, text), (section, name) = config.model.params_non_embedding, ranked, key
    by_law = knob_laws.knob_by_law(key, text, N=N, D=tokens, scheme=config.scheme)
    value = by_law.value if key == RATE else max(1, round(by_law.value / config.data.seq_len))
    origins[".".join(key)] = f"{origin}: {by_law.origin}"
    tree = config.model_dump()
    return validated(RunConfig, {**tree, section: {**tree[section], name: value}})


def _source(layers: Sequence[Layer]) -> Source | None:
    """The checkpoint that the last of the layers with `model.init` names, if any. Raises what `open_source` does."""
    names = [layer.values[("model", "init")] for layer in layers if ("model", "init") in layer.values]
    if not names or names[-1] == "":
        if any(layer.values.get(("data", "tokenizer")) == "init" for layer in layers):
            raise UsageError("data.tokenizer: init is the tokenizer of model.init, which is not given.")
        return None
    if not isinstance(names[-1], str):
        raise UsageError(f"model.init: {names[-1]!r}: must be a text.")
    return open_source(names[-1])


def _with_source(source: Source, layers: Sequence[Layer]) -> list[Layer]:
    """The layers with the values of a checkpoint. Presets lose their model; a user's values must equal the checkpoint's.

    Raises UsageError for a key with another value, and for a hash that differs from that of the weights.
    """
    shape = ModelConfig.model_validate(source.model)
    own: dict[tuple[str, ...], Any] = {("model", key): value for key, value in shape.model_dump().items()}
    own |= {("model", name): field.default for name, field in ModelConfig.model_fields.items() if ("model", name) not in own}
    own[("model", "init_sha256")] = source.sha256
    free = {("model", "init"), ("model", "init_std")}
    kept = []
    for layer in layers:
        values = {key: value for key, value in layer.values.items() if key[0] != "model" or key in free}
        for key in layer.values.keys() - values.keys():
            value = layer.values[key]
            if layer.origin.startswith("preset ") or value == own.get(key, ""):
                continue
            if key == ("model", "init_sha256"):
                raise UsageError(
                    f"model.init: {source.name} has other weights (hash {source.sha256[:8]}) than {layer.as_written(key)} says "
                    f"({str(value)[:8]})."
                )
            has = f", but {own[key]!r}" if key in own else ""
            raise UsageError(f"{layer.as_written(key)}: {value!r} is not what {source.name} has{has}; leave it out.")
        kept.append(Layer(layer.origin, values))
    below = {key: value for key, value in own.items() if key not in free}
    if shape.rotation_block > 1:
        below[("quant", "block")] = shape.rotation_block
    at = next((i + 1 for i, layer in enumerate(kept) if layer.origin.startswith("preset ")), 0)
    kept.insert(at, Layer("model.init", below))
    named = [layer.values[("data", "tokenizer")] for layer in layers if ("data", "tokenizer") in layer.values]
    text = next((x.values[("data", "source")] for x in reversed(layers) if ("data", "source") in x.values), "")
    if (not named and not str(text).startswith(("bin:", "synthetic:"))) or named[-1:] == ["init"]:
        if source.tokenizer is None:
            raise UsageError(
                f"data.tokenizer: none is read from {source.name}; name one (hf:FOLDER), or a text of ids (bin:PATH)."
            )
        kept.append(Layer("model.init", {("data", "tokenizer"): source.tokenizer}))
    return kept


def flat_items(config: RunConfig) -> list[tuple[str, Any]]:
    """All values of a config as JSON holds them, under dotted keys: `[("model.n_layer", 1), …]`, in the order of the tree.

    Overrides have keys such as `quant.overrides.blocks.*.down.weights`. Defaults that JSON leaves out are included.
    """
    items: list[tuple[str, Any]] = []
    dumped = config.model_dump(mode="json")
    for section in type(config).model_fields:
        if (own := getattr(config, section)) is None:
            continue
        values, fields = dumped.get(section, {}), type(own).model_fields
        for key, value in ((key, values[key] if key in values else _as_json(about.default)) for key, about in fields.items()):
            if (section, key) == ("quant", "overrides"):
                sides = ((pattern, side, spec) for pattern, layer in value.items() for side, spec in layer.items() if spec)
                items += [(f"quant.overrides.{pattern}.{side}", spec) for pattern, side, spec in sides]
            else:
                items.append((f"{section}.{key}", value))
    return items


def _as_json(default: Any) -> Any:
    """The default of a field as JSON holds it."""
    return str(default) if isinstance(default, QuantSpec) else default


def _expand_ffn(ranked: dict[tuple[str, ...], tuple[int, str, Any]]) -> None:
    """Set d_ff to 8/3 d_model rounded up, unless a layer at least as late as that of d_model gives d_ff itself."""
    multiple = ranked.pop(("model", "ffn_multiple_of"), None)
    width = ranked.get(("model", "d_model"))
    explicit = ranked.get(("model", "d_ff"))
    newest = max((x for x in (multiple, width) if x), key=lambda x: x[0], default=None)
    if newest is None or (explicit and explicit[0] >= newest[0]):
        return
    d_model = width[2] if width else ModelConfig.model_fields["d_model"].default
    step = multiple[2] if multiple else 256
    for key, value in (("model.d_model", d_model), ("model.ffn_multiple_of", step)):
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UsageError(f"{key}: {value!r} is not a positive whole number.")
    d_ff = -(-8 * d_model // (3 * step)) * step
    ranked[("model", "d_ff")] = (newest[0], f"{newest[1]} (8/3 d_model, multiple of {step})", d_ff)


def _refuse_idle_bits(ranked: Mapping[tuple[str, ...], tuple[int, str, Any]], rank: int) -> None:
    """Raises UsageError if the layer of this rank asks for bf16 and for bits: one of the two is a mistake.

    In files, and in the cells of a sweep, bits may stand beside bf16: they apply if a later layer replaces bf16 by a method.
    """
    method, bits = (ranked.get(("quant", k)) for k in ("method", "bits"))
    if method and bits and method[0] == bits[0] == rank and method[2] == "bf16" and str(bits[2]) != "16":
        raise UsageError(f"quant.bits: {bits[2]} of bf16, which quantizes nothing; leave one of the two out.")


def _expand_method(ranked: dict[tuple[str, ...], tuple[int, str, Any]]) -> None:
    """Replace method, bits and block by the specs of weights and activations.

    A spec that the same layer or a later one gives directly wins over the method.
    """
    shorthands = {k[1]: ranked.pop(k) for k in _METHOD_KEYS if k in ranked}
    if not shorthands.keys() & {"method", "bits", "weight_only"}:
        return  # a preset gives only the block, which asks for no quantization
    if "method" not in shorthands and "bits" not in shorthands:
        raise UsageError("quant.weight_only: needs quant.method and quant.bits.")
    method = shorthands["method"][2] if "method" in shorthands else "quest"
    bits = shorthands["bits"][2] if "bits" in shorthands else None
    weight_only = shorthands["weight_only"][2] if "weight_only" in shorthands else False
    if not isinstance(weight_only, bool):
        raise UsageError(f"quant.weight_only: {weight_only!r} is neither true nor false.")
    specs = method_specs(method, bits, block=shorthands["block"][2] if "block" in shorthands else 128, weight_only=weight_only)
    rank = max(shorthands[k][0] for k in shorthands if k != "block")
    origin = ", ".join(f"{k}={shorthands[k][2]} ({shorthands[k][1]})" for k in shorthands)
    if isinstance(stages := ranked.get(("quant", "stages")), tuple) and isinstance(stages[2], str):
        block = shorthands["block"][2] if "block" in shorthands else 128
        ranked[("quant", "stages")] = (*stages[:2], ", ".join(map(str, parse_stages(stages[2], block))))
    for side, spec in zip(("weights", "activations"), specs, strict=True):
        if ("quant", side) not in ranked or ranked[("quant", side)][0] < rank:
            ranked[("quant", side)] = (rank, origin, spec)


def _expand_teacher(ranked: dict[tuple[str, ...], tuple[int, str, Any]], command_line: int) -> None:
    """Set the teacher and its hash. Without a source, or with weight 0, there is no teacher, and the other keys have no effect.

    They are allowed, since a sweep may vary the source. On the command line, of rank `command_line`, they are a mistake.
    """
    teacher = {key: ranked.pop(key) for key in list(ranked) if key[0] == "teacher"}
    rank, origin, name = teacher.get(("teacher", "source"), (0, "", ""))
    if not isinstance(name, str):
        raise UsageError(f"{TEACHER}: {name!r}: must be a text.")
    idle = next((key for key, (by, *_) in teacher.items() if by == command_line and key[1] != "source"), None)
    if not name and idle:
        raise UsageError(f"{'.'.join(idle)}: needs a teacher: --teacher RUN, FOLDER, FILE.gguf, hf:NAME or init.")
    weight = teacher.get(("teacher", "weight"), (0, "", None))[2]
    if not name or (weight == 0 and not isinstance(weight, bool)):
        return
    if name == "init":
        name = ranked.get(("model", "init"), (0, "", ""))[2]
        if not name:
            raise UsageError(f"{TEACHER}: init is the checkpoint of model.init, which is not given.")
    source = open_source(name, TEACHER)
    stored = teacher.get(("teacher", "sha256"), (0, "", ""))[2]
    if stored not in ("", source.sha256):
        raise UsageError(
            f"{TEACHER}: {name} has other weights (hash {source.sha256[:8]}) than teacher.sha256 says ({str(stored)[:8]})."
        )
    ranked |= teacher | {("teacher", "source"): (rank, origin, name), ("teacher", "sha256"): (rank, origin, source.sha256)}


def _steps(config: RunConfig, unit: str, amount: Any) -> tuple[int, str]:
    """The optimizer steps of a length in steps, tokens or tokens per parameter, and a note for the origin of train.steps."""
    if unit == "steps":
        as_it_is = config.model.init and amount == 0 and not isinstance(amount, bool)
        return (0 if as_it_is else int(_positive(unit, amount))), ""
    tokens = _tokens(config, unit, amount)
    return max(1, round(tokens / (config.train.batch_size * config.data.seq_len))), f" ({unit}={amount:g})"


def _tokens(config: RunConfig, unit: str, amount: Any) -> float:
    """The tokens of a length in tokens or in tokens per parameter."""
    return _positive(unit, amount) * (config.model.params_non_embedding if unit == "tokens_per_param" else 1)


def _positive(unit: str, amount: Any) -> float:
    """A length that is a positive number, of steps a whole one. Raises UsageError for anything else."""
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    if not number or not 0 < amount < float("inf") or (unit == "steps" and amount != int(amount)):
        raise UsageError(f"train.{unit}: {amount!r} is not a positive {'whole number' if unit == 'steps' else 'number'}.")
    return amount


def _check_steps(config: RunConfig) -> None:
    """Raises UsageError if warm-up and cool-down, or a checkpoint to keep, do not fit into the steps of the run."""
    steps, warm, cool = config.train.steps, config.warmup_steps, config.cooldown_steps
    if config.optim.schedule == "wsd" and warm + cool > steps * (1 + 1e-9):
        raise UsageError(f"optim: a warm-up of {warm:g} steps and a cool-down of {cool:g} exceed the run's {steps}.")
    assert config.stages[0][0] == 0  # raises if the precision schedule does not fit
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
