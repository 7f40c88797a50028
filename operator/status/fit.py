"""`status.plan`: what the model takes, as a running replica says, and whether a change would fit.

The operator cannot read a model's files, so the first replica tells it; from then on a spec that
cannot fit is refused before any pod of it is made. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.planning.fit import GIB, Fit, Wish, measured_fit, plan_fit
from mizzen.operator.planning.model_shape import DTYPE_BYTES, ModelShape
from mizzen.operator.status.conditions import Document

PLAN = "plan"
_REQUEST_TOKENS = 2048  # of a usual request, as `mizzen plan` takes it
_CPU = "cpu"
_SIZES = ("layers", "hidden", "heads", "kvHeads", "headDim", "contextTokens", "parameters")
# Told by newer runtimes only.
_PARTS = ("layerParameters", "tableParameters")
# Where a device's memory is not known only what needs none is judged.
_ENDLESS_BYTES = 1 << 60


def fit_document(
    told: Mapping[str, object], spec: LLMDeploymentSpec, *, revision: str
) -> Document | None:
    """Return `status.plan` from a runtime's answer, None where the answer tells too little."""
    kv_tokens, longest = _size(told.get("kvTokens")), _size(told.get("maxModelLen"))
    sizes = {name: _size(told.get(name)) for name in _SIZES}
    dtype = str(told.get("dtype"))
    if not kv_tokens or not longest or not all(sizes.values()) or dtype not in DTYPE_BYTES:
        return None
    sizes |= {name: size for name in _PARTS if (size := _size(told.get(name)))}
    device_bytes = _size(told.get("deviceBytes"))
    wish = _wish(spec, dtype=dtype, device_bytes=device_bytes, max_len=longest)
    tensor = spec.parallelism.tensor
    fit = measured_fit(_shape(sizes), wish, tensor=tensor, kv_tokens=kv_tokens)
    return {
        "revision": revision,
        "source": spec.model.source,
        "placement": placement_of(spec),
        "model": sizes,
        **({"deviceBytes": device_bytes} if device_bytes else {}),
        **_figures(fit),
    }


def refuse_misfit(
    plan: Mapping[str, object] | None, spec: LLMDeploymentSpec, *, revision: str
) -> None:
    """Do nothing unless this spec of a known model cannot fit.

    The revision that was measured fits, whatever arithmetic says.

    Raises:
        DoesNotFitError: it cannot; the text has the numbers and the ways out.
    """
    if plan is None or plan["revision"] == revision or plan["source"] != spec.model.source:
        return
    sizes = plan["model"]
    assert isinstance(sizes, dict)
    shape = _shape(sizes)
    device_bytes = _size(plan.get("deviceBytes"))
    if plan["placement"] != placement_of(spec):
        device_bytes = None  # other devices may have other memory
    dtype = spec.model.dtype if spec.model.dtype != "auto" else str(plan["dtype"])
    longest = spec.model.max_model_len or shape.max_len
    plan_fit(shape, _wish(spec, dtype=dtype, device_bytes=device_bytes, max_len=longest))


def placement_of(spec: LLMDeploymentSpec) -> str:
    """Return a hash of what decides which devices the pods get."""
    patch = spec.pod_template_patch
    parts = [spec.accelerator.resource, patch.model_dump(mode="json") if patch else None]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _wish(spec: LLMDeploymentSpec, *, dtype: str, device_bytes: int | None, max_len: int) -> Wish:
    wanted_gib = spec.engine.kv_cache_gib
    return Wish(
        accelerator=spec.accelerator.resource if spec.accelerator.is_gpu else _CPU,
        device_bytes=device_bytes or _ENDLESS_BYTES,
        dtype=dtype,
        max_len=max_len,
        request_tokens=min(_REQUEST_TOKENS, max_len),
        tensor=spec.parallelism.tensor,
        pipeline=spec.parallelism.pipeline,
        kv_cache_bytes=int(wanted_gib * GIB) if wanted_gib else None,
    )


def _figures(fit: Fit) -> Document:
    return {
        "dtype": fit.dtype,
        "tensor": fit.tensor,
        **({"pipeline": fit.pipeline} if fit.pipeline > 1 else {}),
        "weightBytes": fit.weight_bytes,
        "kvBytesPerToken": fit.kv_bytes_per_token,
        "kvTokens": fit.kv_tokens,
        "maxModelLen": fit.max_len,
        "maxConcurrency": fit.max_concurrency,
    }


def _shape(sizes: Mapping[str, int | None]) -> ModelShape:
    layers, parameters = int(sizes["layers"] or 0), int(sizes["parameters"] or 0)
    return ModelShape(
        layers=layers,
        hidden=int(sizes["hidden"] or 0),
        heads=int(sizes["heads"] or 0),
        kv_heads=int(sizes["kvHeads"] or 0),
        head_dim=int(sizes["headDim"] or 0),
        max_len=int(sizes["contextTokens"] or 0),
        parameters=parameters,
        layer_parameters=sizes.get("layerParameters") or parameters // layers,
        table_parameters=sizes.get("tableParameters") or 0,
    )


def _size(value: object) -> int | None:
    is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return int(str(value)) if is_size else None
