"""Which closed-over arrays are constants, and that their hash is that of their values."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbptt._closure import constants
from jaxbptt._closure.constants import changed_constants, hashes_of_constants

LARGE = 2**17


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "bool", "complex64"])
def test_a_hash_is_that_of_the_values(dtype):
    one = (jnp.arange(LARGE) % 2).astype(dtype)
    (same,), (turned,) = hashes_of_constants([jnp.array(one)]), hashes_of_constants([one[::-1]])
    assert hashes_of_constants([one, np.asarray(one)]) == (same, same)
    assert same != turned
    assert changed_constants([same, None, same], [one[::-1], one, one]) == [0]


def test_what_is_small_or_traced_or_a_key_is_no_constant():
    keys = jax.random.split(jax.random.key(0), LARGE)
    assert hashes_of_constants([jnp.ones(2**12), keys]) == (None, None)

    @jax.jit
    def traced(array):
        assert hashes_of_constants([array]) == (None,)
        assert changed_constants(["hash"], [array]) == [0]
        return array

    traced(jnp.ones(LARGE))


def test_no_hash_outlives_its_array():
    gc.collect()
    before = len(constants._known)
    array = jnp.ones(LARGE) + 1
    (first,) = hashes_of_constants([array])
    assert len(constants._known) == before + 1
    assert hashes_of_constants([array]) == (first,)
    del array
    gc.collect()
    assert len(constants._known) == before


def test_an_array_of_numpy_is_looked_at_each_time():
    array = np.ones(LARGE)
    (first,) = hashes_of_constants([array])
    array[5] = 2.0
    assert changed_constants([first], [array]) == [0]
