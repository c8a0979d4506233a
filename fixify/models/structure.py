"""Match two state dicts of the same shapes by the structure of their names, whatever order the tensors are stored in.

A state dict lists the modules of a tree, each with everything below it. Foreign names therefore fit an architecture if
the branches of their tree can be arranged so that the shapes are those of the architecture, one after the other. The
best arrangement has the most branches that are modules of the architecture, too, and among those the most with the
same names. Siblings whose names differ only in a number (`norm1`, `norm2`) are arranged by that number. If other
siblings can be exchanged, the names do not decide, and neither does the order of a file: that is a tie, which is
reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fixify.catalogue.signature import is_counter

Shape = tuple[int, ...]

# The last part of a tensor's name, where it means the same in every implementation; in the order of torch's modules.
KINDS = ("weight", "bias", "running_mean", "running_var")
_MOST_LEVELS = 40
_MOST_STEPS = 200_000
# Kernel sizes (conv3x3) do not count modules.
_NUMBERS = re.compile(r"[0-9]+x[0-9]+|[0-9]+")


@dataclass(frozen=True)
class NameMatch:
    """How foreign names fit an architecture.

    Attributes:
        key_map: Foreign name -> name in the architecture, in the order of the foreign names.
        tie: Why the names do not decide, in words, or None.
    """

    key_map: Mapping[str, str]
    tie: str | None = None


def match_names(theirs: Mapping[str, Sequence[int]], ours: Mapping[str, Sequence[int]]) -> NameMatch | None:
    """Match foreign names to those of an architecture.

    Args:
        theirs: Foreign name -> shape.
        ours: The architecture's names and shapes, in the order of its modules. Counters of BatchNorm are matched if
            the other names decide, or if both have equally many.

    Returns:
        None if no arrangement of the foreign names has the shapes of the architecture.
    """
    given = {key: tuple(shape) for key, shape in theirs.items() if not is_counter(key)}
    target = _Target.of({key: tuple(shape) for key, shape in ours.items() if not is_counter(key)})
    if len(given) != len(target.keys) or any(key.count(".") >= _MOST_LEVELS for key in given):
        return None
    root = _tree(given)
    search = _Search(target)
    try:
        found = search.best(root, 0)
    except _TooManyWaysError:
        return NameMatch({}, "The shapes of too many modules are alike, and their names have no numbers.")
    if found is None:
        return None
    tie = (
        search.tie(root, 0)
        if found.ways > 1
        else _contradiction(root, {key: place for place, key in enumerate(theirs)})
    )
    mapped = search.key_map(root, 0)
    return NameMatch(_with_counters(mapped, theirs, ours), tie)


class _TooManyWaysError(Exception):
    """The search was given up."""


@dataclass(frozen=True)
class _Target:
    """The architecture's tensors in the order of its modules.

    Attributes:
        keys: Their names.
        shapes: Their shapes.
        sums: Sum of the hashes of the shapes before each position.
        last: The last parts of all names.
        modules: (first position, position after the last) of each module.
    """

    keys: tuple[str, ...]
    shapes: tuple[Shape, ...]
    sums: tuple[int, ...]
    last: frozenset[str]
    modules: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, tensors: Mapping[str, Shape]) -> _Target:
        sums = [0]
        for shape in tensors.values():
            sums.append(sums[-1] + hash(shape))
        last = frozenset(key.rpartition(".")[2] for key in tensors)
        inside: dict[str, list[int]] = {"": [*range(len(tensors))]}
        for position, key in enumerate(tensors):
            for match in re.finditer(r"\.", key):
                inside.setdefault(key[: match.start()], []).append(position)
        modules = frozenset((found[0], found[-1] + 1) for found in inside.values() if found)
        return cls(tuple(tensors), tuple(tensors.values()), tuple(sums), last, modules)

    def names(self, start: int, end: int) -> set[str]:
        """Return the parts that the names of some tensors have in common."""
        return set.intersection(*(set(key.split(".")) for key in self.keys[start:end]))


@dataclass(eq=False)
class _Node:
    """A module of the foreign tree, the standard tensors of one module, or a single tensor.

    Attributes:
        path: Its full name.
        tensors: Name -> shape, if it has no branches.
        branches: What it contains, if it is a module. Those of one list are arranged in the order of the list.
        size: Number of tensors in it.
        total: Sum of the hashes of their shapes.
    """

    path: str
    tensors: Mapping[str, Shape] = field(default_factory=dict)
    branches: Sequence[Sequence[_Node]] = ()
    size: int = 0
    total: int = 0

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    def first(self, places: Mapping[str, int]) -> int:
        """Return the place of the first of its tensors in a file."""
        if self.tensors:
            return min(places[key] for key in self.tensors)
        return min(child.first(places) for branch in self.branches for child in branch)


def _tree(tensors: Mapping[str, Shape]) -> _Node:
    nested: dict[str, dict[str, Shape]] = {}
    for key, shape in tensors.items():
        nested.setdefault(key.rpartition(".")[0], {})[key] = shape
    # Every module on the way to a tensor, the deepest first.
    paths = {""}
    for path in nested:
        parts = path.split(".")
        paths |= {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    inside: dict[str, list[_Node]] = {path: [] for path in paths}
    for path in sorted(paths, key=lambda path: (-path.count("."), path == "", path)):
        children = inside.pop(path)
        own = nested.get(path, {})
        unit = {key: own[key] for kind in KINDS if (key := _join(path, kind)) in own}
        if unit:
            children.append(_leaf(path, unit))
        children += [_leaf(key, {key: shape}) for key, shape in own.items() if key not in unit]
        node = children[0] if len(children) == 1 else _module(path, children)
        if path == "":
            return node
        # A module with one branch is that branch, under the module's name.
        node = _Node(path, node.tensors, node.branches, node.size, node.total)
        inside[path.rpartition(".")[0]].append(node)
    raise RuntimeError("unreachable: the root is the last path")


def _leaf(path: str, tensors: Mapping[str, Shape]) -> _Node:
    return _Node(path, tensors, (), len(tensors), sum(hash(shape) for shape in tensors.values()))


def _module(path: str, children: Sequence[_Node]) -> _Node:
    groups: dict[str, dict[tuple[int, ...], _Node]] = {}
    alone: list[_Node] = []
    for child in children:
        pattern, numbers = _pattern(child.name if child.path != path else "")
        group = groups.setdefault(pattern if numbers else child.path, {})
        if numbers in group:  # such as 1 and 01: no number tells which is first
            alone.append(child)
        else:
            group[numbers] = child
    branches = [[group[numbers] for numbers in sorted(group)] for group in groups.values()] + [[one] for one in alone]
    size, total = sum(child.size for child in children), sum(child.total for child in children)
    return _Node(path, {}, branches, size, total)


def _pattern(name: str) -> tuple[str, tuple[int, ...]]:
    """Split a name into its text and its numbers.

    >>> _pattern("conv3x3_12")
    ('conv3x3_#', (12,))
    """
    numbers = tuple(int(each) for each in _NUMBERS.findall(name) if each.isdecimal() and len(each) < 10)
    return _NUMBERS.sub(lambda m: "#" if m[0].isdecimal() and len(m[0]) < 10 else m[0], name), numbers


@dataclass(frozen=True)
class _Best:
    """The best arrangements of a node at a position.

    Attributes:
        cost: Number of branches in it that are no module of the architecture; number of those that have another name
            there. The smallest pair is best.
        ways: Number of arrangements; two stand for any number above one.
    """

    cost: tuple[int, int] = (0, 0)
    ways: int = 1

    def then(self, other: _Best) -> _Best:
        cost = (self.cost[0] + other.cost[0], self.cost[1] + other.cost[1])
        return _Best(cost, min(2, self.ways * other.ways))


@dataclass
class _Step:
    """A partial arrangement of the branches of a module: where it ends, how good it is, and what was placed last."""

    position: int
    best: _Best
    before: list[tuple[tuple[int, ...], _Node]] = field(default_factory=list)


class _Search:
    """Find the best arrangements of a tree that have the shapes of an architecture."""

    def __init__(self, target: _Target) -> None:
        self._target = target
        self._best: dict[tuple[_Node, int], _Best | None] = {}
        self._ends: dict[tuple[_Node, int], list[dict[tuple[int, ...], _Step]]] = {}
        self._steps = 0

    def best(self, node: _Node, start: int) -> _Best | None:
        """Return the best arrangements of a node that begin at a position, or None if it does not fit there."""
        sums = self._target.sums
        end = start + node.size
        if end >= len(sums) or sums[end] - sums[start] != node.total:
            return None
        if (node, start) not in self._best:
            leaf = _Best() if node.tensors and self._fits(node, start) else None
            found = leaf if node.tensors else self._arranged(node, start)
            if found is not None:
                strange = not node.tensors and (start, end) not in self._target.modules
                unlike = node.name not in self._target.names(start, end)
                found = found.then(_Best((int(strange), int(unlike))))
            self._best[node, start] = found
        return self._best[node, start]

    def key_map(self, node: _Node, start: int) -> dict[str, str]:
        """Return foreign name -> name in the architecture, for one arrangement."""
        if node.tensors:
            return self._assigned(node, start)
        found: dict[str, str] = {}
        layers = self._ends[node, start]
        (state,) = layers[-1]
        for number in range(len(layers) - 1, 0, -1):
            state, child = layers[number][state].before[0]
            found |= self.key_map(child, layers[number - 1][state].position)
        return found

    def tie(self, node: _Node, start: int) -> str:
        """Name two branches that can be exchanged."""
        layers = self._ends[node, start]
        (state,) = layers[-1]
        for number in range(len(layers) - 1, 0, -1):
            step = layers[number][state]
            if len(step.before) > 1:
                first, second = sorted(child.path for _, child in step.before[:2])
                return f"{first} and {second} have tensors of the same shapes, and no numbers say which comes first."
            state, child = step.before[0]
            place = layers[number - 1][state].position
            found = self._best[child, place]
            if found is not None and found.ways > 1:
                return self.tie(child, place)
        raise RuntimeError("unreachable: the node has several arrangements")

    def _fits(self, node: _Node, start: int) -> bool:
        target = self._target
        keys = target.keys[start : start + node.size]
        shapes = dict(zip(keys, target.shapes[start : start + node.size], strict=True))
        if len(node.tensors) == 1:
            ((key, shape),) = node.tensors.items()
            last, own = key.rpartition(".")[2], keys[0].rpartition(".")[2]
            if last not in KINDS:
                # A name that the architecture has as well means the same.
                return shape == shapes[keys[0]] and (last == own or last not in target.last)
            if own not in KINDS:
                return shape == shapes[keys[0]]
        parents = {key.rpartition(".")[0] for key in keys}
        if len(parents) != 1:
            return False
        (parent,) = parents
        kinds = {_join(parent, key.rpartition(".")[2]): shape for key, shape in node.tensors.items()}
        beside = target.keys[start - 1 : start] + target.keys[start + node.size : start + node.size + 1]
        torn = any(key.rpartition(".")[0] == parent and key.rpartition(".")[2] in KINDS for key in beside)
        return kinds == shapes and not torn

    def _assigned(self, node: _Node, start: int) -> dict[str, str]:
        keys = self._target.keys[start : start + node.size]
        if len(keys) == 1:
            return {next(iter(node.tensors)): keys[0]}
        parent = keys[0].rpartition(".")[0]
        return {key: _join(parent, key.rpartition(".")[2]) for key in node.tensors}

    def _arranged(self, node: _Node, start: int) -> _Best | None:
        """Arrange a module's branches, one after the other."""
        layers = [{(0,) * len(node.branches): _Step(start, _Best())}]
        for _ in range(sum(len(branch) for branch in node.branches)):
            layer: dict[tuple[int, ...], _Step] = {}
            for state, step in layers[-1].items():
                for index, child, best in self._next(node, state, step.position):
                    after = (*state[:index], state[index] + 1, *state[index + 1 :])
                    found = step.best.then(best)
                    old = layer.get(after)
                    if old is None or found.cost < old.best.cost:
                        layer[after] = _Step(step.position + child.size, found, [(state, child)])
                    elif found.cost == old.best.cost:
                        old.best = _Best(found.cost, 2)
                        old.before.append((state, child))
            if not layer:
                return None
            layers.append(layer)
        self._ends[node, start] = layers
        (end,) = layers[-1].values()
        return end.best

    def _next(self, node: _Node, state: tuple[int, ...], position: int) -> list[tuple[int, _Node, _Best]]:
        """Return the branches that can come next."""
        fitting = [
            (index, branch[done], best)
            for index, (branch, done) in enumerate(zip(node.branches, state, strict=True))
            if done < len(branch) and (best := self.best(branch[done], position)) is not None
        ]
        self._steps += len(state) * (1 + len(fitting))
        if self._steps > _MOST_STEPS:
            raise _TooManyWaysError
        return fitting


def _contradiction(node: _Node, places: Mapping[str, int]) -> str | None:
    """Say which two branches a file stores in another order than their numbers; None if there are none.

    Only branches of the same shapes count, and not what sorting by name explains.
    """
    for branch in node.branches:
        for before, after in pairwise(branch):
            alike = (before.size, before.total) == (after.size, after.total)
            if alike and before.path < after.path and before.first(places) > after.first(places):
                return f"{after.path} is stored before {before.path}, although its number is larger."
        for child in branch:
            found = _contradiction(child, places)
            if found is not None:
                return found
    return None


def _with_counters(
    mapped: Mapping[str, str], theirs: Mapping[str, object], ours: Mapping[str, object]
) -> dict[str, str]:
    """Add BatchNorm's counters: those of the same modules, or all of them in order if both have equally many."""
    modules = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in mapped.items()}
    counters = [key for key in theirs if is_counter(key)]
    known = {key: f"{modules.get(key.rpartition('.')[0], '')}.num_batches_tracked" for key in counters}
    own = [key for key in ours if is_counter(key)]
    if not set(known.values()) <= set(own) or len(set(known.values())) != len(counters):
        known = dict(zip(sorted(counters, key=_natural), own, strict=True)) if len(counters) == len(own) else {}
    return {key: {**mapped, **known}[key] for key in theirs if key in mapped or key in known}


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
