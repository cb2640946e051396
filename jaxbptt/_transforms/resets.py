"""`with_resets`: a step that starts its sequences anew where the input says so."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._signatures import takes_more
from jaxbptt._types import LeafType, PyTree, StepFn, TreeType, is_one_leaf, leaf_type, type_of


def with_resets(step: StepFn, initial_carry: PyTree | Callable[..., PyTree]) -> StepFn:
    """Makes a step whose input says which sequences start anew: `(x, is_first)` for x.

    Where is_first_s holds, step s starts from the initial carry c_0 in place of c_{s-1}:

        c′_{s-1} = where(is_first_s, c_0(θ_s), c_{s-1})
        (c_s, y_s) = step(θ_s, c′_{s-1}, x_s)

    so λ′_{s-1}, the cotangent of c′_{s-1}, goes to c_0 and so to θ_s there, and elsewhere
    to c_{s-1}. No gradient crosses a reset, and no value: sequences of different lengths
    can share a batch element one after the other, each as if it had been run by itself.
    Only the groups of `every` are laid over the whole run, across resets.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, one time step. Each leaf of its carry
            begins with the axes of is_first, the batch; apart from these axes, leaves can
            have any rank and dtype (integers, typed PRNG keys).
        initial_carry: c_0, or a function `initial_carry(params)` that returns it. A pytree
            of the carry's structure and dtypes, each leaf broadcastable to the carry's: (H,)
            will do for (B, H). From the function, the parameters receive c_0's gradient,
            whatever the window, as it is computed inside the step. Something callable
            counts as the function. Or `initial_carry(params, carry, x)`, which also gets the
            carry that is abandoned and x without its flag: for a shape, a key, a part that goes
            on. It gets all three if it can't be called with params alone, as its signature
            says: arguments with a default and `*args` don't ask for them. A gradient crosses
            the reset through what it makes of that carry, unless `jax.lax.stop_gradient` is
            put in the way.

    Returns:
        A step of the same name, `step(params, carry, (x, is_first)) -> (carry, y)`, for
        `record`, `scan` and `vmap`. is_first is a bool array, True at the first step of a
        sequence: of shape (B,) it resets elements of the batch, of shape () all of them.

    Raises:
        ValueError: `step` is not a function, or `initial_carry` one of other arguments; or,
            when the step is traced, x is not a pair, is_first is not bool or of a shape with
            which some leaf of the carry doesn't begin, or c_0 doesn't go with the carry.

    Cost:
        A select of each leaf of the carry and one c_0 per step, forward and in each step
        pullback; is_first on the ring, one byte per flag.

    Note:
        A NaN in the carry that a reset abandons stays out of values and gradients. A step
        that had a NaN inside is another matter: its pullback makes NaN of zeros (0·NaN)
        as long as it is in the window. `Recorder.clear` forgets it.

    References:
        Hennigan et al., "Haiku: Sonnet for JAX", 2020: `hk.ResetCore`, the usual name.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxbptt
        >>> def step(params, c, x):
        ...     return params["w"] * c + x, params["w"] * c + x
        >>> packed = jaxbptt.with_resets(step, lambda params: params["start"])
        >>> rec = jaxbptt.record(packed, window=3)
        >>> params = {"w": 0.5, "start": 4.0}
        >>> tape = rec.init(params, 0.0, (0.0, True))
        >>> for inputs in [(1.0, True), (2.0, False), (3.0, True), (4.0, False)]:
        ...     tape, y = rec(params, tape, inputs)
        >>> float(y)  # 4 + w 3 + w² start
        6.5
        >>> ct = rec.pullback(params, tape, jnp.ones(1))
        >>> float(ct.params["start"]), float(ct.params["w"])  # w², and 3 + 2 w start
        (0.25, 7.0)
    """
    if not callable(step):
        raise _errors.not_callable(step)
    computed = callable(initial_carry)
    wants_all = computed and takes_more(
        initial_carry, "initial_carry", ("params",), ("params", "carry", "x")
    )

    def initial_of(params: PyTree, carry: PyTree, x: PyTree) -> PyTree:
        form = "initial_carry(params, carry, x)" if wants_all else "initial_carry(params)"
        try:
            return initial_carry(params, carry, x) if wants_all else initial_carry(params)
        except Exception as error:
            error.add_note(f"Raised by initial_carry, which with_resets called as {form}.")
            raise

    @functools.wraps(step)
    def resetting_step(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        x, is_first = _pair(x)
        # Made at every step, whether a sequence starts or not: which ones do is known only on the
        # device.
        initial = initial_of(params, carry, x) if computed else initial_carry
        initial, carry = (
            as_strong_arrays(initial, "initial_carry"),
            as_strong_arrays(carry, "carry"),
        )
        _check_types(type_of(initial), type_of(carry), leaf_type(is_first))
        select = functools.partial(_select, is_first)
        return step(params, jax.tree.map(select, initial, carry), x)

    return resetting_step


# The reverse mode of a select keeps its mask as broadcast, a byte for each number in the
# carry. Computed again, what is kept are the flags.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _select(is_first: jax.Array, initial: jax.Array, carry: jax.Array) -> jax.Array:
    """The initial leaf where the flags are set. Before the step: 0·NaN doesn't arise in it."""
    flags = is_first.reshape(is_first.shape + (1,) * (carry.ndim - is_first.ndim))
    return jnp.where(flags, initial, carry)


def _pair(inputs: PyTree) -> tuple[PyTree, jax.Array]:
    """The two halves of the pair, or a refusal."""
    if not isinstance(inputs, tuple | list) or len(inputs) != 2:
        raise ValueError(
            "x must be a pair (x, is_first) for a step with resets, but got "
            f"{_errors.describe(inputs)}. Pass the flags along, e.g. xs=(xs, is_first) to scan."
        )
    x, is_first = inputs
    flags = as_strong_arrays(is_first, "is_first") if is_one_leaf(is_first) else None
    if flags is None or flags.dtype != jnp.bool:
        raise ValueError(
            "is_first must be a bool array, True where a sequence starts, but got "
            f"{_errors.describe(is_first)}. Compare to get one, e.g. is_first != 0."
        )
    return x, flags


def _check_types(initial: TreeType, carry: TreeType, flags: LeafType) -> None:
    """Refuses an initial carry or flags that don't go with the carry."""
    rank = len(flags.shape)
    # The message shows each leaf beside the flags where it doesn't begin with their axes.
    leading = [leaf if leaf.shape[:rank] == flags.shape else flags for leaf in carry.leaves]
    _errors.same_type(
        "is_first must have a shape that each leaf of the carry begins with",
        "carry",
        carry,
        TreeType(carry.treedef, tuple(leading)),
        "Give is_first the batch axes, in front in all leaves of the carry, or () to reset all.",
        words=("in the carry", "in is_first"),
    )
    # Leaves that can be broadcast count as the carry's own, so that the message shows the others.
    fitting = initial
    if initial.treedef == carry.treedef:
        pairs = zip(initial.leaves, carry.leaves, strict=True)
        fitting = TreeType(carry.treedef, tuple(c if _fits(i, c) else i for i, c in pairs))
    _errors.same_type(
        "initial_carry must have the carry's structure and dtypes, and shapes broadcastable to it",
        "initial_carry",
        carry,
        fitting,
        f"Make it like the carry that the loop starts from{_errors.cast(carry, initial)}.",
        words=("in the carry", "given"),
    )


def _fits(initial: LeafType, carry: LeafType) -> bool:
    """Whether a leaf has the dtype of the carry's and broadcasts to its shape."""
    # NumPy's rule for broadcasting, from the last axis on.
    sizes = zip(reversed(initial.shape), reversed(carry.shape), strict=False)
    shorter = len(initial.shape) <= len(carry.shape)
    return initial.dtype == carry.dtype and shorter and all(i in (1, c) for i, c in sizes)
