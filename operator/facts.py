"""What a reconcile may use besides the API server: settings, what is known, other parts."""

from dataclasses import dataclass

from mizzen.operator.config import OperatorConfig
from mizzen.operator.kube.store import Store
from mizzen.operator.metrics.source import MetricsSource
from mizzen.operator.namespaces import Namespaces
from mizzen.operator.nodes import NodeSizes
from mizzen.operator.runtimes import Runtimes
from mizzen.operator.specs import SpecCache
from mizzen.operator.trainers import TrainerClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Handed to every reconcile; the clock is handed over beside it, as `now`."""

    config: OperatorConfig
    store: Store
    specs: SpecCache
    namespaces: Namespaces
    nodes: NodeSizes
    runtimes: Runtimes
    trainers: TrainerClient
    # For canaries: an instance of its own, because one remembers of each process what it was
    # asked for last.
    metrics: MetricsSource
