"""One Lease object, read and replaced with its version, for the election in engine/lease.py."""

from dataclasses import dataclass

from mizzen.operator.kube.documents import Json, Ref, collection_path, object_path
from mizzen.operator.kube.errors import KubeError, NotFound
from mizzen.operator.kube.transport import Transport

API_VERSION = "coordination.k8s.io/v1"


@dataclass(frozen=True, slots=True)
class LeaseObject:
    """A Lease by name."""

    transport: Transport
    namespace: str
    name: str

    async def read(self) -> Json | None:
        """Return the Lease, or None where there is none yet."""
        try:
            return await self.transport.request("GET", object_path(self._ref()), timeout_s=5)
        except NotFound:
            return None

    async def write(
        self, spec: Json, *, annotations: dict[str, str], previous: Json | None
    ) -> Json | None:
        """Write the Lease over `previous`; None when somebody else was quicker."""
        metadata: Json = {"name": self.name, "namespace": self.namespace}
        metadata["annotations"] = annotations
        method, path = "POST", collection_path(API_VERSION, "Lease", self.namespace)
        if previous is not None:
            metadata["resourceVersion"] = previous["metadata"]["resourceVersion"]
            method, path = "PUT", object_path(self._ref())
        body = {"apiVersion": API_VERSION, "kind": "Lease", "metadata": metadata, "spec": spec}
        try:
            return await self.transport.request(method, path, body=body, timeout_s=5)
        except KubeError as error:
            if error.status == 409:
                return None
            raise

    def _ref(self) -> Ref:
        return Ref(API_VERSION, "Lease", self.namespace, self.name)
