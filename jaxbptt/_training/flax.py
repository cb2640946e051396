"""`from_linen` and `from_nnx`: flax modules with state of their own as step functions."""

import importlib
import inspect
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import jax

from jaxbptt import _errors
from jaxbptt._types import PyTree, StepFn


class LinenState(NamedTuple):
    """The state of a linen module, carried from step to step beside the module's own carry.

    Attributes:
        collections: all collections but "params" by name, such as "batch_stats".
        rngs: keys, from which each step splits off its own.
    """

    collections: dict[str, PyTree]
    rngs: PyTree


class ModuleStep(NamedTuple):
    """A flax module as a step, with what the step begins from.

    Attributes:
        step: `step(params, (carry, state), x) -> ((carry, state), y)`.
        params: the parameters.
        state: the state to start from.
    """

    step: StepFn
    params: PyTree
    state: PyTree


def from_linen(
    module: Any, variables: Mapping[str, PyTree], *, rngs: PyTree = None, **kwargs: Any
) -> ModuleStep:
    """Makes a step of a linen module that has mutable collections or draws random numbers.

    Both change at each step, so the step's carry holds them beside the module's own carry:

        rngs_s, drawn_s = split(rngs_{s-1})
        ((carry_s, y_s), collections_s) =
            apply({"params": θ_s, **collections_{s-1}}, carry_{s-1}, x_s, rngs=drawn_s)

    A module without them needs no adapter: `module.apply` is its step.

    Args:
        module: a `flax.linen.Module` that is called as `module(carry, x) -> (carry, y)`.
        variables: what `module.init` returned. All collections but "params" are mutable.
        rngs: keys for `module.apply`, such as `{"dropout": key}`; None for none.
        **kwargs: for `module.apply`: `method`, or arguments of the module, `train=True`.

    Returns:
        A named tuple `(step, params, state)`. Its params are `variables["params"]`, and the step's
        carry is a pair `(carry, state)` whose state is a `LinenState(collections, rngs)`.
        Gradients flow through the collections as through any carry; `window=(20, 1)` lets
        them flow one step through these.

    Raises:
        ValueError: `module` is not a `flax.linen.Module` or can't be called with a carry and x,
            `variables` has no "params", or `rngs` holds something that is not a key.
        TypeError: the module doesn't return a pair; raised when the step is traced.
        ImportError: flax is not installed.

    Cost:
        That of the module, and one split of each key.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbptt
        >>> class Cell(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, carry, x, train):
        ...         carry, y = nn.GRUCell(4)(carry, x)
        ...         return carry, nn.Dropout(0.5)(y, deterministic=not train)
        >>> cell = Cell()
        >>> h, x = jnp.zeros((2, 4), jnp.float32), jnp.ones((2, 3), jnp.float32)
        >>> variables = cell.init(jax.random.key(0), h, x, False)
        >>> rngs = {"dropout": jax.random.key(1)}
        >>> step, params, state = jaxbptt.from_linen(cell, variables, rngs=rngs, train=True)
        >>> tape = jaxbptt.record(step, window=20).init(params, (h, state), x)
    """
    _check_module(module, "linen", kwargs)
    errors = importlib.import_module("flax.errors")
    is_mapping = isinstance(variables, Mapping)
    if not is_mapping or (variables and "params" not in variables):
        came = ", ".join(map(repr, variables)) if is_mapping else _errors.describe(variables)
        raise ValueError(
            "variables must be what module.init returned, with 'params' among its collections, "
            f"but got {came}. Pass {{'params': params, ...}}."
        )
    # A key that can't be split would be found in the step, with an error of JAX's.
    try:
        jax.eval_shape(_next_keys, rngs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"rngs must hold keys, such as {{'dropout': jax.random.key(0)}}, but got {rngs!r}."
        ) from error
    # flax allows a step to write into these, and returns them.
    mutable = [name for name in variables if name != "params"]

    def step(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        carry, (collections, rngs) = carry
        rngs, own_rngs = _next_keys(rngs)
        given = {"params": params, **collections}
        try:
            out, changed = module.apply(given, carry, x, rngs=own_rngs, mutable=mutable, **kwargs)
        except (errors.ScopeParamNotFoundError, errors.ScopeCollectionNotFound) as cause:
            raise ValueError(
                f"variables must be what {type(module).__name__}.init returned, but of "
                f"{', '.join(map(repr, variables)) or 'nothing'} flax says: "
                f"{str(cause).split(' (http')[0].rstrip('.')}. Pass module.init(key, carry, x)."
            ) from cause
        carry, y = _as_pair(out, module)
        return (carry, LinenState({**collections, **changed}, rngs)), y

    state = LinenState({name: variables[name] for name in mutable}, rngs)
    return ModuleStep(step, variables.get("params", {}), state)


def from_nnx(module: Any, *, wrt: Any = None, **kwargs: Any) -> ModuleStep:
    """Makes a step of an nnx module that has state: batch statistics, random numbers.

    State changes at each step, so the step's carry holds it beside the module's own carry:

        (carry_s, y_s), state_s = module{θ_s, state_{s-1}}(carry_{s-1}, x_s)

    A module without state needs no adapter: it is a pytree, its own params, and
    `lambda module, carry, x: module(carry, x)` is its step.

    Args:
        module: an `nnx.Module` that is called as `module(carry, x) -> (carry, y)`, in the mode
            (train or eval) that it is in now. It is copied and not changed.
        wrt: filter for the variables that are params, as for `nnx.grad`; None for `nnx.Param`.
            An `nnx.Param` that it leaves out is a constant of the step.
        **kwargs: arguments of the module, `train=True`.

    Returns:
        A named tuple `(step, params, state)` whose params and state are `nnx.State`s, state of all
        variables that are not params, and the step's carry is a pair `(carry, state)`. After
        a run `nnx.update(module, params, state)` puts both back into the module.

    Raises:
        ValueError: `module` is not an `nnx.Module`, or can't be called with a carry and x.
        TypeError: the module doesn't return a pair; raised when the step is traced.
        ImportError: flax is not installed.

    Cost:
        That of the module.

    Examples:
        >>> import jax.numpy as jnp, jaxbptt
        >>> from flax import nnx
        >>> class Cell(nnx.GRUCell):
        ...     def __init__(self, rngs):
        ...         super().__init__(3, 4, rngs=rngs)
        ...         self.dropout = nnx.Dropout(0.5, rngs=rngs)
        ...     def __call__(self, carry, x):
        ...         return super().__call__(self.dropout(carry), x)
        >>> cell = Cell(nnx.Rngs(0))
        >>> h, x = jnp.zeros((2, 4), jnp.float32), jnp.ones((2, 3), jnp.float32)
        >>> step, params, state = jaxbptt.from_nnx(cell)
        >>> tape = jaxbptt.record(step, window=20).init(params, (h, state), x)
    """
    nnx = _check_module(module, "nnx", kwargs)
    # In this order: a variable goes to the first filter that takes it.
    filters = (nnx.Param if wrt is None else wrt, nnx.Param, ...)
    # A module changes its variables in place when it is called. So the user's own is cloned
    # here, and the step merges copies into the module that it calls.
    graph, params, constants, state = nnx.split(nnx.clone(module), *filters)

    def step(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        carry, state = carry
        merged = nnx.merge(graph, params, constants, state, copy=True)
        carry, y = _as_pair(merged(carry, x, **kwargs), module)
        *_, state = nnx.split(merged, *filters)
        return (carry, state), y

    return ModuleStep(step, params, state)


def _next_keys(rngs: PyTree) -> tuple[PyTree, PyTree]:
    """Splits each key in two: those to carry on with, and those to draw from in this step."""
    pairs = jax.tree.map(jax.random.split, rngs)
    return jax.tree.map(itemgetter(0), pairs), jax.tree.map(itemgetter(1), pairs)


def _as_pair(out: Any, module: Any) -> Any:
    """Returns what a module returned, or refuses it if it is not a pair."""
    _errors.is_pair(out, "a pair (carry, y)", f"Let {type(module).__name__} return that.")
    return out


def _check_module(module: Any, library: str, kwargs: dict[str, Any]) -> Any:
    """Imports flax's `library`, and checks that `module` is one of it and takes a carry and x."""
    # Imported here and not above: flax is optional.
    try:
        flax = importlib.import_module(f"flax.{library}")
    except ImportError as error:
        raise ImportError(
            f"from_{library} needs flax, which isn't installed: pip install 'jaxbptt[flax]'."
        ) from error
    if not isinstance(module, flax.Module):
        is_class = isinstance(module, type)
        got = f"the class {module.__name__}" if is_class else _errors.describe(module)
        raise ValueError(
            f"module must be a flax.{library}.Module, but got {got}. "
            "Pass an instance; from_linen is for flax.linen, from_nnx for flax.nnx."
        )
    # Another method has a signature of its own, which flax checks.
    signature = inspect.signature(type(module).__call__)
    try:
        if "method" not in kwargs:
            signature.bind(module, "carry", "x", **kwargs)
    except TypeError as error:
        raise ValueError(
            "module must be called as module(carry, x) -> (carry, y), but the arguments of "
            f"{type(module).__name__} are ({', '.join([*signature.parameters][1:])}). Pass a cell "
            "(an RNN's .cell), and further arguments by name, e.g. train=True."
        ) from error
    return flax
