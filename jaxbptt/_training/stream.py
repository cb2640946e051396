"""The driver of endless streams: stacks inputs into blocks and runs a compiled loop over each."""

import contextlib
import importlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays, check_range
from jaxbptt._signatures import check_takes
from jaxbptt._training.state import LearnerState, Metrics
from jaxbptt._transforms.tape import settings_of
from jaxbptt._types import LeafType, PyTree, TreeType, type_of

Callback = Callable[[LearnerState, Metrics], Any]
# (state, stacked inputs) -> (state, metrics), for a number of steps that was compiled for; the
# state that it is given is donated.
RunBlock = Callable[[LearnerState, PyTree], tuple[LearnerState, Metrics]]
CompileBlock = Callable[[int, LearnerState, PyTree], RunBlock]


def run_stream(
    compile_block: CompileBlock,
    state: LearnerState,
    xs: Iterable[PyTree],
    block: int,
    callback: Callback | None,
    progress: bool | str,
) -> LearnerState:
    """Runs a whole stream, block by block; see `Learner.run`."""
    _errors.positive_int("block", block)
    if callback is not None and not callable(callback):
        raise ValueError(
            "callback must be a function callback(state, metrics), or None for none, but got "
            f"{_errors.describe(callback)}. How many steps run between two calls is block."
        )
    if callback is not None:
        check_takes(callback, "callback", ("state", "metrics"))
    if not isinstance(progress, bool | str):
        raise ValueError(
            f"progress must be True, False or a description, but got {_errors.describe(progress)}. "
            "Pass progress=True for a bar."
        )
    blocks = _BlockReader(xs, block, settings_of(state.tape).x, int(state.step))
    # Whatever raises from here on, `state` is the newest state, and it is not donated; unless
    # it was a block's call itself that raised.
    try:
        with _progress_bar(xs, progress) as show:
            inputs = blocks.read()
            while inputs.steps:
                # This may take long, but donates nothing yet: Ctrl-C ends it at once.
                run_block = compile_block(inputs.steps, state, inputs.stacked)
                with _interrupts_held_back():
                    state, metrics = run_block(state, inputs.stacked)
                # The call above was only dispatched: the next block is read while the device
                # works. Waiting for the metrics then keeps the host at most one block ahead.
                inputs = blocks.read()
                jax.block_until_ready(metrics)
                show(metrics)
                if callback is not None and callback(state, metrics):
                    return state
            if blocks.fault is not None:
                raise blocks.fault
    except BaseException as error:
        _attach_state(error, state)
        raise
    return state


class _Block(NamedTuple):
    """The inputs of one block.

    Attributes:
        steps: how many there are; 0 at the end of the stream.
        stacked: the inputs, leaves (steps, *x.shape).
    """

    steps: int
    stacked: PyTree


class _BlockReader:
    """Reads inputs, checks that each is of the type that the tape was made for, and stacks them.

    Attributes:
        fault: the exception that ended the stream. It is raised after the inputs before it
            have been trained on.
    """

    def __init__(self, xs: Iterable[PyTree], size: int, x_type: TreeType, done: int) -> None:
        try:
            self._xs: Iterator[PyTree] | None = iter(xs)
        except TypeError as cause:
            raise _not_iterable(xs) from cause
        self._size, self._x_type, self._done = size, x_type, done
        self.fault: Exception | None = None

    def read(self) -> _Block:
        """Reads up to `size` inputs; fewer where the stream ends, by itself or by a fault."""
        rows: list[list] = []
        while self._xs is not None and len(rows) < self._size:
            # The inputs before a fault are good, and those who sent them expect them trained on:
            # the fault waits in `fault` until they are. (KeyboardInterrupt is no Exception.)
            try:
                rows.append(self._leaves_of(next(self._xs)))
                self._done += 1
            except StopIteration:
                self._xs = None
            except Exception as fault:
                self._xs, self.fault = None, fault
        stacks = [_stack(leaves) for leaves in zip(*rows, strict=True)]
        return _Block(len(rows), self._x_type.treedef.unflatten(stacks) if rows else None)

    def _leaves_of(self, x: PyTree) -> list:
        """The leaves of one input, copied if they are on the host."""
        leaves, treedef = jax.tree.flatten(x)
        # np.array copies: a stream may fill one buffer again and again.
        arrays = [v if isinstance(v, jax.Array) else np.array(v) for v in leaves]
        types = tuple(map(_type_on_device, arrays))
        fitting = treedef == self._x_type.treedef and types == self._x_type.leaves
        if fitting:
            for leaf in arrays:
                check_range(leaf, f"after {self._done} steps, x")
            return arrays
        # It is of another type, or of one that NumPy doesn't know but JAX does.
        when = f"after {self._done} steps, x"
        strong = as_strong_arrays(x, when)
        _errors.same_type(
            f"{when} must be of the type that the tape was made for",
            "x",
            self._x_type,
            type_of(strong),
            "xs must give single inputs, one for each time step. Inputs that are stacked "
            "already go through jax.lax.scan(learner.update, state, xs).",
        )
        return jax.tree.leaves(strong)


def _type_on_device(array: Any) -> LeafType | None:
    """The type that an array will have on the device; None if it can't be put there."""
    if isinstance(array, jax.Array):
        return LeafType(array.shape, array.dtype)
    try:
        return LeafType(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))
    except TypeError:
        return None


def _stack(leaves: tuple) -> Any:
    # Inputs on the host are stacked there, and go to the device in one transfer.
    on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
    return jnp.stack(leaves) if on_device else np.stack(leaves)


def _not_iterable(xs: Any) -> ValueError:
    return ValueError(
        "xs must be an iterable of single inputs, one for each time step, but got "
        f"{_errors.describe(xs)}. Write a generator that yields them."
    )


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Delays Ctrl-C to the end of the `with` block, so that it can't lose the state.

    A block's call donates the old state before the name is bound to the new one. A
    KeyboardInterrupt in between would leave neither. It is raised by SIGINT's Python handler,
    which only the main thread runs, between any two bytecodes; so that handler is replaced for
    as long as the call takes. Without donation there would be no such gap, but a run
    would hold two to three states more, and with block=1 the ring would be copied at each step.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if arrived:
        handler(*arrived[-1])


def _attach_state(error: BaseException, state: LearnerState) -> None:
    """Attaches the newest state to the exception that ends a run: the caller's was donated."""
    try:
        done = int(state.step)
    except RuntimeError:
        # It was donated to the block that raised, and there is no state left.
        return
    error.state = state  # type: ignore[attr-defined]
    error.add_note(f"The LearnerState after {done} steps is in this exception's .state.")


@contextlib.contextmanager
def _progress_bar(xs: Any, progress: bool | str) -> Iterator[Callable[[Metrics], None]]:
    """Opens a progress bar, if one is asked for; yields what shows a block's metrics on it."""
    if not progress:
        yield lambda metrics: None
        return
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError as cause:
        raise ImportError(
            f"progress={progress!r} needs tqdm, which is not there. pip install 'jaxbptt[train]'"
        ) from cause
    total = len(xs) if hasattr(xs, "__len__") else None
    label = progress if isinstance(progress, str) else None
    with tqdm(total=total, desc=label, unit=" steps", dynamic_ncols=True) as bar:

        def show(metrics: Metrics) -> None:
            bar.set_postfix_str(f"loss {float(jnp.mean(metrics.loss)):.4g}", refresh=False)
            bar.update(len(metrics.loss))

        yield show
