"""Which beginnings of many texts are computed once, and in what batches: plans on tokens, in plain Python.

The texts of a task share beginnings: the choices of a question its context, questions asked behind the same shots those
shots, all of them a system prompt. `tree` finds the shared stretches that are worth a cache of their own, however deep
they are nested; `batches` cuts what is to be computed side by side into forward passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]
# In tokens of a text, as the demo's model takes them on two cores; a GPU would pay more for a pass, and share less.
SHORTEST = 8  # a shared stretch below this is rather computed again: a cache has to be copied to each of its rows
PASS = 78  # what a forward pass costs beside its tokens: every weight is read once
HEAD = 0.75  # what the output layer costs for a position whose logits are needed
ROWS = 256  # of a batch; what more rows would save is nothing
PACKED = 512  # tokens of a row that holds a stretch with all its continuations; attention over more is wasteful
WHOLE = 4  # a batch holds the keys and values of at most this many times the tokens that it may compute


@dataclass(frozen=True)
class Text:
    """A text to score: `tokens`, of which those from `start` on count (start >= 1)."""

    tokens: Tokens
    start: int


@dataclass(eq=False)
class Node:
    """A stretch of tokens that is computed once.

    Attributes:
        tokens: everything from the beginning; the model reads `tokens[part:]` behind the parent's cache.
        part: how many tokens the parent has read.
        texts: the texts of which all but the last token, which is only predicted, are `tokens`.
        children: what continues from the cache of this stretch.
        low: the lowest `start` of a text here or below.
        packed: continuations that are read in the same row, behind this stretch, each blind to the others but its own
            beginnings; parents before children.
    """

    tokens: Tokens
    part: int = 0
    texts: list[Text] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)
    low: int = 1 << 62
    packed: list[Packed] = field(default_factory=list)

    @property
    def end(self) -> int:
        return len(self.tokens)

    @property
    def stop(self) -> int:
        """Where its row ends, the packed continuations counted one after another."""
        return self.end + sum(p.node.end - p.node.part for p in self.packed)

    @property
    def first(self) -> int:
        """The first position whose logits are needed: it predicts the first token that is scored, or what follows."""
        return min(max(self.low - 1, self.part), self.end - 1)


@dataclass(frozen=True)
class Packed:
    """A continuation in the row of another stretch. `start` is where in the row; `above` are its parents there."""

    node: Node
    start: int
    above: tuple[Packed, ...] = ()


def pack(nodes: Sequence[Node]) -> None:
    """Moves what continues a node into its row, wherever all of it fits."""
    for node in nodes:
        found: list[Packed] = []
        start = node.end
        waiting: list[tuple[Node, tuple[Packed, ...]]] = [(child, ()) for child in reversed(node.children)]
        while waiting and start <= PACKED:
            child, above = waiting.pop()
            found.append(Packed(child, start, above))
            start += child.end - child.part
            waiting += [(grandchild, (*above, found[-1])) for grandchild in reversed(child.children)]
        if node.children and start <= PACKED:
            node.packed, node.children = found, []


def tree(texts: Iterable[Text], share: bool = True) -> list[Node]:
    """The stretches that start at the beginning of a text, with those that continue them below.

    Every text is in one node's `texts`, and its tokens but the last are that node's. Only a whole stretch of at least
    SHORTEST tokens with two continuations, or one that is itself a text, is a node with children.

    Args:
        texts: no two equal.
        share: without it no node has children: every text is computed whole.
    """
    ending: dict[Tokens, list[Text]] = {}
    for text in texts:
        ending.setdefault(text.tokens[:-1], []).append(text)
    leaves = [Node(tokens, texts=ending[tokens]) for tokens in sorted(ending)]
    top = _chosen(_branches(leaves)) if share else leaves
    _lowest(top)
    return top


def _branches(leaves: Sequence[Node]) -> list[Node]:
    """All places where sorted token lists part, as a tree."""
    root = Node(())
    path = [root]
    for leaf in leaves:
        shared = common(path[-1].tokens, leaf.tokens)
        below = None
        while path[-1].end > shared:
            below = path.pop()
        if path[-1].end < shared and below is not None:
            branch = Node(leaf.tokens[:shared], children=[below])
            path[-1].children[-1] = branch
            path.append(branch)
        path[-1].children.append(leaf)
        path.append(leaf)
    return root.children


def _chosen(nodes: Sequence[Node]) -> list[Node]:
    """The same tree without the branches that are too short to be worth it; their children move up."""
    top: list[Node] = []
    waiting = [(node, 0, top) for node in reversed(nodes)]
    while waiting:
        node, part, siblings = waiting.pop()
        below, node.children, node.part = node.children, [], part
        kept = bool(below) and node.end - part >= SHORTEST
        if kept or node.texts:
            siblings.append(node)
        inner = (node.end, node.children) if kept else (part, siblings)
        waiting += [(child, *inner) for child in reversed(below)]
    return top


def _lowest(top: Sequence[Node]) -> None:
    order: list[Node] = list(top)
    for node in order:  # grows as it goes: parents before children
        order += node.children
    for node in reversed(order):
        node.low = min([t.start for t in node.texts] + [child.low for child in node.children])


def batches(nodes: Sequence[Node], budget: int) -> list[list[Node]]:
    """The cheapest of the usual ways to compute nodes whose parents are in one cache.

    A batch reads its nodes from the least `part` of them to the end of the longest, so it is best of nodes that are
    alike. The cost, padding and repetition included, is at its least among the cuts of the nodes in order of their ends
    or of their parts.

    Args:
        nodes: siblings in the sense that one cache holds all of their parents.
        budget: tokens per batch; a node that is longer goes alone.
    """
    orders = (lambda n: (n.stop, n.part)), (lambda n: (n.part, n.stop))
    plans = [_cut(sorted(nodes, key=order), budget) for order in orders]
    return min(plans, key=lambda plan: sum(map(_cost, plan)))


def _cost(batch: Sequence[Node]) -> float:
    return _price(len(batch), max(n.stop for n in batch), min(n.part for n in batch), min(n.first for n in batch))


def _price(rows: int, end: int, part: int, first: int) -> float:
    return PASS + rows * (end - part + HEAD * (end - first))


def _cut(nodes: Sequence[Node], budget: int) -> list[list[Node]]:
    """The least cost of all nodes, by the least costs of the first 1, 2, 3, ..."""
    extents = [(n.stop, n.part, n.first) for n in nodes]  # looked at once for each of up to ROWS batches
    costs, starts = [0.0], [0]
    for stop in range(1, len(nodes) + 1):
        end, part, first, least, at = 0, 1 << 62, 1 << 62, float("inf"), stop - 1
        for start in range(stop - 1, max(-1, stop - 1 - ROWS), -1):
            (its_stop, its_part, its_first), rows = extents[start], stop - start
            end, part, first = max(end, its_stop), min(part, its_part), min(first, its_first)
            fits = rows * (end - part) <= budget and rows * end <= WHOLE * budget
            if rows > 1 and not fits:
                break
            if (cost := costs[start] + _price(rows, end, part, first)) <= least:
                least, at = cost, start
        costs.append(least)
        starts.append(at)
    plan: list[list[Node]] = []
    stop = len(nodes)
    while stop:
        plan.append(list(nodes[starts[stop] : stop]))
        stop = starts[stop]
    return plan[::-1]


def fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows of these sizes, the largest first, in batches within the budget when padded to their largest."""
    found: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if not found or sizes[found[-1][0]] * (len(found[-1]) + 1) > budget:
            found.append([])
        found[-1].append(index)
    return found


def common(a: Tokens, b: Tokens) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # halving, since comparing slices is a hundred times as fast as a loop
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
