"""The baselines' rules, each held to what its source says."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from mizzen.operator.simulator.policies.dynamo import Estimator, Load, Sla, load_target
from mizzen.operator.simulator.policies.hpa import Stabilization, on_queue, plain_metric_replicas
from mizzen.operator.simulator.policies.keda import KedaConcurrency, average_value_replicas
from mizzen.operator.simulator.policies.knative import KnativeKpa
from mizzen.operator.simulator.policies.kubeai import KubeAi
from mizzen.operator.simulator.policies.mizzen import Mizzen, rules_of
from mizzen.operator.simulator.policies.registry import (
    POLICIES,
    UnknownPolicyError,
    build_policy,
)
from mizzen.operator.simulator.policies.regression import Fit, fit_plane
from mizzen.operator.simulator.policies.wva import Peak, Thresholds, saturation_target
from mizzen.operator.simulator.signals import ReplicaSample, Sample, View
from mizzen.operator.simulator.simulation import Policy, Setting

HPA = {
    "ceil of the mean over the target": ([12, 8], 0, 2, 5, 4),
    "nothing within a tenth of the target": ([5.4, 5.4], 0, 2, 5, 2),
    "pods that are not ready count as idle on the way up": ([20, 20], 2, 4, 5, 8),
    "and stop it where they turn the ratio round": ([6, 6], 2, 4, 5, 4),
    "pods that are not ready are left out on the way down": ([1, 1], 2, 4, 5, 1),
    "an empty queue asks for none": ([0, 0, 0], 0, 3, 5, 0),
}


@pytest.mark.parametrize(
    ("values", "unready", "current", "target", "expected"), HPA.values(), ids=HPA
)
def test_hpa_rule(
    values: Sequence[float], unready: int, current: int, target: float, expected: int
) -> None:
    wanted = plain_metric_replicas(values, unready=unready, current=current, target=target)
    assert wanted == expected


def test_hpa_goes_up_by_four_or_double_and_down_after_five_minutes_at_less() -> None:
    stabilization = Stabilization()
    assert stabilization.settle(40, current=2, now=0) == 6
    assert stabilization.settle(40, current=6, now=15) == 12
    assert stabilization.settle(3, current=12, now=30) == 12
    assert stabilization.settle(3, current=12, now=315) == 12
    assert stabilization.settle(3, current=12, now=331) == 3


KEDA = {
    "ceil of the total over the target": (45, 2, 18, 3),
    "nothing within a tenth": (39, 2, 18, 2),
    "nothing at all is zero": (0, 4, 18, 0),
}


@pytest.mark.parametrize(("total", "current", "target", "expected"), KEDA.values(), ids=KEDA)
def test_keda_rule(total: float, current: int, target: float, expected: int) -> None:
    assert average_value_replicas(total, current=current, target=target) == expected


WVA = {
    "one more where little is spare on average": ([(0.75, 0), (0.72, 0)], 0, 3),
    "one more where the queue leaves no spare": ([(0.1, 3), (0.1, 2)], 0, 3),
    "one more where all are saturated": ([(0.9, 9)], 0, 2),
    "but not while one is starting": ([(0.9, 9)], 1, 2),
    "one fewer where the rest could carry all": ([(0.2, 0), (0.2, 0), (0.2, 0)], 0, 2),
    "none fewer where they could not": ([(0.5, 0), (0.5, 0)], 0, 2),
    "saturated ones are left out of the mean": ([(0.95, 0), (0.3, 0), (0.3, 0)], 0, 2),
    "never fewer than one": ([(0.0, 0)], 0, 1),
}


@pytest.mark.parametrize(("peaks", "starting", "expected"), WVA.values(), ids=WVA)
def test_wva_rule(peaks: list[tuple[float, int]], starting: int, expected: int) -> None:
    seen = [Peak(kv_ratio=kv, waiting=waiting) for kv, waiting in peaks]
    assert saturation_target(seen, starting=starting, limits=Thresholds()) == expected


DYNAMO = {
    "one more where every engine would miss the TTFT": ([(30_000, 0), (30_000, 0)], 3),
    "none where one of them would keep it": ([(30_000, 0), (12_000, 0)], 2),
    "one more where every engine would miss the ITL": ([(0, 90_000), (0, 90_000)], 3),
    "one fewer where the rest would keep both with room to spare": ([(0, 100), (0, 100)], 1),
    "none fewer where N on N-1 would not": ([(0, 40_000), (0, 40_000)], 2),
    "none fewer where the rest's KV cache would be full": ([(0, 100, 150), (0, 100, 150)], 2),
    "never fewer than one": ([(0, 0)], 1),
}


@pytest.mark.parametrize(("loads", "expected"), DYNAMO.values(), ids=DYNAMO)
def test_dynamo_rule(loads: list[tuple[float, ...]], expected: int) -> None:
    estimator = Estimator(
        fit=Fit(0.02, 0.0001, 0.000001),
        mean_prompt_tokens=500,
        mean_step_prompt_tokens=0,
        mean_kv_tokens=500,
        budget_tokens=2048,
    )
    seen = [
        Load(queued_prompt_tokens=one[0], decode_kv_tokens=one[1], kv_capacity=(*one, 1e9)[2])
        for one in loads
    ]
    assert load_target(seen, estimator, Sla(ttft_s=2.0, itl_s=0.1)) == expected


def test_a_plane_is_found_again_and_a_constant_input_gets_no_slope() -> None:
    points = [(x, y, 3 + 2 * x + 0.5 * y) for x in (0.0, 1.0, 4.0) for y in (2.0, 7.0)]
    fit = fit_plane(points)
    assert (fit.base, fit.per_x, fit.per_y) == pytest.approx((3, 2, 0.5))
    flat = fit_plane([(x, 5.0, 1 + x) for x in (1.0, 2.0, 3.0)])
    assert (flat.base, flat.per_x, flat.per_y) == pytest.approx((1, 1, 0))


@dataclass
class World:
    """A deployment whose concurrency is given; policies are asked at their own pace."""

    policy: Policy
    ready: int = 2
    now: float = 0.0
    area: float = 0.0
    samples: list[Sample] = field(default_factory=list)

    def run(self, seconds: float, concurrency: float, *, scraped: bool = True) -> list[int]:
        answers = []
        end = self.now + seconds
        while self.now < end:
            self.now += self.policy.scrape_s
            self.area += concurrency * self.policy.scrape_s
            if scraped:
                self.samples.append(self._sample(concurrency))
            if self.now % self.policy.interval_s == 0:
                self.ready = max(1, self.policy.wanted(self._view()))
                answers.append(self.ready)
        return answers

    def _sample(self, concurrency: float) -> Sample:
        each = int(concurrency / self.ready)
        replica = dict.fromkeys(ReplicaSample.__dataclass_fields__, 0) | {"kv_capacity": 1000}
        counts = dict.fromkeys(Sample.__dataclass_fields__, 0)
        return Sample(
            **counts
            | {
                "at": self.now,
                "in_flight": int(concurrency),
                "in_flight_s_total": self.area,
                "replicas": tuple(
                    ReplicaSample(**replica | {"number": n, "running": each, "waiting": each})
                    for n in range(self.ready)
                ),
            }
        )

    def _view(self) -> View:
        return View(
            now=self.now,
            samples=self.samples,
            ready=self.ready,
            starting=0,
            draining=0,
            min_replicas=1,
            max_replicas=100,
            replicas=(),
        )


def test_knative_panics_at_double_and_does_not_shrink_until_a_stable_window_later() -> None:
    world = World(KnativeKpa(target=10))
    assert set(world.run(60, 20)) == {2}
    # Within the panic window of six seconds the load is five times as high.
    assert world.run(8, 100)[-1] == 10
    during = world.run(52, 5)
    assert set(during) == {10}
    # Then at most half is taken away in one tick.
    after = world.run(60, 5)
    assert after[-1] == 1
    assert all(b >= a // 2 for a, b in pairwise(after))


def test_kubeai_takes_the_mean_of_ten_minutes_and_three_downs_before_the_fourth_counts() -> None:
    world = World(KubeAi(target=10))
    assert world.run(600, 40)[-1] == 4
    assert world.run(200, 0)[-1] == 3  # a third of the window is empty: ceil(26.7 / 10)
    policy = KubeAi(target=10)
    world = World(policy, ready=4)
    assert world.run(40, 10) == [4, 4, 4, 1]


def test_without_metrics_keda_shrinks_and_an_hpa_stays() -> None:
    keda, hpa = World(KedaConcurrency(target=10), ready=5), World(on_queue(5), ready=5)
    keda.run(60, 50)
    hpa.run(60, 50)
    before = hpa.ready
    assert keda.run(420, 50, scraped=False)[-1] == 1
    assert hpa.run(420, 50, scraped=False)[-1] == before


def test_without_metrics_ours_keeps_what_there_is() -> None:
    world = World(Mizzen(rules_of(Setting())), ready=5)
    before = world.run(600, 200)[-1]
    assert set(world.run(420, 200, scraped=False)) == {before}


def test_every_policy_is_known_by_its_name_and_others_are_refused_with_the_list() -> None:
    for name in POLICIES:
        assert build_policy(name, Setting()).name in (name, "knative-kpa")
    with pytest.raises(UnknownPolicyError, match="mizzen"):
        build_policy("magic", Setting())
    with pytest.raises(UnknownPolicyError, match="has no target"):
        build_policy("wva", Setting(), target=3)
