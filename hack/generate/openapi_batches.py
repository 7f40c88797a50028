"""Files and batches in OpenAPI's words: what the gateway answers itself."""

from typing import Any

from mizzen.runtime.gateway.batches.lines import ENDPOINTS

_TEXT = {"type": "string"}
_NUMBER = {"type": "integer"}
_FILE = {
    "type": "object",
    "required": ["id", "object", "bytes", "created_at", "filename", "purpose"],
    "properties": {
        **{name: _TEXT for name in ("id", "filename", "purpose", "status")},
        **{name: _NUMBER for name in ("bytes", "created_at", "expires_at")},
        "object": {"const": "file"},
    },
}
_BATCH = {
    "type": "object",
    "required": ["id", "object", "endpoint", "input_file_id", "status", "request_counts"],
    "properties": {
        **{name: _TEXT for name in ("id", "endpoint", "input_file_id", "status")},
        **{name: {"type": ["string", "null"]} for name in ("output_file_id", "error_file_id")},
        **{name: _NUMBER for name in ("created_at", "expires_at")},
        "object": {"const": "batch"},
        "request_counts": {
            "type": "object",
            "properties": {name: _NUMBER for name in ("total", "completed", "failed")},
        },
    },
}
_DELETED = {
    "type": "object",
    "properties": {"id": _TEXT, "object": {"const": "file"}, "deleted": {"type": "boolean"}},
}
_CREATE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["input_file_id", "endpoint", "completion_window"],
    "properties": {
        "input_file_id": _TEXT,
        "endpoint": {"enum": list(ENDPOINTS)},
        "completion_window": {"type": "string", "pattern": "^[1-9][0-9]{0,2}h$"},
        "metadata": {"type": ["object", "null"], "additionalProperties": _TEXT},
    },
}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "purpose": {"const": "batch"},
    },
}
_ERRORS = {
    "4XX": {"description": "OpenAI's error: what to change."},
    "501": {"description": "The gateway has no volume for files."},
}


def batch_paths(security: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the paths of files and batches, each with the gateway's `security`."""

    def operation(summary: str, answer: dict[str, Any], **more: Any) -> dict[str, Any]:
        content = {"application/json": {"schema": answer}}
        responses = {"200": {"description": "The answer.", "content": content}, **_ERRORS}
        return {"summary": summary, "responses": responses, "security": security, **more}

    file_id, batch_id = _path_parameter("file_id"), _path_parameter("batch_id")
    page = [_query("limit", {"type": "integer", "minimum": 1}), _query("after", _TEXT)]
    of_files = [*page, _query("purpose", _TEXT), _query("order", {"enum": ["asc", "desc"]})]
    content = operation("Read a file", {}, parameters=[file_id])
    content["responses"]["200"]["content"] = {"application/jsonl": {"schema": {}}}
    return {
        "/v1/files": {
            "post": operation(
                "Upload a file",
                _FILE,
                requestBody=_body("multipart/form-data", _UPLOAD),
            ),
            "get": operation("List files", _list_of(_FILE), parameters=of_files),
        },
        "/v1/files/{file_id}": {
            "get": operation("Describe a file", _FILE, parameters=[file_id]),
            "delete": operation("Delete a file", _DELETED, parameters=[file_id]),
        },
        "/v1/files/{file_id}/content": {"get": content},
        "/v1/batches": {
            "post": operation(
                "Make a batch", _BATCH, requestBody=_body("application/json", _CREATE)
            ),
            "get": operation("List batches", _list_of(_BATCH), parameters=page),
        },
        "/v1/batches/{batch_id}": {
            "get": operation("Describe a batch", _BATCH, parameters=[batch_id])
        },
        "/v1/batches/{batch_id}/cancel": {
            "post": operation("Cancel a batch", _BATCH, parameters=[batch_id])
        },
    }


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _TEXT}


def _query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema}


def _body(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {kind: {"schema": schema}}}


def _list_of(schema: dict[str, Any]) -> dict[str, Any]:
    properties = {"object": {"const": "list"}, "data": {"type": "array", "items": schema}}
    return {"type": "object", "required": ["object", "data"], "properties": properties}
