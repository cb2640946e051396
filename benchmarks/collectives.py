"""Which collectives a compiled program has, and in which loops they sit, read from its text.

    found = collectives(jax.jit(update).lower(state, batch).compile().as_text())

A program's text (the optimised HLO) is a list of computations; a loop is an instruction
`while` that names its body. How deep a collective sits is how many bodies are around it.
"""

import dataclasses
import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16}  # of other types the name ends in the number
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_BETWEEN_SLICES = re.compile(r'^\s+%?[\w.\-]+ = (.*?) send\(.*megascale_transfer_type="(\w+)"')
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
        kind: one of `KINDS`, or such a kind "between slices" of a TPU.
        shapes: what it makes on one device, one for each array: ("f32[8,4]", ...).
        bytes: the bytes of these.
        group: how many devices take part together; 0 where the text doesn't say.
        trips: of the program's own loops around it, outermost first, how often each runs; 0
            where the text doesn't say.
        passes: how often it runs in one trip of the innermost of them. More than once where the
            compiler has cut a product into pieces, to send one while it multiplies another.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    group: int
    trips: tuple[int, ...]
    passes: int

    @property
    def depth(self) -> int:
        """How many of the program's own loops are around it."""
        return len(self.trips)


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, from the outermost to the innermost loop."""
    computations = _computations(text)
    around = _loops_around(computations)
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            made = _collective(name, line, around)
            if made:
                known = found.setdefault(_identity(line), made)
                if made.passes < known.passes:
                    found[_identity(line)] = made
    return sorted(found.values(), key=lambda c: (c.depth, c.kind, -c.bytes))


def _collective(name: str, line: str, around) -> Collective | None:
    between = _BETWEEN_SLICES.match(line)
    if between:
        kind = between[2].lower().replace("_", "-") + " between slices"
        shapes = _made(between[1], kind, False)[:1]  # then a counter
        return Collective(kind, shapes, sum(map(_bytes, shapes)), 0, *around(name))
    match = _COLLECTIVE.match(line)
    if not match:
        return None
    kind, group = match[2], _group(line)
    shapes = _made(match[1], kind, bool(match[3]))
    size = sum(map(_bytes, shapes))
    if name.startswith("all-reduce-scatter"):  # a fusion: it keeps its part only
        kind, size = "reduce-scatter", size // group
    return Collective(kind, shapes, size, group, *around(name))


def arrays(text: str) -> set[str]:
    """All shapes in a program, such as "f32[8,4]": those of one device."""
    return {f"{dtype}[{shape}]" for dtype, shape in _ARRAY.findall(text)}


def instructions(text: str, opcodes: str) -> list[tuple[int, str, str]]:
    """The instructions of a program with such an opcode (a regular expression).

    Returns:
        For each how many loops are around it, its opcode, and the shape of what it makes.
    """
    computations = _computations(text)
    around = _loops_around(computations)
    # Of a tuple, such as a product and its scratch memory, the first counts.
    made = r"\(?(\w+\[[\d,]*\])[^=]*"
    pattern = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = {made}? ({opcodes})\(")
    return [
        (len(around(name)[0]), match[2], match[1])
        for name, lines in computations.items()
        for match in map(pattern.match, lines)
        if match
    ]


def _computations(text: str) -> dict[str, list[str]]:
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match and not line.startswith(" "):
            lines = computations.setdefault(match[1], [])
        else:
            lines.append(line)
    return computations


def _loops_around(computations: dict[str, list[str]]):
    callers: dict[str, list[tuple[str, str]]] = {}
    for caller, lines in computations.items():
        for line in lines:
            called = {*_BODY.findall(line), *_CALLED.findall(line)}
            for names in _BRANCHES.findall(line):
                called |= {name.strip().lstrip("%") for name in names.split(",")}
            for name in called & computations.keys():
                callers.setdefault(name, []).append((caller, line))

    def around(name: str) -> tuple[tuple[int, ...], int]:
        found = [((), 1)]
        for caller, line in callers.get(name, ()):
            trips, passes = around(caller)
            if name in _BODY.findall(line):
                count = _trips(line, computations)
                if "windowed_dot_general" in line:  # a loop that the compiler has made
                    passes *= count
                else:
                    trips, passes = (*trips, count), 1
            found.append((trips, passes))
        return max(found, key=lambda pair: (len(pair[0]), pair[1]))

    return around


def _identity(line: str) -> str:
    """What tells a collective from others: one spread over other work is written many times."""
    channel = re.search(r"\bchannel_id=(\d+)", line)
    return f"channel {channel[1]}" if channel and "async_collective" in line else line


def _trips(loop: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs, from its line or from the limit in its condition."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop)
    if known:
        return int(known[1])
    condition = computations.get(re.search(r"\bcondition=%?([\w.\-]+)", loop)[1], [])
    limits = re.findall(r"= [su]\d+\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(limits[0]) if len(limits) == 1 else 0


def _made(shapes: str, kind: str, started: bool) -> tuple[str, ...]:
    """The arrays that a collective makes; one that is only started names its operands too."""
    made = [f"{dtype}[{shape}]" for dtype, shape in _ARRAY.findall(shapes)]
    if started and kind == "collective-permute":
        made = made[1:2]  # operand, result, and two counters
    elif started and kind != "all-reduce":
        made = made[len(made) // 2 :]
    return tuple(made)


def _bytes(shape: str) -> int:
    dtype, sizes = re.fullmatch(_ARRAY, shape).groups()
    bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
    return bits * math.prod(int(n) for n in sizes.split(",") if n) // 8


def _group(line: str) -> int:
    """How many devices reduce or exchange together; 0 where the text says all of them."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if mesh:
        sizes = {name: int(n) for name, n in re.findall(r"('\w+')=(\d+)", mesh[1])}
        parts = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(listed[1].split(",")) if listed else 0
