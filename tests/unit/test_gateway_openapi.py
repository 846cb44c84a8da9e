"""The OpenAPI document: valid, complete, and true to what is answered."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import Route

from keepstream_gateway.app import make_app
from keepstream_gateway.native import openapi
from keepstream_gateway.settings import load_settings

DOCUMENT: dict[str, Any] = json.loads(openapi.document())
OPERATIONS = {
    (path, method.upper()): operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
}


def test_the_document_is_valid_openapi() -> None:
    assert list(OpenAPIV31SpecValidator(DOCUMENT).iter_errors()) == []


def test_it_describes_each_address_and_no_other(tmp_path: Path) -> None:
    settings = load_settings({}, redis_url="redis://127.0.0.1:1/0", database_url=f"sqlite:///{tmp_path}/k.db")
    app, _ = make_app(settings)
    served = {
        (route.path, method)
        for route in app.routes
        if isinstance(route, Route) and route.path.startswith("/api/jobs") and route.methods
        for method in route.methods - {"HEAD"}
    }
    assert served == OPERATIONS.keys()


def test_each_operation_has_a_name_of_its_own_and_says_how_it_fails() -> None:
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(names) == len(set(names))
    for operation in OPERATIONS.values():
        assert {"400", "401", "403", "503"} <= operation["responses"].keys()
        has_body = {"408", "413", "415"} <= operation["responses"].keys()
        assert has_body is ("requestBody" in operation)


def test_it_refers_to_nothing_outside_itself() -> None:
    references = re.findall(r'"\$ref": ?"([^"]+)"', openapi.document())
    assert references
    assert all(reference.startswith("#/components/") for reference in references)


@pytest.mark.parametrize(
    ("job", "is_valid"),
    [
        ({"request": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}, "max_attempts": 3}, True),
        ({"request": {"model": "m"}}, False),
        ({"request": {"model": "m", "messages": [{}]}, "max_atempts": 3}, False),
        ({}, False),
    ],
)
def test_a_new_job_is_what_is_accepted(job: dict[str, Any], *, is_valid: bool) -> None:
    schema = {"$ref": "#/components/schemas/NewJob", "components": DOCUMENT["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(job) is is_valid
