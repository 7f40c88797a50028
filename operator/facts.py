"""What a reconcile may use besides the API server: settings, what is known, other parts."""

from dataclasses import dataclass, field

from mizzen.operator.config import OperatorConfig
from mizzen.operator.gateway_api import GatewayApi
from mizzen.operator.kube.store import Store
from mizzen.operator.ledger import Ledger
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
    gateway_api: GatewayApi
    runtimes: Runtimes
    trainers: TrainerClient
    # For canaries: an instance of its own, because one remembers of each process what it was
    # asked for last.
    metrics: MetricsSource
    # An arbiter fills it in; without one nobody waits for devices.
    ledger: Ledger = field(default_factory=Ledger)
