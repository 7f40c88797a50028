"""Loading and unloading adapters: by repository calls, and from the mounted list at start."""

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mizzen.runtime.engine.errors import AdapterLoadError, EngineDeadError
from mizzen.runtime.errors import MizzenError
from mizzen.runtime.server.errors import ApiError, invalid, to_api_error
from mizzen.runtime.server.service import Service
from mizzen.runtime.train.digest import base_weights_of, digest_of, hash_files

log = logging.getLogger(__name__)


class AdapterSource(BaseModel):
    """Where an adapter lies, and the digest its content must have."""

    model_config = ConfigDict(extra="ignore")

    path: str = Field(min_length=1, max_length=4096)
    digest: str | None = Field(None, pattern=r"^sha256:[0-9a-f]{64}$")


class _ListedAdapter(AdapterSource):
    name: str = Field(min_length=1)


class _AdapterList(BaseModel):
    adapters: list[_ListedAdapter] = Field(default_factory=list)


_PARAMETERS = TypeAdapter(dict[str, object])


def source_from_parameters(parameters: dict[str, object]) -> AdapterSource:
    """Return the source that a repository load names.

    tritonclient can pass only a `config`, a JSON string; there the same two parameters stand
    under "parameters", as plain strings or as a model configuration's {"string_value": ...}.
    """
    if "path" not in parameters and isinstance(config := parameters.get("config"), str | bytes):
        parameters = _from_config(config)
    try:
        return AdapterSource.model_validate(
            {key: _plain(parameters[key]) for key in ("path", "digest") if key in parameters}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise invalid(
            str(first["loc"][0]),
            f"Loading an adapter needs the parameters path and, if wanted, digest "
            f"(sha256:HEX): {first['loc'][0]}: {first['msg']}.",
        ) from error


def _from_config(config: str | bytes) -> dict[str, object]:
    try:
        document = _PARAMETERS.validate_json(config)
        return _PARAMETERS.validate_python(document.get("parameters", {}))
    except ValidationError as error:
        raise invalid("config", "config is not JSON with an object 'parameters'.") from error


def _plain(value: object) -> object:
    return value.get("string_value") if isinstance(value, dict) else value


def checked_path(path: str, roots: Sequence[Path]) -> Path:
    """Return the real path of a directory with weights.

    Raises:
        ApiError: it is not below one of `roots`, links followed. What lies elsewhere is not
            looked at, so the answer tells nothing about the rest of the file system.
    """
    allowed = ", ".join(str(root) for root in roots)
    outside = ApiError(
        403,
        f"Weights are loaded only from below {allowed}. Move them there or start the server with "
        "--adapter-root.",
        code="path_not_allowed",
        param="path",
    )
    given = Path(os.path.normpath(path))
    if not any(given.is_relative_to(root) for root in roots):
        raise outside
    try:
        real = given.resolve()
        if not any(real.is_relative_to(root.resolve()) for root in roots):
            raise outside
        if real.is_dir():
            return real
    except (OSError, ValueError):
        pass  # over the longest name there can be, or a NUL in it: no directory either
    raise invalid("path", f"{str(given)[:200]!r} is not a directory.", code="path_not_found")


async def load_adapter(service: Service, name: str, source: AdapterSource) -> None:
    """Load an adapter under `name`, replacing one of another content.

    Raises:
        ApiError: it cannot be loaded; what is served stays as it was.
    """
    if name == service.served_name or ":" in name:
        raise invalid("name", f"{name!r} cannot be an adapter's name.")
    engine = service.engine
    path = checked_path(source.path, service.config.adapter_roots)
    async with service.change_lock:
        try:
            if source.digest:
                await asyncio.to_thread(_check_digest, path, source.digest)
            await _check_base(service, path)
            await engine.load_adapter(name, path, source.digest)
        except EngineDeadError as error:
            raise to_api_error(error) from error
        except MizzenError as error:
            service.adapter_errors[name] = str(error)
            # Whatever else the engine calls it, the adapter is at fault.
            raise ApiError(400, str(error), code="adapter_load_failed") from error
        except Exception as error:
            log.exception("loading the adapter %s failed", name)
            message = "The server failed on this adapter; its log says why."
            service.adapter_errors[name] = message
            raise ApiError(500, message, code="adapter_load_failed") from error
        service.adapter_errors.pop(name, None)
        # The engine keeps the digest of the first load of an equal content; asked is asked.
        service.adapter_digests[name] = source.digest
    log.info("adapter loaded: %s from %s", name, path)


def _check_digest(path: Path, wanted: str) -> None:
    found = f"sha256:{digest_of(hash_files(path))}"
    if found != wanted:
        raise AdapterLoadError(
            f"The files in {path} have the digest {found} and not {wanted}. Publish the adapter "
            "again, or ask for the digest it has."
        )


async def _check_base(service: Service, path: Path) -> None:
    """Raise AdapterLoadError if an adapter says that it was trained beside other weights."""
    trained = await asyncio.to_thread(base_weights_of, path)
    if trained is None:
        return
    try:
        served = await service.weights_mark()
    except OSError as error:
        raise AdapterLoadError(
            f"Whether the adapter was trained beside the served weights cannot be seen: their "
            f"files in {service.weights} cannot be read ({type(error).__name__}). Put them back."
        ) from error
    if trained != served:
        raise AdapterLoadError(
            f"The adapter was trained beside weights with the digest {trained}, and those that "
            f"are served have {served}. Serve the base model that it was trained on, or train it "
            "again on this one. Without its artifact.json, in a folder of its own, it is loaded "
            "beside any."
        )


async def unload_adapter(service: Service, name: str) -> None:
    """Stop serving an adapter.

    Raises:
        ApiError: it is not loaded, or it is the base model.
    """
    if name == service.served_name:
        raise invalid("name", "The base model stays loaded for the life of the server.")
    async with service.change_lock:
        service.adapter_errors.pop(name, None)
        service.adapter_digests.pop(name, None)
        try:
            await service.engine.unload_adapter(name)
        except MizzenError as error:
            raise to_api_error(error) from error
    log.info("adapter unloaded: %s", name)


async def swap_weights(service: Service, path: Path) -> None:
    """Serve other weights, and no more the adapters that say they were trained beside others.

    Raises:
        MizzenError: the engine cannot take them; what is served stays as it was.
    """
    await service.load_weights(path)
    async with service.change_lock:
        for name, folder in [(one.name, Path(one.path)) for one in service.adapters()]:
            try:
                await _check_base(service, folder)
            except AdapterLoadError as error:
                await service.engine.unload_adapter(name)
                service.adapter_digests.pop(name, None)
                service.adapter_errors[name] = str(error)
                log.error("adapter %s is no longer served: %s", name, error)


async def load_listed(service: Service, file: Path | None) -> None:
    """Load the adapters that `file` lists; one that fails is noted and does not stop the rest.

    A replica without one adapter still serves the base model; the operator reads the errors and
    keeps traffic away where an adapter is missed.
    """
    for adapter in _read_list(service, file) if file else ():
        try:
            await load_adapter(service, adapter.name, adapter)
        except ApiError as error:
            service.adapter_errors[adapter.name] = error.message
            log.error("adapter %s was not loaded: %s", adapter.name, error.message)


def _read_list(service: Service, file: Path) -> list[_ListedAdapter]:
    try:
        return _AdapterList.model_validate_json(file.read_bytes()).adapters
    except FileNotFoundError:
        return []  # the operator mounts the list only where there are adapters
    except (OSError, ValidationError) as error:
        log.error("the adapters file %s cannot be used: %s", file, error)
        service.adapter_errors["*"] = f"The adapters file {file} is not a valid list."
        return []


def adapters_body(service: Service) -> dict[str, object]:
    """Return what is loaded and what failed, for the operator."""
    return {
        "adapters": [
            {
                "name": adapter.name,
                "path": adapter.path,
                "digest": service.adapter_digests.get(adapter.name) or adapter.digest,
                "rank": adapter.rank,
            }
            for adapter in service.adapters()
        ],
        "errors": [
            {"name": name, "message": message}
            for name, message in sorted(service.adapter_errors.items())
        ],
    }
