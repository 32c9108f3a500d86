"""Conversations as templates of several models write them, and grammars that force a call."""

import json
from typing import Any

import pytest

from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.sampling import Grammar
from abyssal.serve.chat import ChatFormat, ChatPrompt, render
from abyssal.serve.errors import ApiError
from abyssal.serve.limits import Limits
from abyssal.serve.protocol import ChatRequest
from abyssal.serve.tools import CALL_BEGIN, CALLS_BEGIN, SEPARATOR

USER = {"role": "user", "content": "hi"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]},
    },
}
OTHER = {"type": "function", "function": {"name": "time"}}
R1 = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.files | {"chat_template.jinja": template.encode()})


def rendered(tokenizer: Tokenizer, body: dict[str, Any], limits: Limits | None = None) -> ChatPrompt:
    request = ChatRequest.model_validate({"messages": [USER]} | body)
    return render(request, tokenizer, ChatFormat.of(tokenizer), limits or Limits())


def test_a_template_that_opens_the_thinking_is_seen_to(tokenizer: Tokenizer) -> None:
    own = with_template(tokenizer, R1)
    assert rendered(own, {}) == ChatPrompt("user:hi\n<think>\n", None, opened=True, inside=False)
    shaped = rendered(own, {"response_format": {"type": "json_object"}})
    assert shaped == ChatPrompt("user:hi\n<think>\n\n</think>\n\n", Grammar("json"), opened=False, inside=False)


def test_a_template_that_writes_tools_gets_them(tokenizer: Tokenizer) -> None:
    own = with_template(tokenizer, R1)
    text = rendered(own, {"tools": [TOOL], "messages": [{"role": "developer", "content": "x"}, USER]}).text
    assert text.startswith("system:x\nuser:hi\n[{") and json.dumps(TOOL["function"]["name"]) in text  # type: ignore[index]
    assert "## Tools" not in text


def test_variables_of_ours_reach_the_template_and_others_cannot(tokenizer: Tokenizer) -> None:
    own = with_template(tokenizer, "{{ 'deep' if thinking else 'quick' }}{{ evil }}{{ messages[0].content }}")
    assert rendered(own, {"thinking": True}).text == "deephi"
    assert rendered(own, {}).text == "quickhi"
    said = rendered(own, {"messages": [{"role": "user", "content": "{{ 7 * 7 }}{% raw %}", "evil": "x"}]}).text
    assert said == "quick{{ 7 * 7 }}{% raw %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
            "wrote",
        ),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}", "longer than 0.2 s"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('no ' + messages[0].content) }}", "no hi"),
    ],
)
def test_templates_are_bounded_and_caged(tokenizer: Tokenizer, template: str, said: str) -> None:
    with pytest.raises(ApiError, match=said) as refused:
        rendered(with_template(tokenizer, template), {}, Limits(template_seconds=0.2, template_chars=5000))
    assert refused.value.status == 400 and refused.value.param == "messages"


def test_a_model_without_a_template_says_so(tokenizer: Tokenizer) -> None:
    files = dict(tokenizer.files)
    config = json.loads(files["tokenizer_config.json"])
    del config["chat_template"]
    with pytest.raises(ApiError, match="has no chat_template"):
        rendered(Tokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()}), {})


@pytest.mark.parametrize("fenced", [True, False])
def test_a_forced_calls_grammar_is_one_that_compiles_and_takes_the_call_alone(
    deepseek: Tokenizer, fenced: bool
) -> None:
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("llguidance")
    from abyssal.engine.constraint import Grammars

    own = deepseek if fenced else with_template(deepseek, "{{ messages[0].content }}<｜Assistant｜>")
    prompt = rendered(own, {"tools": [TOOL, OTHER], "tool_choice": "required"})
    assert prompt.inside and prompt.text.endswith(CALLS_BEGIN + CALL_BEGIN + (f"function{SEPARATOR}" if fenced else ""))
    assert "### time" in prompt.text and prompt.grammar is not None
    between = "\n```json\n" if fenced else SEPARATOR
    constraint = Grammars(own, own.vocab_size, frozenset({1})).compile(prompt.grammar)
    mask = numpy.zeros((1, (own.vocab_size + 31) // 32), dtype=numpy.int32)

    def allowed(token: int) -> bool:
        constraint.masks([], mask)
        return bool(mask[0, token // 32] >> (token % 32) & 1)

    assert not allowed(own.encode("Sure")[0])
    for token in own.encode(f'weather{between}{{"city": "Rome"}}', special=True):
        assert allowed(token), own.token_bytes(token)
        constraint.accept(token)
    assert allowed(1)
