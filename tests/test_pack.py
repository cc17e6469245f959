"""Packed codes: bit for bit the layout that the text says, and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_trials import DEVICE, attempt, refused, trials

from questctl.kernels.op import load
from questctl.kernels.pack import PLANES, pack, pack_triton, random_codes, split_planes, unpack, unpack_triton


def by_hand(codes: np.ndarray, bits: int) -> np.ndarray:
    """One byte at a time, one plane after the other."""
    if bits == 3:
        high = np.vectorize(lambda o: 2 * ((o - 1) // 2 // 2) + 1)(codes)
        return np.concatenate([by_hand(high, 2), by_hand(codes - 2 * high, 1)], axis=1)
    per_byte = 8 // bits
    group = codes.shape[1] // per_byte
    out = np.zeros((len(codes), group), np.uint8)
    for n in range(len(codes)):
        for j in range(group):
            out[n, j] = sum((((int(codes[n, i * group + j]) - 1) // 2) % 2**bits) << (bits * i) for i in range(per_byte))
    return out


@trials("pack", "unpack")
def test_every_implementation_at_odd_shapes(name, shape, which):
    attempt(name, shape, which)


@pytest.mark.parametrize("bits", PLANES)
def test_the_bytes_are_those_of_the_layout(bits):
    codes = random_codes(7, 40, bits, torch.device("cpu"), 3)
    assert set(np.unique(codes.numpy())) == set(range(1 - 2**bits, 2**bits, 2))
    expected = by_hand(codes.numpy(), bits)
    assert np.array_equal(pack(codes, bits).numpy(), expected)
    assert np.array_equal(pack_triton(codes.to(DEVICE), bits).cpu().numpy(), expected)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(PLANES)), st.integers(0, 9), st.integers(1, 20), st.integers(0, 99))
def test_unpacking_gives_back_what_was_packed(bits, rows, width, seed):
    codes = random_codes(rows, 8 * width, bits, torch.device("cpu"), seed)
    packed = pack(codes, bits)
    assert packed.shape == (rows, width * bits)
    assert torch.equal(unpack(packed, bits, 8 * width), codes)
    assert torch.equal(unpack_triton(packed.to(DEVICE), bits, 8 * width).cpu(), codes)


def test_three_bits_are_a_two_bit_plane_and_a_sign_plane():
    codes = torch.arange(-7, 8, 2, dtype=torch.int8)
    high, low = split_planes(codes, 3)
    assert torch.equal(2 * high + low, codes)
    assert set(high.tolist()) == {-3, -1, 1, 3}
    assert set(low.tolist()) == {-1, 1}


@pytest.mark.parametrize(("bits", "share"), [(4, 0.27), (2, 0.14), (1, 0.08)])
def test_memory_of_a_packed_weight_with_its_scale(bits, share):
    packed = pack(random_codes(512, 512, bits, torch.device("cpu"), 0), bits)
    assert packed.numel() + 4 * 512 <= share * 2 * 512 * 512


def test_the_custom_ops_keep_torchs_contract():
    codes = random_codes(3, 16, 3, torch.device("cpu"), 0)
    torch.library.opcheck(torch.ops.questctl.pack.default, (codes, 3))
    torch.library.opcheck(torch.ops.questctl.unpack.default, (pack(codes, 3), 3, 16))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack(torch.ones(2, 8, dtype=torch.int8), 5), ["5 bits", "1, 2, 3, 4"]),
        (lambda: pack(torch.ones(2, 12, dtype=torch.int8), 1), ["12", "8"]),
        (lambda: pack(torch.ones(2, 8), 4), ["float32", "int8"]),
        (lambda: unpack(torch.ones(2, 5, dtype=torch.uint8), 4, 8), ["(2, 5)", "8 codes", "4 bits"]),
        (lambda: unpack(torch.ones(2, 4, dtype=torch.int8), 4, 8), ["int8"]),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with refused(*words):
        call()


def test_the_check_notices_one_wrong_bit():
    op = load("pack")
    inputs = op.inputs({"N": 63, "K": 72, "bits": 2}, torch.device("cpu"), 0)
    packed = op.function(*inputs)
    packed[62, 17] ^= 64
    check = op.check(inputs, packed)
    assert (check.passed, check.wrong) == (False, 1)
