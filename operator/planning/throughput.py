"""How much one replica serves: the cost of an engine step, fitted from what engines report. Pure.

A step that computes `n` sequences and `p` prompt tokens takes T = a + b*n + c*p seconds. The same
holds for the sums over many steps and many replicas, so the three costs can be fitted from rates
that are already summed over a deployment, whichever source they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations

# A sample's weight after one more sample; at one per 5 s half of the weight lies in 12 minutes.
_FORGET = 0.995
_ENOUGH_SAMPLES = 10
# Below this relative spread of the load, costs per sequence and per step cannot be told apart
# (llm-d's throughput analyzer uses the same figure).
_ENOUGH_SPREAD = 0.3
# Holds the split between b and c where prompts and answers grow in step with each other: any
# split then predicts the same.
_RIDGE = 1e-4


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The costs a, b and c, in seconds."""

    per_step_s: float
    per_sequence_s: float
    per_prompt_token_s: float


@dataclass(frozen=True, slots=True)
class Shape:
    """The mean request: tokens."""

    prompt: float  # all of the prompt: it is held in the KV cache
    computed: float  # of the prompt, what the prefix cache does not have
    output: float

    @property
    def kv_tokens(self) -> float:
        """Tokens held on average while a request runs."""
        return self.prompt + self.output / 2


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one replica serves within the ITL limit."""

    requests_per_s: float
    bound: str  # "compute" or "memory"


@dataclass(frozen=True, slots=True)
class CostFit:
    """Least squares with forgetting: moments of the samples, and the costs last accepted."""

    costs: StepCosts | None = None
    samples: int = 0
    # Sums of x*x (upper triangle, row by row) and x*T, where x = (1, n, p).
    xx: tuple[float, ...] = (0.0,) * 6
    xy: tuple[float, ...] = (0.0,) * 3


def cost_per_request_s(costs: StepCosts, shape: Shape) -> float:
    """Return the engine seconds that one request adds to the steps it is part of."""
    return costs.per_sequence_s * shape.output + costs.per_prompt_token_s * shape.computed


def step_s(costs: StepCosts, shape: Shape, *, requests_per_s: float) -> float:
    """Return the step time of a replica at this rate; infinite where it cannot keep up.

    By Little's law x*O*T sequences run, and x*I*T prompt tokens enter per step:
    T = a + b*x*O*T + c*x*I*T, hence T = a / (1 - x*(b*O + c*I)).
    """
    left = 1.0 - requests_per_s * cost_per_request_s(costs, shape)
    return costs.per_step_s / left if left > 0 else math.inf


def capacity(
    costs: StepCosts, shape: Shape, *, itl_s: float, kv_tokens: float | None, kv_full_ratio: float
) -> Capacity | None:
    """Return the rate at which steps take `itl_s`, or at which the KV cache is full.

    None where the limit cannot be held even by an empty replica, or nothing bounds the rate.
    """
    cost = cost_per_request_s(costs, shape)
    if costs.per_step_s >= itl_s:
        return None
    bounds = []
    if cost > 0:
        bounds.append(Capacity((1 - costs.per_step_s / itl_s) / cost, "compute"))
    if kv_tokens:
        held = shape.kv_tokens * shape.output * itl_s
        if held > 0:
            bounds.append(Capacity(kv_full_ratio * kv_tokens / held, "memory"))
    return min(bounds, key=lambda bound: bound.requests_per_s, default=None)


def learn(fit: CostFit, *, step_s: float, sequences: float, prompt_tokens: float) -> CostFit:
    """Return the fit with one more sample: means over the steps of one interval."""
    x = (1.0, sequences, prompt_tokens)
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]
    xx = tuple(old * _FORGET + x[i] * x[j] for old, (i, j) in zip(fit.xx, pairs, strict=True))
    xy = tuple(old * _FORGET + value * step_s for old, value in zip(fit.xy, x, strict=True))
    grown = replace(fit, samples=fit.samples + 1, xx=xx, xy=xy)
    if grown.samples < _ENOUGH_SAMPLES or _spread(xx) < _ENOUGH_SPREAD:
        return grown
    return replace(grown, costs=_solve(xx, xy) or fit.costs)


def _spread(xx: tuple[float, ...]) -> float:
    """Return the larger coefficient of variation of the two loads."""
    weight, n, p, nn, _, pp = xx
    found = []
    for first, second in ((n, nn), (p, pp)):
        mean = first / weight
        if mean > 0:
            found.append(math.sqrt(max(0.0, second / weight - mean * mean)) / mean)
    return max(found, default=0.0)


def _solve(xx: tuple[float, ...], xy: tuple[float, ...]) -> StepCosts | None:
    """Return the least-squares costs among those that are not negative, None if none makes sense.

    Costs below zero would promise endless capacity, so each subset of the two loads is tried and
    the best fit with a positive step cost wins.
    """
    full = [[xx[0], xx[1], xx[2]], [xx[1], xx[3], xx[4]], [xx[2], xx[4], xx[5]]]
    best: tuple[float, StepCosts] | None = None
    for size in (1, 2):
        for loads in combinations((1, 2), size):
            chosen = (0, *loads)
            answer = _least_squares(full, xy, chosen)
            if answer is None or answer[0] <= 0 or any(cost < 0 for cost in answer):
                continue
            costs = [0.0, 0.0, 0.0]
            for index, value in zip(chosen, answer, strict=True):
                costs[index] = value
            # The part of the squared error that depends on the costs.
            fitted = sum(
                costs[i] * (sum(full[i][j] * costs[j] for j in range(3)) - 2 * xy[i])
                for i in range(3)
            )
            if any(costs[1:]) and (best is None or fitted < best[0]):
                best = (fitted, StepCosts(*costs))
    return best[1] if best else None


def _least_squares(
    full: list[list[float]], xy: tuple[float, ...], chosen: tuple[int, ...]
) -> list[float] | None:
    """Solve the normal equations of the chosen columns, scaled to equal size and ridged."""
    if any(full[i][i] <= 0 for i in chosen):
        return None
    scale = [math.sqrt(full[i][i]) for i in chosen]
    rows = [
        [full[i][j] / (scale[r] * scale[c]) for c, j in enumerate(chosen)] + [xy[i] / scale[r]]
        for r, i in enumerate(chosen)
    ]
    for index in range(1, len(rows)):
        rows[index][index] += _RIDGE
    solved = _eliminate(rows)
    return None if solved is None else [v / s for v, s in zip(solved, scale, strict=True)]


def _eliminate(rows: list[list[float]]) -> list[float] | None:
    """Solve a small linear system by Gauss-Jordan elimination with pivoting."""
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda r: abs(rows[r][column]))
        if abs(rows[pivot][column]) < 1e-12:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        head = rows[column][column]
        rows[column] = [value / head for value in rows[column]]
        for other in range(size):
            if other != column:
                factor = rows[other][column]
                rows[other] = [
                    a - factor * b for a, b in zip(rows[other], rows[column], strict=True)
                ]
    return [row[size] for row in rows]
