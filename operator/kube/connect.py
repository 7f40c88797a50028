"""How to reach the API server: as a pod's service account, or by the user's kubeconfig."""

import datetime
import os
from dataclasses import dataclass

from kubernetes.aio import config as loaders
from kubernetes.aio.client import ApiClient, Configuration

_IN_CLUSTER = "KUBERNETES_SERVICE_HOST"
# A service account's token is renewed on disk well before it ends; a minute is soon enough.
_REREAD_AFTER = datetime.timedelta(minutes=1)


async def load_configuration() -> Configuration:
    """Return address and credentials of the API server."""
    configuration = Configuration()
    if os.environ.get(_IN_CLUSTER):
        loaders.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
    else:
        await loaders.load_kube_config(  # type: ignore[no-untyped-call]
            client_configuration=configuration
        )
    # Every worker may have a request under way, and a few list calls beside them.
    configuration.connection_pool_maxsize = 64
    # Otherwise every request looks for a .netrc file, in a thread of its own.
    configuration.client_session_kwargs = {"trust_env": False}
    return configuration


async def open_client() -> ApiClient:
    """Return a client for `HttpTransport`; close it in the end."""
    return ApiClient(await load_configuration())


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a second client needs to log in the same way."""

    server: str
    ca_path: str | None
    certificate_path: str | None
    private_key_path: str | None
    token: str | None
    insecure: bool
    expires_at: datetime.datetime | None


async def load_credentials() -> Credentials:
    """Return the credentials as files and token, freshly read."""
    found = await load_configuration()
    token = str(found.api_key.get("BearerToken") or "")
    scheme, _, secret = token.partition(" ")
    return Credentials(
        server=found.host,
        ca_path=found.ssl_ca_cert,
        certificate_path=found.cert_file,
        private_key_path=found.key_file,
        token=(secret or scheme) or None,
        insecure=not found.verify_ssl,
        expires_at=datetime.datetime.now(datetime.UTC) + _REREAD_AFTER if token else None,
    )
