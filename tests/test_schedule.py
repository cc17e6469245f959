"""The precision schedule: full precision until quantization begins, then the same weights under quantizers."""

import json

import pytest
import tiny
import torch
from command_line import output

from questctl.config import RunConfig
from questctl.config.commands import make_config, train_command
from questctl.config.describe import to_toml
from questctl.data import sampler
from questctl.errors import UsageError
from questctl.models.llama import build_model
from questctl.quant.linear import QuantLinear
from questctl.store import RunStore, describe
from questctl.training import checkpoint, loading
from questctl.training.loop import train
from questctl.training.optim import calibration_steps
from questctl.training.run_data import load_data

EVERY = {"train.log_every": 1, "train.health_every": 100, "train.keep_steps": "7"}


def lines(root, config):
    return [json.loads(line) for line in RunStore(root).run(config.run_id).metrics_path.read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run in full precision, whose checkpoint of step 7 is kept."""
    root = tmp_path_factory.mktemp("plain")
    train(tiny.config(EVERY), runs=root)
    return root


@pytest.mark.parametrize(
    "quant",
    [
        {"quant.method": "quest", "quant.bits": 2, "quant.block": 32},
        {"quant.method": "quest", "quant.bits": 2, "quant.block": 32, "quant.weight_only": True},
        {"quant.weights": "bf16", "quant.activations": "int4-h16-rms-trust"},
    ],
    ids=["both", "weights", "inputs"],
)
def test_a_run_is_that_in_full_precision_until_quantization_begins(tmp_path, plain, quant):
    config = tiny.config({**EVERY, **quant, "quant.start": 7})
    train(config, runs=tmp_path)
    full, late = lines(plain, tiny.config(EVERY)), lines(tmp_path, config)
    assert late[:7] == full[:7]
    assert late[7]["train_loss(nats/token)"] != full[7]["train_loss(nats/token)"]

    kept = checkpoint.load(RunStore(plain).run(tiny.config(EVERY).run_id).kept_path / "step-00000007")
    model = build_model(config.model.model_copy(update={"vocab_size": 16}), config.quant, 5, rotate_back=True)
    model.load_state_dict(kept.model)
    data = load_data(config, RunStore(tmp_path).run(config.run_id))
    rows = torch.from_numpy(sampler.batch(data.train, seed=0, step=7, batch_size=8, seq_len=16))
    assert late[7]["train_loss(nats/token)"] == pytest.approx(model(rows[:, :-1], rows[:, 1:]).item(), abs=1e-6)


@pytest.mark.parametrize("weights_only", [False, True])
def test_eight_bits_hardly_change_the_loss_where_they_begin(tmp_path, plain, weights_only):
    """Weights keep their meaning, also where they alone are rotated."""
    quant = {"quant.method": "quest", "quant.bits": 8, "quant.block": 32, "quant.weight_only": weights_only}
    config = tiny.config({**EVERY, **quant, "quant.start": 7})
    result = train(config, runs=tmp_path)
    full, late = (lines(root, c)[7]["train_loss(nats/token)"] for root, c in ((plain, tiny.config(EVERY)), (tmp_path, config)))
    assert late == pytest.approx(full, abs=2e-3)
    loaded = loading.load(RunStore(tmp_path).run(config.run_id))
    assert loading.loss_on(loaded.model, config, loaded.data) == result.loss


def test_learned_scales_of_each_stage_are_set_from_data(tmp_path, monkeypatch):
    config = tiny.config(tiny.LSQ, quant__stages="3:lsq-w8a8", quant__start=7)
    seen = []
    real = loading.checkpoint.load

    def recorded(path):
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(loading.checkpoint, "load", recorded)
    train(config, runs=tmp_path)
    assert seen == ["step-00000003", "step-00000007"]
    model = loading.load_model(RunStore(tmp_path).run(config.run_id))
    specs = {str(m.weight_quantizer.spec) for m in model.modules() if isinstance(m, QuantLinear)}
    assert specs == {str(config.quant.weights)}
    for layer in (m for m in model.modules() if isinstance(m, QuantLinear)):
        scale = layer.weight_quantizer.scale.item()
        layer.calibrate_weight()
        assert 0.5 < scale / layer.weight_quantizer.scale.item() < 2
    assert calibration_steps(config, 7) == {7, *range(8, 18)}


# --- the config -------------------------------------------------------------------------------------------------------


def config_of(start=0, stages="", **more: object) -> RunConfig:
    optim = {"schedule": "wsd"} if start == "cooldown" else {}
    quant = {"method": "quest", "bits": 2, "start": start, "stages": stages} | more
    return make_config(preset="107K", quant=quant, optim=optim, train={"steps": 100})


@pytest.mark.parametrize(
    ("start", "stages", "steps", "label"),
    [
        (0, "", [0], "quest-w2a2"),
        (0.75, "", [0, 75], "quest-w2a2+s0.75"),
        (75, "", [0, 75], "quest-w2a2+s0.75"),
        ("0.75", "", [0, 75], "quest-w2a2+s0.75"),
        ("cooldown", "", [0, 80], "quest-w2a2+s0.8"),
        (0.001, "", [0], "quest-w2a2+s0"),
        (0.5, "0:quest-w8a8", [0, 50], "quest-w2a2+s0.5+"),
        (0.5, ".25: quest-w8a8 , 40:int4-rms-ste/bf16", [0, 25, 40, 50], "quest-w2a2+s0.5+"),
    ],
)
def test_places_are_shares_or_steps_or_the_cooldown(start, stages, steps, label):
    config = config_of(start, stages)
    assert [step for step, _ in config.stages] == steps
    assert config.scheme.startswith(label)
    assert config.stages[-1][1] == config_of().quant
    assert (config.run_id == config_of().run_id) == (start == 0)


@pytest.mark.parametrize("start", [0.8, 40, "cooldown"])
def test_a_schedule_survives_toml_json_and_the_command(tmp_path, start):
    config = config_of(start, "" if start == "cooldown" else "0.25:quest-w8a8")
    path = tmp_path / "c.toml"
    path.write_text(to_toml(config))
    assert make_config(file=path).run_id == config.run_id
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert "-q quest -b 2" in train_command(config)
    assert f"quant.start={start}" in train_command(config)


def test_bf16_beside_schemes_that_begin_late_is_one_run():
    assert config_of(0.5, method="bf16", bits=16).run_id == config_of(0, method="bf16", bits=16).run_id


def test_tokens_before_quantization():
    config = config_of(0.5, "0.25:quest-w8a8")
    assert config.full_precision_tokens == config.tokens // 4 == describe(config)["tokens_fp"]
    assert config_of().full_precision_tokens == 0
    assert config_of(method="bf16", bits=16).full_precision_tokens == config.tokens


@pytest.mark.parametrize(
    ("start", "stages", "message"),
    [
        ("x", "", "quant.start: 'x' is neither a share of the run below 1, nor a number of steps, nor cooldown."),
        (-1, "", "quant.start: -1 is neither"),
        (1.5, "", "quant.start: 1.5 is neither"),
        (float("nan"), "", "quant.start: nan"),
        (True, "", "quant.start: True is neither"),
        (100, "", "quant.start: step 100 is not before the end of the run, 100 steps."),
        (0.5, "0.6:quest-w8a8", "quant.start: step 50 is not after quant.stages, step 60."),
        (0, "0.6:quest-w8a8", "quant.start: step 0 is not after quant.stages, step 60."),
        (0.5, "quest-w8a8", "quant.stages: 'quest-w8a8' is not of the form START:SCHEME"),
        (0.5, "0.2:quest-w9a9", "quant.stages: '0.2:quest-w9a9' is not of the form START:SCHEME"),
        (0.5, "0.2:int9/bf16", "quant.stages: "),
    ],
)
def test_mistakes_are_named(start, stages, message):
    with pytest.raises(UsageError) as e:
        config_of(start, stages)
    assert str(e.value).startswith(message)


def test_a_cooldown_needs_a_schedule_that_has_one():
    with pytest.raises(UsageError, match=r"cooldown needs optim\.schedule=wsd, not cosine"):
        make_config(preset="107K", quant={"method": "quest", "bits": 2, "start": "cooldown"})


def test_a_stage_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    words = ["--set", "quant.stages=0.2:int4-h48-rms-ste/bf16", "--set", "quant.start=.5"]
    said = output("train", "--preset", "53K", "-q", "quest", "-b", "4", *words, "--runs", str(tmp_path), code=2)
    assert "h48" in said
    assert not list(tmp_path.iterdir())
