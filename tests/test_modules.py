"""Quantized layers in modules of others: the same function, the right layers, and everything that a module must survive."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import questctl
from questctl.errors import UsageError
from questctl.quant.linear import QuantConv1D, QuantLinear
from questctl.quant.methods import METHODS, method_specs
from questctl.quant.packed import PackedLinear
from questctl.quant.quantizer import make_quantizer
from questctl.quant.spec import QuantSpec

W4 = "int4-h32-rms-trust"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mlp(width=64, hidden=96):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def inputs(rows=60, width=64):
    return 2 * torch.randn(rows, width)


def quietly(module, *args, **settings):
    """`quantize_` without its warnings, which tests of their own look at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return questctl.quantize_(module, *args, **settings)


# --- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", ["both", "weights", "inputs"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "bf16"])
def test_a_swapped_layer_computes_the_function_of_the_plain_one(method, sides):
    bits = "8" if "8" in METHODS[method].bits else METHODS[method].bits[-1]
    weights, activations = method_specs(method, bits, block=64)
    weights, activations = "bf16" if sides == "inputs" else weights, "bf16" if sides == "weights" else activations
    if weights == activations == "bf16":  # a method for weights alone
        return
    exact_enough = bits == "8" and "2of4" not in weights
    plain, x = nn.Sequential(nn.Linear(128, 48)), inputs(width=128)
    quant = questctl.make_config(quant={"weights": weights, "activations": activations}).quant
    module = questctl.calibrate_(quietly(copy.deepcopy(plain), quant), [x])
    exact, y = plain(x), module(x)
    assert isinstance(module[0], QuantLinear)
    if exact_enough:  # two thirds of a per cent for each operand, more for learned scales of a tensor and levels of a power
        assert (y - exact).norm() / exact.norm() < 0.035
    assert F.cosine_similarity(y.flatten(), exact.flatten(), dim=0) > (0.99 if exact_enough else 0.6)
    questctl.freeze_(module)
    with torch.no_grad():
        assert torch.equal(module(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_our_layers_and_of_the_formula(dtype):
    plain, x, g = mlp(), inputs(), torch.randn(60, 64)
    module = quietly(copy.deepcopy(plain), W4)
    spec = QuantSpec.parse(W4)
    ours = nn.Sequential(*(QuantLinear.from_linear(copy.deepcopy(m), spec, spec) if i != 1 else m for i, m in enumerate(plain)))
    quantizer = make_quantizer(W4)

    def by_formula(x):
        for linear in (plain[0], plain[2]):
            x = F.gelu(x) if linear is plain[2] else x
            x = F.linear(quantizer.reference(x), quantizer.reference(linear.weight), linear.bias)
        return x

    results = []
    for function, parameters in ((module, module.parameters()), (ours, ours.parameters()), (by_formula, plain.parameters())):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = function(leaf)
        results.append([y.float(), *torch.autograd.grad(y, [leaf, *parameters], g.to(y.dtype))])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    if dtype == torch.float32:
        for a, b in zip(results[0], results[2], strict=True):
            torch.testing.assert_close(a, b)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q, k, v = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
        return self.out(F.scaled_dot_product_attention(q, k, v))


def test_siblings_quantize_a_tensor_once_and_never_another_one(monkeypatch):
    module = quietly(Attention(), W4)
    alone = copy.deepcopy(module)
    for m in alone.modules():
        m.shared = None
    calls = []
    real = QuantLinear.quantize_input
    monkeypatch.setattr(QuantLinear, "quantize_input", lambda self, x: calls.append(self) or real(self, x))
    x, memory = inputs() * 1.0, inputs() * 1.0
    for given, times in (((x,), 2), ((x, memory), 3), ((x,), 2)):
        calls.clear()
        leaf = [t.clone().requires_grad_() for t in given]
        y = module(*(t * 1.0 for t in leaf))
        assert len(calls) == times
        expected = alone(*(t * 1.0 for t in leaf))
        assert torch.equal(y, expected)
        for a, b in zip(*(torch.autograd.grad(out.square().sum(), leaf) for out in (y, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        x = x.clone()
        first = module.q_proj(x)
        x.mul_(3)  # the same tensor with other numbers
        assert torch.equal(module.k_proj(x), alone.k_proj(x))
        assert torch.equal(module.q_proj(x), alone.q_proj(x))
        assert not torch.equal(first, module.q_proj(x))
    hidden = inputs().requires_grad_() * 1.0
    torch.utils.checkpoint.checkpoint(module, hidden, use_reentrant=False).sum().backward()  # each layer is called twice
    assert copy.deepcopy(module).q_proj.shared._entry is None


# --- which layers -----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two blocks, an embedding, a head that shares its weight, and one that does not."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}) for _ in range(2))
        self.lm_head = nn.Linear(64, 40, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


def states(module):
    return {x.layer: (x.weights, x.activations) for x in questctl.describe(module).layers if x.state == "quantized"}


def test_patterns_say_which_layers_and_how():
    model = quietly(
        Model(),
        "quest",
        bits=2,
        overrides={"*.1.down": {"weights": "int8-rms-ste", "activations": "bf16"}, "*.up": "lsq-w4a16", "layers.0.down": W4},
        exclude="*.1.up",
    )
    assert states(model) == {
        "layers.0.up": ("int4-learned-clip1", "bf16"),
        "layers.0.down": (W4, W4),
        "layers.1.down": ("int8-rms-ste", "bf16"),
    }
    assert type(model.lm_head) is nn.Linear
    quietly(model, "quest-w8a8", include="lm_head")  # a second call adds to the first
    assert len(states(model)) == 4


def test_a_shared_weight_stays_unless_it_is_named():
    with pytest.warns(UserWarning, match="lm_head shares its weight with embed and stays as it is"):
        model = questctl.quantize_(Model(tied=True), "int4-rms-ste")
    assert "lm_head" not in states(model)
    quietly(model, "int4-rms-ste", include=["*", "lm_head"])
    assert "lm_head" in states(model)
    assert model.lm_head.weight is model.embed.weight


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"include": "layers.*.dwon"}, "include: unknown layer 'layers.*.dwon'; did you mean 'layers.*.down'?"),
        ({"exclude": "attention"}, "exclude: unknown layer 'attention'"),
        ({"overrides": {"*.q": "bf16"}}, "unknown layer '*.q'"),
        ({"overrides": {"*.up": {"weight": W4}}}, "overrides: '*.up': unknown key 'weight'; did you mean 'weights'?"),
        ({"overrides": {"*.up": W4, "layers.0.*": "int8-rms-ste"}}, "give layer layers.0.up different weights"),
        ({"exclude": "*"}, "include=['*'] without exclude=['*'] leaves no layer"),
        ({"strict": True}, "layer layers.0.up: rotation h128 does not divide the width 64"),
        ({"quant": "qest"}, "quant: unknown method 'qest'; did you mean 'quest'?"),
        ({"quant": "lsq", "bits": None}, "quant: 'lsq' needs bits"),
        ({"quant": W4}, f"quant: '{W4}' says its bits itself"),
        ({"quant": "int4-rsm-ste", "bits": None}, "quant: 'int4-rsm-ste', component 2: unknown"),
        ({"bits": 9}, "quant.bits: unknown value '9'"),
        ({"overrides": {"*.down": "int4-rms.g64-ste"}}, "layer layers.0.down: scale rms.g64: the group does not divide"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(settings, sentence):
    model = Model()
    with pytest.raises(UsageError) as e:
        questctl.quantize_(model, **{"quant": "quest", "bits": 4, **settings})
    assert sentence in str(e.value)
    assert "\n" not in str(e.value)
    assert states(model) == {}


def test_a_block_that_does_not_divide_a_width_gives_way_to_one_that_does():
    model = nn.Sequential(nn.Linear(192, 96), nn.Linear(96, 96), nn.Linear(96, 40), nn.Linear(40, 3))
    with pytest.warns(UserWarning, match="rotation") as caught:
        questctl.quantize_(model, "quest", bits=4)
    assert [str(w.message) for w in caught] == [
        "quantize_: rotation h128 does not divide the width 192: h64 instead in 0.",
        "quantize_: rotation h128 does not divide the width 96: h32 instead in 1 and 1 more.",
        "quantize_: rotation h128 does not divide the width 40: no rotation instead in 3.",
    ]
    assert [w for w, _ in states(model).values()] == [
        "int4-h64-rms-trust",
        "int4-h32-rms-trust",
        "int4-h32-rms-trust",
        "int4-rms-trust",
    ]


def test_layers_that_are_called_in_a_way_of_their_own_stay():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    module = nn.ModuleDict({"own": Own(32, 32), "normed": normed, "lazy": nn.LazyLinear(3), "plain": nn.Linear(32, 32)})
    with pytest.warns(UserWarning, match="stays as it is") as caught:
        questctl.quantize_(module, W4)
    said = " ".join(str(w.message) for w in caught)
    assert all(words in said for words in ("own is a Own with a forward", "normed computes its weight", "lazy has no weight"))
    assert list(states(module)) == ["plain"]
    with pytest.raises(UsageError, match="include: own is a Own with a forward of its own and cannot be quantized"):
        questctl.quantize_(module, W4, include="own")
    with pytest.raises(UsageError, match="a linear layer itself"):
        questctl.quantize_(nn.Linear(32, 32), W4)


def test_torchs_transformer_layers_use_their_quantized_layers_in_evaluation_too():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), 1)
    quietly(encoder, "int2-h32-rms-ste")
    assert list(states(encoder)) == ["layers.0.linear1", "layers.0.linear2"]  # attention multiplies by its weights itself
    x, padding = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    trained = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=padding), trained)


def test_a_layer_in_two_places_stays_one_layer_and_keeps_its_hooks():
    shared, calls = nn.Linear(32, 32), []
    shared.register_forward_hook(lambda *_: calls.append(1))
    module = quietly(nn.Sequential(shared, nn.ReLU(), shared), W4)
    assert module[0] is module[2]
    module(torch.randn(4, 32))
    assert len(calls) == 2
    questctl.freeze_(module)
    assert isinstance(module[2], PackedLinear)
    assert module[0] is module[2]


def test_conv1d_of_transformers_is_a_linear_layer_with_a_transposed_weight():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    plain, x = nn.Sequential(Conv1D(48, 64)), inputs()
    weight = plain[0].weight
    exact = plain(x)
    module = quietly(plain, "quest", bits=8)
    assert isinstance(module[0], QuantConv1D)
    assert module[0].weight is weight  # (K, N), so that checkpoints of the plain module load
    y = module(x)
    assert (y - exact).norm() / exact.norm() < 0.02
    with torch.no_grad():
        assert torch.equal(questctl.freeze_(module)(x), y)


# --- what a module must survive ---------------------------------------------------------------------------------------


def test_training_copies_checkpoints_and_conversion():
    module = questctl.calibrate_(quietly(mlp(), "lsq", bits=4), [inputs()])
    x, target = inputs(), torch.randn(60, 64)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    y = module(x)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = quietly(mlp(), "lsq", bits=4)
    fresh.load_state_dict(torch.load(buffer))
    for other in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
    for dtype in (torch.bfloat16, torch.float64):
        assert copy.deepcopy(module).to(dtype)(x.to(dtype)).dtype == dtype
    packed = questctl.freeze_(copy.deepcopy(module))
    with torch.no_grad():
        exact = packed(x)
        assert torch.equal(exact, y)
        half = copy.deepcopy(packed).to(torch.bfloat16)
        assert half[0].rows.scale.dtype == torch.float32
        assert (half(x.bfloat16()) - exact).norm() / exact.norm() < 0.1
        assert torch.equal(pickle.loads(pickle.dumps(packed))(x), y)


@pytest.mark.slow
def test_torch_compile_takes_it_whole():
    module, x = quietly(Attention(), "quest", bits=4), inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(compiled(x), module(x))
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), module.q_proj.weight)
    (theirs,) = torch.autograd.grad(module(x).square().sum(), module.q_proj.weight)
    torch.testing.assert_close(ours, theirs)


def test_distributed_data_parallel_wraps_it(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = quietly(Attention(), "lsq", bits=4)
        x = inputs()
        expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        wrapped = nn.parallel.DistributedDataParallel(module)
        wrapped(x).square().sum().backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), expected, strict=True))
        with pytest.raises(UsageError, match="calibrate it before that"):
            questctl.calibrate_(wrapped, [x])
    finally:
        torch.distributed.destroy_process_group()


def test_calibration_takes_batches_of_any_form_and_leaves_modes_alone():
    with pytest.warns(UserWarning, match=r"inputs of 4 layers .*calibrate_\(module, batches\)"):
        module = questctl.quantize_(Attention(), "int8-learned-clip1")
    module.q_proj.eval()
    x = [torch.randn(50, 64) * size for size in (1, 3)]
    questctl.calibrate_(module, [x[0], {"x": x[1]}])
    spec, scale = QuantSpec.parse("int8-learned-clip1"), module.q_proj.input_quantizer.scale
    assert scale.item() == pytest.approx(spec.grid.unit * sum(t.square().mean().sqrt().item() for t in x) / 2, rel=1e-5)
    assert (module.training, module.q_proj.training) == (True, False)
    for wrong, sentence in ((x[0], "is one Tensor"), ({"x": x[0]}, "is one dict"), ([], "is empty")):
        with pytest.raises(UsageError, match=sentence):
            questctl.calibrate_(module, wrong)


def test_a_description_has_a_line_a_layer_and_counts_what_is_stored():
    model = quietly(Model(), "quest", bits=4, include="*.up")
    found = questctl.describe(model)
    assert len(str(found).splitlines()) == 2 + len(found.layers) == 7
    assert found.to_json()["layers"][0] == {
        "layer": "layers.0.up",
        "outputs": 96,
        "inputs": 64,
        "state": "quantized",
        "weights": "int4-h64-rms-trust",
        "activations": "int4-h64-rms-trust",
        "bits": 4.0,
    }
    assert found.bits == pytest.approx((4 * 2 * 96 * 64 + 32 * (2 * 96 * 64 + 40 * 64)) / (4 * 96 * 64 + 40 * 64))
    packed = questctl.describe(questctl.freeze_(model)).layers[0]
    assert (packed.state, packed.bits) == ("packed", 4 + 32 / 64)  # with the scale of each row
    with pytest.raises(UsageError, match="has no quantized layer"):
        questctl.freeze_(Model())
