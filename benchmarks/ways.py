"""The ways to train online with a window, ours and those that one writes without it.

Each function takes a `Problem` and returns `(function, state)`: a jitted function from state
to (state, losses) that runs a block of steps, an SGD update at each gradient, and the state
to start from. The state is donated.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

import jaxbptt

RATE = 1e-4


def sgd(params, grads):
    return jax.tree.map(lambda p, g: p - RATE * g, params, grads)


def block(update, xs):
    """A jitted run of `update` over the inputs."""
    return jax.jit(lambda state: lax.scan(update, state, xs), donate_argnums=0)


def updating(problem, rec):
    """One update of (params, tape) by the gradient of this step's loss."""

    def update(state, x):
        params, tape = state

        def loss_fn(params):
            new_tape, y = rec(params, tape, x)
            return problem.loss(y, x), new_tape

        (loss, tape), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return (sgd(params, grads), tape), loss

    return update


def recorded(problem, window, weights):
    """jaxbptt, an update at every step."""
    rec = jaxbptt.record(problem.step, window=window, weights=weights)
    tape = rec.init(problem.params, problem.carry, first(problem.xs))
    return block(updating(problem, rec), problem.xs), (problem.params, tape)


def recorded_every(problem, window, every):
    """jaxbptt, an update every so many steps."""

    def step(params, carry, x):
        carry, y = problem.step(params, carry, x)
        return carry, problem.loss(y, x)

    rec = jaxbptt.record(step, window=window, every=every, weights="current")

    def update(state, x):
        params, tape = state

        def loss_fn(params):
            new_tape, loss = rec(params, tape, x)
            return loss, new_tape

        (loss, tape), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        params = lax.cond(rec.due(tape), lambda: sgd(params, grads), lambda: params)
        return (params, tape), loss

    tape = rec.init(problem.params, problem.carry, first(problem.xs))
    return block(update, problem.xs), (problem.params, tape)


def paced(problem, window, pace):
    """jaxbptt, every cotangent in flight taken `pace` lags further at each step."""
    rec = jaxbptt.record(problem.step, window=window, weights="current", pace=pace)

    def update(state, x):
        params, tape = state
        tape, loss, grads = rec.advance(params, tape, x, lambda y: problem.loss(y, x))
        return (sgd(params, grads), tape), loss

    tape = rec.init(problem.params, problem.carry, first(problem.xs))
    return block(update, problem.xs), (problem.params, tape)


def unused(problem, window):
    """jaxbptt, recording, and no gradient."""
    rec = jaxbptt.record(problem.step, window=window, weights="current")

    def update(tape, x):
        tape, y = rec(problem.params, tape, x)
        return tape, problem.loss(y, x)

    tape = rec.init(problem.params, problem.carry, first(problem.xs))
    return block(update, problem.xs), tape


def forward(problem):
    """The plain loop, without a gradient."""

    def update(carry, x):
        carry, y = problem.step(problem.params, carry, x)
        return carry, problem.loss(y, x)

    return block(update, problem.xs), problem.carry


def rerun(problem, window, every=1):
    """(a) Carries and inputs are kept, and `jax.grad` differentiates the window run again."""

    def update(state, x):
        params, carries, inputs, carry, t = state
        slot = t % window
        carries, inputs = put(carries, carry, slot), put(inputs, x, slot)
        order = (slot + 1 + jnp.arange(window)) % window

        def loss_fn(params):
            rows = jax.tree.map(lambda ring: ring[order], inputs)
            oldest = jax.tree.map(lambda ring: ring[order[0]], carries)
            _, ys = lax.scan(functools.partial(problem.step, params), oldest, rows)
            last = jax.tree.map(lambda v: v[-every:], (ys, rows))
            return jnp.sum(jax.vmap(problem.loss)(*last))

        carry, y = problem.step(params, carry, x)
        loss = problem.loss(y, x)
        if every == 1:
            params = sgd(params, jax.grad(loss_fn)(params))
        else:
            due = t % every == every - 1
            params = lax.cond(due, lambda: sgd(params, jax.grad(loss_fn)(params)), lambda: params)
        return (params, carries, inputs, carry, t + 1), loss

    rings = ring(problem.carry, window), ring(first(problem.xs), window)
    return block(update, problem.xs), (problem.params, *rings, problem.carry, jnp.int32(0))


def closures(problem, window):
    """(b) A ring of whole `jax.vjp` closures, parameters included, pulled back one by one."""

    def update(state, x):
        params, leaves_ring, carry, t = state
        (carry, y), pull = jax.vjp(lambda p, c: problem.step(p, c, x), params, carry)
        leaves, treedef = jax.tree.flatten(pull)
        slot = t % window
        leaves_ring = put(leaves_ring, leaves, slot)
        loss, ct_y = jax.value_and_grad(problem.loss)(y, x)
        lam = jax.tree.map(jnp.zeros_like, carry)

        def back(k, lam, ct_y):
            at = jax.tree.map(lambda r: r[(slot - k) % window], leaves_ring)
            return jax.tree.unflatten(treedef, at)((lam, ct_y))

        def one_lag(k, sums):
            grads, lam = sums
            more, lam = back(k, lam, jax.tree.map(jnp.zeros_like, ct_y))
            return jax.tree.map(jnp.add, grads, more), lam

        grads, _ = lax.fori_loop(1, jnp.minimum(t + 1, window), one_lag, back(0, lam, ct_y))
        return (sgd(params, grads), leaves_ring, carry, t + 1), loss

    def leaves_of(params, carry, x):
        return jax.tree.leaves(jax.vjp(lambda p, c: problem.step(p, c, x), params, carry)[1])

    like = jax.eval_shape(leaves_of, problem.params, problem.carry, first(problem.xs))
    state = problem.params, ring(like, window), problem.carry, jnp.int32(0)
    return block(update, problem.xs), state


def by_chunks(problem, window, run, params, carry):
    """`jax.grad` of one window after another, and an update for each; `run` gives (carry, ys)."""

    def loss_fn(params, carry, rows):
        carry, ys = run(params, carry, rows)
        losses = jax.vmap(problem.loss)(ys, rows)
        return jnp.sum(losses), (carry, losses)

    def update(state, rows):
        params, carry = state
        grads, (carry, losses) = jax.grad(loss_fn, has_aux=True)(params, carry, rows)
        return (sgd(params, grads), carry), losses

    rows = jax.tree.map(lambda v: v.reshape(-1, window, *v.shape[1:]), problem.xs)
    return block(update, rows), (params, carry)


def chunks(problem, window, scan=lax.scan):
    """(c) `jax.grad` of a scan over one window after another."""

    def run(params, carry, rows):
        return scan(functools.partial(problem.step, params), carry, rows)

    return by_chunks(problem, window, run, problem.params, problem.carry)


def scanned_chunks(problem, window):
    """jaxbptt.scan in the place of `lax.scan`."""
    return chunks(problem, window, functools.partial(jaxbptt.scan, window=None))


def nnx_chunks(problem, window):
    """The same with flax: `nnx.RNN` of its own LSTM or GRU cell, parameters of its own."""
    from flax import nnx

    parts = jax.tree.leaves(problem.carry)
    cell_type = nnx.OptimizedLSTMCell if len(parts) == 2 else nnx.GRUCell
    cell = cell_type(problem.xs.shape[-1], parts[0].shape[-1], rngs=nnx.Rngs(0))
    rnn = nnx.RNN(cell, time_major=True, return_carry=True)
    graph, params, rest = nnx.split(rnn, nnx.Param, ...)

    def run(params, carry, rows):
        return nnx.merge(graph, params, rest)(rows, initial_carry=carry)

    carry = tuple(parts[::-1]) if len(parts) == 2 else parts[0]  # flax has c in front of h
    return by_chunks(problem, window, run, params, carry)


def first(xs):
    return jax.tree.map(lambda v: v[0], xs)


def ring(tree, window):
    return jax.tree.map(lambda v: jnp.zeros((window, *v.shape), v.dtype), tree)


def put(rings, values, slot):
    return jax.tree.map(lambda r, v: lax.dynamic_update_index_in_dim(r, v, slot, 0), rings, values)
