"""How a job's result comes to be served: spec.promotion."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import AdapterName, ApiModel, DnsLabel, cel
from mizzen.operator.crds.rollout import Limits, Probe


class Trial(Limits):
    """How long a new adapter is watched, beside all else that its deployment is asked."""

    rules = (
        cel(
            "has(self.errorRatio) || has(self.ttftFactor)",
            "promotion.trial needs errorRatio or ttftFactor: without them nothing is judged.",
        ),
    )

    hold_seconds: Annotated[
        int,
        Field(ge=10, le=604800, description="For how long requests get it before it is promoted."),
    ] = 600


class Promotion(ApiModel):
    """What happens with a result that passed."""

    rules = (
        cel(
            "self.strategy == 'None' || has(self.deployment)",
            "promotion.strategy needs promotion.deployment, the LLMDeployment to promote to.",
        ),
        cel(
            "!has(self.probes) || self.strategy == 'HotLoadAdapter'",
            "promotion.probes are for HotLoadAdapter; a whole model has the deployment's "
            "rollout.canary.rollbackOn.probe.",
        ),
        cel(
            "!has(self.trial) || self.strategy == 'HotLoadAdapter'",
            "promotion.trial is for HotLoadAdapter; a whole model has the deployment's "
            "rollout.canary.",
        ),
    )

    deployment: Annotated[
        DnsLabel | None,
        Field(description="The LLMDeployment of this namespace that gets the result."),
    ] = None
    strategy: Annotated[
        Literal["None", "HotLoadAdapter", "Canary"],
        Field(
            description="HotLoadAdapter loads the adapter on every replica; Canary rolls a whole "
            "model out as the deployment's spec.rollout says; None only publishes."
        ),
    ] = "HotLoadAdapter"
    adapter: Annotated[
        AdapterName | None,
        Field(description="Name of the adapter there; by default the job's."),
    ] = None
    replaces: Annotated[
        DnsLabel | None, Field(description="Job whose result this one takes the place of.")
    ] = None
    approval: Annotated[
        Literal["Auto", "Manual"],
        Field(description="Manual waits for `kubectl mizzen approve NAME`."),
    ] = "Auto"
    probes: Annotated[
        list[Probe] | None,
        Field(
            min_length=1,
            max_length=16,
            description="Prompts put to the adapter once a replica has loaded it. An answer "
            "without what is expected takes it back, and the job fails with RolledBack.",
        ),
    ] = None
    trial: Annotated[
        Trial | None,
        Field(
            description="Once every replica has the adapter its requests are watched for a while. "
            "Where they fare worse than the others the adapter is taken back, and the job fails "
            "with RolledBack."
        ),
    ] = None
