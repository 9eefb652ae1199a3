"""The service keeps what its OpenAPI document says, whatever is sent to it."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving.running import BEARER, Api, head

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 20


@pytest.fixture(scope="module")
def document(api: Api) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{api.port}/openapi.json")


@pytest.mark.parametrize("headers", [{}, BEARER], ids=["without a key", "with a key"])
def test_every_operation_answers_as_documented(document: schemathesis.BaseSchema, api: Api, headers: dict[str, str]):
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:
        statuses = answers_of(operation, headers, known=api.predict(head("glioma")).json()["id"])
        if headers:  # else it would say nothing of what is behind the door
            assert statuses - {401, 403, 429}, operation.label


def answers_of(operation: schemathesis.schemas.APIOperation, headers: dict[str, str], known: str) -> set[int]:
    """The statuses of an operation's answers; in half of the cases about a prediction that there is."""
    statuses = set()

    @given(case=operation.as_strategy())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def keeps_its_word(case: schemathesis.Case) -> None:
        if "prediction_id" in case.path_parameters and case.path_parameters["prediction_id"][:1] < "U":
            case.path_parameters["prediction_id"] = known
        statuses.add(case.call_and_validate(headers=headers, checks=CHECKS).status_code)

    keeps_its_word()
    return statuses
