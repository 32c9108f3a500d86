"""The description of the API is true: whatever it lets one send has an answer that it tells of, and none is a 500."""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

schemathesis = pytest.importorskip("schemathesis")

from fake import FakeEngine  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from abyssal.data.tokenizer import Tokenizer  # noqa: E402
from abyssal.serve.app import create_app  # noqa: E402
from abyssal.serve.auth import Keys  # noqa: E402
from abyssal.serve.limits import Limits  # noqa: E402
from abyssal.serve.service import Service  # noqa: E402

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def ask(cases: int) -> None:
    """`cases` requests, spread over the operations, both such as the description allows and such as it doesn't."""
    tokenizer = Tokenizer.train(["a small tokenizer, for small prompts. " * 20], 300)
    service = Service(FakeEngine(tokenizer), tokenizer, "fake", Limits())  # type: ignore[arg-type]
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service, Keys([]), "testserver"))
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 9
    statuses: set[int] = set()
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    strategy = st.one_of(*(operation.as_strategy(generation_mode=mode) for operation in operations for mode in modes))

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(case: schemathesis.Case) -> None:
        response = case.call(headers={"host": "localhost"})
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    one()
    service.close()
    assert {200, 400} <= statuses and not any(status >= 500 for status in statuses), statuses


def test_a_hundred_cases_are_answered_as_described() -> None:
    ask(100)


@pytest.mark.slow
def test_two_thousand_cases_are_answered_as_described() -> None:
    ask(2000)
