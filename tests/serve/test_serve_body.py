"""Bodies are JSON by the standard, and requests are what they say they are."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from abyssal.serve.auth import Keys, may_be_called
from abyssal.serve.body import parse_json
from abyssal.serve.errors import ApiError, from_validation
from abyssal.serve.limits import Limits
from abyssal.serve.protocol import ChatRequest, CompletionRequest

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff", "expected JSON in UTF-8"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1e999]", "too large"),
        (b"[" + b"9" * 5000 + b"]", "expected JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (rb'["\ud800"]', "half a surrogate pair"),
        (rb'{"\uDFFF": 1}', "half a surrogate pair"),
        (b"[" * 6 + b"]" * 6, "nested deeper than 5"),
        (b"[" * 100000, "nested deeper than 5"),
        (b'{"a":' * 6 + b"1" + b"}" * 6, "nested deeper than 5"),
        (b"\xef\xbb\xbf{}", "expected JSON"),
    ],
)
def test_what_is_not_json_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ApiError, match=said) as refused:
        parse_json(data, 5)
    assert refused.value.status == 400
    refused.value.response()  # can be sent


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values)
def test_json_is_read_as_written(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), 64) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), 64) == value


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.0}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [1]}, "stop.0"),
        ({"logit_bias": {"5": "x"}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages.0.tool_calls.0.function.name",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"tools": [{"type": "function", "function": {"name": 'a"b'}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
    ],
)
def test_a_field_that_is_wrong_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate({"messages": [USER]} | change)
    found = from_validation(refused.value)
    assert found.param == param and found.message.startswith(param) and found.status == 400


def test_what_would_change_the_answer_is_refused_by_name_and_the_rest_let_be() -> None:
    with pytest.raises(ApiError, match="suffix: not supported") as refused:
        CompletionRequest.model_validate({"prompt": "a", "suffix": "b"})
    assert refused.value.param == "suffix"
    with pytest.raises(ApiError, match="tempratur: unrecognized request argument"):
        CompletionRequest.model_validate({"prompt": "a", "tempratur": 1})
    harmless = {"user": "me", "metadata": {"a": 1}, "store": True, "suffix": None, "use_beam_search": False}
    assert CompletionRequest.model_validate({"prompt": "a", "temperature": None} | harmless).prompt == "a"
    answered = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None}
    ChatRequest.model_validate({"messages": [USER, answered, USER]})


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [None] * 100000},
        {"prompt": [[None] * 10] * 10000},
        {"prompt": "a", "stop": [1] * 100000},
        {"prompt": "a", "logit_bias": {str(i): "x" for i in range(100000)}},
        {"prompt": "a"} | {f"x{i}": 1 for i in range(100000)},
        {"messages": [{}] * 100000},
        {"messages": [{"role": "user", "content": [{}] * 100000}]},
        {"messages": [USER], "tools": [{}] * 100000},
    ],
)
def test_a_million_mistakes_make_a_few_errors(body: dict[str, Any]) -> None:
    """They took a gigabyte."""
    kind = ChatRequest if "messages" in body else CompletionRequest
    try:
        kind.model_validate(body)
    except ValidationError as error:
        assert error.error_count() < 10
    except ApiError as error:
        assert error.status == 400
    else:
        pytest.fail("was taken")


def test_limits_are_set_by_name() -> None:
    changed = Limits().changed(["body_bytes=10", "send_seconds=0.5"])
    assert (changed.body_bytes, changed.send_seconds, changed.n) == (10, 0.5, Limits().n)
    for setting, said in [("nothing=1", "one of body_bytes"), ("n=x", "expected int"), ("n=0", "more than 0")]:
        with pytest.raises(ValueError, match=said):
            Limits().changed([setting])


def test_keys() -> None:
    keys = Keys(["alpha", "beta"])
    first, second = keys.salt("Bearer alpha"), keys.salt("bearer  beta")
    assert first and second and first != second and "alpha" not in first
    for header in (None, "", "alpha", "Basic alpha", "Bearer", "Bearer alph", "Bearer älpha"):
        assert keys.salt(header) is None
    assert Keys([]).salt(None) == ""
    with pytest.raises(ValueError, match="printable ASCII"):
        Keys(["a b"])


@pytest.mark.parametrize(
    ("header", "may"),
    [
        ("localhost:8000", True), ("127.0.0.1", True), ("[::1]:80", True), ("10.0.0.7:1", True), ("box", True),
        ("evil.example:8000", False), ("", False), (None, False), ("localhost.evil.example", False),
        ("a.localhost", True),
    ],
)  # fmt: skip
def test_names_that_a_page_could_point_here_are_not_answered(header: str | None, may: bool) -> None:
    assert may_be_called(header, "box") is may


def test_the_document_lists_every_limit_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", text, re.MULTILINE))
    assert {name: float(value) for name, value in listed.items()} == asdict(Limits())
