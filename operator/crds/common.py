"""What both resources share: model base, conditions, accelerator, pod overrides.

These models are the API: the CRDs and the reference pages are generated from them, and
`kubectl explain` shows their descriptions. They know nothing of clients or controllers.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "mizzen.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

# A wire document. Its values are whatever the API server accepts, so they stay untyped.
Json = dict[str, Any]


def cel(rule: str, message: str) -> dict[str, str]:
    """Return one CEL validation: `message` is what the user reads when `rule` is false."""
    return {"rule": rule, "message": message}


def rules(*validations: dict[str, str]) -> Json:
    """Return the schema extra that carries CEL validations."""
    return {"x-kubernetes-validations": list(validations)}


class ApiModel(BaseModel):
    """Base of all API types: camelCase on the wire, frozen in memory.

    Unknown fields are dropped: the API server has already refused or pruned them, and an
    operator must survive fields of a newer CRD.
    """

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True
    )

    # CEL rules about the object as a whole.
    rules: ClassVar[tuple[dict[str, str], ...]] = ()

    @classmethod
    def parse(cls, value: Json) -> Self:
        """Return the model for a wire document.

        Raises:
            pydantic.ValidationError: the document was stored under looser rules.
        """
        return cls.model_validate(value)

    def to_api(self) -> Json:
        """Return the wire document: camelCase, no nulls."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")


DnsLabel = Annotated[
    str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
]
AdapterName = Annotated[
    str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
]
Quantity = Annotated[int | str, Field(json_schema_extra={"x-kubernetes-int-or-string": True})]


def address_rules(forms: str, message: str) -> Json:
    """Return the schema extra of an address: one of the forms, and no way up in its path."""
    return rules(
        cel(
            f"self.matches('^({forms})$') && !self.matches('(^|/)[.][.](/|$)')",
            f"{message}, without '..'.",
        )
    )


ServedSource = Annotated[
    str,
    Field(
        min_length=1,
        max_length=512,
        json_schema_extra=address_rules(
            r"pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.+)?|file:///.+"
            r"|hf://[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*"
            r"(@[A-Za-z0-9][-A-Za-z0-9._%]*)?(/.+)?"
            r"|s3://[a-z0-9][-a-z0-9.]*[a-z0-9]/.+",
            "A model's source must look like pvc://CLAIM/PATH, file:///PATH, "
            "hf://ORG/NAME[@REVISION] or s3://BUCKET/PREFIX",
        ),
    ),
]
ModelSource = Annotated[
    str,
    Field(
        min_length=1,
        max_length=512,
        json_schema_extra=address_rules(
            r"pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.+)?|file:///.+",
            "A model path must look like pvc://CLAIM/PATH or file:///PATH",
        ),
    ),
]


class Condition(ApiModel):
    """One observed aspect of the resource."""

    type: Annotated[str, Field(max_length=64, description="Name of the aspect, such as Ready.")]
    status: Annotated[
        Literal["True", "False", "Unknown"],
        Field(description="Whether the aspect holds; Unknown until it was observed."),
    ]
    observed_generation: Annotated[
        int | None, Field(description="The metadata.generation this condition was computed from.")
    ] = None
    last_transition_time: Annotated[
        str,
        Field(
            description="When the status last changed.", json_schema_extra={"format": "date-time"}
        ),
    ]
    reason: Annotated[
        str, Field(max_length=128, description="One CamelCase word for the cause, for programs.")
    ]
    message: Annotated[
        str,
        Field(max_length=4096, description="A sentence that says what happened and what to do."),
    ]


Conditions = Annotated[
    list[Condition],
    Field(
        max_length=32,
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
        },
    ),
]


class Accelerator(ApiModel):
    """The devices each pod asks for."""

    resource: Annotated[
        str,
        Field(
            max_length=128,
            pattern=r"^(none|[a-z0-9.-]+/[A-Za-z0-9._-]+)$",
            description="Extended resource that a pod requests, such as nvidia.com/gpu; "
            "`none` runs on the CPU.",
        ),
    ] = "none"
    count: Annotated[
        int | None,
        Field(
            ge=1,
            le=64,
            description="Devices per pod; by default one for each of its ranks.",
        ),
    ] = None

    @property
    def is_gpu(self) -> bool:
        """Whether pods ask for a device at all."""
        return self.resource != "none"


class KeyRef(ApiModel):
    """A key of a Secret or ConfigMap in the same namespace."""

    name: Annotated[str, Field(max_length=253, description="Name of the Secret or ConfigMap.")]
    key: Annotated[str, Field(max_length=253, description="The key whose value is taken.")]
    optional: Annotated[
        bool | None, Field(description="Start the pod even when the object or key is missing.")
    ] = None


class EnvSource(ApiModel):
    """Where a variable's value comes from."""

    rules = (
        cel(
            "has(self.secretKeyRef) != has(self.configMapKeyRef)",
            "Set exactly one of secretKeyRef and configMapKeyRef.",
        ),
    )

    secret_key_ref: Annotated[KeyRef | None, Field(description="A key of a Secret.")] = None
    config_map_key_ref: Annotated[KeyRef | None, Field(description="A key of a ConfigMap.")] = None


class EnvVar(ApiModel):
    """One environment variable of the main container."""

    name: Annotated[
        str,
        Field(min_length=1, max_length=128, description="Name of the variable, e.g. HF_HOME."),
    ]
    value: Annotated[str | None, Field(max_length=4096, description="Its literal value.")] = None
    value_from: Annotated[EnvSource | None, Field(description="Its value from an object.")] = None


class EmptyDir(ApiModel):
    """Scratch space that lives as long as the pod."""

    medium: Annotated[
        Literal["", "Memory"] | None, Field(description="Memory for a RAM disk; disk otherwise.")
    ] = None
    size_limit: Annotated[Quantity | None, Field(description="Largest size, e.g. 10Gi.")] = None


class ConfigMapVolume(ApiModel):
    """The keys of a ConfigMap as files."""

    name: Annotated[str, Field(max_length=253, description="Name of the ConfigMap.")]
    optional: Annotated[bool | None, Field(description="Start even when it is missing.")] = None


class SecretVolume(ApiModel):
    """The keys of a Secret as files."""

    secret_name: Annotated[str, Field(max_length=253, description="Name of the Secret.")]
    optional: Annotated[bool | None, Field(description="Start even when it is missing.")] = None


class ClaimVolume(ApiModel):
    """A persistent volume claim of the same namespace."""

    claim_name: Annotated[str, Field(max_length=253, description="Name of the claim.")]
    read_only: Annotated[bool | None, Field(description="Mount without write access.")] = None


class Volume(ApiModel):
    """A volume of one of the kinds that cannot reach the node."""

    rules = (
        cel(
            "[has(self.emptyDir), has(self.configMap), has(self.secret), "
            "has(self.persistentVolumeClaim)].filter(x, x).size() == 1",
            "A volume needs exactly one of emptyDir, configMap, secret and "
            "persistentVolumeClaim; hostPath and other kinds are not allowed.",
        ),
    )

    name: Annotated[DnsLabel, Field(description="Name that volumeMounts refer to.")]
    empty_dir: Annotated[EmptyDir | None, Field(description="Scratch space.")] = None
    config_map: Annotated[ConfigMapVolume | None, Field(description="A ConfigMap.")] = None
    secret: Annotated[SecretVolume | None, Field(description="A Secret.")] = None
    persistent_volume_claim: Annotated[ClaimVolume | None, Field(description="A claim.")] = None


class VolumeMount(ApiModel):
    """Where a volume appears in the main container."""

    name: Annotated[DnsLabel, Field(description="Name of a volume in this patch.")]
    mount_path: Annotated[
        str,
        Field(
            min_length=1,
            max_length=512,
            pattern=r"^/[^:]*$",
            description="Absolute path in the container.",
        ),
    ]
    sub_path: Annotated[str | None, Field(max_length=512, description="Folder in it.")] = None
    read_only: Annotated[bool | None, Field(description="Mount without write access.")] = None


class Resources(ApiModel):
    """CPU, memory and other resources of the main container."""

    requests: Annotated[
        dict[str, Quantity] | None,
        Field(max_length=16, description="What the scheduler reserves, e.g. {cpu: 2}."),
    ] = None
    limits: Annotated[
        dict[str, Quantity] | None,
        Field(max_length=16, description="What the container may not exceed."),
    ] = None


class LocalRef(ApiModel):
    """The name of an object in the same namespace."""

    name: Annotated[str, Field(min_length=1, max_length=253, description="Its name.")]


class Toleration(ApiModel):
    """Lets pods onto nodes with a taint."""

    key: Annotated[str | None, Field(max_length=317, description="Key of the taint.")] = None
    operator: Annotated[
        Literal["Exists", "Equal", "Lt", "Gt"] | None, Field(description="How to compare.")
    ] = None
    value: Annotated[str | None, Field(max_length=63, description="Value of the taint.")] = None
    effect: Annotated[
        Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None,
        Field(description="Effect to tolerate; all when left out."),
    ] = None
    toleration_seconds: Annotated[
        int | None, Field(description="How long a NoExecute taint is tolerated.")
    ] = None


OpenObject = Annotated[
    Json, Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
]

_OWN_KEYS = cel(
    "self.all(k, !k.startsWith('mizzen.dev/') && !k.startsWith('app.kubernetes.io/'))",
    "Keys under mizzen.dev/ and app.kubernetes.io/ are set by Mizzen; use another prefix.",
)
ExtraKeys = Annotated[
    dict[str, Annotated[str, Field(max_length=4096)]],
    Field(max_length=32, json_schema_extra=rules(_OWN_KEYS)),
]


class PodTemplatePatch(ApiModel):
    """Additions to the pods Mizzen makes.

    Only fields that cannot weaken the pod's isolation are here: no host paths, host
    namespaces, privileges or extra containers.
    """

    labels: Annotated[ExtraKeys | None, Field(description="Labels added to every pod.")] = None
    annotations: Annotated[
        ExtraKeys | None, Field(description="Annotations added to every pod.")
    ] = None
    node_selector: Annotated[
        dict[str, str] | None,
        Field(max_length=32, description="Labels a node must have, e.g. {gpu: h100}."),
    ] = None
    tolerations: Annotated[
        list[Toleration] | None, Field(max_length=32, description="Taints the pods accept.")
    ] = None
    affinity: Annotated[
        OpenObject | None,
        Field(description="Affinity in the form of a pod's spec.affinity."),
    ] = None
    topology_spread_constraints: Annotated[
        list[OpenObject] | None,
        Field(max_length=8, description="As in a pod's spec.topologySpreadConstraints."),
    ] = None
    env: Annotated[
        list[EnvVar] | None,
        Field(
            max_length=64,
            description="Environment variables of the main container.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ] = None
    volumes: Annotated[
        list[Volume] | None,
        Field(
            max_length=32,
            description="Volumes: emptyDir, configMap, secret or persistentVolumeClaim.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ] = None
    volume_mounts: Annotated[
        list[VolumeMount] | None,
        Field(max_length=32, description="Where those volumes appear in the main container."),
    ] = None
    resources: Annotated[
        Resources | None,
        Field(description="CPU, memory and other resources of the main container."),
    ] = None
    image_pull_secrets: Annotated[
        list[LocalRef] | None,
        Field(max_length=8, description="Secrets with credentials for the image registry."),
    ] = None
    runtime_class_name: Annotated[
        str | None, Field(max_length=253, description="RuntimeClass of the pods, e.g. nvidia.")
    ] = None
    priority_class_name: Annotated[
        str | None, Field(max_length=253, description="PriorityClass of the pods.")
    ] = None
