"""The CRDs as YAML: once beside their models, once for `kubectl apply`."""

import yaml

from mizzen.operator.crds.schema import ALL, build_crd

HEADER = "# Generated from operator/crds by `make crds`; change the models, not this file.\n"


def files() -> dict[str, str]:
    """Return path and content of every generated file."""
    found: dict[str, str] = {}
    for crd in ALL:
        text = HEADER + yaml.safe_dump(
            build_crd(crd), sort_keys=False, width=1000, default_flow_style=None
        )
        for folder in ("operator/crds/generated", "manifests/crds"):
            found[f"{folder}/mizzen.dev_{crd.plural}.yaml"] = text
    return found
