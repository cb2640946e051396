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

from jaxbptt._check import check_step
from jaxbptt._check_report import Finding, Report
from jaxbptt._checkpoints import Checkpoints, checkpoints
from jaxbptt._cotangents import Cotangents
from jaxbptt._decay import Decay, fit_decay
from jaxbptt._flax import from_linen, from_nnx
from jaxbptt._lags import ByLag, gradient_by_lag
from jaxbptt._learner import Learner, learner
from jaxbptt._learner_state import LearnerState, Metrics
from jaxbptt._plot import plot_by_lag
from jaxbptt._random_window import RandomWindow, random_window
from jaxbptt._record import Recorder, record
from jaxbptt._resets import with_resets
from jaxbptt._scan import scan
from jaxbptt._tabulate import Table, tabulate
from jaxbptt._tape import Tape

__all__ = [
    "ByLag",
    "Checkpoints",
    "Cotangents",
    "Decay",
    "Finding",
    "Learner",
    "LearnerState",
    "Metrics",
    "RandomWindow",
    "Recorder",
    "Report",
    "Table",
    "Tape",
    "check_step",
    "checkpoints",
    "fit_decay",
    "from_linen",
    "from_nnx",
    "gradient_by_lag",
    "learner",
    "plot_by_lag",
    "random_window",
    "record",
    "scan",
    "tabulate",
    "with_resets",
]
__version__ = "0.1.0"
