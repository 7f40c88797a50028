"""The CRDs as a template of the chart: the same YAML as manifests/crds, under two values."""

from __future__ import annotations

from pathlib import Path

HEADER = "{{- /* Generated from manifests/crds by `make chart`. */ -}}\n"
_METADATA = "metadata:\n  name: "
_ANNOTATION = """metadata:
  {{- if .Values.crds.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
  name: """


def crds_template(folder: Path) -> str:
    """Return templates/crds.yaml.

    Raises:
        ValueError: a CRD is not laid out as expected, or holds what Helm would take for its own.
    """
    documents = [_document(path) for path in sorted(folder.glob("*.yaml"))]
    body = "".join(f"---\n{document}" for document in documents)
    return f"{HEADER}{{{{- if .Values.crds.install }}}}\n{body}{{{{- end }}}}\n"


def _document(path: Path) -> str:
    text = "".join(
        line for line in path.read_text().splitlines(keepends=True) if not line.startswith("#")
    )
    if "{{" in text:
        raise ValueError(f"{path.name} holds '{{{{', which Helm would take for a template.")
    if text.count(_METADATA) != 1:
        raise ValueError(f"{path.name} does not begin its metadata with a name.")
    return text.replace(_METADATA, _ANNOTATION)
