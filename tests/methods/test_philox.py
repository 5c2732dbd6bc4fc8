"""The mask generator against numpy's own Philox, and its statistics against the binomial law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.method import Call
from mergekit_lr.philox import DRAWS, draws, effective_probability, level, masked, philox_words

KEYS = st.integers(0, 2**128 - 1)


@given(key=KEYS, counter=st.integers(0, 2**62), blocks=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_torch_words_equal_numpys(key: int, counter: int, blocks: int) -> None:
    mine = philox_words(key, counter + 1, blocks, "cpu").reshape(-1).numpy().view(np.uint64)
    reference = np.random.Philox(key=key, counter=counter).random_raw(4 * blocks)
    assert np.array_equal(mine, reference)


@given(key=KEYS, start=st.integers(0, 1000), count=st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_draw_of_an_element_depends_on_its_index_alone(key: int, start: int, count: int) -> None:
    words = np.random.Philox(key=key).random_raw(4 * (1 + (start + count) // DRAWS))
    reference = words.view(np.uint16)[start : start + count].astype(np.int32)
    assert np.array_equal(draws(key, start, count).numpy(), reference)


def test_known_answer() -> None:
    # Random123's known-answer vector for philox4x64-10, counter and key all zero.
    words = philox_words(0, 0, 1, "cpu").reshape(-1).numpy().view(np.uint64)
    assert [f"{w:016x}" for w in words] == [
        "16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b",
    ]  # fmt: skip


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 / 65536])
def test_share_kept_is_the_effective_probability(p: float) -> None:
    n = 1 << 20
    kept = int(torch.count_nonzero(masked(torch.ones(n), 12345, 0, p)))
    q = effective_probability(p)
    assert abs(kept - n * q) <= 5 * np.sqrt(n * q * (1 - q)) + 1


def test_probabilities_are_multiples_of_two_to_the_minus_sixteen() -> None:
    assert level(0.0) == 0
    assert level(1e-9) == 1
    assert level(1.0) == 65536
    assert effective_probability(0.5) == 0.5
    assert abs(effective_probability(0.3) - 0.3) <= 2**-17
    x = torch.randn(100)
    assert torch.equal(masked(x, 1, 0, 1.0), x)
    assert not masked(x, 1, 0, 0.0).any()


def test_masked_keeps_values_and_shape() -> None:
    x = torch.randn(33, 17)
    y = masked(x, 99, 320, 0.6)
    kept = draws(99, 320, x.numel()).reshape(x.shape) < level(0.6)
    assert torch.equal(y, torch.where(kept, x, torch.zeros(())))


def test_keys_separate_seed_model_tensor_and_purpose() -> None:
    def key(name: str, seed: int, model: str, purpose: str = "mask") -> int:
        return Call(name, (1,), None, (None,), False, seed, (model,)).philox_key(0, purpose)

    keys = [key("a", 0, "m"), key("b", 0, "m"), key("a", 1, "m"), key("a", 0, "n"), key("a", 0, "m", "x")]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**128 for k in keys)
    streams = [draws(k, 0, 4096).double() for k in keys]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / 64
