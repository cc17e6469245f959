"""The quantizer module: one formula for every spec, and a fast implementation of it with a hand-written backward pass.

    z = x·H;  s = scale(z);  u = z/s;  q = keep(z)·grid(u);  m = mask(u, q);  y = s·(m·u + (q − m·u).detach())

x (…, K) → y (…, K). If the spec has a rotation, y is in the rotated basis. The value of y is s·q. The gradient of x is m·g,
rotated back. A learned scale receives Σ g·(q − m·u), the gradient of LSQ; other scales are constants of the row. With an offset
b, the formula holds for z − b and y − b, and a learned offset receives Σ g·(1 − m).

`Quantizer.reference` is this formula under autograd and is the definition. `forward` computes the same numbers with about a
third of the operations, because its backward pass is written by hand: small models on a CPU are bound by the number of
operations. Rows on int grids at the scale `rms`, as QuEST has them, are rounded on a CPU in a single pass (kernels/native.py),
with the same bits. All computation is in fp32 (fp64 for fp64 input), also for bf16 input and under autocast; y has the dtype of
x. A row of zeros gives zeros, and its gradient passes as the mask at u = 0 says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels.native import SMALLEST_SCALE
from . import opaque  # noqa: F401  registers operations that compiled code calls
from .fusable import is_plain, unaliased
from .fused import Settings
from .grids import Int
from .layer_specs import check_rows, check_width
from .rotations import Hadamard
from .scales import Learned, Rms
from .spec import QuantSpec


class Rounded(NamedTuple):
    """The factors of y = s·q + b: levels q in units of s, the scale s, and the offset b (None without one).

    q has the view of x (…, K) whose last dimension shares a scale (`Scale.share`); s and b broadcast over it.
    """

    q: torch.Tensor
    s: torch.Tensor
    b: torch.Tensor | None


class Draws(NamedTuple):
    """The random numbers of one rounding of a gradient: noise for levels and scales, and the signs (K,) of fresh rotations."""

    noise: torch.Tensor | None
    of_scales: torch.Tensor | None
    signs: tuple[torch.Tensor, ...]


class Part(NamedTuple):
    """The place of a part in its batch: the index () of its first row, int64, and the number of rows of the batch.

    Stochastic grids draw the noise of the whole batch for each part and use that of its rows, so that a batch is rounded the
    same, in however many parts it is computed. The index is a tensor, because torch.compile would compile anew for each number.
    """

    first: torch.Tensor
    of: int


class Quantizer(nn.Module):
    """y = q(x), x (…, K) → y (…, K). Raises UsageError if the rotation's block or a group of a component does not divide K.

    y is a pure function of x and of the parameters `scale` (1,) and `offset` (1,), which exist if the spec's scale is learned;
    for `learned.r` the scale is (rows, 1), `rows` being the N of a weight (N, K), or (1,) if `rows` is not given. They start as
    the optimum for a standard normal; `calibrate` sets them from data. Stochastic grids also draw noise while gradients are
    recorded, from the generator that `forward` takes or from torch's own. Without gradients (evaluation) they round to the
    nearest level. `numel` is the number of values that share the scale in LSQ's gradient factor: all of a weight, or the K
    features of an activation (the default).
    """

    def __init__(self, spec: QuantSpec, *, numel: int | None = None, rows: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.numel = numel
        self.part: Part | None = None  # place of an input or gradient in its batch; None: it is the whole
        self.fused: Settings | None = None  # settings of the fused kernel, which is used while gradients are recorded
        learned = spec.scale is not None and spec.scale.learned
        unit = 0.0 if spec.is_identity else spec.grid.unit  # derived now, so that the first step does not pay for it
        self.by_row: ByRow | None = None if spec.is_identity else _by_row(spec)
        each = learned and rows is not None and spec.scale is not None and spec.scale.variant == "r"
        self.scale = nn.Parameter(torch.full((rows or 1, 1) if each else (1,), unit)) if learned else None
        self.offset = nn.Parameter(torch.zeros(1)) if learned and spec.scale is not None and spec.scale.centred else None

    def forward(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """x (…, K) → y (…, K), same dtype; `generator`, on the device of x, is used by stochastic rounding only."""
        if self.spec.is_identity:
            return x
        if self.fused and torch.is_grad_enabled():
            from ..kernels.fake_quant import fake_quantize

            return fake_quantize(x, *self.fused)
        if self.rounds_rows(x):
            check_width(self.spec, x.shape[-1], where=self.spec)
            if torch.is_grad_enabled():
                in_one_pass: torch.Tensor = _QuantizeRows.apply(x, self.by_row)
                return in_one_pass
            assert self.by_row is not None
            return _round_rows(x, self.by_row, keep=False)[1]
        noise = self._noise(x, generator) if torch.is_grad_enabled() else None
        y: torch.Tensor = _Quantize.apply(x, self.scale, self.offset, noise, self.spec, self._factor(x))
        return y

    def rounds_rows(self, x: torch.Tensor) -> bool:
        """Whether each row of x (…, K) is rounded by itself, in the single pass."""
        return self.by_row is not None and not self.fused and is_plain(x)

    @property
    def has_hooks(self) -> bool:
        """Whether this module has hooks."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)

    def reference(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """The formula as written above, differentiated by autograd: the definition of `forward`."""
        spec = self.spec
        if spec.is_identity:
            return x
        assert spec.scale is not None
        assert spec.estimator is not None
        z = _rotated(x, spec)
        noise = self._noise(x, generator) if torch.is_grad_enabled() else None
        keep = spec.sparsity.keep(z) if spec.sparsity else None
        z = spec.scale.share(z)
        b = torch.zeros((), dtype=z.dtype, device=z.device)
        if spec.scale.centred:
            b = spec.scale.centres(z.detach()) if self.offset is None else self._slowed(self.offset.to(z.dtype), x)
        z = z - b
        s = spec.scale.sizes(z.detach(), spec.grid) if self.scale is None else self._slowed(self.scale.to(z.dtype).abs(), x)
        u = z * _reciprocal(s)
        with torch.no_grad():
            q = spec.grid.quantize(u) if noise is None else spec.grid.round_at_random(u, noise.view(u.shape))
            if keep is not None:
                q = q * keep.view(q.shape)
            m = spec.estimator.mask(u, q, spec.grid)
            learns = spec.estimator.residual(u, q, m)  # q − m·u, or the part of it that this estimator passes to s
            rest = s * (q - m * u - learns)
        # s·m·u is written as m·z, because a row of zeros has s = 0 and would lose its gradient
        return (m * z + s * learns + rest + b).reshape(x.shape).to(x.dtype)

    def in_its_basis(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, K) → its quantized value in its own basis, Q(x·H)·Hᵀ (…, K), same dtype, with the gradient of `forward`."""
        y: torch.Tensor = self(x if self.spec.basis is None else _wide(x))
        return y if self.spec.basis is None else self.spec.basis.unrotate(y).to(x.dtype)

    @torch.no_grad()
    def rounded(self, x: torch.Tensor) -> Rounded:
        """x (…, K) → the factors of its quantized value under nearest rounding; s·q + b equals it to the last bit (fp32)."""
        return _round(x, self.scale, self.offset, None, self.spec)[1]

    @torch.no_grad()
    def shares(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, K) → (2,), fp32: the share of its entries that receive gradient, and the share beyond the grid.

        The first is the mean of m, which is graded for smooth estimators. The second counts entries with |u| more than half a
        step above the outermost level, which are clamped to it. Both are for nearest rounding; bf16 has neither.
        """
        assert self.spec.estimator is not None
        grid = self.spec.grid
        u, (q, _, _) = _round(x, self.scale, self.offset, None, self.spec)
        m = self.spec.estimator.mask(u, q, grid)
        return torch.stack([m.float().mean(), (u.abs() > grid.top + grid.half_step).float().mean()])

    @torch.no_grad()
    def of_gradient(self, g: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Quantize a gradient in its own basis: g (…, N) → Q(g·H)·Hᵀ (…, N), same dtype. Stochastic grids always draw noise."""
        draws = self.draws(g, generator)
        y = self.turned(g, draws)
        basis = self.spec.basis
        y = basis.unrotate(y) if basis else y
        for i, signs in enumerate(reversed(draws.signs)):
            y = (basis.rotate(y) if basis and i else y) * signs
        return y.to(g.dtype)

    @torch.no_grad()
    def draws(self, g: torch.Tensor, generator: torch.Generator | None = None) -> Draws:
        """The random numbers for a rounding of g (…, N), from `generator` or torch's own."""
        scale = self.spec.scale
        assert scale is not None
        noise = self.uniform(g, generator) if self.spec.grid.stochastic else None
        signs, of_scales = self.signs(g.shape[-1], g, generator), None
        if scale.corrected:
            groups = g.shape[-1] // (scale.group or g.shape[-1])
            drawn = self.uniform(g.new_empty(()).expand(*g.shape[:-1], groups), generator)
            of_scales = drawn.unsqueeze(-1) if scale.group else drawn
        return Draws(noise, of_scales, signs)

    def signs(self, width: int, like: torch.Tensor, generator: torch.Generator | None = None) -> tuple[torch.Tensor, ...]:
        """The signs (width,) of each fresh rotation, the same in every block, on the device of `like`; none without one."""
        basis, dtype = self.spec.basis, torch.float64 if like.dtype == torch.float64 else torch.float32
        if basis is None or not basis.fresh:
            return ()
        bits = torch.randint(0, 2, (basis.fresh, basis.block), generator=generator, device=like.device)
        return tuple((2 * bits - 1).to(dtype).repeat(1, width // basis.block))

    @torch.no_grad()
    def turned(self, g: torch.Tensor, draws: Draws) -> torch.Tensor:
        """g (…, N) → its quantized value (…, N) in the rotated basis, fp32 or fp64, with these draws.

        The product of two operands that are rotated with the same signs is that of the operands in their own basis.
        """
        wide = _wide(g)
        for i, signs in enumerate(draws.signs):
            wide = (self.spec.basis.rotate(wide) if self.spec.basis and i else wide) * signs
        return self._levels(wide, draws, self.spec)

    @torch.no_grad()
    def unturned(self, g: torch.Tensor) -> torch.Tensor:
        """g (…, N) → its quantized value (…, N) without the rotation of the spec, fp32 or fp64, with draws of its own."""
        return self._levels(_wide(g), self.draws(g), _unrotated(self.spec))

    def _levels(self, wide: torch.Tensor, draws: Draws, spec: QuantSpec) -> torch.Tensor:
        scale = spec.scale
        assert scale is not None
        u, (q, s, b) = _round(wide, None, None, draws.noise, spec)
        if scale.corrected:
            s = scale.correction(u * s, q, spec.grid, draws.of_scales)
        return (q * s if b is None else q * s + b).reshape(wide.shape)  # it may be expanded

    @torch.no_grad()
    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, K) → its quantized value in its own basis, Q(x·H)·Hᵀ (…, K), same dtype, by nearest rounding."""
        if self.spec.is_identity:
            return x
        if self.rounds_rows(x):
            assert self.by_row is not None
            y = _round_rows(x, self.by_row, keep=False)[1]
        else:
            q, s, b = self.rounded(x)
            y = (q * s if b is None else q * s + b).reshape(x.shape)
        return (self.spec.basis.unrotate(y) if self.spec.basis else y).to(x.dtype)

    @torch.no_grad()
    def calibrate(self, x: torch.Tensor) -> None:
        """Set a learned scale to the Gaussian optimum for all of x (…, K), and a learned offset to its mean.

        A `learned.r` scale is set row by row. Both stay as they are if x has no scale: if all its entries are equal, or one is
        not finite.
        """
        if self.scale is not None:
            assert self.spec.scale is not None
            z = _rotated(x, self.spec)
            offset = None if self.offset is None else self.spec.scale.centre(z).to(self.offset.dtype)
            z = z if offset is None else z - offset.to(z.dtype)
            z = z if self.scale.dim() > 1 else z.reshape(1, -1)
            scale = self.spec.scale.of(z, self.spec.grid).to(self.scale.dtype).view(self.scale.shape)
            usable = scale.isfinite() & (scale > SMALLEST_SCALE)
            self.scale.copy_(torch.where(usable, scale, self.scale))
            if self.offset is not None and offset is not None:
                self.offset.copy_(torch.where(usable, offset, self.offset))

    def extra_repr(self) -> str:
        """The spec, as `print(model)` shows it."""
        return str(self.spec)

    def _factor(self, x: torch.Tensor) -> float:
        if self.scale is None or (self.spec.estimator is not None and not self.spec.estimator.lsq_factor):
            return 1.0
        share = x.shape[-1] if self.scale.dim() > 1 else self.numel or x.shape[-1]
        return Learned.gradient_factor(share, self.spec.grid)

    def _slowed(self, p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """p, whose gradient is multiplied by LSQ's factor."""
        slow = p * self._factor(x)
        return slow + (p - slow).detach()

    def _noise(self, x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor | None:
        return self.uniform(x, generator) if self.spec.grid.stochastic else None

    def uniform(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Noise of the shape of x, uniform on [0, 1): that of the whole batch, of which x may be a part."""
        rows = len(x) if self.part is None else self.part.of
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        noise = torch.rand((rows, *x.shape[1:]), generator=generator, dtype=dtype, device=x.device)
        if self.part is None:
            return noise
        return noise.index_select(0, self.part.first + torch.arange(len(x), device=x.device))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside a `with` block, treat every tensor as a whole batch, not as a part of one."""
        part, self.part = self.part, None
        try:
            yield
        finally:
            self.part = part


def make_quantizer(spec: str, in_features: int | None = None) -> Quantizer:
    """The quantizer with a spec such as 'int4-h128-rms-trust'.

    Raises UsageError if the spec is invalid, or if `in_features` is given and a rotation block or group does not divide it.
    """
    parsed = QuantSpec.parse(spec)
    if in_features is not None:
        check_width(parsed, in_features, where=f"quant: '{spec}'")
    return Quantizer(parsed)


class _Quantize(torch.autograd.Function):
    """`Quantizer.reference` with a backward pass written by hand, which needs u or m, and q − m·u for a learned scale."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        offset: torch.Tensor | None,
        noise: torch.Tensor | None,
        spec: QuantSpec,
        factor: float,
    ) -> torch.Tensor:
        assert spec.estimator is not None
        grid = spec.grid
        u, (q, s, b) = _round(x, scale, offset, noise, spec)
        ctx.spec, ctx.factor, ctx.bound, ctx.learns_offset = spec, factor, None, offset is not None
        mask = residual = sign = None
        bound = None if spec.sparsity else spec.estimator.bound(grid)
        if scale is not None:
            m = spec.estimator.mask(u, q, grid)
            residual, sign = spec.estimator.residual(u, q, m), scale.sign()
        if bound is None or offset is not None or (bound < math.inf and x.is_cuda):
            mask = spec.estimator.mask(u, q, grid)  # 1 byte per value
        elif bound < math.inf:
            mask, ctx.bound = u, _next_above(bound, u.dtype)  # on a CPU bool tensors cost more than the memory of u
        if mask is not None and mask.shape != x.shape:
            mask = mask.reshape(x.shape)
        ctx.save_for_backward(mask, residual, sign)
        y = q.mul_(s)
        if b is not None:
            y += b
        if y.shape != x.shape:
            y = unaliased(y.view(x.shape))
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = grads
        mask, residual, sign = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        grad_x = grad_scale = grad_offset = None
        if ctx.needs_input_grad[0]:
            wide = _wide(g)
            if ctx.bound is not None:
                wide = _where_below(wide, mask, -ctx.bound, ctx.bound)
            elif mask is not None:
                wide = wide * mask
            grad_x = (spec.basis.unrotate(wide) if spec.basis else wide).to(g.dtype)
        if residual is not None and ctx.needs_input_grad[1]:
            slope = _wide(g) * residual
            slope = slope.sum(-1, keepdim=True) if sign.dim() > 1 else slope.sum()  # one scale per row, or one of the tensor
            grad_scale = slope.mul(ctx.factor).to(sign.dtype) * sign
        if ctx.learns_offset and ctx.needs_input_grad[2]:
            wide = _wide(g)
            grad_offset = (wide - wide * mask).sum().mul(ctx.factor).to(sign.dtype).reshape(1)
        return grad_x, grad_scale, grad_offset, None, None, None


class ByRow(NamedTuple):
    """Constants of a spec whose rows are rounded in one pass: an int grid, the scale `rms` by row, an interval as mask."""

    basis: Hadamard | None
    unit: float  # the scale is unit·√(mean z²)
    top: float
    bound: float  # |u| below it receives gradient


def _by_row(spec: QuantSpec) -> ByRow | None:
    """The settings of a spec whose rows are rounded in one pass; None for others."""
    grid, scale = spec.grid, spec.scale
    if not isinstance(grid, Int) or grid.variant or spec.sparsity or not isinstance(scale, Rms) or scale.variant:
        return None
    assert spec.estimator is not None
    bound = spec.estimator.bound(grid)
    if bound is None:
        return None
    return ByRow(spec.basis, grid.unit, grid.top, _next_above(bound, torch.float32) if bound < math.inf else bound)


class _QuantizeRows(torch.autograd.Function):
    """`_Quantize` of rows that are rounded in one pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, how: ByRow) -> torch.Tensor:
        u, y = _round_rows(x, how, keep=how.bound < math.inf)
        ctx.how = how
        ctx.save_for_backward(u)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (g,) = grads
        (u,) = ctx.saved_tensors
        how: ByRow = ctx.how
        if u is not None:
            g = _where_below(g, u, -how.bound, how.bound)
        return (how.basis.unrotate(g) if how.basis else g), None


_where_below = torch.ops.aten.hardtanh_backward.default  # g where |u| < bound, else 0, in one fused pass


def _round_rows(x: torch.Tensor, how: ByRow, *, keep: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
    """u (None unless `keep`), and the quantized value of x (…, K), fp32 on a CPU; without gradients."""
    from ..kernels.native import round_rows

    z = how.basis.rotate(x) if how.basis else x
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    if not how.basis:
        z = x.clone(memory_format=torch.contiguous_format) if keep else x.contiguous()
    return round_rows(z, norm, how.unit / x.shape[-1] ** 0.5, how.top, keep=keep)


def _round(
    x: torch.Tensor, scale: torch.Tensor | None, offset: torch.Tensor | None, noise: torch.Tensor | None, spec: QuantSpec
) -> tuple[torch.Tensor, Rounded]:
    """u, and the factors of its quantized value; `noise` is given for stochastic rounding only."""
    assert spec.scale is not None
    grid = spec.grid
    z = _rotated(x, spec)
    shared = spec.scale.share(z) if spec.scale.variant else z
    b = None
    if spec.scale.centred:
        b = spec.scale.centres(shared) if offset is None else offset.to(z.dtype)
        shared = shared - b
    s = spec.scale.sizes(shared, grid) if scale is None else scale.to(z.dtype).abs()
    fresh = spec.basis is not None and not torch.is_grad_enabled() and b is None and not spec.sparsity
    fresh = fresh and not torch.compiler.is_compiling()  # the compiler cannot save a tensor that shares memory with another
    u = shared.mul_(_reciprocal(s)) if fresh else shared * _reciprocal(s)  # in place where z is a new tensor
    q = grid.quantize(u) if noise is None else grid.round_at_random(u, noise.view(u.shape))
    if spec.sparsity:
        q *= spec.sparsity.keep(z).view(q.shape)
    return u, Rounded(q, s, b)


def _rotated(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """x (…, K) → z (…, K) in fp32 or fp64. Raises UsageError naming the component that does not divide K."""
    check_width(spec, x.shape[-1], where=spec)  # converted to text only if there is an error
    if spec.scale is not None and spec.scale.rows > 1:
        check_rows(spec, x.shape[-2] if x.dim() > 1 else 1, where=spec)
    z = _wide(x)
    return spec.basis.rotate(z) if spec.basis else z


@lru_cache
def _unrotated(spec: QuantSpec) -> QuantSpec:
    return replace(spec, basis=None)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _reciprocal(s: torch.Tensor) -> torch.Tensor:
    return s.clamp_min(SMALLEST_SCALE).reciprocal()


def _next_above(bound: float, dtype: torch.dtype) -> float:
    """The smallest number of `dtype` above `bound`, so that `< result` means `≤ bound`."""
    digits = 53 if dtype == torch.float64 else 24
    mantissa, exponent = math.frexp(bound)
    return math.ldexp(round(math.ldexp(mantissa, digits)) + 1, exponent - digits)
