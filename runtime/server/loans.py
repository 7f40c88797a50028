"""Lending the weights to a training job: the admin port's calls."""

import json

from mizzen.runtime.engine.api import LoanState
from mizzen.runtime.server.errors import invalid, to_api_error
from mizzen.runtime.server.service import Service
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.lendable import check_places, read_loan


async def start_loan(service: Service, job: str) -> dict[str, object]:
    """Lend the weights to the job that a job.json describes; return how far it is.

    Raises:
        ApiError: 400 for a job that cannot run here, 429 where another one has the weights.
    """
    try:
        check_places(read_loan(job), service.config.adapter_roots)
    except JobConfigError as error:
        raise invalid(None, str(error), code="loan_refused") from error
    try:
        return _body(service, await service.engine.start_loan(job))
    except Exception as error:
        raise to_api_error(error) from error


async def stop_loan(service: Service) -> dict[str, object]:
    """Have the job commit its last whole step and end; return how far it is."""
    await service.engine.stop_loan()
    return await look_at_loan(service)


async def look_at_loan(service: Service) -> dict[str, object]:
    """Return how far the job is that has the weights, or how the last one ended."""
    return _body(service, await service.engine.loan())


def _body(service: Service, state: LoanState | None) -> dict[str, object]:
    """Return what the operator is told: null where no job ever had the weights."""
    if state is None:
        return {"inFlight": service.in_flight(), "loan": None}
    return {
        "inFlight": service.in_flight(),
        "loan": {
            "job": state.job,
            "generation": state.generation,
            "directory": state.directory,
            "exitCode": state.exit_code,
            "endedAt": state.ended_at,
            "reason": state.reason,
            "message": state.message,
            "progress": json.loads(state.progress),
        },
    }
