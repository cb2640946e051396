"""The driver of endless streams: stacks inputs into blocks and runs a compiled loop over each."""

import contextlib
import importlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt import _errors
from jaxbptt._arrays import as_strong_arrays
from jaxbptt._training.state import LearnerState, Metrics
from jaxbptt._transforms.tape import settings_of
from jaxbptt._types import LeafType, PyTree, TreeType, type_of

Callback = Callable[[LearnerState, Metrics], Any]
# From a number of steps, a state, which is donated, and stacked inputs to the next state.
RunBlock = Callable[[int, LearnerState, PyTree], tuple[LearnerState, Metrics]]


def run(
    run_block: RunBlock,
    state: LearnerState,
    xs: Iterable[PyTree],
    block: int,
    callback: Callback | None,
    progress: bool | str,
) -> LearnerState:
    """Runs a whole stream, block by block; see `Learner.run`."""
    _errors.positive_int("block", block)
    blocks = _Blocks(xs, block, settings_of(state.tape).x, int(state.step))
    try:
        with _progress_bar(xs, progress) as show:
            steps, stacked = blocks.read()
            while steps:
                with _interrupts_held_back():
                    state, metrics = run_block(steps, state, stacked)
                steps, stacked = blocks.read()  # while the device is at work
                jax.block_until_ready(metrics)
                show(metrics)
                if callback is not None and callback(state, metrics):
                    return state
            if blocks.fault is not None:
                raise blocks.fault
    except BaseException as error:
        _hand_over(error, state)
        raise
    return state


class _Blocks:
    """Reads inputs, holds each against the type that the state was made for, and stacks them.

    Attributes:
        fault: what ended the stream before its time; the inputs before it are read first.
    """

    def __init__(self, xs: Iterable[PyTree], block: int, kind: TreeType, done: int) -> None:
        try:
            self._xs: Iterator[PyTree] | None = iter(xs)
        except TypeError as cause:
            raise _not_iterable(xs) from cause
        self._block, self._kind, self._done = block, kind, done
        self.fault: Exception | None = None

    def read(self) -> tuple[int, PyTree]:
        """The next block: how many inputs, and their leaves (steps, *x.shape)."""
        rows: list[list] = []
        while self._xs is not None and len(rows) < self._block:
            try:
                rows.append(self._leaves(next(self._xs)))
                self._done += 1
            except StopIteration:
                self._xs = None
            except Exception as fault:
                self._xs, self.fault = None, fault
        stacks = [_stacked(leaves) for leaves in zip(*rows, strict=True)]
        return len(rows), self._kind.treedef.unflatten(stacks) if rows else None

    def _leaves(self, x: PyTree) -> list:
        """The leaves of one input. They are copied: it may be a buffer that is filled again."""
        leaves, treedef = jax.tree.flatten(x)
        arrays = [v if isinstance(v, jax.Array) else np.array(v) for v in leaves]
        if treedef == self._kind.treedef and tuple(map(_host_type, arrays)) == self._kind.leaves:
            return arrays
        when = f"after {self._done} steps, x"
        _errors.same_type(
            f"{when} must be of the type that the tape was made for",
            "x",
            self._kind,
            type_of(as_strong_arrays(x, when)),
            "xs must give single inputs, one for each time step. Inputs that are stacked "
            "already go through jax.lax.scan(learner.update, state, xs).",
        )
        return arrays


def _host_type(array: Any) -> LeafType | None:
    """The type an array will have on the device; None if it can't be there."""
    if isinstance(array, jax.Array):
        return LeafType(array.shape, array.dtype)
    try:
        return LeafType(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))
    except TypeError:
        return None


def _stacked(leaves: tuple) -> Any:
    on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
    return jnp.stack(leaves) if on_device else np.stack(leaves)


def _not_iterable(xs: Any) -> ValueError:
    return ValueError(
        "xs must be an iterable of single inputs, one for each time step, but got "
        f"{_errors.describe(xs)}. Write a generator that yields them."
    )


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Puts off Ctrl-C, which would lose the new state when the old one is donated already."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[-1])


def _hand_over(error: BaseException, state: LearnerState) -> None:
    """Leaves the newest state with what ends a run, since the caller's was donated."""
    try:
        done = int(state.step)
    except RuntimeError:  # donated to a block that failed
        return
    error.state = state  # type: ignore[attr-defined]
    error.add_note(f"The LearnerState after {done} steps is in this exception's .state.")


@contextlib.contextmanager
def _progress_bar(xs: Any, progress: bool | str) -> Iterator[Callable[[Metrics], None]]:
    """A function that shows a block's metrics."""
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
