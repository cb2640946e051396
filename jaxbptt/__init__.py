"""Truncated backpropagation through time as one function transformation.

A loop over single time steps with the gradient inside it; here it reaches back two steps:

    >>> import jax, jaxbptt
    >>> step = lambda w, carry, x: (w * carry + x, w * carry + x)
    >>> rec = jaxbptt.record(step, window=2)
    >>> tape = rec.init(0.5, 0.0, 0.0)
    >>> def loss_fn(w, tape, x):
    ...     return rec(w, tape, x)[::-1]  # y is the loss, the new tape goes along
    >>> for x in (1.0, 2.0, 3.0, 4.0):
    ...     (loss, tape), grad = jax.value_and_grad(loss_fn, has_aux=True)(0.5, tape, x)
    >>> float(grad)  # c_3 + w c_2 = 4.25 + 0.5 * 2.5, without the w² c_1 of full BPTT
    5.5
"""

from jaxbptt._checkpoints import state_dict as _state_dict  # noqa: F401  tells flax of tapes
from jaxbptt._checkpoints.checkpoints import Checkpoints, checkpoints
from jaxbptt._inspection.bias import Bias, estimate_bias
from jaxbptt._inspection.by_lag import ByLag, gradient_by_lag
from jaxbptt._inspection.by_range import ByRange, gradient_by_range
from jaxbptt._inspection.check import check_step
from jaxbptt._inspection.check_report import Finding, Report
from jaxbptt._inspection.decay import Decay, fit_decay
from jaxbptt._inspection.plot import plot_by_lag
from jaxbptt._inspection.tabulate import Table, tabulate
from jaxbptt._training.flax import from_linen, from_nnx
from jaxbptt._training.learner import Learner, learner
from jaxbptt._training.state import LearnerState, Metrics
from jaxbptt._transforms.cotangents import Cotangents
from jaxbptt._transforms.record import Recorder, record
from jaxbptt._transforms.resets import with_resets
from jaxbptt._transforms.scan import scan
from jaxbptt._transforms.tape import Tape
from jaxbptt._version import __version__
from jaxbptt._windows import RandomReach, RandomWindow, random_reach, random_window

__all__ = [
    "Bias",
    "ByLag",
    "ByRange",
    "Checkpoints",
    "Cotangents",
    "Decay",
    "Finding",
    "Learner",
    "LearnerState",
    "Metrics",
    "RandomReach",
    "RandomWindow",
    "Recorder",
    "Report",
    "Table",
    "Tape",
    "__version__",
    "check_step",
    "checkpoints",
    "estimate_bias",
    "fit_decay",
    "from_linen",
    "from_nnx",
    "gradient_by_lag",
    "gradient_by_range",
    "learner",
    "plot_by_lag",
    "random_reach",
    "random_window",
    "record",
    "scan",
    "tabulate",
    "with_resets",
]
