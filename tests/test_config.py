"""The config: precedence, origins, shorthands, identity, and one clear sentence for every mistake."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from questctl.config import (
    Layer,
    OptimConfig,
    PTQConfig,
    QuantConfig,
    RunConfig,
    env_layer,
    file_layer,
    flat_items,
    flatten,
    human_count,
    known_keys,
    parse_value,
    resolve,
    set_layer,
)
from questctl.config.amounts import BYTE_UNITS, parse_amount, parse_count
from questctl.config.commands import train_command
from questctl.config.describe import to_toml
from questctl.config.layers import _RESERVED_ENVIRONMENT, _refuse_or_warn, edit_distance
from questctl.config.presets import PRESETS
from questctl.errors import DataError, QuestError, UsageError
from questctl.quant.methods import METHODS
from questctl.quant.spec import QuantSpec

RUN_IDS = json.loads((Path(__file__).parent / "data" / "run_ids.json").read_text())  # preset → method → id of older versions


def layer(origin="test", **dotted):
    return Layer(origin, {tuple(k.split("__")): v for k, v in dotted.items()})


# --- precedence and origins -------------------------------------------------------------------------------------------


def test_later_layers_win_and_every_value_knows_its_origin(tmp_path):
    path = tmp_path / "exp.toml"
    path.write_text('preset = "107K"\n[optim]\nlr = 1e-2\n[train]\nseed = 1\n')
    layers = [
        file_layer(path),
        env_layer({"QUESTCTL_TRAIN__SEED": "2", "HOME": "/"}),
        set_layer(["train.seed=3"]),
        layer("--seed", train__seed=4),
    ]
    for upto, (seed, origin) in enumerate([(1, "file exp.toml"), (2, "environment"), (3, "--set"), (4, "--seed")], start=1):
        resolved = resolve(layers[:upto])
        assert (resolved.config.train.seed, resolved.origins["train.seed"]) == (seed, origin)
    assert resolved.config.optim.lr == 1e-2
    assert resolved.origins["optim.lr"] == "file exp.toml"
    assert resolved.origins["model.n_layer"] == "preset 107K"
    assert resolved.origins["optim.beta1"] == "default"
    assert set(resolved.origins) == {k for k, _ in flat_items(resolved.config)}


def test_a_preset_named_later_replaces_the_earlier_but_stays_below_values():
    resolved = resolve([layer(preset="53K", optim__lr=1e-2), layer("--preset", preset="640K")])
    assert resolved.config.model.d_model == 128
    assert resolved.config.optim.lr == 1e-2


def test_method_and_words_obey_the_order_of_layers():
    base = layer("file", preset="53K", quant__method="quest", quant__bits=4)
    words = resolve([base]).config.quant
    assert str(words.weights) == str(words.activations) == "int4-h64-rms-trust"
    later_word = resolve([base, set_layer(["quant.weights=int2-rms-ste"])]).config.quant
    assert (str(later_word.weights), str(later_word.activations)) == ("int2-rms-ste", "int4-h64-rms-trust")
    later_bits = resolve(
        [layer("file", preset="53K", quant__weights="int2-rms-ste"), layer("--quant", quant__method="ste", quant__bits=8)]
    )
    assert str(later_bits.config.quant.weights) == str(later_bits.config.quant.activations) == "int8-rms-ste"
    assert "ste" in later_bits.origins["quant.weights"]


def test_the_command_line_is_one_place():
    file = layer("file a.toml", preset="53K", train__tokens_per_param=5, quant__method="quest", quant__bits=4)
    steps, ratio = layer("--steps", train__steps=3), layer("--tokens-per-param", train__tokens_per_param=5)
    assert resolve([file, steps]).config.train.steps == 3
    assert resolve([file, set_layer(["train.steps=2"]), steps]).config.train.steps == 3
    for layers, said in (
        ([steps, ratio], "--steps and --tokens-per-param both"),
        ([set_layer(["train.steps=3"]), ratio], "--set train.steps and --tokens-per-param both"),
        ([set_layer(["train.steps=3", "train.tokens=9000"])], "--set train.steps and --set train.tokens both"),
    ):
        with pytest.raises(UsageError, match=said):
            resolve([file, *layers])
    with pytest.raises(UsageError, match=r"file a\.toml: train\.steps and train\.tokens both"):
        resolve([layer("file a.toml", train__steps=1, train__tokens=1)])


def test_bits_of_bf16_are_refused_on_one_command_line_alone():
    file = layer("file a.toml", preset="53K", quant__method="quest", quant__bits=4)
    bf16, bits = layer("--quant", quant__method="bf16"), layer("--bits", quant__bits=2)
    for layers in ([bf16, bits], [set_layer(["quant.method=bf16"]), bits], [set_layer(["quant.method=bf16", "quant.bits=2"])]):
        with pytest.raises(UsageError, match="2 of bf16, which quantizes nothing; leave one of the two out"):
            resolve([file, *layers])
    assert resolve([file, bf16]).config.quant.weights.is_identity
    assert resolve([file, bf16, layer("--bits", quant__bits=16)]).config.quant.weights.is_identity
    assert resolve([layer("cell", preset="53K", quant__method="bf16", quant__bits=4)]).config.quant.weights.is_identity


def test_a_word_beside_a_method_on_one_command_line_is_not_dropped():
    quant = resolve(
        [
            layer("file", preset="53K"),
            set_layer(["quant.activations=bf16"]),
            layer("--quant", quant__method="quest"),
            layer("--bits", quant__bits=4),
        ]
    ).config.quant
    assert (str(quant.weights), str(quant.activations)) == ("int4-h64-rms-trust", "bf16")


def test_one_experiment_has_one_spelling():
    spellings = [
        [layer(preset="53K", quant__method="quest", quant__bits=4)],
        [layer(preset="53K", quant__weights="int4-h64-trust", quant__activations="int4-h64-rms-trust")],
        [layer(preset="53K", quant__method="quest", quant__bits=4, train__steps=522)],
        [layer(preset="53K", quant__method="quest", quant__bits=4, train__tokens=522 * 16 * 128)],
        [Layer("f", flatten(PRESETS["53K"], where="f")), layer(quant__bits=4)],
    ]
    assert len({resolve(s).config.run_id for s in spellings}) == 1


def test_tokens_per_parameter_count_the_non_embedding_parameters():
    config = resolve([layer(preset="53K")]).config
    assert config.model.params_non_embedding == 53_440
    assert config.train.steps == round(20 * 53_440 / (16 * 128))
    assert config.tokens == config.train.steps * 16 * 128


def test_d_ff_follows_the_width_unless_it_is_given():
    assert resolve([layer(preset="53K")]).config.model.d_ff == 192
    assert resolve([layer(preset="53K"), layer(model__d_model=128, model__n_head=4)]).config.model.d_ff == 384
    assert resolve([layer(preset="53K"), layer(model__d_ff=256)]).config.model.d_ff == 256
    assert resolve([layer(preset="30M")]).config.model.d_ff == 1792  # 8/3·640 = 1706.7 → 7·256
    assert resolve([layer(model__d_model=96, model__ffn_multiple_of=256)]).config.model.d_ff == 256  # exactly 8/3·96


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_with_every_method_that_its_block_allows(name):
    for bits in (1, 4):
        config = resolve([layer(preset=name, quant__method="quest", quant__bits=bits)]).config
        assert RunConfig.from_json(config.to_json()) == config


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("train.device='cpu'", True),
        ("train.threads=1", True),
        ("train.compile='off'", True),
        ("train.log_every=3", True),
        ("train.eval_every=5", True),
        ("train.checkpoint_every=7", True),
        ("train.micro_batch=4", True),
        ("train.checkpoint_activations=true", True),
        ("train.seed=1", False),
        ("train.precision='bf16'", False),
        ("train.steps=521", False),
        ("train.eval_tokens=4096", False),
        ("optim.lr=1e-3", False),
        ("optim.grad_clip=0.0", False),
        ("data.val_fraction=0.1", False),
        ("data.tokenizer='x'", False),
        ("model.norm_eps=1e-6", False),
        ("quant.weights='int4-rms-ste'", False),
        ("quant.overrides.'blocks.*.down'.weights='int8-h64-rms-trust'", False),
    ],
)
def test_the_id_changes_exactly_with_what_changes_the_result(change, same):
    base = [layer(preset="53K", quant__method="quest", quant__bits=4)]
    assert (resolve([*base, set_layer([change])]).config.run_id == resolve(base).config.run_id) is same


def test_every_field_is_either_in_the_id_or_marked_as_execution():
    """A new field that is forgotten here fails: it must be decided whether it changes the result."""
    config = RunConfig()
    hashed = {f"{s}.{k}" for s, v in config.identity.items() if isinstance(v, dict) for k in v}
    execution = {
        "micro_batch",
        "device",
        "threads",
        "compile",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_steps",
        "parallel",
        "kernels",
        "health_every",
        "diverged_loss",
        "diverged_grad_norm",
        "diverged_steps",
    }
    everything = {f"{s}.{k}" for s, v in config.model_dump().items() for k in v}
    later = {"optim.warmup_steps", "optim.decay_steps"}  # in the id of a run that uses them
    learned = {"optim.scale_calibrations", "optim.scale_update", "optim.scale_lr"}  # in the id of a run with learned scales
    assert everything - hashed == {f"train.{k}" for k in execution} | later | learned
    used = RunConfig(optim=config.optim.model_copy(update={"name": "muon", "warmup_steps": 3.0, "decay_steps": 5}))
    assert {"name", "warmup_steps", "decay_steps"} <= used.identity["optim"].keys()


def test_run_ids_are_safe_folder_names():
    config = resolve(
        [layer(preset="53K"), set_layer(["quant.overrides.'../../*'.weights=int8-h64-rms-trust", "data.source='file:/a/../b'"])]
    ).config
    assert "/" not in config.run_id
    assert ".." not in config.run_id


def test_toml_and_json_round_trip(tmp_path):
    config = resolve(
        [
            layer(preset="214K", quant__method="quest", quant__bits=2),
            set_layer(["quant.overrides.'blocks.*.down'.weights=int8-h64-rms-trust"]),
        ]
    ).config
    path = tmp_path / "again.toml"
    path.write_text(to_toml(config))
    assert tomllib.loads(path.read_text())["model"]["n_layer"] == 4
    assert resolve([file_layer(path)]).config == config
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([layer(preset="35M")], ["preset", "'35M'", "30M", "1600M"]),
        ([set_layer(["quant.method=qest", "quant.bits=4"])], ["quant.method", "'qest'", "'quest'", "lsq"]),
        ([set_layer(["quant.method=quest", "quant.bits=9"])], ["quant.bits", "9", "8"]),
        ([set_layer(["quant.method=quest", "quant.bits=0"])], ["quant.bits", "0"]),
        ([set_layer(["quant.method=quest"])], ["quant.method", "quant.bits"]),
        ([set_layer(["quant.weights=int4-h128-rms-turst"])], ["quant.weights", "turst", "trust"]),
        (
            [layer(preset="53K"), set_layer(["quant.weights=int4-h128-rms-trust"])],
            ["quant.weights", "128", "d_model 64", "quant.block=64"],
        ),
        ([set_layer(["quant.overrides.'blocks.*.down'.weights=int99"])], ["quant.overrides", "int99"]),
        ([set_layer(["train.steps=0"])], ["train.steps", "0"]),
        ([set_layer(["train.steps=1.5"])], ["train.steps", "1.5"]),
        ([set_layer(["train.tokens=-5"])], ["train.tokens", "-5"]),
        ([set_layer(["train.tokens_per_param=nan"])], ["train.tokens_per_param", "nan"]),
        ([set_layer(["train.steps=3", "train.tokens=9"])], ["train.steps", "train.tokens"]),
        ([set_layer(["train.precision=fp8"])], ["train.precision", "'fp8'", "bf16"]),
        ([set_layer(["optim.lr=inf"])], ["optim.lr", "inf"]),
        ([set_layer(["optim.lr=fast"])], ["optim.lr", "'fast'"]),
        ([set_layer(["optim.schedule=linear"])], ["optim.schedule", "'linear'", "wsd"]),
        ([set_layer(["optim.schedule=wsd", "optim.decay_frac=0.95"])], ["optim.decay_frac", "0.95"]),
        ([set_layer(["model.n_head=3"])], ["model.n_head", "3", "64"]),
        ([set_layer(["model.d_model='wide'"])], ["model.d_model", "'wide'"]),
        ([set_layer(["train.micro_batch=5"])], ["train.micro_batch", "5", "16"]),
        ([set_layer(["train.seed=-1"])], ["train.seed", "-1"]),
        ([set_layer(["train.device=gpu"])], ["train.device", "'gpu'", "cuda"]),
    ],
)
def test_a_mistake_names_key_value_and_choices(layers, words):
    with pytest.raises(UsageError) as e:
        resolve(layers)
    sentence = str(e.value)
    assert [w for w in words if w not in sentence] == []
    assert "\n" not in sentence
    assert e.value.exit_code == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: set_layer(["optim.lrate=1"]), ["--set", "'optim.lrate'", "'optim.lr'"]),
        (lambda: set_layer(["seed"]), ["--set seed", "key=value"]),
        (lambda: set_layer(["quant.overrides.blocks.*.down.weights=bf16"]), ["quotes"]),
        (lambda: set_layer(["quant.overrides.'blocks.*.down'=bf16"]), ["quant.overrides", "weights"]),
        (lambda: set_layer(["quant.overrides.'blocks.*.down'.weight=bf16"]), ["'weight'", "'weights'"]),
        (lambda: env_layer({"QUESTCTL_TRAIN__SED": "1"}), ["QUESTCTL_TRAIN__SED", "QUESTCTL_TRAIN__SEED", "Two underscores"]),
        (lambda: flatten({"modle": {"n_layer": 3}}, where="x.toml"), ["x.toml", "'modle'"]),
        (lambda: flatten({"model": 3}, where="x.toml"), ["x.toml", "'model'"]),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(make, words):
    with pytest.raises(UsageError) as e:
        make()
    assert [w for w in words if w not in str(e.value)] == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("QUESTCTL_TRAIN_STEPS", "QUESTCTL_TRAIN__STEPS"),
        ("QUESTCTL_TRAIN__STEP", "QUESTCTL_TRAIN__STEPS"),
        ("QUESTCTL_TRAIN__SEDE", "QUESTCTL_TRAIN__SEED"),
        ("QUESTCTL_TRAIN__TOKENS__PER__PARAM", "QUESTCTL_TRAIN__TOKENS_PER_PARAM"),
        ("QUESTCTL_PRESETS", "QUESTCTL_PRESET"),
        ("QUESTCTL_presets", "QUESTCTL_PRESET"),
        ("QUESTCTL_CACHES", "QUESTCTL_CACHE"),  # of the variables that set no key, too
        ("QUESTCTL_RUN", "QUESTCTL_RUNS"),
        ("QUESTCTL_TRACKER", "QUESTCTL_TRACK"),
    ],
)
def test_a_variable_within_two_letters_of_a_known_one_is_refused(name, meant):
    for _ in range(2):  # the refusal is repeated, where a warning is not
        with pytest.raises(UsageError) as e:
            env_layer({name: "3"})
        assert str(e.value).startswith(f"{name}: names no key; did you mean {meant}")
        assert str(e.value).endswith("as in QUESTCTL_TRAIN__STEPS for train.steps.")


@pytest.mark.parametrize("name", ["QUESTCTL_HOME", "QUESTCTL_CACHE_DIR", "QUESTCTL_VERSION", "QUESTCTL_", "QUESTCTL_X__Y"])
def test_another_variable_is_ignored_with_one_warning_that_names_the_nearest(name, caplog):
    _refuse_or_warn.cache_clear()
    for _ in range(2):
        layer = env_layer({name: "/opt/questctl", "QUESTCTL_TRAIN__SEED": "7", "QUESTCTL_TRACK": "wandb"})
        assert dict(layer.values) == {("train", "seed"): 7}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    words = record.getMessage().rstrip(".").split()
    assert words[0] == f"{name}:"
    assert "is ignored; the nearest variable is" in record.getMessage()
    assert all(edit_distance(name, words[-1]) <= edit_distance(name, other) for other in VARIABLES)


VARIABLES = [f"QUESTCTL_{'__'.join(key).upper()}" for key in known_keys()] + sorted(_RESERVED_ENVIRONMENT)


def test_every_variable_is_its_own_and_one_letter_off_is_refused():
    assert all(edit_distance(a, b) > 0 for a, b in itertools.combinations(VARIABLES, 2))
    for variable in VARIABLES[::8]:
        for mistyped in (variable + "X", variable[:-1], variable[:10] + "Q" + variable[11:]):
            if mistyped not in VARIABLES:
                with pytest.raises(UsageError, match=f"^{mistyped}: names no key; did you mean "):
                    env_layer({mistyped: "1"})


@given(st.text("ABC_", max_size=6), st.text("ABC_", max_size=6), st.text("ABC_", max_size=6))
def test_the_edit_distance_is_a_metric(a, b, c):
    d = edit_distance
    assert (d(a, b) == 0) == (a == b)
    assert d(a, b) == d(b, a)
    assert d(a, c) <= d(a, b) + d(b, c)
    assert abs(len(a) - len(b)) <= d(a, b) <= max(len(a), len(b))
    assert d(a + c, b + c) <= d(a, b)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("train.device=foo", "train.device: 'foo': takes auto | cpu | cuda | cuda:N."),
        (
            "train.keep_steps=x",
            "train.keep_steps: 'x': takes steps whose checkpoints are kept for branches, such as '300,600'.",
        ),
        ("train.precision=fp8", "train.precision: unknown value 'fp8'; choices: fp32, bf16."),
        (
            "optim.schedule=cosin",
            "optim.schedule: unknown value 'cosin'; did you mean 'cosine'? Choices: cosine, wsd, constant, knots.",
        ),
        ("train.seed=-1", "train.seed: -1: must be 0 or more."),
        ("train.seed=1.5", "train.seed: 1.5: must be a whole number."),
        ("optim.lr=0", "optim.lr: 0: must be greater than 0."),
        ("optim.lr=true", "optim.lr: True: must be a number."),
        ("optim.beta1=1", "optim.beta1: 1: must be less than 1."),
        ("optim.lr=nan", "optim.lr: nan: must be finite."),
        ("data.source=3", "data.source: 3: must be a text."),
        ("data.source=", "data.source: '': must not be empty."),
    ],
)
def test_a_value_out_of_range_is_answered_in_words(assignment, sentence):
    with pytest.raises(UsageError) as e:
        resolve([set_layer([assignment])])
    assert str(e.value) == sentence


def test_no_constraint_is_told_in_the_words_of_pydantic():
    """Every field, given values of every wrong kind, answers without patterns and without 'input should'."""
    said = []
    for key, value in itertools.product(known_keys(), ("?", "", -1, 10**12, 0.5, float("nan"), True, [1])):
        try:
            resolve([layer("x", **{"__".join(key): value})])
        except (UsageError, DataError) as e:  # the latter of a checkpoint to begin with that is not here
            said.append(str(e))
    assert len(said) > 100
    assert [sentence for sentence in said if re.search("pattern|nput should|tring should|valid ", sentence)] == []


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml"):
        file_layer(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("lr = \n")
    with pytest.raises(UsageError, match=r"bad\.toml.*line 1"):
        file_layer(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(UsageError, match=r"latin\.toml"):
        file_layer(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    "values", [None, [], {}, {"schema": 99}, {"schema": 1, "model": {"n_layer": -1}}, {"schema": 1, "more": {}}]
)
def test_a_damaged_config_is_refused_by_name(values):
    with pytest.raises(UsageError, match=r"config\.json"):
        RunConfig.from_json(values, where="config.json")


@given(
    st.lists(st.sampled_from(["train.seed", "optim.lr", "model.n_layer", "quant.weights", "data.source"]), max_size=3),
    st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.booleans(), st.none(), st.lists(st.integers(), max_size=2)),
)
def test_any_value_under_any_key_is_a_config_or_one_of_our_errors(keys, value):
    try:
        resolve([Layer("f", {tuple(k.split(".")): value for k in keys})])
    except QuestError as e:
        sentence = str(e)
        if "\n" not in str(value):
            assert "\n" not in sentence


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("3e-4", 3e-4),
        ("true", True),
        ('"x"', "x"),
        ("int4-h64-rms-trust", "int4-h64-rms-trust"),
        ("[1, 2]", [1, 2]),
        ("", ""),
    ],
)
def test_values_are_toml_where_they_can_be(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (53_440, "53K"),
        (106_816, "107K"),
        (999_499, "999K"),
        (999_600, "1M"),
        (1_771_200, "1.8M"),
        (30_482_560, "30M"),
        (7e9, "7B"),
        (950, "950"),
    ],
)
def test_counts_are_short(n, text):
    assert human_count(n) == text


# --- quantized after training -----------------------------------------------------------------------------------------


def quantized_config(words="int4-h64-rms-ste", activations=None, **ptq):
    config = resolve([layer(preset="53K", quant__weights=words, quant__activations=activations or words)]).config
    return config.model_copy(update={"ptq": PTQConfig(**{"source": "53K-bf16-20x-s0-8f674f50", **ptq})})


def test_a_config_without_ptq_says_nothing_of_it():
    config = resolve([layer(preset="53K")]).config
    assert config.run_id == "53K-bf16-20x-s0-8f674f50"  # as before there was such a section
    for text in (json.dumps(config.to_json()), json.dumps(config.identity), to_toml(config)):
        assert "ptq" not in text
    assert not any(k[0] == "ptq" for k in known_keys())


def test_a_ptq_config_is_another_experiment_and_survives_its_json():
    seen = {
        quantized_config().run_id,
        quantized_config(method="gptq").run_id,
        quantized_config(source="another").run_id,
        quantized_config(method="gptq", calibration_tokens=4096).run_id,
        quantized_config(method="gptq", damping=0.1).run_id,
        quantized_config().model_copy(update={"ptq": None}).run_id,
    }
    assert len(seen) == 6
    config = quantized_config(method="gptq", calibration_tokens=4096, damping=0.01)
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert ("ptq.calibration_tokens", 4096) in flat_items(config)


@pytest.mark.parametrize(
    ("words", "activations", "method", "scheme"),
    [
        ("int4-h64-rms-ste", None, "rtn", "ptq-rtn-w4a4"),
        ("int4-rms-ste", None, "gptq", "ptq-gptq-w4a4-norot"),
        ("int2-h64-rms-ste", "bf16", "gptq", "ptq-gptq-w2a16"),
        ("int4-absmax-ste", None, "rtn", "ptq-rtn-int4-absmax-ste"),
    ],
)
def test_the_scheme_of_a_ptq_run_says_method_bits_and_rotation(words, activations, method, scheme):
    config = quantized_config(words, activations, method=method)
    assert config.scheme == scheme
    assert config.run_id.startswith(f"53K-{scheme}-20x-s0-")


@pytest.mark.parametrize("set_", ["ptq.method=rtn", "ptq.source=x"])
def test_ptq_is_not_the_users_to_set(set_):
    with pytest.raises(UsageError, match="ptq"):
        set_layer([set_])


def test_the_rotation_block_divides_every_width():
    for name in PRESETS:
        model, block = resolve([layer(preset=name)]).config.model, PRESETS[name]["quant"]["block"]
        assert model.rotation_block % block == 0
        assert model.rotation_block == block or name.startswith("laptop")  # which has one block for all its sizes
    assert resolve([layer(model__d_model=96, model__n_head=2, model__d_ff=200)]).config.model.rotation_block == 8


def test_amounts_have_units() -> None:
    assert [parse_amount(text, "--memory", BYTE_UNITS) for text in ("24GB", "1 GiB", "5e9", "2kb")] == [24e9, 2.0**30, 5e9, 2e3]
    assert [parse_amount(text, "--flops") for text in ("2e21", "1T", "7B")] == [2e21, 1e12, 7e9]
    for bad in ("-1", "GB", "1XB", "0", "1e999"):
        with pytest.raises(UsageError, match=r"--memory: .* is not a positive amount; units: B, KB"):
            parse_amount(bad, "--memory", BYTE_UNITS)
    assert [parse_count(text, "--max-tokens") for text in ("3B", "1.5M", "800", "2k")] == [3 * 10**9, 1_500_000, 800, 2000]
    for bad in ("0.3", "many", "-2", "1e999"):
        with pytest.raises(UsageError, match=r"^--max-tokens: "):
            parse_count(bad, "--max-tokens")


# --- quantizer specs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", RUN_IDS)
def test_run_ids_of_presets_and_methods_never_change(preset):
    """Run folders are found by their id: a change of how the config is held must not change what was named before.

    Learned scales are trained otherwise now. What earlier versions did is what these keys ask for; other runs do not have them.
    """
    ids = {name: of_method(preset, name, **BEFORE).run_id for name in RUN_IDS[preset]}
    assert ids == RUN_IDS[preset]
    now = {name: of_method(preset, name).run_id for name in ids}
    assert {name for name in ids if now[name] != ids[name]} == {"lsq", "lsq+", "pact", "adabin"}


BEFORE = {"optim__scale_calibrations": 0, "optim__scale_update": "absolute", "optim__scale_lr": 1.0}


def of_method(preset, name, **more):
    """The config of a method at 4 bits, or at those that it is made for."""
    method = METHODS[name]
    bits = {} if name == "bf16" else {"quant__bits": method.bits[0] if len(method.bits) == 1 else 4}
    return resolve([layer(preset=preset, quant__method=name, **bits, **more)]).config


@pytest.mark.parametrize("name", ["lsq", "quest"])
def test_a_stored_config_without_keys_of_learned_scales_is_what_earlier_versions_trained(name):
    """An old folder keeps its name and its training, as JSON, as TOML and as the command that trains it."""
    stored = of_method("53K", name, **BEFORE).to_json()
    assert not [key for key in stored["optim"] if key.startswith("scale_")]
    read = RunConfig.from_json(stored)
    assert read.run_id == RUN_IDS["53K"][name]
    assert read.to_json() == stored
    values = read.optim.scale_calibrations, read.optim.scale_update, read.optim.scale_lr
    assert (values == (0, "absolute", 1.0)) == (name == "lsq")
    toml = resolve([Layer("toml", flatten(tomllib.loads(to_toml(read)), where="toml"))]).config
    assert toml.run_id == read.run_id
    words = shlex.split(train_command(read))
    assert (
        resolve([layer(preset="53K", quant__method=name, quant__bits=4), set_layer(words_after(words, "--set"))]).config == read
    )


def words_after(words, flag):
    return [b for a, b in pairwise(words) if a == flag]


@pytest.mark.parametrize(
    "change", [{"optim__scale_calibrations": 5}, {"optim__scale_lr": 1.5}, {"optim__scale_update": "absolute"}]
)
def test_keys_of_learned_scales_count_where_scales_are_learned(change):
    plain, changed = (of_method("53K", "lsq", **more) for more in ({}, change))
    assert plain.run_id != changed.run_id
    assert RunConfig.from_json(changed.to_json()) == changed
    for name in ("quest", "bf16", "bitnet"):
        assert of_method("53K", name, **change).run_id == of_method("53K", name).run_id == RUN_IDS["53K"][name]
    down = {("quant", "overrides", "blocks.*.down", "activations"): "int8-learned-clip1"}
    layers = [layer(preset="53K", quant__method="quest", quant__bits=4, **more) for more in ({}, change)]
    assert len({resolve([each, Layer("down", down)]).config.run_id for each in layers}) == 2


def test_the_config_holds_specs_and_writes_their_text():
    down = {("quant", "overrides", "blocks.*.down", "weights"): "int8-h64-rms-trust"}
    sets = {("preset",): "53K", ("quant", "method"): "quest", ("quant", "bits"): 4, ("quant", "gradients"): "int8-absmax-ste"}
    config = resolve([Layer("test", sets | down)]).config
    quant = config.quant
    specs = [quant.weights, quant.activations, quant.gradients, quant.overrides["blocks.*.down"].weights]
    assert all(isinstance(spec, QuantSpec) for spec in specs)
    assert quant.overrides["blocks.*.down"].activations is None
    for dumped in (config.model_dump(), config.model_dump(mode="json"), json.loads(config.model_dump_json())):
        assert dumped["quant"] == {
            "weights": "int4-h64-rms-trust",
            "activations": "int4-h64-rms-trust",
            "gradients": "int8-absmax-ste",
            "overrides": {"blocks.*.down": {"weights": "int8-h64-rms-trust", "activations": None}},
        }
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_spec_is_taken_parsed_or_as_text_and_checked_for_its_operand_either_way():
    spec = QuantSpec.parse("ec4-ste")
    assert QuantConfig(weights=spec) == QuantConfig(weights="ec4-rms-ste")
    for value in (spec, "ec4-ste"):
        with pytest.raises(ValidationError, match=r"quant\.activations: 'ec4.*-ste': the entropy code"):
            QuantConfig(activations=value)
    with pytest.raises(UsageError, match=r"quant\.weights: 4: must be a text\."):
        resolve([layer(quant__weights=4)])


# --- lengths and sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "steps", "length"), [({"warmup_frac": 0.1}, 45, 4.5), ({"warmup_steps": 3.0}, 45, 3.0)])
def test_the_warm_up_in_steps_is_given_or_a_share_of_the_run(warmup, steps, length):
    config = RunConfig()
    config = config.model_copy(
        update={"optim": OptimConfig(**warmup), "train": config.train.model_copy(update={"steps": steps})}
    )
    assert config.warmup_steps == config.optim.warmup_of(steps) == length


def test_the_vocabulary_of_the_data_fills_in_for_none():
    config = RunConfig()
    assert config.with_vocabulary(300).model.vocab_size == 300
    assert config.with_vocabulary(None) == config
    assert config.with_vocabulary(300).with_vocabulary(16).model.vocab_size == 300
