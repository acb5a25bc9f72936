"""Collectives are read from a compiled program here: what it sends between devices, and how often."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_CALLS = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[([^\]]*)\] \{([^}]*)\})"
)


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `collective-permute`.
      arrays: Shape and bytes, per device, of each array that it gives.
      group: Number of devices that take part.
      times: How often it runs.
      optimizer_step: Whether it is inside a `cond`, so that it runs in an optimizer step only.
      source: The operation in the traced program that it came from.
    """

    kind: str
    arrays: tuple[tuple[str, int], ...]
    group: int
    times: int
    optimizer_step: bool
    source: str

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs together, by the ring algorithms."""
        share = (self.group - 1) / self.group if self.group > 1 else 0.0
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.group * share}
        if self.kind == "collective-permute":
            return float(self.nbytes * self.times)
        return factor.get(self.kind, share) * self.nbytes * self.times


def collectives(text: str, devices: int) -> list[Collective]:
    """Gives every collective of compiled HLO; one that is split into asynchronous parts counts once."""
    bodies = dict(_computations(text))
    times, conditional = _multiplicities(bodies)
    found: dict[str, Collective] = {}
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if not match or name not in times:
                continue
            result, kind, start = match.groups()
            arrays = _ARRAY.findall(result)
            if start and kind != "all-reduce":  # operands, results, and two words of context
                arrays = arrays[len([a for a in arrays if a[0] != "u32"]) // 2 :]
            arrays = [a for a in arrays if not (start and a == ("u32", ""))]
            channel = re.search(r"channel_id=(\d+)", line)
            source = re.search(r'op_name="([^"]*)"', line)
            found[channel[1] if channel else line] = Collective(
                kind=kind,
                arrays=tuple(
                    (f"{dtype}[{sizes}]", _nbytes(dtype, sizes)) for dtype, sizes in arrays
                ),
                group=_group(line, devices),
                times=times[name],
                optimizer_step=name in conditional,
                source=source[1] if source else "",
            )
    return list(found.values())


def _nbytes(dtype: str, sizes: str) -> int:
    return WIDTHS[dtype] * math.prod(int(n) for n in sizes.split(",") if n)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in text.splitlines():
        if name is None:
            if match := _HEAD.match(line):
                name, lines = ("ENTRY" if match[1] else match[2]), []
        elif line.startswith("}"):
            yield name, lines
            name = None
        else:
            lines.append(line)


def _multiplicities(bodies: dict[str, list[str]]) -> tuple[dict[str, int], set[str]]:
    """Gives how often each computation runs, and the computations that run inside a conditional."""
    times, conditional, waiting = {"ENTRY": 1}, set(), ["ENTRY"]
    while waiting:
        name = waiting.pop()
        for line in bodies.get(name, ()):
            for role, called in _CALLS.findall(line):
                for other in _NAME.findall(called):
                    trips = _trips(line, bodies) if role == "body" else 1
                    inside = name in conditional or "branch" in role or "_computation" in role
                    fresh = times[name] * trips > times.get(other, 0)
                    if fresh or (inside and other not in conditional):
                        times[other] = max(times.get(other, 0), times[name] * trips)
                        if inside:
                            conditional.add(other)
                        waiting.append(other)
    return times, conditional


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", line)
    numbers = [
        int(n)
        for other in bodies.get(condition[1] if condition else "", ())
        for n in re.findall(r"s32\[\][^=]*constant\((\d+)\)", other)
    ]
    return max(numbers, default=1)


def _group(line: str, devices: int) -> int:
    match = _GROUPS.search(line)
    if not match:
        return devices
    size, first, mesh, axes = match.groups()
    if size:
        return int(size)
    if first:
        return first.count(",") + 1
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes))
