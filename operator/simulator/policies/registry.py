"""Every policy by its name, ready to run."""

from __future__ import annotations

from collections.abc import Callable

from mizzen.operator.simulator.policies.dynamo import DynamoLoad, Sla
from mizzen.operator.simulator.policies.fixed import Fixed
from mizzen.operator.simulator.policies.hpa import on_kv, on_queue
from mizzen.operator.simulator.policies.keda import KedaConcurrency
from mizzen.operator.simulator.policies.knative import KnativeKpa
from mizzen.operator.simulator.policies.kubeai import KubeAi
from mizzen.operator.simulator.policies.mizzen import Mizzen, rules_of
from mizzen.operator.simulator.policies.wva import Wva
from mizzen.operator.simulator.simulation import Policy, Setting


class UnknownPolicyError(ValueError):
    """There is no policy of this name, or it takes no target."""


# What each makes of its target, its one number to tune; None is its source's default.
_TUNABLE: dict[str, tuple[float, Callable[[float], Policy]]] = {
    "static": (1, lambda target: Fixed(int(target))),
    "hpa-queue": (5, on_queue),
    "hpa-kv": (0.5, on_kv),
    "keda-concurrency": (18, lambda target: KedaConcurrency(target)),
    "knative-kpa": (18, lambda target: KnativeKpa(target)),
    "knative-kpa-delayed": (10, lambda target: KnativeKpa(target, down_delay_s=300.0)),
    "kubeai": (100, lambda target: KubeAi(target)),
}
# What follows from the setting and has no number of its own to tune.
_SELF_TUNED: dict[str, Callable[[Setting], Policy]] = {
    "mizzen": lambda setting: Mizzen(rules_of(setting)),
    "wva": lambda setting: Wva(),
    "dynamo-load": lambda setting: DynamoLoad(
        Sla(ttft_s=setting.objective.ttft_s, itl_s=setting.objective.itl_s),
        budget_tokens=setting.profile.budget_tokens,
    ),
}
POLICIES = (*_TUNABLE, *_SELF_TUNED)


def build_policy(name: str, setting: Setting, *, target: float | None = None) -> Policy:
    """Return a fresh policy; one cannot be used twice, as it remembers.

    Raises:
        UnknownPolicyError: no policy has this name, or it has no target to set.
    """
    if name in _TUNABLE:
        default, build = _TUNABLE[name]
        return build(default if target is None else target)
    if name not in _SELF_TUNED:
        raise UnknownPolicyError(
            f"There is no policy {name!r}. Choose one of: {', '.join(POLICIES)}."
        )
    if target is not None:
        raise UnknownPolicyError(f"Policy {name} has no target: leave --target out.")
    return _SELF_TUNED[name](setting)
