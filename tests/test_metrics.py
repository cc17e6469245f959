"""The keys of metrics: each is defined once."""

from pathlib import Path

import pytest

from questctl import metrics

ROOT = Path(__file__).resolve().parent.parent
WITH_UNITS = [value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str) and "(" in value]


@pytest.mark.parametrize("key", [*WITH_UNITS, "_trust(fraction)", "_saturation(fraction)"])
def test_no_other_module_spells_a_key(key):
    files = [*(ROOT / "questctl").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]
    assert [path.name for path in files if f'{key}"' in path.read_text() and path.name != "metrics.py"] == []


def test_the_keys_are_those_of_files_written_before():
    assert set(WITH_UNITS) == {
        "train_loss(nats/token)",
        "val_loss(nats/token)",
        "val_loss_average(nats/token)",
        "teacher_kl(nats/token)",
        "loss_spike(nats/token)",
        "grad_norm_growth(ratio)",
        "step_time(ms)",
    }
    assert metrics.GRAD_NORM == "grad_norm"
    assert metrics.TOKENS_PER_S == "tokens/s"
    assert [metrics.trust("weight"), metrics.saturation("activation")] == [
        "weight_trust(fraction)",
        "activation_saturation(fraction)",
    ]
