"""Packed layers: the outputs of the layers they replace, in the memory that their bits imply."""

import copy
from collections import Counter

import pytest
import torch
from helpers import slow_but
from kernel_trials import as_on_a_gpu
from torch.utils._python_dispatch import TorchDispatchMode

from questctl.config import LayerQuant, ModelConfig, QuantConfig
from questctl.kernels import fake_quant, norm_quant, rotary
from questctl.models.llama import Cache, Llama, build_model, rotary_tables
from questctl.quant.codes import stored_levels
from questctl.quant.fused import settings
from questctl.quant.linear import QuantLinear, fan_out
from questctl.quant.packed import PackedLinear, freeze, odd_codes, packed_size
from questctl.quant.quantizer import make_quantizer
from questctl.quant.spec import QuantSpec

BY_INTEGERS = ("int4-learned-clip1", "int4.sr-rms.t-ste")  # of these
SHAPE = ModelConfig(n_layer=2, d_model=64, n_head=2, d_ff=192, vocab_size=61)
QUEST = {b: f"int{b}-h64-rms-{'clip1.3' if b == 1 else 'trust'}" for b in (1, 2, 3, 4)}
OTHERS = [
    ("ec2.5-h32-rms-trust", "int4-h32-rms-trust"),
    ("ec7-rms.g32-ste", "bf16"),
    ("int4-h64.s-rms.g32-trust", "int4-h64.s-rms-trust"),
    ("fp4-e8m0.g32-ste", "fp4-e8m0.g32-ste"),
    ("ternary-absmean.t-ste", "sint8-absmax-ste"),
    ("int4-learned-clip1", "int4-learned-clip1"),
    ("int1-meanstd-ste", "int1-learned.o-clip1"),
    ("int2-h64-rms-2of4pairs-trust", "int4-h64-rms-trust"),
    ("int8-rms-ste", "int8-rms-ste"),
    ("lloyd3-rms-ste", "int4-rms-ste"),
    ("olive4-mse-ste", "olive4-mse-ste"),
    ("int4.sr-rms.t-ste", "int4.sr-rms.t-ste"),
    ("int3-rms-ste", "bf16"),
    ("int5-rms-ste", "int4-rms-ste"),
    ("fp8-absmax-ste", "fp8-absmax-ste"),
    ("power3-rms-ste", "power4-rms-ste"),
    ("fp4-e4m3.g16-ste", "bf16"),
]


def model(weights: str, activations: str, **overrides: LayerQuant) -> Llama:
    return build_model(SHAPE, QuantConfig(weights=weights, activations=activations, overrides=overrides), 0)


def tokens(rows: int = 3, length: int = 33) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def spread(m: Llama) -> Llama:
    """Weights as after training: rows of different sizes, some outliers, learned scales of different sizes."""
    with torch.no_grad():
        for i, p in enumerate(m.parameters()):
            noise = torch.rand(p.shape[0], *[1] * (p.ndim - 1), generator=torch.Generator().manual_seed(i))
            p.mul_(0.5 + 3 * noise)
    return m


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("weight_only", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_is_the_unpacked_one_to_the_last_bit(bits: int, rotated: bool, weight_only: bool, autocast: bool) -> None:
    spec_text = QUEST[bits] if rotated else f"int{bits}-rms-ste"
    unpacked = spread(model(spec_text, "bf16" if weight_only else spec_text))
    packed = freeze(copy.deepcopy(unpacked))
    x = tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(packed(x[:, :-1], x[:, 1:]), unpacked(x[:, :-1], x[:, 1:]))
    assert not any(isinstance(m, QuantLinear) for m in packed.modules())


@pytest.mark.parametrize(("weights", "activations"), OTHERS)
def test_every_other_grid_scale_mask_and_offset_too(weights: str, activations: str) -> None:
    unpacked = spread(model(weights, activations))
    packed = freeze(copy.deepcopy(unpacked))
    with torch.no_grad():
        assert torch.equal(packed(tokens()), unpacked(tokens()))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("inputs", [1, 4, 7])
@pytest.mark.parametrize("product", ["integers", "bytes"])
@pytest.mark.parametrize("rows", [1, 63])
def test_integers_are_the_exact_product_of_the_same_codes(bits: int, inputs: int, rows: int, product: str) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(64, 40, QuantSpec.parse(f"int{bits}-h32-rms-ste"), QuantSpec.parse(f"int{inputs}-h32-rms-ste"))
    packed = PackedLinear(layer, product)
    assert packed.product_by == product
    x = torch.randn(2, rows, 64)
    exact = layer.input_quantizer(x).double() @ layer.weight_quantizer(layer.weight).double().T
    y = packed(x)
    assert y.shape == (2, rows, 40)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.detach().abs().max()))
    codes, scale = odd_codes(layer.input_quantizer, x)
    assert torch.equal(codes * scale, layer.input_quantizer(x))
    assert set(codes.unique().tolist()) <= set(range(1 - 2**inputs, 2**inputs, 2))


@pytest.mark.parametrize(
    ("weights", "activations"),
    [(QUEST[4], QUEST[4]), ("int4-learned-clip1", "int2-learned-clip1"), ("int2-rms.t-ste", "int4-rms.t-ste")],
)
def test_one_scale_of_a_tensor_serves_every_row(weights: str, activations: str) -> None:
    unpacked = spread(model(weights, activations))
    integers = freeze(copy.deepcopy(unpacked), "integers")
    assert packed_size(integers).by_integers == 14
    h = torch.randn(4, 5, 64)
    with torch.no_grad():
        for name in ("q", "gate"):
            a, b = (m.blocks[0].get_submodule(name)(h) for m in (integers, unpacked))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("product", ["values", "integers"])
def test_a_bf16_model_is_packed_as_it_is(bits: int, product: str) -> None:
    unpacked = spread(model(QUEST[bits], QUEST[bits])).bfloat16()
    packed = freeze(copy.deepcopy(unpacked), product)
    with torch.no_grad():
        assert packed(tokens()).dtype == torch.bfloat16
        if product == "values":
            assert torch.equal(packed(tokens()), unpacked(tokens()))
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        a, b = (m.blocks[0].q(x).float() for m in (packed, unpacked))
        assert float((a - b).norm() / b.norm()) < 1e-2


@pytest.mark.parametrize(("weights", "activations"), [o for o in OTHERS if o[0] not in BY_INTEGERS])
def test_what_has_no_integers_multiplies_by_values(weights: str, activations: str) -> None:
    packed = freeze(model(weights, activations), "integers")
    assert {m.product_by for m in packed.modules() if isinstance(m, PackedLinear)} == {"values"}
    assert packed_size(packed).by_integers == 0


def test_layers_of_different_kinds_do_not_share_an_input() -> None:
    torch.manual_seed(0)
    a, b = (QuantLinear(64, 8, QuantSpec.parse(w), QuantSpec.parse(QUEST[4])) for w in (QUEST[4], "fp4-h64-rms-trust"))
    x = torch.randn(3, 64)
    mixed = [PackedLinear(a, "integers"), PackedLinear(b, "integers"), b]
    assert [m.product_by for m in mixed[:2]] == ["integers", "values"]
    assert all(torch.equal(y, m(x)) for y, m in zip(fan_out(x, *mixed), mixed, strict=True))


def test_layers_that_quantize_inputs_alone_or_nothing_stay() -> None:
    exact = LayerQuant(weights="bf16", activations="bf16")
    m = model(QUEST[4], QUEST[4], **{"blocks.0.q": LayerQuant(weights="bf16"), "blocks.0.k": exact})
    before = m(tokens())
    freeze(m)
    kinds = [type(m.blocks[0].get_submodule(n)).__name__ for n in "qkv"]
    assert kinds == ["QuantLinear", "Linear", "PackedLinear"]
    assert torch.equal(m(tokens()), before)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rows_that_do_not_fill_whole_bytes_take_a_byte_a_code(bits: int) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(33, 8, QuantSpec.parse(f"int{bits}-rms-ste"), QuantSpec.parse("int4-rms-ste"))
    packed = PackedLinear(layer, "integers")
    assert (packed.codes.shape, packed.product_by) == ((8, 33), "values")
    x = torch.randn(3, 33)
    assert torch.equal(packed(x), layer(x))


# --- inputs through the kernel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec_text", [*QUEST.values(), "int7-h32-rms-ste", "int4-rms-ste", "int2-h64-rms-clip1.3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_the_codes_of_the_formula_up_to_ties(spec_text: str, dtype: torch.dtype) -> None:
    quantizer = make_quantizer(spec_text)
    how = settings(quantizer.spec, 192)
    assert how is not None
    x = torch.randn(3, 1000, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = 0
    x[0, 1, :3] *= 50
    (a, s), (b, t) = odd_codes(quantizer, x), odd_codes(quantizer, x, how)
    assert (a.shape, s.shape, a.dtype, s.dtype) == (b.shape, t.shape, b.dtype, t.dtype)
    torch.testing.assert_close(s, t, rtol=1e-6, atol=0)
    off = (a.int() - b.int()).abs()
    assert int(off.max()) in (0, 2)  # the level beside it
    assert float((off > 0).float().mean()) < 3e-5
    assert torch.equal(b[0, 0], a[0, 0])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 130])  # one row, few, and more than are multiplied packed
def test_a_model_through_the_kernel_is_the_model_by_the_formula(bits: int, rows: int) -> None:
    unpacked = spread(model(QUEST[bits], QUEST[bits]))
    by_formula, by_kernel = (freeze(copy.deepcopy(unpacked), "integers", how) for how in ("auto", "fused"))
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in ("quantize_codes", "rmsnorm_quantize", "silu_mul_quantize"):
            module = fake_quant if name == "quantize_codes" else norm_quant
            run = getattr(module, name)
            patch.setattr(module, name, lambda *a, run=run, name=name: called.append(name) or run(*a))
        a = by_formula(tokens(1, rows))
        assert called == []
        b = by_kernel(tokens(1, rows))
    of_a_block = ["rmsnorm_quantize", "quantize_codes", "rmsnorm_quantize", "silu_mul_quantize"]  # qkv, o, gate and up, down
    assert called == 2 * of_a_block
    assert packed_size(by_kernel).by_integers == 14
    close = ((a - b).norm(dim=-1) / a.norm(dim=-1)) < 1e-4
    assert float(close.float().mean()) > 0.97


def test_words_that_the_kernel_does_not_know_go_by_the_formula() -> None:
    for spec_text in ("int4-learned-clip1", "int4-h64.s-rms-trust", "int4-absmax-ste"):
        layers = [freeze(spread(model(spec_text, spec_text)), "integers", k).blocks[0].q for k in ("fused", "reference")]
        assert [m.product_by for m in layers] == ["integers", "integers"]
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(layers[0](x), layers[1](x))


# --- one product of layers with one input -----------------------------------------------------------------------------


@pytest.mark.parametrize("spec_text", [*QUEST.values(), "int4-rms.t-ste"])
@pytest.mark.parametrize("kernels", ["auto", "fused"])
@pytest.mark.parametrize("rows", slow_but([1, 5, 64, 65], [5, 65]))  # more are multiplied layer by layer
@pytest.mark.parametrize("product", ["integers", "bytes"])
def test_joined_layers_give_the_same_bits_as_each_alone(spec_text: str, kernels: str, rows: int, product: str) -> None:
    unpacked = spread(model(spec_text, spec_text)).blocks[0]
    block = freeze(copy.deepcopy(unpacked), product, kernels)
    x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(0))
    for names in (("q", "k", "v"), ("gate", "up")):
        joined = [block.get_submodule(name) for name in names]
        alone = [PackedLinear(unpacked.get_submodule(name), "integers", kernels) for name in names]
        assert all(torch.equal(y, m(x)) for y, m in zip(fan_out(x, *joined), alone, strict=True))
        assert all(torch.equal(m(x), a(x)) for m, a in zip(joined, alone, strict=True))
        for m, a in zip(joined, alone, strict=True):
            assert torch.equal(m.values(), a.values())
            assert m.stored_bytes == a.stored_bytes


def products(block: torch.nn.Module, rows: int = 1) -> int:
    with Launches() as launches, torch.no_grad():
        fan_out(torch.randn(rows, 64), block.q, block.k, block.v)
    return launches.names.count("questctl.packed_gemm.default")


def test_which_layers_are_joined() -> None:
    def frozen(spec_text: str = QUEST[4], product: str = "integers", **overrides: LayerQuant) -> torch.nn.Module:
        return freeze(
            model(spec_text, spec_text, **{f"blocks.0.{k}": o for k, o in overrides.items()}), product, "fused"
        ).blocks[0]

    assert [products(frozen(), rows) for rows in (1, 64, 65)] == [1, 1, 3]
    assert products(frozen(product="values")) == 0
    assert products(frozen("int4-learned-clip1")) == 3  # each input has a scale of its own
    assert products(frozen(v=LayerQuant(weights=QUEST[2]))) == 3
    assert products(frozen(v=LayerQuant(activations=QUEST[2]))) == 3
    assert products(frozen(v=LayerQuant(weights="bf16", activations="bf16"))) == 2


def test_the_bytes_beside_the_codes_are_those_of_the_codes() -> None:
    m = freeze(spread(model(QUEST[4], QUEST[4])), "bytes")
    x, size = tokens(2, 9), packed_size(m)
    expected = m(x)
    assert size.expanded_bytes == sum(n.in_features * n.out_features for n in m.modules() if isinstance(n, PackedLinear))
    assert torch.equal(copy.deepcopy(m)(x), expected)
    assert torch.equal(m.double().float()(x), expected)
    other = freeze(model(QUEST[4], QUEST[4]), "bytes")
    assert not torch.equal(other(x), expected)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(x), expected)


def test_joined_rows_are_stored_once_and_stay_joined() -> None:
    m = freeze(spread(model(QUEST[4], QUEST[4])), "integers", "fused")
    buffers = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in m.buffers()}
    levels = sum(layer.levels.nbytes for layer in m.modules() if isinstance(layer, PackedLinear))
    assert sum(buffers.values()) == packed_size(m).bytes + levels
    expected = m(tokens(1, 1))
    other = freeze(model(QUEST[4], QUEST[4]), "integers", "fused")
    other.load_state_dict({name: t.clone() for name, t in m.state_dict().items()}, assign=True)
    for twin in (copy.deepcopy(m), copy.deepcopy(m).to(torch.device("cpu")).double().float(), other):
        block = twin.blocks[0]
        assert block.q.codes.data_ptr() + block.q.codes.nbytes == block.k.codes.data_ptr()
        assert block.gate.scale.data_ptr() + block.gate.scale.nbytes == block.up.scale.data_ptr()
        assert block.q.codes.data_ptr() != m.blocks[0].q.codes.data_ptr()
        assert torch.equal(twin(tokens(1, 1)), expected)
        block.v.scale.mul_(2)  # what is written in one view is what the product reads
        assert not torch.equal(twin(tokens(1, 1)), expected)
    assert m.to("meta").blocks[0].v.codes.is_meta


@pytest.mark.parametrize(("bits", "d_ff"), [(4, 64), pytest.param(3, 32, marks=pytest.mark.slow)])
def test_the_kernels_of_a_gpu_write_the_same_text(bits: int, d_ff: int) -> None:
    """A prompt and one token through the Triton kernels and what is done around them, on the layouts that a model has."""
    spec_text, shape = f"int{bits}-h32-rms-trust", ModelConfig(n_layer=1, d_model=32, n_head=2, d_ff=d_ff, vocab_size=61)
    m = freeze(spread(build_model(shape, QuantConfig(weights=spec_text, activations=spec_text), 0)), "integers", "fused")
    text = tokens(1, 4)

    def logits() -> torch.Tensor:
        cache = Cache(shape, 4, "cpu")
        with torch.inference_mode():
            return torch.cat([m(part, cache=cache) for part in (text[:, :3], text[:, 3:])], 1)[0]

    by_torch = logits()
    with as_on_a_gpu() as ran:
        by_kernels = logits()
    assert ran == {"rmsnorm_quantize", "silu_mul_quantize", "quantize_codes", "packed_gemm", "rotary"}
    torch.testing.assert_close(by_kernels, by_torch, rtol=1e-4, atol=1e-4 * float(by_torch.abs().max()))


class Launches(TorchDispatchMode):
    """The names of the operations that are no views: on a GPU each is a kernel to launch, or several."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view:
            self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_decoded_token_launches_in_a_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fake_quant, rotary):
        monkeypatch.setattr(module, "eager_on_cpu", lambda x: False)  # one op, as on a GPU
    m = freeze(model(QUEST[4], QUEST[4]).to(dtype), "integers", "fused")
    cache = Cache(SHAPE, 8, "cpu")
    cos, sin = (t[5:6] for t in rotary_tables(8, 32, SHAPE.rope_theta, torch.device("cpu")))
    with torch.no_grad():
        m(tokens(1, 5), cache=cache)
        cache.advance(1)
        x = m.embed(tokens(1, 1))
        with Launches() as launches:
            m.blocks[1](x, cos, sin, cache, 1)
    found = Counter(name.partition(".")[2].partition(".")[0] for name in launches.names)
    (attention,) = (name for name in found if "attention" in name)
    assert found == {
        "rmsnorm_quantize": 2,
        "quantize_codes": 1,
        "silu_mul_quantize": 1,
        "packed_gemm": 4,
        "rotary": 1,
        attention: 1,
        "add": 2,
    }


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "share"), [(4, 0.27), (2, 0.14), (1, 0.08), (3, 0.20)])
@pytest.mark.parametrize("width", [256, 768])
def test_memory_of_a_packed_weight(bits: int, share: float, width: int) -> None:
    layer = PackedLinear(QuantLinear(width, 128, QuantSpec.parse(QUEST[bits]), QuantSpec.parse(QUEST[4])))
    stored = sum(t.untyped_storage().nbytes() for t in layer.state_dict().values())
    assert stored == layer.stored_bytes
    assert stored <= share * 2 * 128 * width
    assert [p for p in layer.parameters() if p.numel() > 1] == []


def test_sizes_of_a_model_by_hand() -> None:
    size = packed_size(freeze(model(QUEST[2], QUEST[2]), "integers"))
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 192)
    rows = 2 * (4 * 64 + 2 * 192 + 64)
    assert size == (14, 14, weights // 4 + 4 * rows, 2 * weights, 0)


def test_the_packed_state_moves_and_loads() -> None:
    a, b = (freeze(spread(model(QUEST[3], QUEST[3]))) for _ in range(2))
    for m in b.modules():
        if isinstance(m, PackedLinear):
            m.codes.zero_()
    assert not torch.equal(a(tokens()), b(tokens()))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(tokens()), b(tokens()))
    assert "weights=int3-h64-rms-trust" in repr(a.blocks[0].q)


def test_a_mask_adds_zero_to_the_levels() -> None:
    assert len(stored_levels(QuantSpec.parse("int2-rms-2of4-ste"))) == 5
    assert len(stored_levels(QuantSpec.parse("ternary-rms-2of4-ste"))) == 3
    assert make_quantizer("int4-rms-ste").rounded(torch.zeros(2, 8)).s.tolist() == [[0.0], [0.0]]
