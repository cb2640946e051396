"""A fingerprint: the same in every process, another where the step does something else."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbptt
from jaxbptt._closure.fingerprint import fingerprint
from jaxbptt._transforms.record import trace_recorder

ROOT = Path(jaxbptt.__file__).parents[1]
NAMES = [
    *("spike_vjp", "spike_jvp", "inverse_vjp", "jitted", "vmapped", "stacked_layers", "cond"),
    *("while_loop", "inner_gradient", "checkpoint_policy", "closed_over", "typed_key", "fused_gru"),
]


ONE = np.ones(())  # unlike a Python number of a fixed type


def of(step, params=ONE, carry=ONE, x=ONE, **options):
    """The fingerprint of a step on arguments of these types."""
    rec = jaxbptt.record(step, **({"window": 3} | options))
    params, carry, x = jax.tree.map(jnp.asarray, (params, carry, x))
    return fingerprint(trace_recorder(rec, params, carry, x))


def of_zoo(names):
    cases = {name: zoo.ZOO[name](jnp.float32) for name in names}
    return {name: of(case.step, case.params, case.carry, case.x()) for name, case in cases.items()}


@pytest.mark.exhaustive
def test_it_is_the_same_in_another_process(tmp_path):
    # There sets have another order, lines other numbers, and files another place.
    (tmp_path / "zoo.py").write_text("#\n" * 9 + Path(zoo.__file__).read_text("utf-8"), "utf-8")
    program = tmp_path / "program.py"
    program.write_text(
        "import conftest, sys\nfrom test_fingerprint import of_zoo\n"
        "for name, said in of_zoo(sys.argv[:0:-1]).items():\n    print(name, said)\n"
    )
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests", Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, program, *NAMES],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "12345"},
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split() for line in done.stdout.splitlines())
    assert said == of_zoo(NAMES)
    assert len(set(said.values())) == len(NAMES)


# ------------------------------------------------------------- what counts


def both(c):
    return c, c


def with_rule(backward):
    @jax.custom_vjp
    def bent(v):
        return jnp.sin(v)

    bent.defvjp(lambda v: (jnp.sin(v), v), backward)
    return lambda w, c, x: both(bent(w * c + x))


def with_loop(body):
    def step(w, c, x):
        return both(lax.scan(lambda c, _: (body(w, c, x), None), c, None, length=2)[0])

    return step


def with_jit(inner):
    inner = jax.jit(inner)
    return lambda w, c, x: both(inner(w * c) + x)


def closing_over(values):
    values = jnp.asarray(values)
    return lambda w, c, x: both(w * c + jnp.sum(values) * x)


def remat(policy):
    return jax.checkpoint(lambda w, c, x: both(jnp.sin(jnp.sin(w * c) + x)), policy=policy)


def choosing(first, second):
    return lambda w, c, x: both(lax.cond(x > 0, lambda c: first * c, lambda c: second * c, w * c))


DIFFERENT = {
    "a rule's backward pass": (
        with_rule(lambda v, ct: (ct * jnp.cos(v),)),
        with_rule(lambda v, ct: (ct / (1 + v**2),)),
    ),
    "a loop's body": (
        with_loop(lambda w, c, x: jnp.sin(w * c) + x),
        with_loop(lambda w, c, x: jnp.sin(w * c) - x),
    ),
    "a number in a loop": (
        with_loop(lambda w, c, x: 0.5 * w * c + x),
        with_loop(lambda w, c, x: 0.6 * w * c + x),
    ),
    "a jitted part": (with_jit(jnp.sin), with_jit(jnp.cos)),
    "an array closed over": (closing_over([1.0, 2.0]), closing_over([1.0, 3.0])),
    "keys closed over": tuple(
        (lambda key: lambda w, c, x: both(w * c + x + jax.random.uniform(key)))(jax.random.key(i))
        for i in range(2)
    ),
    "a number": (lambda w, c, x: both(0.5 * w * c + x), lambda w, c, x: both(0.6 * w * c + x)),
    "which way round": (lambda w, c, x: both(w * c - x), lambda w, c, x: both(x - w * c)),
    "the branches": (choosing(2.0, 3.0), choosing(3.0, 2.0)),
    "what is not differentiated": (
        lambda w, c, x: both(w * c + lax.stop_gradient(x)),
        lambda w, c, x: both(lax.stop_gradient(w) * c + x),
    ),
    "a policy": (
        remat(jax.checkpoint_policies.nothing_saveable),
        remat(jax.checkpoint_policies.everything_saveable),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_step_that_does_something_else_has_another(name):
    one, other = DIFFERENT[name]
    assert of(one) != of(other)
    assert of(one) == of(one)


def test_types_count_and_values_of_arguments_do_not():
    def step(w, c, x):
        return both(w * c + x)

    assert of(step) == of(step, 2.5 * ONE, 1.5 * ONE, 1.25 * ONE)
    assert of(step) != of(step, x=jnp.zeros(3), carry=jnp.zeros(3))
    product = lambda w, c, x: both(w * c * x)  # noqa: E731
    assert of(product) != of(product, *jnp.zeros(3, jnp.float32))
    assert of(step, weights="current") != of(step, weights="stored")


# ------------------------------------------------------- what does not count


def test_names_and_places_do_not_count():
    def step(w, c, x):
        @jax.jit
        def inner(v):
            return jnp.sin(v)

        return both(inner(w * c) + x)

    def renamed(params, carry, inputs):
        @jax.jit
        def other(value):
            return jnp.sin(value)

        return both(other(params * carry) + inputs)

    assert of(step) == of(renamed)
    assert of(with_loop(lambda *args: step(*args)[0])) == of(
        with_loop(lambda *args: renamed(*args)[0])
    )
    rules = [with_rule(lambda v, ct: (ct * jnp.cos(v),)) for _ in range(2)]
    assert of(rules[0]) == of(rules[1])


def test_a_closed_over_array_counts_by_its_values_alone():
    assert of(closing_over([1.0, 2.0])) == of(closing_over(np.array([1.0, 2.0])))
    long = np.arange(5000.0)  # its middle is not in its repr
    other = long.copy()
    other[2500] += 1
    assert of(closing_over(long)) != of(closing_over(other))


def test_the_layout_on_devices_does_not_count():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))

    def laid(spec):
        def step(w, c, x):
            c = lax.with_sharding_constraint(w * c + x, NamedSharding(mesh, spec))
            return c, c

        return of(step, carry=jnp.zeros(8), x=jnp.zeros(8))

    assert laid(P("batch")) == laid(P())
