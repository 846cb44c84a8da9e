"""Errors over HTTP: each error of the contract has a status, and none tells more than it should."""

import inspect
import json

import pytest
from starlette.exceptions import HTTPException

from keepstream import errors
from keepstream_gateway.errors import ApiError, api_error, unforeseen

STATUSES = {
    errors.InvalidJobError: 400,
    errors.InvalidArgumentError: 400,
    errors.InvalidCursorError: 400,
    errors.JobNotFoundError: 404,
    errors.JobStateError: 409,
    errors.EventsLostError: 410,
    errors.IdempotencyConflictError: 422,
    errors.BrokerUnavailableError: 503,
    errors.StoreUnavailableError: 503,
    errors.InvalidSettingError: 503,
    errors.ClientClosedError: 503,
    errors.FollowTimeoutError: 504,
}
DEFECTS = {errors.KeepstreamError, errors.NotConfiguredError, errors.UnexpectedError}


def test_each_error_of_the_contract_has_a_status_or_is_a_defect() -> None:
    raised = {
        value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, errors.KeepstreamError)
    }
    assert raised == STATUSES.keys() | DEFECTS
    for error, status in STATUSES.items():
        found = api_error(error("model: is missing"))
        assert found is not None
        assert found.status == status
        assert found.code
    assert all(api_error(defect("x")) is None for defect in DEFECTS)
    assert api_error(ValueError("x")) is None


@pytest.mark.parametrize("status", [503, 504, 429])
def test_what_passes_says_when_to_ask_again(status: int) -> None:
    found = [error for kind in STATUSES if (error := api_error(kind("x"))) is not None and error.status == status]
    found += [ApiError(429, "x", retry_after=5)] if status == 429 else []
    assert found
    for error in found:
        response = error.response()
        assert int(response.headers["retry-after"]) >= 1
        assert error.type == "server_error"


def test_the_body_has_openais_shape_and_names_the_parameter() -> None:
    found = api_error(errors.InvalidJobError("request.model: must be a text"))
    assert found is not None
    assert json.loads(bytes(found.response().body)) == {
        "error": {
            "message": "request.model: must be a text",
            "type": "invalid_request_error",
            "param": "request.model",
            "code": "invalid_job",
        }
    }


def test_a_conflict_is_not_repeated_by_sdks() -> None:
    found = api_error(errors.JobStateError("x"))
    assert found is not None
    assert found.response().headers["x-should-retry"] == "false"


def test_what_a_server_says_of_itself_is_not_told() -> None:
    for kind in (errors.StoreUnavailableError, errors.BrokerUnavailableError, errors.InvalidSettingError):
        found = api_error(kind("connection to 10.0.0.7 failed"))
        assert found is not None
        assert "10.0.0.7" not in found.message
    assert "10.0.0.7" not in unforeseen().message


@pytest.mark.parametrize("status", [400, 404, 405])
def test_the_frameworks_errors_have_the_same_shape(status: int) -> None:
    found = api_error(HTTPException(status, headers={"Allow": "GET"}))
    assert found is not None
    assert found.response().status_code == status
    assert found.response().headers["allow"] == "GET"
    assert found.type == "invalid_request_error"
