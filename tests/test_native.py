"""CPU operations in C: the bits of their definitions in torch, the fallback without a compiler, and whole steps."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch

from questctl.kernels import native
from questctl.kernels.native import round_rows, round_rows_reference
from questctl.models import llama
from questctl.quant import quantizer
from questctl.quant.fusable import Normed
from questctl.quant.linear import QuantLinear, quantized_once
from questctl.quant.quantizer import make_quantizer
from questctl.training import train

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C compiler")
SPECS = [
    "int4-h64-rms-trust",
    "int2-h16-rms-trust",
    "int1-h32-rms-clip1.3",
    "int3-rms-ste",
    "int8-h128-rms-clip1",
    "int2-rms-trust",
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def looked_for_anew() -> Iterator[None]:
    """What this process knows of its library is forgotten before and after."""
    native.library.cache_clear()
    native.checked.cache_clear()
    yield
    native.library.cache_clear()
    native.checked.cache_clear()


@needs_compiler
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (2, 3, 33), (0, 8)])
def test_one_pass_has_the_bits_of_the_definition(shape: tuple[int, ...], keep: bool) -> None:
    z = draw(*shape)
    if z.numel() > 1:
        z.view(-1)[:2] = torch.tensor([float("nan"), 0.0])
        z[-1] = 0.0
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    for bits in (1, 2, 4, 7):
        top = (2**bits - 1) / 2
        right = round_rows_reference(z, norm, 0.37, top, keep=keep)
        found = round_rows(z.clone(), norm, 0.37, top, keep=keep)
        for a, b in zip(found, right, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a.view(torch.int32), b.view(torch.int32))
    assert native.checked().keys() >= {"round_rows", "norm_rows"}


@needs_compiler
@pytest.mark.usefixtures("looked_for_anew")
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("round_rows", "floorf(fabsf", "ceilf(-1.0f + fabsf"),  # ties are rounded down
        ("norm_rows", "(x[i * cols + j] * r[i]) * gain[j]", "x[i * cols + j] * (r[i] * gain[j])"),
        ("turn_rows", "low[j] * c[j] + high[j] * s[j + half]", "fmaf(low[j], c[j], high[j] * s[j + half])"),
    ],
)
def test_a_function_with_other_bits_is_not_used(name: str, right: str, wrong: str, monkeypatch, tmp_path) -> None:
    source = native.SOURCE.read_text()
    assert right in source
    (tmp_path / "native.c").write_text(source.replace(right, wrong))
    monkeypatch.setattr(native, "SOURCE", tmp_path / "native.c")
    assert native.library() is not None
    assert name not in native.checked()
    assert native.usable(name) is None
    assert native.checked()


@pytest.mark.usefixtures("looked_for_anew")
def test_without_a_compiler_the_definition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "none")
    assert native.find_compiler() is None
    assert native.library() is None
    x, norm = draw(3, 8), torch.ones(3, 1)
    for a, b in zip(round_rows(x, norm, 1.0, 1.5, keep=True), round_rows_reference(x, norm, 1.0, 1.5, keep=True), strict=True):
        assert torch.equal(a, b)


@needs_compiler
@pytest.mark.usefixtures("looked_for_anew")
def test_a_compiler_that_fails_is_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "native.c"
    broken.write_text("this is no C\n")
    monkeypatch.setattr(native, "SOURCE", broken)
    with pytest.raises(subprocess.CalledProcessError):
        native.compiled_library()
    assert native.library() is None


def test_beside_many_threads_torch_divides_its_own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: native.MOST_THREADS + 1)
    assert native.usable("round_rows") is None


@pytest.mark.parametrize("word", SPECS)
@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 256)])
def test_the_quantizer_in_one_pass_has_the_bits_of_the_general_one(word: str, shape: tuple[int, ...]) -> None:
    """Values and gradients, also where the input is a view with other strides, and a row is zero."""
    x = draw(*shape[:-2], shape[-1], shape[-2], seed=1).transpose(-1, -2)
    x[..., 0, :] = 0.0
    g = draw(*x.shape, seed=2)

    def run(general: bool) -> list[torch.Tensor]:
        q = make_quantizer(word)
        assert q.rounds_rows(x)
        if general:
            q.by_row = None
        own = x.clone().requires_grad_()
        y = q(own)
        (grad,) = torch.autograd.grad(y, own, g)
        with torch.no_grad():
            return [y.detach(), grad, q(own)]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def test_what_is_not_plain_takes_the_general_way() -> None:
    q = make_quantizer("int4-h64-rms-trust")
    assert q.rounds_rows(draw(2, 64))
    assert not q.rounds_rows(draw(2, 64).double())
    assert not q.rounds_rows(draw(2, 64).bfloat16())
    assert not q.rounds_rows(draw(2, 64).to("meta"))
    for other in (
        "int4-learned-clip1",
        "int4-rms.g16-trust",
        "fp4-rms-trust",
        "int4.sr-rms-ste",
        "int4-rms-2of4-trust",
        "int4-rms-tanh",
    ):
        assert not make_quantizer(other).rounds_rows(draw(2, 64)), other


def test_weights_are_quantized_as_one_matrix_and_no_bit_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of two steps: in the second it is known which layers are called together."""
    config = tiny.config(tiny.QUEST)
    from questctl.models.llama import build_model

    shape = config.model.model_copy(update={"vocab_size": 50, "n_layer": 2})
    x = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    real = quantizer._round_rows
    monkeypatch.setattr(quantizer, "_round_rows", lambda x, how, keep: calls.append(x.ndim) or real(x, how, keep=keep))

    def run(once: bool) -> list[torch.Tensor]:
        model = build_model(shape, config.quant, 0)
        out = []
        for _ in range(2):
            model.zero_grad()
            calls.clear()
            with quantized_once(model, once):
                loss = model(x[:, :-1], x[:, 1:])
                loss.backward()
            out += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert all(m._kept is None for m in layers)
        widths = {m.in_features for m in layers}
        assert calls.count(2) == (len(widths) if once else len(layers))  # weights are matrices, inputs have three dimensions
        return out

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


# --- the steps of a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passed_on", [True, False])
def test_an_rmsnorm_in_few_passes_has_the_bits_of_the_module(passed_on: bool) -> None:
    """Value and gradients, with and without another use of x, whose gradient comes first."""
    norm = torch.nn.RMSNorm(24, eps=1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, g, other = draw(3, 5, 24), draw(3, 5, 24, seed=1), draw(3, 5, 24, seed=2)

    def run(watched: bool) -> list[torch.Tensor]:
        handle = norm.register_forward_hook(lambda *_: None) if watched else None  # whoever watches sees the module called
        own = x.clone().requires_grad_()
        normed = Normed(norm, own * 1.0)
        y = normed.value()
        assert (type(y.grad_fn).__name__ == "_RMSNormBackward") == (not watched and "norm_rows" in native.checked())
        outputs, grads = ((y, normed.through + draw(3, 5, 24, seed=3)), (g, other)) if passed_on else ((y,), (g,))
        found = torch.autograd.grad(outputs, (own, norm.weight), grads)
        with torch.no_grad():
            alone = Normed(norm, x).value()
        if handle:
            handle.remove()
        return [y.detach(), *found, alone]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 7, 1, 24), (3, 4, 2, 2)])
def test_heads_turned_in_one_pass_have_the_bits_of_the_formula(shape: tuple[int, int, int, int]) -> None:
    b, t, h, w = shape
    cos, sin = draw(t, w, seed=4), draw(t, w, seed=5)
    x = draw(b, t, 3 * h * w)[..., : h * w].unflatten(-1, (h, w)).transpose(1, 2)  # a view, as q is
    g = draw(b, h, t, w, seed=6)

    def run(formula: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        own = x.detach().requires_grad_()
        y = formula(own, cos, sin)
        return [y.detach(), *torch.autograd.grad(y, own, g)]

    assert all(torch.equal(a, b) for a, b in zip(run(llama.turned), run(llama.rotary), strict=True))


MIXED = {"quant.weights": "int1-rms-ste", "quant.activations": "int2-rms-clip1.3"}


@needs_compiler
@pytest.mark.usefixtures("looked_for_anew")
@pytest.mark.parametrize("quant", [tiny.QUEST, pytest.param(MIXED, marks=pytest.mark.slow), {}])
def test_a_run_has_the_same_losses_with_and_without_the_library(quant, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = train(tiny.config(quant, train__steps=12), runs=tmp_path / "with")
    assert native.checked()
    monkeypatch.setenv("CC", "none")
    native.library.cache_clear()
    native.checked.cache_clear()
    without = train(tiny.config(quant, train__steps=12), runs=tmp_path / "without")
    assert not native.checked()
    assert (with_it.loss, with_it.train_loss) == (without.loss, without.train_loss)
    weights = [(tmp_path / word / with_it.run / "model.safetensors").read_bytes() for word in ("with", "without")]
    assert weights[0] == weights[1]


def test_a_step_does_not_import_sympy() -> None:
    """Which takes a second or two in every process, and which gradients of outputs that are no scalars do."""
    program = """
import sys, torch, tiny
from pathlib import Path
from questctl.training import train
train(tiny.config(tiny.QUEST, train__steps=2, train__checkpoint_every=0), runs=sys.argv[1])
from questctl.kernels import native
assert native.find_compiler() is None or native.checked()
assert "sympy" not in sys.modules
"""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", program, folder], check=True, cwd=Path(__file__).parent)


@needs_compiler
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_library_may_be_looked_for_first_in_any_mode(mode, looked_for_anew) -> None:
    """`questctl generate` runs in inference mode from the first token on, and a run in bf16 in autocast from the first step."""
    with mode():
        assert native.checked().keys() == {"round_rows", "norm_rows", "turn_rows"}
