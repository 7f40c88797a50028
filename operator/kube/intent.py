"""Does the live object already say what we intend? Pure.

Every intent carries a hash of itself in an annotation. An object that has that hash and holds
every field of the intent needs no write: a removed field changes the hash, a foreign edit of our
field breaks the cover, and an addition by somebody else is none of our business. All of it is
read from the object, so a restarted operator writes nothing.
"""

import hashlib
import json
from typing import Any

from mizzen.operator.kube.documents import Json

HASH_ANNOTATION = "mizzen.dev/intent"

# Lists whose elements have names: the server may add elements of others, in any order.
_NAMES = ("name", "type", "key", "topologyKey", "uid")


def stamp(intent: Json) -> Json:
    """Return a copy of the intent that carries its own hash."""
    metadata = intent["metadata"]
    annotations = {**(metadata.get("annotations") or {}), HASH_ANNOTATION: hash_of(intent)}
    return {**intent, "metadata": {**metadata, "annotations": annotations}}


def hash_of(document: Json) -> str:
    """Return a short digest, the same for equal documents whatever their key order."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def covers(live: Any, intended: Any) -> bool:
    """Return whether `live` holds everything `intended` says."""
    if live is None and not intended:
        return True  # the server leaves out what is empty, zero or false
    if isinstance(intended, dict):
        return isinstance(live, dict) and all(
            covers(live.get(key), value) for key, value in intended.items()
        )
    if isinstance(intended, list):
        return isinstance(live, list) and _covers_list(live, intended)
    return bool(live == intended)


def _covers_list(live: list[Any], intended: list[Any]) -> bool:
    name = _name_of_elements(intended)
    if name is None:
        return len(live) == len(intended) and all(map(covers, live, intended))
    found = {element.get(name): element for element in live if isinstance(element, dict)}
    return all(covers(found.get(element[name]), element) for element in intended)


def _name_of_elements(elements: list[Any]) -> str | None:
    """Return the field that tells the elements apart, None for a plain list."""
    for name in _NAMES:
        values = [element.get(name) for element in elements if isinstance(element, dict)]
        if (
            len(values) == len(elements)
            and None not in values
            and len(set(map(str, values))) == len(values)
        ):
            return name
    return None
