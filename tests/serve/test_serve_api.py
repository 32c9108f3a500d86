"""The API without a socket: answers, streams, limits, keys and errors, over an engine that says what it is told to."""

import asyncio
import dataclasses
import json
import threading
from typing import Any

import httpx
import pytest
from fake import Client, FakeEngine

from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.client import Refused
from abyssal.serve.answers import ChatCompletion, Completion
from abyssal.serve.limits import Limits
from abyssal.serve.logprobs import TextLogprobWriter
from abyssal.serve.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
INTEGERS = ("n", "max_tokens", "seed", "priority", "top_k", "logprobs", "deadline")
CHAT_INTEGERS = ("n", "max_tokens", "max_completion_tokens", "seed", "priority", "top_k", "top_logprobs", "deadline")
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def post(engine: FakeEngine, client: Client, path: str, body: dict[str, Any], **how: Any) -> httpx.Response:
    async with client(engine, **how) as http:
        return await http.post(path, json=body)


def answer(engine: FakeEngine, client: Client, path: str, body: dict[str, Any], **how: Any) -> dict[str, Any]:
    response = asyncio.run(post(engine, client, path, body, **how))
    assert response.status_code == 200, response.text
    return response.json()


def error(
    engine: FakeEngine, client: Client, path: str, body: dict[str, Any], **how: Any
) -> tuple[int, dict[str, Any]]:
    response = asyncio.run(post(engine, client, path, body, **how))
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return response.status_code, found


# ---- completions --------------------------------------------------------------------------------------------------


def test_every_prompt_has_its_own_samples_in_order(tokenizer: Tokenizer, client: Client) -> None:
    body = {"prompt": ["abc", "defg"], "n": 2}
    found = answer(FakeEngine(tokenizer, delay=0), client, COMPLETE, body)
    assert [c["text"] for c in found["choices"]] == ["cba", "cba", "gfed", "gfed"]
    assert [c["index"] for c in found["choices"]] == [0, 1, 2, 3]
    said = sum(len(tokenizer.encode(text)) for text in ("cba", "cba", "gfed", "gfed"))
    prompt = sum(len(tokenizer.encode(text)) for text in ("abc", "defg"))
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": prompt - 2},
    }


def test_a_stream_says_what_the_whole_answer_says(tokenizer: Tokenizer, client: Client) -> None:
    body = {"prompt": ["abc", "defg", "hij"], "n": 2, "logprobs": 1, "stop": "e", "max_tokens": 4}
    whole = answer(FakeEngine(tokenizer, delay=0), client, COMPLETE, body)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(asyncio.run(post(FakeEngine(tokenizer, delay=0), client, COMPLETE, body | streamed)))
    assert last["usage"] == whole["usage"] and last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        for key in choice["logprobs"]:
            assert [v for c in own for v in c["logprobs"][key]] == choice["logprobs"][key]
    assert whole["choices"][2]["text"] == "gf" and whole["choices"][2]["finish_reason"] == "stop"


def test_echo_has_the_prompt_and_its_logprobs(tokenizer: Tokenizer, client: Client) -> None:
    choice = answer(FakeEngine(tokenizer), client, COMPLETE, {"prompt": "abc", "echo": True, "logprobs": 2})["choices"][
        0
    ]
    assert choice["text"] == "abccba"
    assert "".join(choice["logprobs"]["tokens"]) == "abccba"
    assert choice["logprobs"]["token_logprobs"][0] is None and choice["logprobs"]["token_logprobs"][1] == -0.5
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2


def test_a_token_stands_at_its_offset_whatever_characters_were_cut(tokenizer: Tokenizer, client: Client) -> None:
    said = "the \U0001f600 fox \u00e9\u4e2d\U0001f600, <|user|>dog"
    prompt = "jumps \u4e2d<|user|> over"
    engine = FakeEngine(tokenizer, says=lambda prompt: said)
    body = {"prompt": prompt, "logprobs": 0, "max_tokens": 100}
    half = tokenizer.encode("\U0001f600")[:1]
    ids = [*tokenizer.encode(prompt), 2, *half]  # with a control token, and a character that never ends
    for more in ({}, {"echo": True}, {"echo": True, "prompt": ids}):
        choice = answer(engine, client, COMPLETE, body | more)["choices"][0]
        found = choice["logprobs"]
        whole = [pair for pair in zip(found["tokens"], found["text_offset"]) if not pair[0].startswith("bytes:")]
        assert len(whole) < len(found["tokens"]) and found["text_offset"] == sorted(found["text_offset"])
        hidden = [(token, at) for token, at in whole if not choice["text"].startswith(token, at)]
        # A control token that the model says is not in the text, and takes no place there.
        assert [token for token, _ in hidden] == ["<|user|>"] and choice["text"].startswith("dog", hidden[0][1])
    chunks = events(asyncio.run(post(engine, client, COMPLETE, body | {"stream": True})))
    offsets = [at for chunk in chunks for at in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == answer(engine, client, COMPLETE, body)["choices"][0]["logprobs"]["text_offset"]


def test_a_character_that_never_ends_moves_what_follows_on(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("\U0001f600")[:1]
    tokens = [*broken, *tokenizer.encode("a"), *broken]
    text = tokenizer.decode(tokens)
    written = TextLogprobWriter(0, tokenizer).write([None] * len(tokens), tokens)
    assert text == "\ufffda\ufffd" and written.text_offset == [0, 1, 2]


def test_settings_reach_the_engine(tokenizer: Tokenizer, client: Client) -> None:
    engine = FakeEngine(tokenizer)
    body = {
        "prompt": "abc", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "seed": 7,
        "stop": ["x", "y"], "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5,
        "ignore_eos": True, "logit_bias": {"65": -100}, "speculate": False, "priority": -3, "deadline": 2.5,
        "inspect": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
    }  # fmt: skip
    answer(engine, client, COMPLETE, body, keys=(), limits=Limits())
    asked = engine.asked[0]
    s = asked.sampling
    assert (s.max_tokens, s.temperature, s.top_p, s.top_k, s.min_p, s.seed) == (5, 0.5, 0.9, 0, 0.1, 7)
    assert (s.stop, s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (("x", "y"), 1, -1, 1.5)
    assert s.ignore_eos and s.logit_bias == ((65, -100.0),) and s.speculate is False
    assert (
        s.grammar is not None and s.grammar.kind == "json_schema" and json.loads(s.grammar.text) == {"type": "integer"}
    )
    assert (asked.priority, asked.deadline, asked.inspect, asked.salt) == (-3, 2.5, True, "")


# ---- chat ---------------------------------------------------------------------------------------------------------


def test_a_chat_streams_what_it_says(tokenizer: Tokenizer, client: Client) -> None:
    engine = FakeEngine(tokenizer, says=lambda prompt: "<think>\nhm\n</think>\n\nGood day.")
    body = {"messages": [USER], "inspect": True, "logprobs": True, "top_logprobs": 1, "n": 2}
    # Our own template knows no thinking: it is text.
    whole = answer(engine, client, CHAT, body)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "<think>\nhm\n</think>\n\nGood day."}
    assert "".join(text for text, _ in whole["choices"][1]["abyssal"]["spans"]).startswith("<think>")
    chunks = events(asyncio.run(post(engine, client, CHAT, body | {"stream": True})))
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["choices"][0]["delta"]["role"] == "assistant"
        said = [chunk["choices"][0]["delta"].get("content", "") for chunk in own]
        assert "".join(said) == whole["choices"][index]["message"]["content"]
        assert all("".join(t for t, _ in chunk["abyssal"]["spans"]) == text for chunk, text in zip(own, said))
        logprobs = [t for chunk in own for t in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert logprobs == whole["choices"][index]["logprobs"]["content"]
        assert own[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[0]["abyssal"]["inside"]["expert_load"] == [[3, 1], [2, 2]]


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": [USER]}), (COMPLETE, {"prompt": "hi"})])
def test_many_logprobs_are_written_beside_the_event_loop(
    tokenizer: Tokenizer, client: Client, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    threads: list[bool] = []
    for kind in (ChatCompletion, Completion):
        real = kind.model_dump_json

        def dump(self: Any, real: Any = real, **how: Any) -> Any:
            threads.append(threading.current_thread() is threading.main_thread())
            return real(self, **how)

        monkeypatch.setattr(kind, "model_dump_json", dump)
    asked = {"logprobs": True, "top_logprobs": 3} if path == CHAT else {"logprobs": 3}
    for more, inside in (({}, True), (asked, False)):
        found = answer(FakeEngine(tokenizer), client, path, body | more | {"n": 2})
        assert threads.pop() is inside and not threads
        assert [bool(choice["logprobs"]) for choice in found["choices"]] == [not inside] * 2


def test_thinking_is_told_apart(deepseek: Tokenizer, client: Client) -> None:
    engine = FakeEngine(deepseek, says=lambda prompt: "<think>\nhm\n</think>\n\nGood day.")
    message = answer(engine, client, CHAT, {"messages": [USER]})["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Good day.", "reasoning_content": "hm"}
    chunks = events(asyncio.run(post(engine, client, CHAT, {"messages": [USER], "stream": True, "inspect": True})))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Good day."
    for chunk, delta in zip(chunks, deltas):
        told = delta.get("reasoning_content", "") + delta.get("content", "")
        assert "".join(text for text, _ in chunk["abyssal"]["spans"]) == told


CALL = f'{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}weather\n```json\n{{"city": "Paris"}}\n```{CALL_END}{CALLS_END}'


def test_tools_are_called_and_answered(deepseek: Tokenizer, client: Client) -> None:
    engine = FakeEngine(deepseek, says=lambda prompt: "I look. " + CALL)
    body = {"messages": [USER], "tools": [WEATHER]}
    choice = answer(engine, client, CHAT, body)["choices"][0]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I look. "
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'} and call["id"].startswith("call_")
    prompt = deepseek.decode(engine.asked[0].prompt, special=True)
    assert "### weather" in prompt  # this template writes no tools: the system message tells them
    deltas = [
        c["choices"][0]["delta"].get("tool_calls", [])
        for c in events(asyncio.run(post(engine, client, CHAT, body | {"stream": True})))
    ]
    parts = [part for delta in deltas for part in delta]
    assert parts[0]["function"] == {"name": "weather", "arguments": ""} and parts[0]["type"] == "function"
    assert "".join(part["function"]["arguments"] for part in parts) == '{"city": "Paris"}'
    # And back: the call and what came of it stand in the next prompt in DeepSeek's words.
    result = {"role": "tool", "content": "21 C", "tool_call_id": call["id"]}
    answer(engine, client, CHAT, {"messages": [USER, choice["message"], result], "tools": [WEATHER]})
    prompt = deepseek.decode(engine.asked[-1].prompt, special=True)
    assert CALL.removesuffix(CALLS_END) in prompt and "21 C" in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_forced(deepseek: Tokenizer, client: Client, choice: Any) -> None:
    engine = FakeEngine(deepseek, says=lambda prompt: 'weather\n```json\n{"city": "Rome"}')
    other = {"type": "function", "function": {"name": "other"}}
    body = {"messages": [USER], "tools": [WEATHER, other], "tool_choice": choice}
    found = answer(engine, client, CHAT, body)["choices"][0]
    assert found["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert found["message"]["content"] is None and found["finish_reason"] == "tool_calls"
    prompt = deepseek.decode(engine.asked[0].prompt, special=True)
    assert prompt.endswith(f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}")
    grammar = engine.asked[0].sampling.grammar
    assert grammar is not None and grammar.kind == "lark" and '"weather"' in grammar.text
    assert ("other" in grammar.text) is (choice == "required")


def test_no_tools_are_told_where_none_may_be_called(deepseek: Tokenizer, client: Client) -> None:
    engine = FakeEngine(deepseek, says=lambda prompt: CALL)
    choice = answer(engine, client, CHAT, {"messages": [USER], "tools": [WEATHER], "tool_choice": "none"})["choices"][0]
    assert choice["message"]["content"] == CALL and "tool_calls" not in choice["message"]
    assert "weather" not in deepseek.decode(engine.asked[0].prompt, special=True)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (COMPLETE, {"prompt": ""}, 400, "prompt"),
        (COMPLETE, {"prompt": []}, 400, "prompt"),
        (COMPLETE, {"prompt": [[]]}, 400, "prompt"),
        (COMPLETE, {"prompt": [-1]}, 400, "prompt"),
        (COMPLETE, {"prompt": [10**30]}, 400, "prompt"),
        (COMPLETE, {"prompt": ["a"] * 65}, 400, "prompt"),
        (COMPLETE, {"prompt": ["a"] * 20, "n": 10}, 400, "n"),
        (COMPLETE, {"prompt": "a", "n": 17}, 400, "n"),
        (COMPLETE, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        (COMPLETE, {"prompt": "a", "max_tokens": 4096}, 400, "max_tokens"),
        (COMPLETE, {"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens"),
        (COMPLETE, {"prompt": [70] * 4096}, 400, "prompt"),
        (COMPLETE, {"prompt": "a" * 1_000_000}, 400, "prompt"),
        (COMPLETE, {"prompt": "a", "stop": ["a"] * 17}, 400, "stop"),
        (COMPLETE, {"prompt": "a", "stop": "a" * 257}, 400, "stop"),
        (COMPLETE, {"prompt": "a", "stop": ""}, 400, "stop"),
        (COMPLETE, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        (COMPLETE, {"prompt": "a", "logit_bias": {"5": 101}}, 400, "logit_bias"),
        (COMPLETE, {"prompt": "a", "deadline": 601}, 400, "deadline"),
        (COMPLETE, {"prompt": "a", "priority": -11}, 400, "priority"),
        (CHAT, {"messages": [USER], "priority": 11}, 400, "priority"),
        (COMPLETE, {"prompt": "a", "priority": -1_000_001}, 400, "priority"),
        *((COMPLETE, {"prompt": "a", name: 10**400}, 400, name) for name in INTEGERS),
        *((CHAT, {"messages": [USER], "logprobs": True, name: 10**400}, 400, name) for name in CHAT_INTEGERS),
        (COMPLETE, {"prompt": "a", "model": "gpt"}, 404, "model"),
        (COMPLETE, {"prompt": "a", "response_format": {"type": "regex", "regex": "a" * 65537}}, 400, "response_format"),
        (COMPLETE, {"prompt": "a", "echo": True, "stream": True}, 400, "echo"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
        (CHAT, {"messages": [USER], "top_logprobs": 1}, 400, "top_logprobs"),
        (CHAT, {"messages": [USER], "tool_choice": "required"}, 400, "tool_choice"),
        (CHAT, {"messages": [USER], "chat_template": "{{ 1 }}"}, 400, "chat_template"),
        (CHAT, {"messages": [USER] * 2049}, 400, "messages"),
    ],
)
def test_what_cannot_be_is_refused_before_the_engine_hears_of_it(
    tokenizer: Tokenizer, client: Client, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    engine = FakeEngine(tokenizer)
    for stream in ({}, {"stream": True}):
        found = error(engine, client, path, stream | body)
        assert (found[0], found[1]["param"]) == (status, param), found
    assert engine.asked == []


def test_errors_have_one_shape(tokenizer: Tokenizer, client: Client) -> None:
    async def ask() -> None:
        async with client(FakeEngine(tokenizer), limits=Limits(body_bytes=100, header_bytes=2000)) as http:
            big = b'{"prompt": "' + b"a" * 200 + b'"}'

            async def slowly() -> Any:
                for at in range(0, len(big), 50):
                    yield big[at : at + 50]

            json_type = {"content-type": "application/json"}
            for status, response in [
                (404, await http.get("/nowhere")),
                (405, await http.delete(COMPLETE)),
                (415, await http.post(COMPLETE, content=b"{}")),
                (415, await http.post(COMPLETE, data={"prompt": "a"})),
                (413, await http.post(COMPLETE, content=big, headers=json_type)),
                (413, await http.post(COMPLETE, content=slowly(), headers=json_type)),
                (400, await http.post(COMPLETE, content=b"[]", headers=json_type)),
                (400, await http.post(COMPLETE, content=b"{", headers=json_type)),
                (431, await http.get("/health", headers={"x": "a" * 2000})),
                (403, await http.get("/health", headers={"host": "evil.example"})),
                (404, await http.get("/v1/models/nothing")),
            ]:
                assert response.status_code == status, response.text
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    asyncio.run(ask())


def test_what_the_engine_refuses(tokenizer: Tokenizer, client: Client) -> None:
    engine = FakeEngine(tokenizer)
    engine.full = True
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"prompt": ["a", "b"]}):
        response = asyncio.run(post(engine, client, COMPLETE, body))
        assert response.status_code == 429 and response.headers["retry-after"] == "3"
    engine.full = False
    schema = {"prompt": "a", "response_format": {"type": "json_object"}}
    several = schema | {"prompt": ["a", "b"]}
    for refused, blamed in (("grammar", ("response_format", "bad_grammar")), ("request", (None, None))):
        engine.refused = Refused("x: no", refused)
        for body in (schema, schema | {"stream": True}, several):
            status, found = error(engine, client, COMPLETE, body)
            assert (status, found["message"], found["type"]) == (400, "x: no", "invalid_request_error")
            assert (found["param"], found["code"]) == blamed
    engine.refused = Refused("grammar (json): 2 other grammars are being compiled; try again later", "busy")
    for body in (schema, schema | {"stream": True}, several):  # nothing is wrong with it
        response = asyncio.run(post(engine, client, COMPLETE, body))
        found = response.json()["error"]
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")
        assert (found["type"], found["param"], found["code"]) == ("server_error", None, "busy")
    engine.refused, engine.error = None, "the model's logits are not finite"
    for body in (schema, schema | {"stream": True}, several):
        status, found = error(engine, client, COMPLETE, body)
        assert (status, found["code"]) == (500, "generation_failed")  # also under a grammar, and before any token
    engine.error = None
    engine.dead.set()
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
        assert error(engine, client, COMPLETE, body)[1]["code"] == "engine_dead"


def test_echo_is_bounded_by_how_many_logprobs_it_brings(tokenizer: Tokenizer, client: Client) -> None:
    engine, limits = FakeEngine(tokenizer), Limits(echo_logprobs=60)
    most = {"prompt": [[65] * 4, [66] * 6], "echo": True, "logprobs": 2, "n": 2}
    assert len(answer(engine, client, COMPLETE, most, limits=limits)["choices"]) == 4
    for more in ({"logprobs": 3}, {"n": 3}, {"prompt": [[65] * 5, [66] * 6]}):
        status, found = error(engine, client, COMPLETE, most | more, limits=limits)
        assert (status, found["param"]) == (400, "echo") and "at most 60" in found["message"]
    answer(engine, client, COMPLETE, most | {"logprobs": None, "n": 9}, limits=limits)
    answer(engine, client, COMPLETE, most | {"echo": False, "n": 9}, limits=limits)


def test_echo_refuses_ids_without_a_text(tokenizer: Tokenizer, client: Client) -> None:
    """A model's vocabulary may be wider than its tokenizer's."""
    engine = FakeEngine(tokenizer)
    engine.info = dataclasses.replace(engine.info, vocab_size=tokenizer.vocab_size + 3)
    body = {"prompt": [65, tokenizer.vocab_size + 2], "echo": True}
    for more in ({}, {"logprobs": 0}):
        status, found = error(engine, client, COMPLETE, body | more)
        assert (status, found["param"]) == (400, "prompt") and "has no text" in found["message"]


def test_health_is_red_while_the_engine_has_work_and_says_nothing(tokenizer: Tokenizer, client: Client) -> None:
    async def ask() -> None:
        engine = FakeEngine(tokenizer, delay=0.05)
        async with client(engine, limits=Limits(silent_seconds=100)) as http:
            engine._heard -= 200
            assert (await http.get("/health")).status_code == 200  # nothing to say
            running = asyncio.create_task(http.post(COMPLETE, json={"prompt": "abcdefghij"}))
            await asyncio.sleep(0.1)
            red = await http.get("/health")
            assert (red.status_code, red.json()["error"]["code"]) == (503, "engine_silent")
            engine._heard += 200
            assert (await http.get("/health")).status_code == 200
            await running

    asyncio.run(ask())


def test_requests_beyond_the_limit_are_told_to_come_again(tokenizer: Tokenizer, client: Client) -> None:
    async def ask() -> None:
        engine = FakeEngine(tokenizer, delay=0.05)
        async with client(engine, limits=Limits(requests=2)) as http:
            both = await asyncio.gather(*(http.post(COMPLETE, json={"prompt": "abcd"}) for _ in range(4)))
            assert sorted(r.status_code for r in both) == [200, 200, 429, 429]
            assert all("retry-after" in r.headers for r in both if r.status_code == 429)
            assert (await http.post(COMPLETE, json={"prompt": "abcd"})).status_code == 200

    asyncio.run(ask())


def test_an_engine_that_dies_ends_what_runs(tokenizer: Tokenizer, client: Client) -> None:
    async def ask() -> None:
        engine = FakeEngine(tokenizer, delay=0.02)
        async with client(engine) as http:
            body = {"prompt": "abcdefghij" * 4, "max_tokens": 40}
            asked = [body, body | {"stream": True}, {"prompt": ["abcdefghij" * 4, "klmnopqrst" * 4], "max_tokens": 40}]
            running = [asyncio.create_task(http.post(COMPLETE, json=one)) for one in asked]
            while engine.running < 4:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            engine.dead.set()
            plain, streamed, several = await asyncio.gather(*running)
            assert plain.status_code == several.status_code == 503
            assert plain.json()["error"]["code"] == "engine_dead"
            assert streamed.status_code == 200 and "engine_dead" in streamed.text and "[DONE]" not in streamed.text
            assert (await http.get("/health")).status_code == 503
            assert "abyssal_engine_alive 0.0" in (await http.get("/metrics")).text
            assert engine.running == 0

    asyncio.run(ask())


# ---- keys, tokens, the rest ---------------------------------------------------------------------------------------


def test_tenants_are_kept_apart(tokenizer: Tokenizer, client: Client) -> None:
    async def ask() -> None:
        engine = FakeEngine(tokenizer)
        async with client(engine, keys=("one", "two")) as http:
            for path in ("/v1/models", "/v1/stats", "/metrics"):
                refused = await http.get(path)
                assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert (await http.get("/health")).status_code == 200
            assert (await http.post(COMPLETE, json={"prompt": "a"})).status_code == 401
            for key in ("one", "two", "one"):
                bearer = {"authorization": f"Bearer {key}"}
                assert (await http.post(COMPLETE, json={"prompt": "a"}, headers=bearer)).status_code == 200
        one, two, again = (asked.salt for asked in engine.asked)
        assert one == again != two and one and two and "one" not in one

    asyncio.run(ask())


def test_tokens_there_and_back(tokenizer: Tokenizer, client: Client) -> None:
    async def ask() -> None:
        async with client(FakeEngine(tokenizer)) as http:
            found = (await http.post("/v1/tokenize", json={"text": "the fox <|user|>"})).json()
            assert found["tokens"] == tokenizer.encode("the fox <|user|>") and found["count"] == len(found["tokens"])
            special = (await http.post("/v1/tokenize", json={"text": "<|user|>", "special": True})).json()
            assert special["tokens"] == [2]
            chat = (await http.post("/v1/tokenize", json={"messages": [USER]})).json()
            assert chat["tokens"] == tokenizer.encode(tokenizer.chat([USER]), special=True)
            text = await http.post("/v1/detokenize", json={"tokens": found["tokens"]})
            assert text.json() == {"text": "the fox <|user|>"}
            for body in ({"tokens": [10**9]}, {"tokens": [-1]}, {"tokens": ["a"]}):
                assert (await http.post("/v1/detokenize", json=body)).status_code == 400
            assert (await http.post("/v1/tokenize", json={})).status_code == 400

    asyncio.run(ask())


def test_metrics_and_the_page(tokenizer: Tokenizer, client: Client) -> None:
    async def ask() -> None:
        engine = FakeEngine(tokenizer)
        engine.metrics.first_token.add(0.02)
        async with client(engine) as http:
            await http.post(COMPLETE, json={"prompt": "a"})
            text = (await http.get("/metrics")).text
            for line in (
                'abyssal_acceptance{position="0"} 0.8',
                'abyssal_expert_tokens_total{expert="1",layer="1"} 4.0',
                'abyssal_first_token_seconds_bucket{le="0.025"} 1.0',
                'abyssal_first_token_seconds_bucket{le="0.01"} 0.0',
                'abyssal_http_responses_total{route="/v1/completions",status="200"} 1.0',
                "abyssal_requests_total 1.0",
            ):
                assert line in text
            assert (await http.get("/v1/stats")).json()["requests"] == 1
            front = await http.get("/")
            if front.status_code == 200:
                policy = front.headers["content-security-policy"]
                assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy

    asyncio.run(ask())
