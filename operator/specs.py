"""Parsed resources, kept while their generation lasts: parsing costs more than deciding."""

from typing import TypeVar

from pydantic import ValidationError

from mizzen.operator.crds.common import ApiModel
from mizzen.operator.crds.finetunejob import FineTuneJobSpec
from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.kube.documents import Json, uid_of

Spec = TypeVar("Spec", bound=ApiModel)


class InvalidSpecError(Exception):
    """The stored spec does not fit the operator's model: it was written under looser rules."""

    def __init__(self, error: ValidationError) -> None:
        lines = [
            f"spec.{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors()
        ]
        super().__init__("; ".join(sorted(lines)))


class SpecCache:
    """One parsed spec per uid."""

    def __init__(self) -> None:
        self._specs: dict[str, tuple[int, ApiModel]] = {}

    def deployment(self, resource: Json) -> LLMDeploymentSpec:
        """Return an LLMDeployment's spec.

        Raises:
            InvalidSpecError: it does not parse.
        """
        return self._parse(resource, LLMDeploymentSpec)

    def job(self, resource: Json) -> FineTuneJobSpec:
        """Return a FineTuneJob's spec.

        Raises:
            InvalidSpecError: it does not parse.
        """
        return self._parse(resource, FineTuneJobSpec)

    def forget(self, resource: Json) -> None:
        """Drop what is kept of a deleted resource."""
        self._specs.pop(uid_of(resource), None)

    def _parse(self, resource: Json, model: type[Spec]) -> Spec:
        uid, generation = uid_of(resource), int(resource["metadata"].get("generation", 0))
        kept = self._specs.get(uid)
        if kept is not None and kept[0] == generation and isinstance(kept[1], model):
            return kept[1]
        try:
            spec = model.parse(resource.get("spec") or {})
        except ValidationError as error:
            raise InvalidSpecError(error) from error
        self._specs[uid] = (generation, spec)
        return spec
