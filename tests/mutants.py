"""Small faults of the library, and whether the tests find them: python tests/mutants.py.

Each is one line that a real change could have got wrong. A copy of the project is given one after
the other, and the tests that should notice run there until the first fails. What survives is
a gap in the tests, or no fault.

    python tests/mutants.py                        the default tier finds how many?
    python tests/mutants.py --tier exhaustive      all tiers together: how many?
    python tests/mutants.py --only groups          faults whose name or module says so
    python tests/mutants.py --jobs 2 --shard 1/4   two at a time, every fourth of them
"""

import argparse
import collections
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LONGEST = 900  # seconds, after which a run counts as one that never ends
# What is no part of the project, and what other runs have left in its folder.
LEFT_OUT = shutil.ignore_patterns(
    ".[!c]*", "__pycache__", "build", "dist", "runs", "site", "*.egg-info"
)


class Fault(NamedTuple):
    """A change of one line.

    Attributes:
        name: what is wrong then.
        module: the file under `jaxbptt/`, without its ending.
        tests: the files under `tests/` that should notice, without what their names share, the
            likeliest first.
        old: what stands in the file, once.
        new: what stands there instead.
    """

    name: str
    module: str
    tests: str
    old: str
    new: str

    @property
    def path(self):
        return f"jaxbptt/{self.module}.py"

    @property
    def files(self):
        folder = ROOT / "tests"
        found = [next(folder.glob(f"*/test_{name}.py")) for name in self.tests.split()]
        return [str(path.relative_to(ROOT)) for path in found]

    def changed(self, text):
        """The file's text with the fault in it."""
        assert text.count(self.old) == 1, f"{self.path} has not once: {self.old}"
        return text.replace(self.old, self.new)


# fmt: off
FAULTS = [Fault(*row) for row in [

    # ---------------------------------------------------------- window, lags, groups
    ("a group that falls short reaches a step less", "_windows", "oracles parts steps",
     "rows + max(window - every, 0)", "rows + max(window - every - 1, 0)"),
    ("the ring is as long as the shortest part's window", "_closure/closure", "parts",
     'window=max(of_lambda,', 'window=min(of_lambda,'),
    ("a part of λ is followed a lag too far", "_transforms/window_vjp", "parts",
     'tuple(start < part for part', 'tuple(start <= part for part'),
    ("a part counts as over only a segment later", "_transforms/scan_chains", "parts",
     'alive = [count > start for count in counts]', 'alive = [True for count in counts]'),
    ("a step before the window is reached in short groups", "_transforms/groups", "groups scan",
     "end - (window - 1))", "end - window)"),
    ("a last group that is cut short reaches as far as the window", "_transforms/groups", "groups scan",
     "reach = jnp.maximum(first - max(window - self.every, 0), end - (window - 1))",
     "reach = end - (window - 1)"),
    ("the last group ends behind the run", "_transforms/groups", "groups scan",
     "jnp.minimum(first + (self.every - 1), self.length)", "first + (self.every - 1)"),
    ("the last group starts at zero, without the final carry's cotangent", "_transforms/groups",
     "groups scan",
     "(step % self.every == 0) & (step < self.length)", "step % self.every == 0"),
    ("a chain too few where groups don't divide the window", "_transforms/groups", "groups scan scan_steps",
     "-(-window // self.every)", "window // self.every"),
    ("a group's last step belongs to the next", "_transforms/groups", "groups scan",
     "return (step - 1) // self.every", "return step // self.every"),
    ("nothing is cut off from a window of the length on, whatever the groups", "_transforms/groups",
     "groups scan",
     "at_most(length + every - 1, window):", "at_most(length, window):"),
    ("steps that no chain reaches are counted all the same", "_transforms/groups", "scan groups",
     "return not at_most(self.every, self.window)", "return False"),

    ("None is a window of any part", "_windows", "parts",
     "if steps is None and size:", "if steps is None and size < 0:"),
    ("a constant of the step stays a number of Python", "_jaxprs/evaluate", "constants",
     "_as_array(v, atom.aval) if isinstance(atom, core.Literal) else v", "v"),
    ("the branches of other platforms are compiled too", "_jaxprs/partial_eval", "platforms",
     "if platforms is None:", "if True:"),

    ("a sum over a mapped axis counts once for all of its rows", "_transforms/record", "named_axes",
     "new_carry, y, aux = as_mapped(axes, made.step)", "new_carry, y, aux = made.step"),
    ("a weight's cotangent is that of one row", "_transforms/scan", "named_axes",
     "*map(with_none, followed, as_mapped(axes, of_consts))", "*map(with_none, followed, of_consts)"),
    ("mapped axes are out of sight in a rule", "_jaxprs/named_axes", "named_axes",
     "with_axes(missing, function) if missing else function()", "function()"),

    ("symbolic sizes count as small", "_arrays", "export",
     "except Inconclusive:\n        return False", "except Inconclusive:\n        return True"),
    ("a run of symbolic length is cut into blocks", "_jaxprs/loops", "export",
     "return length  # symbolic dimensions", "return _FEWEST  # symbolic dimensions"),
    ("what is offloaded is recorded on the device", "_arrays", "export",
     "if kind.memory is not None:", "if False:"),
    ("parts of a sum are batched over", "_jaxprs/loop_fission", "explicit_axes",
     "plain = not any(map(is_part_of_sum, [*eqn.invars, *eqn.outvars]))", "plain = True"),
    ("parts of a sum are broadcast against", "_arrays", "explicit_axes",
     "if is_part_of_sum(jax.typeof(value)):", "if False:"),
    ("a scan stacks what lies on a mesh of its own", "_transforms/scan", "explicit_axes",
     "or leaves_explicit_axes(body)):", "):"),

    # ------------------------------------------------------------------ tape, ring
    ("the reader is a slot off", "_transforms/tape", "oracles tape",
     "jnp.where(slot < 0, slot + settings.window, slot)",
     "jnp.where(slot < 1, slot + settings.window - 1, slot)"),
    ("slots that were never written are read", "_transforms/tape", "steps oracles",
     "slot_of(jnp.where(lag < tape.length, lag, 0))", "slot_of(lag)"),
    ("the phase does not begin again", "_transforms/tape", "tape oracles learner",
     "lax.rem(tape._phase, jnp.int32(every)) + 1", "tape._phase + 1"),
    ("the length grows beyond the window", "_transforms/tape", "tape",
     "length=jnp.minimum(tape.length, window - 1) + 1", "length=tape.length + 1"),
    ("clear does not begin a new group", "_transforms/tape", "tape learner",
     "_phase=jax.tree.map(jnp.zeros_like, tape._phase)", "_phase=tape._phase"),
    ("clear leaves what is in the ring, NaN too", "_transforms/tape", "steps tape",
     "_ring=[jnp.zeros_like(leaf) for leaf in tape._ring]", "_ring=tape._ring"),
    ("what lies in one array with others is read a row off", "_transforms/tape", "tape",
     "map(jnp.int32, (row, ", "map(jnp.int32, (row - 1, "),
    ("large arrays lie in one too", "_arrays", "tape",
     "small = jnp.issubdtype(kind.dtype, np.number) and at_most(size_in_bytes([kind]), _SMALL)",
     "small = jnp.issubdtype(kind.dtype, np.number)"),
    ("arrays of another mesh lie in one", "_arrays", "explicit_axes",
     "return (kind, *mesh) if small else None", "return (kind,) if small else None"),
    ("weak types stay weak", "_arrays", "tape faults current",
     "return lax.convert_element_type(leaf, leaf.dtype)", "return leaf"),
    ("a stack is laid over the mesh with time for the batch", "_compat", "explicit_axes",
     "(None, *spec.partitions)", "(*spec.partitions, None)"),

    # ----------------------------------------------------------- one recorded step
    ("the gradient doesn't wait until it is due", "_transforms/record", "oracles tape",
     "return lax.cond(is_due(tape), back, lambda: nothing)", "return back()"),
    ("a group's gradient is the mean over its losses", "_transforms/record", "oracles tape",
     "jnp.broadcast_to(v, (rows, *v.shape))", "jnp.broadcast_to(v / rows, (rows, *v.shape))"),
    ("an operand that is wanted summed counts at one lag", "_closure/contraction", "contraction",
     "[jnp.sum(widened(stacks[v]), 0) for v", "[widened(stacks[v])[0] for v"),
    ("lags that are not recorded are not masked", "_transforms/window_vjp", "oracles steps",
     'farthest, cut = tape.length,', 'farthest, cut = jnp.int32(steps),'),
    ("stored parameters are not stored", "_transforms/record", "oracles current",
     'stored=recorder.weights == "stored"', "stored=False"),
    ("y and aux change places", "_transforms/record", "oracles faults",
     "(y, aux) if self.has_aux else y", "(aux, y) if self.has_aux else y"),
    ("x̄ has its rows of zeros at the wrong end", "_transforms/record", "oracles parts",
     'jnp.flip(padded(v, length - window.steps), 0)', 'padded(jnp.flip(v, 0), length - window.steps)'),
    ("each step is replayed from the carry that was recorded", "_transforms/window_vjp", "replayed",
     "begins = (lag >= length - 1) |", "begins = (lag >= 0) |"),
    ("closed-over tracers get no gradient", "_transforms/record", "steps replayed",
     'asked = tuple(v.perturbed for v in args[0])', 'asked = tuple(False for v in args[0])'),
    ("an integer's cotangent may be of its own type", "_transforms/cotangents", "faults steps",
     "leaf.dtype if leaf.differentiable else _FLOAT0", "leaf.dtype"),
    ("float0 cotangents have no axis over the steps", "_transforms/cotangents", "steps",
     "np.zeros((*rows, *leaf.shape), _FLOAT0)", "np.zeros(leaf.shape, _FLOAT0)"),

    # ------------------------------------------------------------------- the chain
    ("λ goes on beyond the reach", "_transforms/window_vjp", "oracles parts",
     'lam = _each(jnp.where, [live & f for f in followed], older, lam)', 'lam = older'),
    ("what is beyond the reach is contracted too", "_transforms/window_vjp", "oracles steps",
     'kept = [where_or_zero(live, v) for v in (*xs, *pick(stacked, made.operands))]',
     'kept = [*xs, *pick(stacked, made.operands)]'),
    ("a slot that is not reached is contracted", "_transforms/window_vjp", "learner",
     "return None if there is None else select_rows(live, there)", "return there"),
    ("operands are stacked by lag beside residuals by slot", "_transforms/window_vjp", "oracles",
     "place = None if all(stacked) else window.recorded.slot", "place = None"),
    ("the newest ȳ is left out where it is in the carry", "_transforms/window_vjp", "oracles steps",
     "carry[place] = carry[place] + next(ys)[0]", "carry[place] = carry[place] + 0 * next(ys)[0]"),
    ("λ of a part is zero where it was cut", "_transforms/window_vjp", "parts",
     'lam = _each(jnp.where, [live & f for f in followed], older, lam)',
     'lam = _each(jnp.where, [live for f in followed], older, lam)'),
    ("ȳ comes oldest first", "_transforms/window_vjp", "oracles",
     'newest_first = [jnp.flip(leaf, 0)[:rows] for leaf in arriving.ys]', 'newest_first = [leaf[:rows] for leaf in arriving.ys]'),
    ("by lag, half precision is added up in half precision", "_transforms/window_vjp", "by_lag",
     "[widened(zeros(kind)) for kind in kinds]", "[zeros(kind) for kind in kinds]"),
    ("by lag, λ of a part goes on after its window", "_transforms/window_vjp", "by_lag parts",
     'handed_on = _each(lambda v, a: where_or_zero(live & a, v), lam, alive)', 'handed_on = _each(lambda v, a: where_or_zero(live, v), lam, alive)'),
    ("chains of parts age at every step", "_transforms/scan_chains", "parts",
     "jnp.where(starts, _older(v), v) for v in lam", "_older(v) for v in lam"),
    ("a new chain finds another's λ in its slot", "_transforms/scan_chains", "scan scan_steps",
     "goes_on = [~(starts & (age == 0)) for age", "goes_on = [True for age"),
    ("ȳ goes into the chain before its own", "_transforms/scan_chains", "scan scan_steps",
     "[counts.index(max(counts))] == 0", "[counts.index(max(counts))] == 1"),
    ("ȳ goes into every chain", "_transforms/scan_chains", "scan scan_steps",
     "[v + select(own, u[None]) for v, u in", "[v + u[None] for v, u in"),
    ("init gets λ of chains that are over", "_transforms/scan_chains", "scan parts",
     "return self.total(self._followed(1, lam, [True] * len(lam)))", "return self.total(lam)"),
    ("dead terms are added up as they are", "_closure/contraction", "contraction scan oracles steps",
     'total + where_or_zero(live, v).astype(', 'total + v.astype('),
    ("dead rows are scattered into an embedding", "_closure/contraction", "contraction scan_steps steps oracles",
     '_scatter(eqn, total, indices, where_or_zero(live, updates))', '_scatter(eqn, total, indices, updates)'),
    ("half precision is added up in half precision", "_closure/contraction", "contraction steps oracles",
     'return [widened(zeros(v.aval)) for v in [*made, *self.summed_as_is]]', 'return [zeros(v.aval) for v in [*made, *self.summed_as_is]]'),
    ("half precision comes out of products in half precision", "_closure/contraction", "contraction steps scan_steps oracles",
     'preferred_element_type=jnp.float32 if is_half_precision(dtype) else dtype', 'preferred_element_type=dtype'),
    ("a product that is transposed keeps its operands where they are", "_closure/contraction",
     "contraction oracles steps",
     "return Product(eqn, True, transpose.outvars[0])",
     "return Product(eqn, False, transpose.outvars[0])"),
    ("operands change places for any transposition", "_closure/contraction", "contraction steps scan_steps oracles",
     'if transpose is not None and transpose.params["permutation"] == changed:',
     "if transpose is not None:"),
    ("a product of few rows is taken for another", "_jaxprs/cpu_products", "cpu_products",
     'eqn.params["dimension_numbers"] == (((1,), (1,)), ((), ()))',
     'eqn.params["dimension_numbers"] == (((1,), (0,)), ((), ()))'),
    ("a turned weight is read across", "_jaxprs/cpu_products", "cpu_products",
     "(((1,), (0,)), ((), ())),\n                precision=eqn",
     "(((1,), (1,)), ((), ())),\n                precision=eqn"),
    ("a weight is turned for a few trips", "_jaxprs/cpu_products", "cpu_products",
     "_TRIPS = 16", "_TRIPS = 1"),
    ("what is known of an inner scan is run forwards", "_jaxprs/partial_eval", "oracles scan_steps",
     'reverse=p["reverse"]', "reverse=False"),
    ("what is known of a branch is not kept off the ring", "_jaxprs/partial_eval", "current steps",
     'if eqn.primitive.name == "cond" and values[0] is not UNKNOWN:', "if False:"),

    # ------------------------------------------------------ residuals, stages, blocks
    ("nothing cheap is left off the ring", "_closure/residuals", "residuals current tabulate",
     "_MOST = 6", "_MOST = 0"),
    ("any length of cheap operations is made again", "_closure/residuals",
     "residuals current tabulate steps",
     "_MOST = 6", "_MOST = 600"),
    ("products that wait for a matrix stay in the loop", "_jaxprs/loop_fission", "loop_fission scan_cost",
     "_ROWS = 8", "_ROWS = 0"),
    ("side effects that no output needs are dropped", "_jaxprs/loop_fission", "loop_fission scan_cost scan",
     "variables(state_outs) + saved, effects=True)", "variables(state_outs) + saved)"),
    ("what the state needs is put off behind the loop", "_jaxprs/loop_fission", "loop_fission scan_cost scan",
     "in_loop = set(variables(state_outs))", "in_loop = set(state_outs[:0])"),
    ("a block that is left over is taken from the wrong end", "_jaxprs/loops", "blocks scan_cost",
     "jnp.int32(length - rest if descending else 0)", "jnp.int32(0)"),
    ("blocks begin where those left over are", "_jaxprs/loops", "blocks scan_cost",
     "starts = (0 if descending else rest) + block", "starts = 0 + block"),
    ("blocks are put together in the order in which they ran", "_jaxprs/loops", "blocks scan_cost",
     "        parts.reverse()", "        parts.sort(key=id)"),
    ("all stacks begin with one number", "_jaxprs/loops", "stacks",
     "_NUMBERS[i % len(_NUMBERS)])", "_NUMBERS[0])"),
    ("inputs that are residuals are stacked once more", "_transforms/scan_forward", "scan_cost scan",
     "made = [v for v in residuals if v not in row]", "made = list(residuals)"),
    ("what earlier blocks have contracted is forgotten", "_transforms/scan_backward", "scan_cost",
     "made = [total + v for total, v in", "made = [v for total, v in"),

    # ------------------------------------------------------------------------ scan
    ("in reverse the steps are counted from the wrong end", "_transforms/scan_backward", "scan scan_steps",
     "return self.groups.length - place if self.reverse else place + 1", "return place + 1"),
    ("in reverse the blocks are pulled back in the wrong order", "_transforms/scan_backward", "remat",
     "descending=not run.reverse", "descending=True"),
    ("in reverse the parts of a block are pulled back in the wrong order", "_transforms/scan_backward",
     "scan_cost scan",
     "descending=not self.run.reverse", "descending=True"),
    ("in a block that runs again the steps are counted from its start", "_transforms/scan_backward", "remat",
     "self.run.step(first + place)", "self.run.step(place)"),
    ("in a block that runs again the gaps lie as in the first", "_transforms/scan_backward", "remat",
     "self.run.reached(first + places)", "self.run.reached(places)"),
    ("a block runs again from the last carry of the one before", "_transforms/scan_forward", "remat",
     "slot = (done + (block - 1)) // block", "slot = done // block"),
    ("in reverse a block runs again from another's carry", "_transforms/scan_forward", "remat",
     "self.length - size - start if self.reverse", "self.length - start if self.reverse"),
    ("a chain's window runs again from the block that it ends in", "_transforms/chain_by_chain", "remat",
     "jnp.maximum(end - steps, 0) // kept.steps", "jnp.maximum(end - 1, 0) // kept.steps"),
    ("what runs again for the last chain ends behind the run", "_transforms/chain_by_chain", "remat",
     "begin = jnp.minimum(begin, length - size)", "begin = jnp.minimum(begin, length)"),
    ("all steps are one block that runs again", "_transforms/scan_backward", "remat",
     "return kept.steps if isinstance(kept, Checkpoints) else", "return"),
    ("sums take in steps that no chain reaches", "_transforms/scan_backward", "scan scan_steps",
     "live = groups.reached(step) if groups.gaps else True", "live = True"),
    ("all of the window is less than all, with groups", "_transforms/scan", "scan",
     'most = max(length, 1) + self.every - 1', 'most = max(length, 1)'),
    ("a carry that is handed on as it came is a parameter", "_transforms/scan", "parts scan",
     "return lax.optimization_barrier(leaf) if id(leaf) in came else leaf", "return leaf"),
    ("an output that is an input has a gradient where none is due", "_transforms/scan", "scan",
     "if ys_too else outs[1]", "if not ys_too else outs[1]"),
    ("groups under a random window are let through", "_transforms/scan", "random_window",
     "if drawn and every > 1:", "if drawn and every > 9:"),

    # --------------------------------------------------------------- random window
    ("where there is no cut, the factor is upside down", "_windows", "random_window",
     "jnp.where(cut, 0, 1 / (1 - c))", "jnp.where(cut, 0, 1 - c)"),
    ("the age of a stretch goes on over a cut", "_windows", "random_window",
     "return jnp.where(cut, 1, age + 1), jnp", "return age + 1, jnp"),
    ("a value that is not finite crosses a cut", "_transforms/scan_backward", "random_window",
     "jnp.where(factor > 0, product, jnp.zeros_like(product)).astype(", "product.astype("),
    ("equations of other parameters are one", "_jaxprs/evaluate", "repeats",
     "key = eqn.primitive, *eqn.params.values(), eqn.ctx,", "key = eqn.primitive, eqn.ctx,"),
    ("half precision is multiplied in half precision", "_transforms/scan_backward", "random_window",
     "wide = widened(value)  # else", "wide = value  # else"),
    ("the factor of the step before", "_transforms/scan_backward", "random_window",
     "self.run.factors[step - 1]", "self.run.factors[step - 2]"),

    # ---------------------------------------------------------------------- resets
    ("a reset keeps the carry and all else starts anew", "_transforms/resets", "resets",
     "return jnp.where(flags, initial, carry)", "return jnp.where(flags, carry, initial)"),
    ("flags lie along the last axes", "_transforms/resets", "resets",
     "is_first.shape + (1,) * (carry.ndim - is_first.ndim)",
     "(1,) * (carry.ndim - is_first.ndim) + is_first.shape"),
    ("an initial carry without the batch's axes is refused", "_transforms/resets", "resets",
     "shorter = len(initial.shape) <= len(carry.shape)",
     "shorter = len(initial.shape) == len(carry.shape)"),

    # --------------------------------------------------------------------- learner
    ("the learner doesn't wait until it is due", "_training/learner", "learner learner_optax",
     "return lax.cond(due, update_now, skip)", "return update_now()"),
    ("the step count counts updates", "_training/learner", "learner stream",
     "tape, state.step + 1, pending)", "tape, state.step + new.updated.astype('uint32'), pending)"),
    ("a gradient that is not finite is learned from", "_training/learner", "learner learner_optax",
     "finite = finite & _all_finite(grads)", "finite = finite & True"),
    ("the carry that was not finite stays", "_transforms/tape", "learner",
     "carry=jax.tree.map(kept, tape.carry, before.carry)", "carry=tape.carry"),
    ("complex parameters go uphill along their imaginary parts", "_training/learner",
     "learner_optax learner",
     "jnp.conj(v) if jnp.iscomplexobj(v) else v", "v"),
    ("a group's loss goes on over the groups", "_training/state", "learner learner_optax",
     "return Pending(ct_ys, added(self.loss, loss), ct_params)",
     "return Pending(ct_ys, self.loss + loss, ct_params)"),
    ("in a window shorter than the group ȳ is put into the wrong row", "_training/state",
     "learner learner_optax",
     "(phase_of(tape) - 1) % pending_rows(tape)", "phase_of(tape) - 1"),
    ("rows of the last group are left in a group cut short", "_training/state", "groups_cut_short",
     "ours = jnp.arange(rows, dtype=jnp.int32) >= rows - steps",
     "ours = jnp.arange(rows, dtype=jnp.int32) >= 0"),
    ("the rows of a group stay where the ring has them", "_training/state", "groups_cut_short learner",
     "jnp.roll(stack, -steps % rows, 0)", "jnp.roll(stack, 0, 0)"),
    ("a group that is cut short reaches as far as the window", "_transforms/window_vjp",
     "groups_cut_short",
     "(jnp.minimum(w, last + max(w - settings.every, 0)) for w in windows)",
     "(jnp.minimum(w, settings.window) for w in windows)"),
    ("a part that is cut in the midst of a sweep is handed on", "_transforms/window_vjp",
     "groups_cut_short",
     "sent = _each(where_or_zero, followed, lam) if window.cut else lam", "sent = lam"),
    ("a flag of the data doesn't begin a new group", "_transforms/tape", "groups_cut_short",
     "_phase=jnp.where(ends, every, tape._phase)", "_phase=tape._phase"),
    ("the flag of the data is not looked at", "_training/learner", "groups_cut_short",
     "due = is_due(tape) if ends is None else is_due(tape) | ends", "due = is_due(tape)"),
    ("a group that is over is flushed again", "_training/learner", "groups_cut_short",
     "waiting = (phase_of(tape) > 0) & ~is_due(tape)", "waiting = phase_of(tape) > 0"),
    ("the losses' own gradient by params goes on over the groups", "_training/state", "loss_of_params",
     "jnp.where(first, new.astype(total.dtype), total + new.astype(total.dtype))",
     "total + new.astype(total.dtype)"),
    ("the losses' own gradient by params is added up in half precision", "_training/state",
     "loss_of_params",
     "sums = [widened(zeros(leaf)) for leaf in ct_params]", "sums = [zeros(leaf) for leaf in ct_params]"),
    ("a default or *args asks for params", "_signatures", "loss_of_params resets",
     "return not fits[0]", "return fits[1]"),
    ("another window keeps the groups that there were, whatever is asked for", "_training/learner", "other_window",
     "new = record(rec.step, window=window, every=every, weights=rec.weights, pace",
     "new = record(rec.step, window=window, every=rec.every, weights=rec.weights, pace"),
    ("pending cotangents of another type are taken", "_training/learner", "learner",
     "check_pending(state.pending, self._pending_like(tape, ct_y, loss, ct_params))", "pass"),
    ("an empty tuple is a leaf", "_types", "resets learner",
     "and len(jax.tree.leaves(tree)) == 1", "and True"),
    ("the remedy is the dtype that went out", "_errors", "faults resets",
     'astype(jnp.{kinds[0]})"', 'astype(jnp.{kinds[1]})"'),
    ("a number that would wrap is NumPy's affair", "_arrays", "stream faults",
     'not in "iu":', 'not in "":'),
    ("a callback of other arguments is found out after a block", "_training/stream", "stream",
     'check_takes(callback, "callback", ("state", "metrics"))', "pass"),
    ("counters of any type will do", "_transforms/tape", "faults learner",
     "got[name] = _type_or_none(getattr(tape, name))", "got[name] = counter"),
    ("None stands for float cotangents too", "_transforms/cotangents", "faults",
     "if part is None and not kind.differentiable", "if part is None"),
    ("any array is a key", "_errors", "random_window",
     'hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)',
     'hasattr(value, "dtype")'),
    ("a manifest's entries are not looked at", "_checkpoints/manifest", "damage",
     "if key not in here:", "if False:"),
    ("flax restores a tape of any step", "_checkpoints/state_dict", "state_dict",
     'if not np.array_equal(state["step"], _step(tape)):', "if False:"),
    ("flax is told of tapes once, at import", "_transforms/tape", "state_dict",
     "        tell_flax()", "        pass"),
    ("the optimiser's state is that of before", "_training/optimizer", "learner_optax learner",
     "return new_params, new_state", "return new_params, state"),
    ("an optimiser that takes the loss by name doesn't get it", "_training/optimizer",
     "learner learner_optax",
     'return "value" in parameters or any(', "return any("),
    ("the optimiser sees integers", "_training/optimizer", "learner_optax learner",
     "lambda leaf: leaf if leaf_type(leaf).differentiable else None, tree",
     "lambda leaf: leaf, tree"),
    ("changes are taken away from the parameters", "_training/optimizer", "learner learner_optax",
     "(leaf + change).astype(leaf.dtype)", "(leaf - change).astype(leaf.dtype)"),
    ("integers in y count as differentiable", "_training/loss", "learner",
     "if leaf.dtype != jax.dtypes.float0]", "if True]"),
    ("the loss's aux is lost", "_training/loss", "learner stream",
     'return value, as_strong_arrays(aux, "aux", blame="step")', "return value, None"),
    ("an evaluation starts from the tape's carry, whatever it is given", "_training/learner", "learner",
     "as_strong_arrays(state.tape.carry if carry is None else carry, ", "as_strong_arrays(state.tape.carry, "),
    ("a stream's positions count from zero", "_training/stream", "stream",
     "settings_of(state.tape).x, int(state.step))", "settings_of(state.tape).x, 0)"),
    ("a block has a step more", "_training/stream", "stream",
     "len(rows) < self._size:", "len(rows) <= self._size:"),
    ("an input is not copied", "_training/stream", "stream",
     "else np.array(v) for v in leaves]", "else np.asarray(v) for v in leaves]"),
    ("an interrupt in the middle of a block is lost", "_training/stream", "stream",
     "handler(*arrived[-1])", "arrived.clear()"),

    # ------------------------------------------------------------------ inspection
    ("partial sums fall to zero behind what is reached", "_inspection/by_lag", "by_lag",
     '(0, unreached), mode="edge")', "(0, unreached))"),
    ("norms of half precision are taken in half precision", "_inspection/by_lag", "by_lag",
     "value = widened(jnp.abs(value))", "value = jnp.abs(value)"),
    ("a run is paired with itself", "_inspection/bias", "bias",
     "pairs = (every - own) / (n * (n - 1))", "pairs = every / (n * n)"),
    ("the bias of a window is that of the range before it", "_inspection/bias", "bias",
     "jnp.append(jnp.flip(jnp.diagonal(behind))[1:], 0)", "jnp.flip(jnp.diagonal(behind))"),
    ("ranges end a lag late", "_inspection/by_range", "by_range",
     "(*(2**i for i in", "(*(2**i + 1 for i in"),
    ("a range has its last segment alone", "_transforms/window_vjp", "by_range",
     "lam, sums[place] = ct.carry, _each(plus, sums[place], ct.weights[first:])",
     "lam, sums[place] = ct.carry, ct.weights[first:]"),
    ("the fit begins at a quarter", "_inspection/decay", "decay",
     "jnp.minimum(extent // 2, extent - 2)", "jnp.minimum(extent // 4, extent - 2)"),
    ("a window beyond the tape is a step too short", "_inspection/decay", "decay",
     "jnp.ceil(jnp.log(ratio) / jnp.log(rate))", "jnp.floor(jnp.log(ratio) / jnp.log(rate))"),
    ("what is past the tape doesn't count", "_inspection/decay", "decay",
     "jnp.concatenate([beyond[None], terms[::-1]])",
     "jnp.concatenate([0 * terms[:1], terms[::-1]])"),
    ("the upright line is a lag too far", "_inspection/plot", "plot",
     "ax.axvline(end - 0.5,", "ax.axvline(end + 0.5,"),
    ("dashes begin where the lags do", "_inspection/plot", "plot",
     "fitted = lags[int(fit.first) :", "fitted = lags[0 :"),
    ("a legend takes its room from the lines", "_inspection/plot", "plot",
     "height + 0.15 * len(labels))", "height)"),
    ("a second gradient has the first one's colours", "_inspection/plot", "plot",
     "in enumerate(parts, used):", "in enumerate(parts, 0):"),
    ("products in a scan count once", "_inspection/tabulate", "tabulate",
     'count += inner * (eqn.params["length"] if', "count += inner * (1 if"),
    ("less than a fifth is suggested too", "_inspection/tabulate", "tabulate",
     "if 5 * p.nbytes <= 4 * per_step > 0]", "if p.nbytes <= per_step > 0]"),
    ("the fewest bytes are suggested, whatever they cost", "_inspection/tabulate", "tabulate",
     "key=lambda p: (p.products, p.nbytes))", "key=lambda p: (p.nbytes, p.products))"),
    ("a kink is a wrong gradient", "_inspection/check_differences", "check",
     "doubt = abs(2 * half_bend - bend) + 6 * abs(narrow - wide)",
     "doubt = 0 * abs(narrow - wide)"),
    ("gradients are compared without regard to sign", "_inspection/check_differences", "check",
     "gaps = [abs(g - d.value) - d.noise for", "gaps = [abs(abs(g) - abs(d.value)) - d.noise for"),
    ("complex gradients are compared with their conjugates", "_inspection/check_differences", "check",
     "np.real(np.sum(gradient * direction))", "np.real(np.sum(gradient * np.conj(direction)))"),
    ("the window that is checked begins a step late", "_inspection/check", "check",
     "_row(carries, before - 1) if", "_row(carries, before) if"),
    ("gradients of x are compared at the other end of the window", "_inspection/check", "check",
     "leaf[::-1], ct.xs)", "leaf, ct.xs)"),
    ("what is only saturated is flat", "_inspection/check_differences", "check",
     "(size + h) * direction)", "(size + 0) * direction)"),
    ("a smaller carry than 1 is never flat", "_inspection/check_differences", "check",
     "for size in (scale, -scale, scale + 1, -scale - 1):", "for size in (scale, -scale):"),
    ("a leaf that is flat is so at each lag anew", "_inspection/check_differences", "check",
     'known |= {finding.kind} & {"flat", "not finite"}', 'known |= {finding.kind} & {"not finite"}'),
    ("a counter in Python is taken for a draw", "_inspection/check", "check",
     "drawn = not _difference(first, fresh()(*args))", "drawn = True"),

    # -------------------------------------------------------------------- messages
    ("a window of zero is let through", "_errors", "faults",
     "or not isinstance(value, int | np.integer) or value < 1:",
     "or not isinstance(value, int | np.integer) or value < 0:"),
    ("one row of cotangents more than the window is let through", "_errors", "faults",
     "not 1 <= length[0] <= window:", "not 1 <= length[0] <= window + 1:"),
    ("leaves are counted where the structure differs", "_errors", "faults",
     "if wanted.keys() == came.keys() and differ:", "if differ:"),
    ("a tape with other weights is taken", "_transforms/record", "faults tape replayed",
     'for name in ("windows", "every", "weights", "pace"):', 'for name in ("windows", "every", "pace"):'),
    ("a carry that the step returns in another type is a ValueError", "_closure/step", "faults steps",
     'words=("in", "out"),\n            error=TypeError,',
     'words=("in", "out"),\n            error=ValueError,'),

    # ----------------------------------------------------------------- checkpoints
    ("recorded steps are not read back", "_checkpoints/checkpoints", "resume",
     "if not (on_tape and clear):", "if not on_tape:"),
    ("the oldest checkpoint is taken for the latest", "_checkpoints/checkpoints", "resume",
     "return there[-1] if step is None else step", "return there[0] if step is None else step"),
    ("a step may be saved twice", "_checkpoints/checkpoints", "resume",
     "least = 0 if last is None else last + 1", "least = 0 if last is None else last"),
    ("pending cotangents are no part of the recorded steps", "_checkpoints/leaves", "resume",
     "return isinstance(node, Pending) or (", "return ("),
    ("keys come back as those of another kind", "_checkpoints/leaves", "resume",
     "jnp.asarray(read), impl=_key_impl(self.value))", "jnp.asarray(read))"),
    ("Python's numbers come back as arrays", "_checkpoints/leaves", "resume",
     "return type(self.value)(read.item())", "return jnp.asarray(read)"),
    ("a tape of groups of another size is taken", "_checkpoints/manifest", "resume",
     '_OPTIONS = ("window", "every",', '_OPTIONS = ("window",'),
    ("a tape of another JAX is taken", "_checkpoints/manifest", "resume",
     """pairs = [(f"JAX {theirs['jax']}", f"JAX {ours['jax']}")]""", "pairs: list[tuple] = []"),
    ("a tape of another step is taken", "_checkpoints/manifest", "resume",
     'if differ or saved["step"] == asked["step"]:', "if True:"),
    ("one checkpoint too few is kept", "_checkpoints/orbax_directory", "resume",
     "LatestN(self._keep)", "LatestN((self._keep or 9) - 1)"),
    ("values of closed-over arrays don't count", "_closure/fingerprint", "fingerprint resume",
     'yield from value_parts(closure.closed_over)', 'yield str(len(closure.closed_over))'),
    ("names count", "_closure/fingerprint", "fingerprint",
     'frozenset({"name", "debug_info", "name_and_src_info"})',
     'frozenset({"debug_info", "name_and_src_info"})'),
    ("addresses in memory count", "_closure/fingerprint", "fingerprint",
     'return _PLACES.sub("", repr(value))', "return repr(value)"),

    # ------------------------------------------------------------------------ flax
    ("collections stay as they were", "_training/flax", "flax",
     "LinenState({**collections, **changed}, rngs)", "LinenState(collections, rngs)"),
    ("the keys to go on with are those that were drawn from", "_training/flax", "flax",
     "jax.tree.map(itemgetter(0), pairs), jax", "jax.tree.map(itemgetter(1), pairs), jax"),
    ("a module in use is changed in place", "_training/flax", "flax",
     "nnx.split(nnx.clone(module), *filters)", "nnx.split(module, *filters)"),

    # -------------------------------------------------------------------- main job
    ("the GRU has no reset gate", "_demo/model", "cli",
     "n = jnp.tanh(n + r * hn)", "n = jnp.tanh(n + hn)"),
    ("a group's gradient is that of the sum", "_demo/train", "cli",
     "optax.scale(1 / every),", "optax.scale(1.0),"),
    ("a stream ends where the text does", "_demo/train", "cli resume_job",
     "following = (position + 1) % n", "following = np.minimum(position + 1, n - 1)"),
    ("it is measured after every block", "_demo/train", "cli resume_job",
     "32 * before < mark * steps <= 32 * after for", "mark <= 32 for"),
    ("the gradient by lag is measured before the tape is full", "_demo/results", "cli",
     "rows[: lags - 1], xs)", "rows[: lags - 2], xs)"),
    ("by the second each run is looked at after its own time", "_demo/results", "cli",
     "run.bits_after(seconds)", "run.bits_after(run.progress.seconds)"),
    ("the picture's window ends a lag too far", "_demo/results", "cli",
     "axvline(window - 0.5,", "axvline(window + 0.5,"),
    ("held-out streams are interleaved", "_demo/text", "cli",
     ".reshape(streams, steps).T)", ".reshape(steps, streams))"),
    ("the least number that an option takes is refused", "_demo/cli", "cli",
     "if least <= int(given) <= _LARGEST:", "if least < int(given) <= _LARGEST:"),
    ("it is saved only where a block ends on the number", "_demo/saves", "saves resume_job",
     "steps // every > self.last // every)", "steps % every == 0)"),
    ("the run of window 1 has the groups of the run beside it", "_demo/job", "cli",
     "dataclasses.replace(config, window=1, every=1)", "dataclasses.replace(config, window=1)"),
    ("chunks learn at the rate of many small updates", "_demo/job", "cli",
     "rate = config.learning_rate * (window / config.every) ** 0.5", "rate = config.learning_rate"),
    ("earlier results are overwritten", "_demo/job", "cli",
     "if (out / name).is_file()]", "if (out / name).is_dir()]"),

    # ------------------------------- rules that are not linear, effects, other steps' tapes
    ("a selection of what moves or a number counts as linear", "_jaxprs/linearity", "linearity",
     "return FIXED not in kinds[1:]", "return True"),
    ("a product of two things that move counts as linear", "_jaxprs/linearity", "linearity",
     "return moving == 1", "return moving >= 1"),
    ("a constant put beside what moves counts as nothing", "_jaxprs/linearity", "linearity",
     "return FIXED not in together and moving", "return moving"),
    ("a loop's carry is looked at once only", "_jaxprs/linearity", "linearity",
     "if joined == carry:", "if True:"),
    ("rules that are not linear are pulled back together", "_transforms/chain_by_chain", "linearity",
     '(several and not pullback.is_linear) or', 'False or'),
    ("in a gap a pullback acts", "_transforms/chain_by_chain", "side_effects",
     "(several or groups.gaps)", "several"),
    ("every chain's λ goes on into init", "_transforms/chain_by_chain", "linearity",
     "reached = [end <= reach_of_rows(w, outputs, every) for w in of_leaves]",
     "reached = [True for w in of_leaves]"),
    ("the final carry's cotangent goes with every group", "_transforms/chain_by_chain", "linearity",
     "[where_or_zero(end == length, v) for v in ct_carry]", "ct_carry"),
    ("a part's window longer than the run is not cut short", "_transforms/chain_by_chain", "linearity",
     "(min(reach_of_rows(w, outputs, every), length) for w in windows)",
     "(min(reach_of_rows(w, outputs, every), length + i) for i, w in enumerate(windows))"),
    ("rounding to a few digits counts as linear", "_jaxprs/linearity", "linearity",
     "return not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 16",
     "return False"),
    ("sums that begin as zeros do not count as zero", "_jaxprs/linearity", "linearity",
     "return [ZERO if is_zero else FIXED] * count", "return [FIXED] * count"),
    ("how exactly products are computed counts", "_closure/program_hash", "whose_tape",
     'weak_type sharding out_sharding precision ', 'weak_type sharding out_sharding '),
    ("x̄ lies a row too far", "_transforms/chain_by_chain", "linearity",
     "newest + 1 - steps + self.padding", "newest + 2 - steps + self.padding"),
    ("side effects of a pullback are dropped", "_closure/pullbacks", "side_effects",
     'Program.of(prune(closed, effects=True))', 'Program.of(prune(closed))'),
    ("a pullback acts for lags that are not recorded", "_transforms/window_vjp", "side_effects",
     "return lax.cond(live, pulled, lambda: none)", "return pulled()"),
    ("the newest step's pullback acts twice", "_transforms/window_vjp", "side_effects",
     'pullback.outputs.x, effects=False)', 'pullback.outputs.x)'),
    ("a drawn reach counts as a window", "_transforms/window_vjp", "reach",
     'elif reach.keep != 1:', 'elif False:'),
    ("a traced reach goes further behind a short group", "_transforms/window_vjp", "reach groups_cut_short",
     'last = rows if group is None else jnp.minimum(group, rows)', 'last = rows'),
    ("a carry that was put in is lost when the window is run again", "_transforms/window_vjp", "replayed",
     '| put_in(lag)', '| (lag > 2**30)'),
    ("a carry that was put in counts as put in a turn later too", "_transforms/tape", "replayed",
     'put_in = put_in.at[(head + 1) % window].set(False)', 'put_in = put_in'),
    ("checkpoints are made by a rule of the user's and not by what it computes", "_transforms/scan", "remat",
     'step = Program.of(prune(core.ClosedJaxpr(outs, forward.consts), effects=True))',
     'step = core.jaxpr_as_fun(eqn.params["jaxpr"])'),
    ("an effect on the way to x happens twice", "_transforms/record", "side_effects",
     'acts = closure.pullback(y=asked).acts', 'acts = False'),
    ("a rule that is not linear gets zeros of the output", "_closure/closure", "rules",
     'return not spared and self.pullback().is_linear', 'return not spared'),
    ("what a gather fills in is added once", "_closure/contraction", "rules",
     'maker)) or fills(eqn):', 'maker)):'),
    ("what is on the ring is no part of a step's hash", "_closure/program_hash", "whose_tape",
     '    if residuals:', '    if False:'),
    ("a long program stays in one piece", "_jaxprs/pieces", "pieces",
     'return longest > _SHORT or len(eqns) > _LONG', 'return False'),
    ("a step of many layers is in pieces", "_jaxprs/pieces", "pieces",
     'return longest > _SHORT or len(eqns) > _LONG', 'return True'),
    ("what pieces hand on is in the compiler's sight", "_jaxprs/pieces", "pieces",
     'cpu=held, default', 'cpu=lambda *v: [*v], default'),
    ("the wrong branch hands on what pieces hold", "_jaxprs/pieces", "pieces",
     'lambda *v: [*v], _others, *values', '_others, lambda *v: [*v], *values'),
    ("a batch of runs has no branch", "_jaxprs/pieces", "pieces",
     'if axis_size else jnp.array(True)), False', 'if axis_size else jnp.array(True)), True'),
    ("what is the same in all iterations is held in each", "_jaxprs/pieces", "pieces",
     'if v in read and v in moving]', 'if v in read]'),
    ("what is large is handed on", "_jaxprs/pieces", "pieces",
     'at_most(size_in_bytes([aval]), _LARGE)', 'True'),
    ("a large array that is closed over stays a parameter", "_closure/closure", "frozen",
     'flag and v is None for flag', 'flag for flag'),
    ("what NumPy's arrays hold counts once for all", "_closure/constants", "frozen_arrays",
     'if isinstance(array, jax.Array):', 'if True:'),
    ("what jitted functions close over stays in them", "_closure/step", "whose_tape",
     'return with_arrays_outside(closed, jax.tree.leaves((params, carry, x))), type_of(shapes)',
     'return closed, type_of(shapes)'),
    ("the arrays in a rule may change", "_closure/program_hash", "whose_tape",
     'if arrays else []', 'if False else []'),
    ("a constant lies on the ring", "_closure/closure", "frozen",
     'not stored or v is not None for v', 'not stored for v'),
    ("a constant may have other values at the next call", "_transforms/record", "frozen",
     'if changed and recorder.weights == "stored":', 'if False:'),
    ("a gradient by a constant is zero", "_transforms/cotangents", "frozen",
     'if given.perturbed and constant is not None:', 'if False:'),
    ("what nothing drives is recorded", "_closure/closure", "frozen",
     'at_most(SMALL + 1, spared)', 'False'),
    ("what nothing drives is never recorded", "_closure/closure", "frozen",
     'at_most(SMALL + 1, spared)', 'True'),
    ("a program with references is taken apart", "_closure/closure", "side_effects",
     'return in_one_piece(traced)', 'return traced'),
    ("what a reference holds counts as known", "_jaxprs/partial_eval", "side_effects",
     "    if acts(eqn):\n", "    if False:\n"),
    ("a collective counts as a side effect", "_jaxprs/evaluate", "side_effects devices",
     'type(effect).__name__ != "NamedAxisEffect"', "True"),
    ("embeddings are added up in half precision", "_closure/contraction", "half_precision",
     'for v in [*made, *self.summed_as_is]]', 'for v in self.summed_as_is] + [zeros(v.aval) for v in made]'),
    ("rounding goes behind the sum", "_jaxprs/primitives", "half_precision contraction",
     "psum_invariant real reduce_sum reshape", "psum_invariant real reduce_precision reduce_sum reshape"),
    ("outputs that nobody asked for are pulled back as something", "_transforms/scan", "scan scan_steps",
     "asked = tuple(not is_symbolic_zero(v) for v in ct_ys)", "asked = tuple(True for v in ct_ys)"),
    ("what is beside the perturbed carry is not looked at again", "_jaxprs/dependence", "dependence scan",
     "if joined == flags[carry]:", "if True:"),
    ("a stopped gradient goes on", "_jaxprs/dependence", "dependence",
     "if name in FLAT or not any(perturbed):", "if not any(perturbed):"),
    # ---------------------------------------------------------- pace, reach
    ("λ is not turned with the rows", "_transforms/pace", "pace",
     "wraps = self.columns.row(lag) == 0", "wraps = self.columns.row(lag) == 1"),
    ("the oldest chain goes on beyond the window", "_transforms/pace", "pace",
     "live = counted & recorded & (of_window < self.settings.window)", "live = counted & recorded"),
    ("chains of losses from before the first step", "_transforms/pace", "pace",
     "live = counted & recorded & (of_window", "live = counted & (of_window"),
    ("a new chain goes on from the old one in its column", "_transforms/pace", "pace",
     "lam = [select(~own, v) for v in chains.columns.in_flight.lam]", "lam = list(chains.columns.in_flight.lam)"),
    ("ȳ goes to all chains", "_transforms/pace", "pace",
     "of_own = [select(own, v[None])", "of_own = [select(own | True, v[None])"),
    ("the cotangent of y counts twice", "_transforms/pace", "pace",
     "contracted = [scale.astype(v.dtype) * v", "contracted = [scale.astype(v.dtype) ** 2 * v"),
    ("cleared chains go on", "_transforms/tape", "pace",
     "_in_flight=jax.tree.map(jnp.zeros_like, tape._in_flight),", "_in_flight=tape._in_flight,"),
    ("the reach is a lag too far", "_transforms/window_vjp", "reach",
     "limit = jnp.minimum(reach.lags, last + beyond)", "limit = jnp.minimum(reach.lags, last + beyond) + 1"),
    ("the loop goes on to the window's end whatever the reach", "_transforms/window_vjp", "reach",
     "return segment.start + carried[0] < jnp.minimum(window.reach, segment.stop)", "return segment.start + carried[0] < segment.stop"),
    ("what a random reach goes on with is not divided", "_transforms/window_vjp", "reach",
     "older = _scaled(older, window.keep, jnp.int32(-1)) if window.keep != 1 else older", "older = older"),
    ("later rows of ȳ are not divided under a random reach", "_transforms/window_vjp", "reach",
     "ct_y = _scaled(ct_y, window.keep, -lag) if window.keep != 1 else ct_y", "ct_y = ct_y"),
    ("any step may take any tape", "_transforms/record", "whose_tape",
     "made.step == _hash_of(recorder, closure)", "True"),
    ("numbers in a step's source do not count", "_closure/program_hash", "whose_tape",
     '_key(*value_parts(np.asarray(atom.val, aval.dtype)))', "_key('number')"),
    ("a retyped value is another value", "_closure/program_hash", "whose_tape devices",
     'if _only_retypes(eqn):', 'if False:'),
    ("what a mesh retypes is not merged", "_jaxprs/evaluate", "whose_tape",
     "not in MOVABLE | RETYPES:", "not in MOVABLE:"),
    ("a step writes into the caller's containers", "_closure/step", "whose_tape",
     "return jax.tree.map(lambda leaf: leaf, trees)", "return trees"),
    ("parameters may change in place", "_closure/step", "whose_tape flax",
     "if id(leaf) not in kept", "if False"),
    ("arrays are restored without a look at their checksum", "_checkpoints/manifest", "damage",
     "checksum(value) not in (saved, None)", "False"),
    ("a manifest is read without a look at its checksum", "_checkpoints/manifest", "damage",
     'not in (None, _seal(manifest))', 'in ("",)'),
]]
# fmt: on


# ----------------------------------------------------------------------- the runs


def copied(folder):
    """The project in a folder of its own, which is what is imported there."""
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    show = [sys.executable, "-c", "import jaxbptt; print(jaxbptt.__file__)"]
    there = subprocess.run(show, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert Path(there.strip()).is_relative_to(folder.resolve()), f"imported {there} instead"
    return folder


def pytest(folder, tests, tier):
    """Exit code and output of the tests, up to the first that fails; None for one without end."""
    marks = [] if tier == "default" else ["-m", ""]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
    # A terminal so narrow has no room for more than the names of what failed.
    env = os.environ | {"COLUMNS": "40", "PYTHONDONTWRITEBYTECODE": "1"}
    env = {name: value for name, value in env.items() if name not in ("CI", "BUILD_NUMBER")}
    process = subprocess.Popen(
        [*command, *marks, *tests],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what the tests have started
        return None, process.communicate()[0]
    return process.returncode, output


def tried(folder, fault, tier, sound):
    """What became of a fault, the first test that failed, and after how many seconds.

    A fault is "caught", has "survived", or is "broken": then nothing ran that could have failed.
    `sound` holds what is known of tests without any fault: one that fails anyway catches nothing.
    """
    path = folder / fault.path
    text = path.read_text(encoding="utf-8")
    path.write_text(fault.changed(text), encoding="utf-8")
    begun = time.monotonic()
    try:
        code, output = pytest(folder, fault.files, tier)
    finally:
        path.write_text(text, encoding="utf-8")
    seconds = time.monotonic() - begun
    if code is None:
        return "caught", "hangs", seconds
    if code == 0:
        return "survived", "", seconds
    failed = re.search(r"^(FAILED|ERROR) (.*)$", output, re.MULTILINE)
    if code != 1 or not failed:
        return "broken", (output.strip().splitlines() or ["no output"])[-1], seconds
    test = failed[2].strip()
    if test not in sound:
        sound[test] = pytest(folder, [test], tier)[0] == 0
    if not sound[test]:
        return "broken", f"{test} fails anyway", seconds
    return "caught", test, seconds


def run(faults, tier, jobs):
    """Tries the faults and prints a line of each; returns how many of each outcome."""
    waiting, lock = queue.SimpleQueue(), threading.Lock()
    counts, sound = collections.Counter(), {}
    for fault in faults:
        waiting.put(fault)

    def work(folder):
        copied(folder)
        while True:
            try:
                fault = waiting.get_nowait()
            except queue.Empty:
                return
            outcome, said, seconds = tried(folder, fault, tier, sound)
            with lock:
                counts[outcome] += 1
                what = f"{fault.module}: {fault.name}"
                print(f"{outcome:8}  {seconds:5.0f} s  {what:76}  {said}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        workers = [
            threading.Thread(target=work, args=(Path(temporary).resolve() / str(i),))
            for i in range(jobs)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=("default", "exhaustive"), default="default")
    parser.add_argument("--only", default="", help="in the name or the module of a fault")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th fault, from the i-th on")
    options = parser.parse_args()
    first, of = map(int, options.shard.split("/"))
    chosen = [v for v in FAULTS if options.only in f"{v.module}: {v.name}"][first - 1 :: of]
    counts = run(chosen, options.tier, options.jobs)
    others = [f"{counts[outcome]} {outcome}" for outcome in ("survived", "broken")]
    print(f"{options.tier}: {counts['caught']} of {len(chosen)} caught, {', '.join(others)}")
    return int(counts["caught"] < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
