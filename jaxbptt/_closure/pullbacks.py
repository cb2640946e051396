"""The pullback of a step: the transpose of its linearization, for the outputs that are alive.

A chain's older lags have no ȳ, and parts of the carry whose window is over have no λ. For each
set of outputs that have a cotangent there is a program of its own, in which nothing is left of
what only the others need: where no ȳ arrives, a loss head's products are gone.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxbptt._arrays import struct_like, zeros
from jaxbptt._closure.contraction import Contraction, divide_pullback
from jaxbptt._compat import with_constvars
from jaxbptt._jaxprs.evaluate import Atom, Program, acts, needed, prune, variables, without_calls
from jaxbptt._jaxprs.linearity import is_linear
from jaxbptt._jaxprs.primitives import HEAVY

Mask = tuple[bool, ...]


class Inputs(NamedTuple):
    """Something of each group of a step's inputs."""

    closed_over: Any
    params: Any
    carry: Any
    x: Any


@dataclasses.dataclass(frozen=True)
class Pullback:
    """A program from residuals, and the cotangents that are alive, to cotangents of the inputs.

    Attributes:
        program: its inputs are the recorded residuals, the invariant ones, and λ and ȳ of the
            outputs that are alive.
        recorded: how many recorded residuals there are.
        invariant: how many invariant ones.
        outputs: the variables of its outputs, for each group of a step's inputs.
    """

    program: Program
    recorded: int
    invariant: int
    outputs: Inputs

    @property
    def residuals(self) -> int:
        """How many residuals it takes."""
        return self.recorded + self.invariant

    @property
    def residuals_by_variable(self) -> dict[Any, int]:
        """The number of each recorded residual by its variable in the program."""
        return {v: i for i, v in enumerate(self.program.jaxpr.invars[: self.recorded])}

    def divide(
        self, summed: list[Atom], at_lag: list[Atom], *, effects: bool = True, fewest: int = 0
    ) -> Contraction:
        """The pullback divided for a loop over the lags.

        Args:
            summed: outputs wanted summed over the lags, or ZERO.
            at_lag: outputs wanted at each lag, or ZERO.
            effects: whether side effects are to happen, at each lag.
            fewest: products of two vectors that have fewer numbers are summed in the loop.
        """
        alive = len(self.program.jaxpr.invars) - self.residuals
        # In the order of the program's inputs: recorded, invariant, λ and ȳ.
        invariant = [False] * self.recorded + [True] * self.invariant + [False] * alive
        return divide_pullback(
            self.program, invariant, summed, at_lag, effects=effects, fewest=fewest
        )

    @property
    def acts(self) -> bool:
        """Whether it has side effects."""
        return any(map(acts, self.program.jaxpr.eqns))

    @property
    def is_linear(self) -> bool:
        """Whether it is known to be linear in the cotangents."""
        closed = core.ClosedJaxpr(self.program.jaxpr, self.program.consts)
        return is_linear(closed, self.residuals)


@dataclasses.dataclass(frozen=True, eq=False)
class Linearization:
    """How the tangents of a step's outputs depend on those of its inputs; transposed on demand.

    Attributes:
        jaxpr: from residuals and tangents to tangents. Or, where `is_pullback`, from residuals
            and the cotangents of all outputs to cotangents: of a program that writes to
            references JAX has a transpose only as a whole, as `jax.vjp` gives it.
        is_pullback: which of the two it is.
        residuals: how many residuals it takes.
        outputs: abstract values of the outputs that can have a cotangent.
    """

    jaxpr: core.Jaxpr
    is_pullback: bool
    residuals: int
    outputs: list[Any]
    _pulls: dict[Mask, Program] = dataclasses.field(default_factory=dict)

    def same_as(self, i: int, others: int) -> int | None:
        """Which of the first outputs an output is the same variable as, None for none."""
        outs = self.jaxpr.outvars
        if self.is_pullback:  # then the outputs are those of the transpose, and not of the step
            return None
        return next((j for j in range(others) if outs[j] is outs[i]), None)

    def heavy(self, alive: Mask) -> int:
        """How much more than elementwise work leads to the outputs that are alive."""
        if self.is_pullback:
            return len(self.jaxpr.eqns)  # it does all the work in any case
        # Transposed, an equation is run for those outputs that it leads to.
        outs = [v for v, a in zip(self.jaxpr.outvars, alive, strict=True) if a]
        eqns = needed(self.jaxpr.eqns, variables(outs))
        return sum(eqn.primitive.name in HEAVY for eqn in eqns)

    def pull(self, consts: list, alive: Mask) -> Program:
        """From residuals and the cotangents that are alive, traced once for each set of these."""
        # A window asks for the same few sets of outputs at every call.
        if alive not in self._pulls:
            self._pulls[alive] = self._trace(alive)
        jaxpr, own = self._pulls[alive].jaxpr, self._pulls[alive].consts
        n = len(consts)
        # What it reads of the constants may be tracers now that were others when it was traced.
        return Program(
            with_constvars(jaxpr, [*jaxpr.constvars, *jaxpr.invars[:n]], jaxpr.invars[n:]),
            [*own, *consts],
        )

    def _trace(self, alive: Mask) -> Program:
        jaxpr, n = self.jaxpr, self.residuals
        # Constants go in as arguments: they may be tracers of a trace that is over when this is
        # used.
        consts = [struct_like(v.aval) for v in jaxpr.constvars]
        given = [struct_like(v.aval) for v in jaxpr.invars]
        residuals, tangents = given[:n], given[n:]
        cts = [struct_like(kind) for kind, a in zip(self.outputs, alive, strict=True) if a]

        def pull(consts: list, residuals: list, cts: list) -> Any:
            run = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))
            if self.is_pullback:
                rest = iter(cts)
                kinds = zip(self.outputs, alive, strict=True)
                return run(*residuals, *(next(rest) if a else zeros(kind) for kind, a in kinds))

            # Only what leads to these outputs is transposed: JAX would pull zeros back as well.
            def outputs_alive(*tangents: Any) -> list:
                outs = run(*residuals, *tangents)
                return [v for v, a in zip(outs, alive, strict=True) if a]

            return jax.linear_transpose(outputs_alive, *tangents)(cts)

        structs = consts, residuals, cts
        closed = without_calls(jax.make_jaxpr(pull)(*structs), jax.tree.leaves(structs))
        return Program.of(prune(closed, effects=True))
