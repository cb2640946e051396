"""What `check_step` reports: findings, each with a sentence, and a text to print."""

import dataclasses
from collections.abc import Sequence

_SHOWN = 12  # findings listed before "and n more"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One place where the recorded gradient, or the step itself, is not what it should be.

    Attributes:
        kind: "gradient" (differs from finite differences), "cut" (zero, though the outputs
            depend on the leaf), "flat" (the outputs depend on the leaf in jumps only),
            "not finite" (NaN or inf), "state" (tracing the step again gives another
            function) or "random" (the same arguments give other outputs).
        path: the leaf, e.g. "params['w']".
        lag: steps before the newest, 0 is the newest; None where no lag is meant.
        expected: the directional derivative by finite differences, or None.
        got: what the recorded gradient gives along the same direction, or None.
        sentence: what is wrong, and what to look for.
    """

    kind: str
    path: str
    lag: int | None
    expected: float | None
    got: float | None
    sentence: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The verdict of `check_step`; `print` it.

    Attributes:
        ok: whether nothing was found.
        findings: what was found.
        compared: directional derivatives compared.
        disregarded: of these, how many could not be judged, as finite differences of two
            sizes contradict each other there: a kink, or rounding.
        precision: the dtype whose rounding the finite differences have.
        notes: sentences about how the check was run.
    """

    ok: bool
    findings: list[Finding]
    compared: int = 0
    disregarded: int = 0
    precision: str = "float64"
    notes: tuple[str, ...] = ()

    def raise_if_bad(self) -> None:
        """Raises the report unless it is ok.

        Raises:
            ValueError: something was found.
        """
        if not self.ok:
            raise ValueError(str(self))

    def __str__(self) -> str:
        # A step that is wrong is wrong at many leaves and lags: the first of them will do.
        count = len(self.findings)
        verdict = f"{count} finding{'s' if count > 1 else ''}" if count else "ok"
        shown = self.findings[:_SHOWN]
        more = [f"and {count - _SHOWN} more"] if count > _SHOWN else []
        # One sentence for each leaf: the other lags are in the table.
        sentences: dict[tuple[str, str], str] = {}
        for finding in shown:
            sentences.setdefault((finding.kind, finding.path), f"* {finding.sentence}")
        how = "The gradient was not compared."
        if self.compared:
            left = ""
            if self.disregarded:
                left = f", {self.disregarded} disregarded: a kink, or rounding"
            how = f"{self.compared} directional derivatives compared in {self.precision}{left}."
        head = f"check_step: {verdict}"
        return "\n".join([head, *_table(shown), *more, *sentences.values(), how, *self.notes])


def _table(findings: Sequence[Finding]) -> list[str]:
    """Rows of equal columns under a head."""
    if not findings:
        return []
    rows: list[tuple[str, ...]] = [("kind", "where", "lag", "expected", "got")]
    for f in findings:
        numbers = ("-" if v is None else f"{v:.6g}" for v in (f.expected, f.got))
        rows.append((f.kind, f.path, "-" if f.lag is None else str(f.lag), *numbers))
    # The last column isn't padded: no line ends in blanks.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


# ------------------------------------------------------------------ sentences


def differs(path: str, lag: int, expected: float, got: float) -> Finding:
    """The recorded gradient is not the one that finite differences give."""
    text = (
        f"The gradient of {path} at lag {lag} is wrong: along a random direction finite "
        f"differences give {expected:.6g}, the recorded gradient {got:.6g}. Check step's custom "
        "derivative rules (a surrogate differs on purpose), stop_gradient, and callbacks."
    )
    return Finding("gradient", path, lag, expected, got, text)


def sum_differs(path: str, expected: float, got: float) -> Finding:
    """The gradient of the whole window is not the sum over its lags."""
    text = (
        f"The gradient of {path} is right at each lag, but over the whole window, along a random "
        f"direction, finite differences give {expected:.6g}, the recorded gradient {got:.6g}. "
        'With weights="current", try "stored".'
    )
    return Finding("gradient", path, None, expected, got, text)


def cut(path: str, lag: int, expected: float) -> Finding:
    """The recorded gradient is exactly zero where the outputs depend on the leaf."""
    text = (
        f"The gradient of {path} at lag {lag} is cut: by finite differences the outputs depend on "
        f"it, {expected:.6g} along a random direction, but the recorded gradient is exactly zero. "
        "Check step for stop_gradient, and for custom derivative rules that return zeros."
    )
    return Finding("cut", path, lag, expected, 0.0, text)


def flat(path: str, lag: int) -> Finding:
    """The outputs depend on the leaf only through what is piecewise constant."""
    text = (
        f"From lag {lag} on, {path} reaches the outputs in jumps only, as by rounding, a cast to "
        "integers or a comparison: its derivative is zero, and no gradient flows. If one should, "
        "give the operation a custom_vjp."
    )
    return Finding("flat", path, lag, 0.0, 0.0, text)


def not_finite(what: str, path: str, lag: int | None = None) -> Finding:
    """A NaN or an infinity, where it is first."""
    where = "" if lag is None else f" at lag {lag}, and nothing before it does"
    return Finding("not finite", path, lag, None, None, f"{what} {path} holds NaN or inf{where}.")


def state(path: str) -> Finding:
    """Traced again, the step is another function."""
    text = (
        f"step returns another {path} each time it is traced, for the same arguments: it reads "
        "something that changes, e.g. a Python counter, a list, a clock. Keep it in the carry."
    )
    return Finding("state", path, None, None, None, text)


def random(path: str, when: str) -> Finding:
    """The step draws random numbers other than from a key."""
    text = (
        f"step returns another {path} each time it {when}, for the same arguments: it is not "
        "deterministic, e.g. by np.random. Draw with jax.random, from a key in the carry or in x."
    )
    return Finding("random", path, None, None, None, text)
