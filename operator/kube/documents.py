"""Small questions to a wire document. Pure."""

from typing import Any, NamedTuple

Json = dict[str, Any]

# Kinds whose plural is not a plain "s": the rule below covers all others we use.
_PLURALS = {"Endpoints": "endpoints"}


class Ref(NamedTuple):
    """Names one object of the cluster."""

    api_version: str
    kind: str
    namespace: str
    name: str

    @classmethod
    def of(cls, document: Json) -> "Ref":
        """Return the name of this document's object."""
        metadata = document["metadata"]
        return cls(
            document["apiVersion"],
            document["kind"],
            metadata.get("namespace") or "",
            metadata["name"],
        )


def plural(kind: str) -> str:
    """Return a kind's name in URLs: Pod is pods, NetworkPolicy is networkpolicies."""
    word = kind.lower()
    if kind in _PLURALS:
        return _PLURALS[kind]
    if word.endswith("y"):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch")) else "s")


def collection_path(api_version: str, kind: str, namespace: str = "") -> str:
    """Return the URL path of a kind's objects, in one namespace or everywhere."""
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    middle = f"/namespaces/{namespace}" if namespace else ""
    return f"{root}{middle}/{plural(kind)}"


def object_path(ref: Ref, subresource: str = "") -> str:
    """Return the URL path of one object or one of its subresources."""
    path = f"{collection_path(ref.api_version, ref.kind, ref.namespace)}/{ref.name}"
    return f"{path}/{subresource}" if subresource else path


def version_of(document: Json) -> int:
    """Return the resourceVersion as a number: the API server promises that they compare."""
    return int(document["metadata"].get("resourceVersion") or 0)


def uid_of(document: Json) -> str:
    """Return the uid, empty before the object exists."""
    return str(document["metadata"].get("uid") or "")


def labels_of(document: Json) -> dict[str, str]:
    """Return the labels."""
    return document["metadata"].get("labels") or {}
