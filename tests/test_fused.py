"""Training through the fused kernels: the outputs and every gradient of the plain path, up to codes on a threshold."""

import pytest
import tiny
import torch
from kernel_trials import as_on_a_gpu

from questctl.config import ModelConfig, QuantConfig
from questctl.errors import UsageError
from questctl.models.llama import build_model
from questctl.quant import fused
from questctl.quant.fusable import FusableInput, Gated, Normed
from questctl.quant.linear import QuantLinear, fan_out, quantized_once, use_kernels
from questctl.quant.spec import QuantSpec
from questctl.training import train

CPU = torch.device("cpu")
SHAPE = ModelConfig(n_layer=2, d_model=64, n_head=2, d_ff=128, vocab_size=50)
SPECS = ["int4-h32-rms-trust", "int2-h32-rms-trust1.5", "int1-h32-rms-clip1.3", "int3-rms-ste", "int7-h64-rms-trust"]


def pair(weights: str, activations: str, k: int = 64, n: int = 48) -> tuple[QuantLinear, QuantLinear]:
    """The same layer, plain and fused."""
    layers = []
    for kernels in ("reference", "fused"):
        torch.manual_seed(0)
        layers.append(QuantLinear(k, n, QuantSpec.parse(weights), QuantSpec.parse(activations)))
        use_kernels(layers[-1], kernels, CPU)
    return layers[0], layers[1]


def gradients(layer: QuantLinear, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, gradient of the weight."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, layer.weight], g.to(y.dtype))]


@pytest.mark.parametrize("spec_text", SPECS)
@pytest.mark.parametrize("rows", [(1,), (63,), (3, 41)])
def test_outputs_and_gradients_are_those_of_the_plain_layer(spec_text: str, rows: tuple[int, ...]) -> None:
    plain, ours = pair(spec_text, spec_text)
    assert ours.fused is not None
    x, g = torch.randn(*rows, 64), torch.randn(*rows, 48)
    for found, truth in zip(gradients(ours, x, g), gradients(plain, x, g), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize(
    ("weights", "activations"), [(SPECS[0], "bf16"), ("fp4-h32-rms-trust", SPECS[0]), ("bf16", "int2-h32-rms-trust")]
)
def test_one_fused_side_alone(weights: str, activations: str) -> None:
    plain, ours = pair(weights, activations)
    assert ours.fused is None
    assert (ours.weight_quantizer.fused is None) == (weights[:3] != "int")
    x, g = torch.randn(20, 64), torch.randn(20, 48)
    for found, truth in zip(gradients(ours, x, g), gradients(plain, x, g), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_in_bf16_the_product_is_exact_and_rounded_once() -> None:
    plain, ours = pair(SPECS[0], SPECS[0])
    x, g = torch.randn(33, 64), torch.randn(33, 48)
    exact = gradients(plain, x, g)
    with torch.autocast("cpu", torch.bfloat16):
        y, gx, gw = gradients(ours, x, g)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ours(x).detach().to(torch.bfloat16))
    for found, truth in ((gx, exact[1]), (gw, exact[2])):
        assert found.dtype == torch.float32
        assert (found - truth).norm() / truth.norm() < 1e-2


def test_a_shared_input_is_quantized_and_masked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [pair(SPECS[0], SPECS[0])[1] for _ in range(3)]
    plain = [pair(SPECS[0], SPECS[0])[0] for _ in range(3)]
    x = torch.randn(5, 64, requires_grad=True)
    calls = []
    original = fused.quantize
    monkeypatch.setattr(fused, "quantize", lambda *a: calls.append(a[0] is x) or original(*a))
    found = torch.autograd.grad(sum(y.square().sum() for y in fan_out(x, *layers)), x)[0]
    assert sum(calls) == 1
    truth = torch.autograd.grad(sum(y.square().sum() for y in fan_out(x, *plain)), x)[0]
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_codes_and_a_bit_mask_are_all_that_is_kept() -> None:
    ours = pair(SPECS[0], SPECS[0], 256, 256)[1]
    x = torch.randn(512, 256, requires_grad=True)
    kept: dict[int, int] = {}

    def count(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        ours(x)
    values = x.numel() + ours.weight.numel()
    assert sum(kept.values()) <= values * (1 + 1 / 8) + 4 * (512 + 256) + 64


@pytest.mark.parametrize(
    "spec_text",
    [
        "int8-rms-ste",
        "int4.sr-rms-ste",
        "int4-rms.g32-ste",
        "int4-h32.s-rms-trust",
        "int4-absmax-ste",
        "int4-learned-clip1",
        "int4-rms-trust0.5",
        "int4-rms-2of4-ste",
        "fp4-rms-trust",
        "int4-h16-rms-ste",
        "int4-rms-tanh",
        "bf16",
    ],
)
def test_what_the_kernels_do_not_know_trains_by_the_formula(spec_text: str) -> None:
    assert fused.settings(QuantSpec.parse(spec_text), 64) is None
    assert fused.settings(QuantSpec.parse("int4-rms-ste"), 60) is None


def test_evaluation_is_by_the_formula_everywhere() -> None:
    plain, ours = pair(SPECS[0], SPECS[0])
    x = torch.randn(9, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


def test_who_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from questctl.kernels import jit

    layer = pair(SPECS[0], SPECS[0])[0]
    gpu = torch.device("cuda")
    assert use_kernels(layer, "auto", CPU) == use_kernels(layer, "reference", gpu) == 0
    assert use_kernels(layer, "fused", CPU) == 1
    monkeypatch.setattr(jit, "why_not", lambda device: "there is no Triton here.")
    with pytest.warns(UserWarning, match="reference instead of fused: there is no Triton here"):
        assert use_kernels(layer, "auto", gpu) == 0
    with pytest.raises(UsageError, match=r"train.kernels: fused: there is no Triton here. Choose reference"):
        use_kernels(layer, "fused", gpu)


# --- an input that is computed in the same pass ------------------------------------------------------------------------


def normed(rows: tuple[int, ...], k: int = 64) -> Normed:
    norm = torch.nn.RMSNorm(k, eps=1e-5)
    with torch.no_grad():
        norm.weight.add_(0.2 * torch.randn(k))
    return Normed(norm, torch.randn(*rows, k).requires_grad_())


def gated(rows: tuple[int, ...], k: int = 64) -> Gated:
    return Gated(*(torch.randn(*rows, k).requires_grad_() for _ in range(2)))


def leaves(source: FusableInput) -> list[torch.Tensor]:
    return [source.x, source.norm.weight] if isinstance(source, Normed) else list(source)


def all_gradients(source: FusableInput, layers: list[QuantLinear], g: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of the layers, gradients of what their input is made of and of their weights."""
    ys = fan_out(source, *layers)
    found = torch.autograd.grad(ys, [*leaves(source), *(m.weight for m in layers)], [g.to(ys[0].dtype)] * len(ys))
    return [*(y.detach() for y in ys), *found]


@pytest.mark.parametrize("spec_text", SPECS)
@pytest.mark.parametrize("rows", [(1,), (63,), (3, 41)])
@pytest.mark.parametrize(("make", "count"), [(normed, 3), (gated, 1), (gated, 2)])
def test_outputs_and_gradients_of_a_source_are_those_of_the_separate_steps(spec_text, rows, make, count) -> None:
    layers = [pair(spec_text, spec_text) for _ in range(count)]
    for i, m in ((i, m) for i, both in enumerate(layers) for m in both):
        m.weight.data = m.weight.roll(i, 0) * (i + 1)
    source, g = make(rows), torch.randn(*rows, 48)
    truth = all_gradients(source, [plain for plain, _ in layers], g)
    ours = [ours for _, ours in layers]
    for found, true in zip(all_gradients(source, ours, g), truth, strict=True):
        assert (found.shape, found.dtype) == (true.shape, true.dtype)
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5 * float(true.abs().max()))
    by_hand = [m(source.value()) for m in ours]  # the kernel, after the value
    for a, b in zip(fan_out(source, *ours), by_hand, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("make", [normed, gated])
def test_a_source_in_bf16(make) -> None:
    plain, ours = pair(SPECS[0], SPECS[0])
    source, g = make((33,)), torch.randn(33, 48)
    truth = all_gradients(source, [plain], g)
    with torch.autocast("cpu", torch.bfloat16):
        found = all_gradients(source, [ours], g)
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0].float(), truth[0], rtol=1e-2, atol=1e-2)
    for a, b in zip(found[1:], truth[1:], strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 1e-2
    halves = [t.detach().bfloat16().requires_grad_() for t in leaves(source)]  # as silu(gate)·up after products in bf16
    if make is gated:
        y = ours(Gated(*halves))
        assert y.dtype == torch.bfloat16
        for a, b in zip(torch.autograd.grad(y, halves, g.bfloat16()), truth[1:], strict=False):
            assert a.dtype == torch.bfloat16
            assert (a.float() - b).norm() / b.norm() < 0.05


def test_what_a_source_is_made_of_is_all_that_is_kept() -> None:
    ours = pair(SPECS[0], SPECS[0], 256, 256)[1]
    for source in (normed((512,), 256), gated((512,), 256)):
        kept: dict[int, int] = {}

        def count(t: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            fan_out(source, ours)
        made_of = sum(t.nbytes for t in leaves(source))
        values = 512 * 256 + ours.weight.numel()
        assert sum(kept.values()) <= made_of + values * (1 + 1 / 8) + 4 * (512 + 256) + 64


@pytest.mark.parametrize(
    "spec_texts",
    [["bf16"] * 2, [SPECS[0], "bf16"], [SPECS[0], SPECS[1]], ["int4-learned-clip1"] * 2, ["int8-rms-ste"] * 2],
    ids="+".join,
)
@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_layers_that_do_not_take_a_source_alike_see_its_value(spec_texts: list[str], kernels: str) -> None:
    layers = [pair(w, w)[kernels == "fused"] for w in spec_texts]
    source = normed((5,))
    calls, seen = [], []
    source.norm.register_forward_hook(lambda *a: calls.append(a[2]))
    for m in layers:
        m.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = fan_out(source, *layers)
    assert len(calls) == 1
    assert all(x is calls[0] for x in seen)
    assert all(torch.equal(y, m(calls[0])) for y, m in zip(found, layers, strict=True))
    with torch.no_grad():  # nobody trains: by the formula
        assert all(torch.equal(y, m(calls[0])) for y, m in zip(fan_out(source, *layers), layers, strict=True))


def test_a_model_trains_through_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of every parameter, and what ran: each norm and gate of a block in the pass that quantizes it."""
    from questctl.kernels import norm_quant

    called: list[str] = []
    for name in ("rmsnorm_quantize", "silu_mul_quantize"):
        run = getattr(norm_quant, name)
        monkeypatch.setattr(norm_quant, name, lambda *a, run=run, name=name: called.append(name) or run(*a))
    ids = torch.randint(0, 50, (3, 18), generator=torch.Generator().manual_seed(0))
    results = []
    for kernels in ("reference", "fused"):
        model = build_model(SHAPE, QuantConfig(weights=SPECS[0], activations=SPECS[0]), 0)
        use_kernels(model, kernels, CPU)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}))
    assert called == ["rmsnorm_quantize", "rmsnorm_quantize", "silu_mul_quantize"] * SHAPE.n_layer
    (loss, truth), (ours, found) = results
    assert ours == pytest.approx(loss, rel=1e-4)
    for name, g in truth.items():
        assert (found[name] - g).norm() / g.norm() < 1e-2, name  # a tipped code is a step


def test_a_training_step_by_the_kernels_of_a_gpu() -> None:
    """Two passes forward and backward of a step through the Triton kernels, on the layouts that a model has."""
    shape = ModelConfig(n_layer=1, d_model=32, n_head=2, d_ff=64, vocab_size=50)
    ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        model = build_model(shape, QuantConfig(weights=SPECS[0], activations=SPECS[0]), 0)
        use_kernels(model, "fused", CPU)
        with quantized_once(model):
            losses = [model(part[:, :-1], part[:, 1:]) for part in ids.split(1)]
            sum(losses).backward()
        return float(sum(losses).detach()), {n: p.grad for n, p in model.named_parameters()}

    loss, truth = step()
    with as_on_a_gpu() as ran:
        ours, found = step()
    assert ran == {"quantize", "rmsnorm_quantize", "silu_mul_quantize", "int_gemm", "mask_rotate"}
    assert ours == pytest.approx(loss, rel=1e-4)
    for name, g in truth.items():
        assert (found[name] - g).norm() / g.norm() < 1e-2, name  # a tipped code is a step


def test_the_compiler_takes_the_whole_training_graph() -> None:
    model = build_model(SHAPE.model_copy(update={"n_layer": 1}), QuantConfig(weights=SPECS[0], activations=SPECS[0]), 0)
    use_kernels(model, "fused", CPU)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))

    def run(forward) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # all but the code generation
    assert all(torch.equal(a, b) for a, b in zip(run(compiled), run(model), strict=True))
    torch._dynamo.reset()


# --- once per optimizer step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("spec_text", [SPECS[0], "int4-learned-clip1", "int4.sr-rms-ste"])
def test_weights_are_quantized_once_and_gradients_stay(kernels: str, spec_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = spec_text if "trust" in spec_text else "int4-rms-trust"
    model = build_model(SHAPE, QuantConfig(weights=spec_text, activations=inputs), 0)
    use_kernels(model, kernels, CPU)
    x = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(0))

    def accumulate(once: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        with quantized_once(model, once):
            for part in x.split(1):
                (model(part[:, :-1], part[:, 1:]) / 4).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    truth = accumulate(False)
    calls = []
    original = QuantLinear.operand
    monkeypatch.setattr(QuantLinear, "operand", lambda self: calls.append(self._kept is None) or original(self))
    found = accumulate(True)
    together = spec_text == SPECS[0] and kernels == "reference"  # as one matrix for each width, without the layers
    assert sum(calls) == (14 * 4 if ".sr" in spec_text else 0 if together else 14)
    assert all(m._kept is None for m in model.modules() if isinstance(m, QuantLinear))
    assert found.keys() == truth.keys()
    for name, g in truth.items():
        torch.testing.assert_close(found[name], g, rtol=1e-4, atol=2e-5 * float(g.abs().max()), msg=name)


def test_a_fused_run_learns_as_a_plain_one_and_has_its_name(tmp_path) -> None:
    plain = train(tiny.config(tiny.QUEST), runs=tmp_path / "plain")
    ours = train(tiny.config(tiny.QUEST, train__kernels="fused", train__micro_batch=2), runs=tmp_path / "fused")
    assert ours.run == plain.run
    assert ours.loss == pytest.approx(plain.loss, rel=2e-3)
