"""Benchmark cases of whole models: correct where built correctly; a wrong scale, code or token gets no speed."""

import json

import pytest
import torch
from command_line import outcome
from helpers import slow_but

from questctl.bench import model_cases
from questctl.bench.suite import Benchmark
from questctl.cli import bench as command
from questctl.cli import options as opt
from questctl.kernels import bench as kernel_bench
from questctl.kernels import devices
from questctl.kernels.bench import run_case
from questctl.kernels.devices import Calibration
from questctl.kernels.op import Case
from questctl.models.llama import Llama
from questctl.quant.packed import PackedLinear

CPU = torch.device("cpu")
SHORT = ["data.seq_len=16"]


def inference(name: str, *, quant: str = "quest", bits: str | None = "4", sets: list[str] = SHORT) -> list[Case]:
    config = opt.build_config(None, sets, preset="107K", quant=quant, bits=bits).config
    return list(model_cases.inference_cases(name, config, CPU))


def packed_model(case: Case) -> Llama:
    """The model that the first implementation runs."""
    model = case.implementations[0].call.__self__.model
    assert isinstance(model, Llama)
    return model


@pytest.mark.parametrize("bits", [4, pytest.param(2, marks=pytest.mark.slow), 1])
def test_the_models_quantizer_is_right_forward_and_backward(bits):
    forward, backward = model_cases.quantizer_cases(bits, CPU)
    for one in (forward, backward):
        rows = run_case(one, CPU, check_only=True)
        assert [r.verdict for r in rows] == ["PASS", "PASS", "floor"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_training_step_is_checked_and_a_leak_between_sequences_is_noticed(precision, monkeypatch):
    config = opt.build_config(None, ["data.seq_len=16", "train.batch_size=4"], preset="53K", quant="quest", bits="2").config
    one = model_cases.train_step_case(config, precision, CPU)
    assert [i.name for i in one.implementations] == ["quest-w2a2", "full precision"]
    assert [r.verdict for r in run_case(one, CPU, check_only=True)] == ["PASS", "PASS"]
    step = one.implementations[0].call
    monkeypatch.setattr(step, "loss", lambda x, y: step.model(x, y) * len(x))  # a loss that grows with the batch
    assert run_case(one, CPU, check_only=True)[0].verdict == "FAIL"


@pytest.mark.slow
def test_the_fused_training_step_takes_no_more_memory_than_full_precision():
    """Of several layers; with one, what quantizing itself takes for a moment decides."""
    sets = ["model.n_layer=4", "data.seq_len=64", "train.batch_size=8", "train.kernels=fused"]
    config = opt.build_config(None, sets, preset="53K", quant="quest", bits="4").config
    quantized, full = run_case(model_cases.train_step_case(config, "fp32", CPU), CPU, seconds=0.001)
    assert 0 < quantized.extra_bytes <= full.extra_bytes


# --- prefill and decode -----------------------------------------------------------------------------------------------

NAMES = ["quest-w4a4 packed, by integers", "quest-w4a4 packed, a byte a weight", "full precision bf16", "full precision fp32"]


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_the_packed_model_is_right_beside_the_same_model_unquantized(name):
    half, single = inference(name)
    assert [half.op, single.op] == [f"{name} bf16", f"{name} fp32"]
    assert [i.name for i in half.implementations] == NAMES[:3]
    assert [i.name for i in single.implementations] == NAMES
    for one in (half, single):
        assert one.shape == {"d_model": 64, "n_layer": 2, "vocab": 256, "batch": 1, "seq": 16}
        rows = run_case(one, CPU, check_only=True)
        assert [r.verdict for r in rows] == ["PASS"] * 2 + ["floor"] * (len(rows) - 2)
        assert rows[0].wrong == rows[1].wrong == 0
    assert run_case(single, CPU, check_only=True)[0].error < 1e-5  # far below one tipped code, which the tolerance allows


@pytest.mark.parametrize("name", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("quant", "bits", "how"),
    [
        ("quest", "1", "integers"),
        ("lsq", "2", "integers"),
        ("mxfp4", None, "values"),
        pytest.param("quest", "3", "integers", marks=pytest.mark.slow),
        pytest.param("quest", "8", "values", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_product_passes_and_is_called_by_its_name(name, quant, bits, how):
    for one in inference(name, quant=quant, bits=bits):
        assert one.implementations[0].name.endswith(f"packed, by {how}")
        assert run_case(one, CPU, check_only=True)[0].verdict == "PASS"


@pytest.mark.parametrize("name", ["prefill", "decode"])
@pytest.mark.parametrize("dtype", [0, 1], ids=["bf16", "fp32"])
@pytest.mark.parametrize("broken", slow_but(["scale", "row of scales", "codes"], ["row of scales"]))
def test_a_layer_that_is_not_the_one_it_was_packed_from_fails_without_a_speed(name, dtype, broken):
    one = inference(name)[dtype]
    layer = packed_model(one).blocks[1].get_submodule("gate")
    assert isinstance(layer, PackedLinear)
    if broken == "scale":
        layer.scale.mul_(1.25)
    elif broken == "row of scales":
        layer.scale[3] *= 4
    else:
        layer.codes[0] ^= 255
    row = run_case(one, CPU, seconds=0.001)[0]
    assert (row.verdict, row.wrong, row.p50_us) == ("FAIL", 1, None)
    assert "1 wrong layers" in row.reason


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_right_layers_with_the_logits_of_another_token_fail(name):
    one = inference(name)[1]
    (tokens,) = one.inputs(0)
    ours = one.implementations[0]
    right = ours.call(*ours.prepare(tokens))
    assert one.check((tokens,), right).passed
    assert not one.check((tokens.roll(1, -1),), right).passed
    assert not one.check((tokens,), right * float("nan")).passed


@pytest.mark.parametrize("dtype", [0, 1], ids=["bf16", "fp32"])
def test_the_same_step_again_gives_the_same_logits_which_are_those_of_the_whole_text(dtype):
    one = inference("decode")[dtype]
    (tokens,) = one.inputs(3)
    for run in one.implementations:
        token, cache = run.prepare(tokens)
        assert token.tolist() == tokens[:, -1:].tolist()
        first, again = run.call(token, cache), run.call(token, cache)
        assert first.shape == (1, 1, 256)
        assert torch.equal(first, again)
        other = run.call(1 - token.clamp(max=1), cache)
        assert not torch.equal(first, other)
        assert torch.equal(run.call(token, cache), first)
    whole = inference("prefill")[dtype].implementations[0].call(tokens)[:, -1:]
    tolerance = {"atol": 1e-2, "rtol": 0.1} if dtype == 0 else {"atol": 1e-5, "rtol": 1e-4}
    token, cache = one.implementations[0].prepare(tokens)
    torch.testing.assert_close(one.implementations[0].call(token, cache), whole, **tolerance)


def test_the_likeliest_tokens_are_those_of_the_unpacked_model():
    config = opt.build_config(None, SHORT, preset="107K", quant="quest", bits="4").config
    one = inference("prefill", sets=["data.seq_len=512"])[1]
    (tokens,) = one.inputs(0)
    model = model_cases.build_model(packed_model(one).config, config.quant, 0)
    with torch.no_grad():
        for p in model.parameters():  # as the benchmark rounds them
            p.copy_(p.bfloat16())
        same = model(tokens).argmax(-1) == one.implementations[0].call(tokens).argmax(-1)
    assert float(same.float().mean()) > 0.98


def test_bytes_and_operations_by_hand(monkeypatch):
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 192)
    rows = 2 * (4 * 64 + 2 * 192 + 64)
    stay = 2 * (256 * 64 + 5 * 64)  # head and norms in bf16
    prefill = inference("prefill", bits="2")[0].cost
    assert prefill == model_cases.Cost(weights / 4 + 4 * rows + stay + 2 * 16 * (64 + 256), 2 * 16 * weights, "int8")
    assert inference("decode", bits="2")[0].cost is None  # it stays in the processor's cache, and has no GB/s
    monkeypatch.setitem(model_cases.ROTATE_BYTES, "cpu", 1)
    decode = inference("decode", bits="2")[0].cost
    assert decode == model_cases.Cost(weights / 4 + 4 * rows + stay + 2 * (64 + 256 + 2 * 2 * 16 * 64), 2 * weights, "int8")


# --- the command ------------------------------------------------------------------------------------------------------


def test_names_and_flags_say_the_same(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "benchmark", lambda names, *a, **k: (asked.append(names), Benchmark((), None))[1])
    for args in (
        ("train-step", "prefill", "decode"),
        ("--decode", "--train-step", "--prefill"),
        ("train-step", "--prefill", "prefill", "--decode"),
    ):
        assert outcome("bench", *args)[0] == 0
    assert asked == [["train-step", "prefill", "decode"]] * 3


def test_a_cpu_checks_and_times_them_and_says_what_it_could_not_measure(monkeypatch):
    rates = Calibration("test", 1, copy_gbs=10.0, tops={"fp32": 0.1, "int8": 0.2})
    for module in (devices, kernel_bench):  # once before the first case, and again after each
        monkeypatch.setattr(module, "calibrate", lambda device, **how: rates)
    args = ("--preset", "53K", "--bits", "2", "--set", "data.seq_len=16", "--json")
    code, out, err = outcome("bench", "prefill", "decode", "--check-only", *args)
    rows = json.loads(out)["rows"]
    assert code == 0
    assert {r["op"] for r in rows} == {"prefill bf16", "prefill fp32", "decode bf16", "decode fp32"}
    assert all(r["p50_us"] is None for r in rows)
    said = " ".join(err.split())
    assert "the Triton kernels and CUDA graphs are not" in said
    assert "can stay in the cache, so that no GB/s is shown" in said
    code, out, _ = outcome("bench", "--decode", "--prefill", "--seconds", "0.001", *args)
    rows = json.loads(out)["rows"]
    assert code == 0
    assert all(r["p50_us"] > 0 and r["speed_up_p50"] > 0 for r in rows)
    rated = {(r["op"], r["implementation"]) for r in rows if r["roofline_share"] is not None}
    packed = [name.replace("w4a4", "w2a2") for name in NAMES[:2]]
    assert rated == {(f"prefill {dtype}", name) for dtype in ("bf16", "fp32") for name in packed}


def test_a_model_without_quantized_weights_has_nothing_to_pack():
    code, _, err = outcome("bench", "prefill", "--check-only", "--preset", "53K", "--quant", "bf16", "--set", "data.seq_len=16")
    assert code == 2
    assert "nothing to pack" in err.replace("\n", " ")
