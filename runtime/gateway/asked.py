"""A request, read and understood."""

from __future__ import annotations

from dataclasses import dataclass

from multidict import CIMultiDictProxy

from mizzen.runtime.gateway.body import Body
from mizzen.runtime.gateway.limits import Account


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a model, and by whom."""

    path: str
    headers: CIMultiDictProxy[str]
    body: Body
    request_id: str
    client: str = ""
    priority: int = 0
    account: Account | None = None

    @property
    def endpoint(self) -> str:
        """The path without its query."""
        return self.path.partition("?")[0]
