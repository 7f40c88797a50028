"""Model and adapter addresses become paths in a container and the volumes behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from mizzen.operator.crds.common import Json

CLAIM_ROOT = "/mnt/pvc"
_CLAIM_SCHEME = "pvc://"
_FILE_SCHEME = "file://"
_HUB_SCHEME, _BUCKET_SCHEME = "hf://", "s3://"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a container finds what an address names."""

    path: str
    claim: str | None = None  # None: it is part of the image

    @property
    def is_remote(self) -> bool:
        """Whether the container has to fetch it; the path is then the address itself."""
        return self.path.startswith((_HUB_SCHEME, _BUCKET_SCHEME))

    @property
    def is_in_hub(self) -> bool:
        """Whether it comes from a hub, and not from a bucket."""
        return self.path.startswith(_HUB_SCHEME)

    @property
    def folder(self) -> str:
        """The folder that holds it."""
        return str(PurePosixPath(self.path).parent)


def locate(address: str) -> Source:
    """Return where `pvc://CLAIM/PATH` or `file:///PATH` lies in a pod of ours.

    Raises:
        ValueError: the address has another scheme; the CRD refuses those.
    """
    if address.startswith(_CLAIM_SCHEME):
        claim, _, path = address.removeprefix(_CLAIM_SCHEME).partition("/")
        return Source(str(PurePosixPath(CLAIM_ROOT, claim, path)), claim)
    if address.startswith(_FILE_SCHEME):
        return Source(str(PurePosixPath(address.removeprefix(_FILE_SCHEME))))
    raise ValueError(f"{address} must look like pvc://CLAIM/PATH or file:///PATH.")


def locate_model(address: str) -> Source:
    """Return where a served model lies, which may also be a hub or a bucket.

    Raises:
        ValueError: the address has another scheme; the CRD refuses those.
    """
    if address.startswith((_HUB_SCHEME, _BUCKET_SCHEME)):
        return Source(address)
    return locate(address)


def claims_of(sources: Iterable[Source]) -> tuple[str, ...]:
    """Return the claims behind the sources, each once, in a fixed order."""
    return tuple(sorted({source.claim for source in sources if source.claim}))


def claim_volume(claim: str) -> Json:
    """Return the volume of a claim; whether it may be written to is each mount's affair."""
    return {"name": _volume_name(claim), "persistentVolumeClaim": {"claimName": claim}}


def claim_mount(claim: str, *, read_only: bool) -> Json:
    """Return the mount of a claim at its fixed place."""
    mount: Json = {"name": _volume_name(claim), "mountPath": f"{CLAIM_ROOT}/{claim}"}
    return mount | ({"readOnly": True} if read_only else {})


def _volume_name(claim: str) -> str:
    # A claim's name may have dots and 253 characters, a volume's may not.
    return f"pvc-{claim.replace('.', '-')}"[:63].rstrip("-")
