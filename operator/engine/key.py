"""The name of one thing to reconcile."""

from typing import NamedTuple


class Key(NamedTuple):
    """Names one resource: `kind` in lower case, such as llmdeployment.

    A named tuple, since tens of thousands of them are hashed per second in a burst.
    """

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}"
