"""The presets are the published sizes and recipes, to the last digit."""

from __future__ import annotations

import pytest

from questctl.config import Layer, resolve

PUBLISHED = {  # arXiv 2502.05003: layers, width, heads, lr, non-embedding parameters; training tokens of the published runs
    "30M": (6, 640, 5, 1.2e-3, 30_482_560, 2_999_975_936),
    "50M": (7, 768, 6, 1.2e-3, 49_556_736, 4_999_872_512),
    "100M": (8, 1024, 8, 6e-4, 102_777_856, 9_999_745_024),
    "200M": (10, 1280, 10, 3e-4, 203_188_480, 19_999_752_192),
    "430M": (13, 1664, 13, 1.5e-4, 443_068_288, 42_999_742_464),
    "800M": (16, 2048, 16, 7.5e-5, 822_151_168, 79_999_795_200),
    "1600M": (20, 2560, 20, 3.75e-5, 1_586_076_160, 159_999_852_544),
}
LAPTOP = {"53K": 53_440, "107K": 106_816, "214K": 213_568, "640K": 639_872}


def config_of(name):
    return resolve([Layer("test", {("preset",): name})]).config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_recipes(name):
    c = config_of(name)
    found = (c.model.n_layer, c.model.d_model, c.model.n_head, c.optim.lr, c.model.params_non_embedding, c.tokens)
    assert found == PUBLISHED[name]
    assert (c.data.seq_len, c.train.batch_size, c.train.precision) == (512, 512, "bf16")
    o = c.optim
    assert (o.beta1, o.beta2, o.weight_decay, o.grad_clip, o.schedule, o.warmup_frac) == (0.9, 0.95, 0.1, 1.0, "cosine", 0.1)
    assert (o.start_factor, o.final_factor) == (0.01, 0.1)


@pytest.mark.parametrize("name", LAPTOP)
def test_laptop_sizes(name):
    c = config_of(name)
    assert c.model.params_non_embedding == LAPTOP[name]
    assert (c.data.seq_len, c.train.batch_size, c.optim.lr) == (128, 16, 3e-3)
