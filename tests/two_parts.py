"""A step of two cells with memories of different lengths, which read each other."""

import jax.numpy as jnp
from harness import draw

LENGTH = 8


def step(p, carry, x):
    """Two cells that read each other; a counter beside them."""
    fast, (slow, count) = carry["fast"], carry["slow"]
    new = jnp.tanh(x @ p["wx"] + fast @ p["ff"] + slow @ p["sf"])
    slow = 0.9 * slow + jnp.tanh(fast @ p["fs"] + slow @ p["ss"] + x[:, :2])
    return {"fast": new, "slow": (slow, count + 1)}, new[:, :2] * slow


PARAMS = {
    "wx": draw(1, 3, 4),
    "ff": draw(2, 4, 4),
    "sf": draw(3, 2, 4),
    "fs": draw(4, 4, 2),
    "ss": draw(5, 2, 2),
}
CARRY = {"fast": draw(6, 2, 4), "slow": (draw(7, 2, 2), jnp.int32(0))}
XS = draw(8, LENGTH, 2, 3)
