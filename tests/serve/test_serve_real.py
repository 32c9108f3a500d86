"""`abyssal serve` itself: a tiny model in a process of its own, asked by the official client."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch

from abyssal import ModelConfig, Transformer, cli
from abyssal.data.tokenizer import Tokenizer

WORDS = 'the quick brown fox jumps over the lazy dog, and {"a": 1} is what it says: 0123456789\n'


class Server:
    """The process, its address, and what it said."""

    def __init__(self, folder: Path, *options: str, variables: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "abyssal", "serve", str(folder), "--port", "0", "--cache-bytes", "4000000"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (variables or {})
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
        self.said: list[str] = []
        self._ready = threading.Event()
        self.address = ""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            found = re.search(r" at (http://\S+)", line)
            if found:
                self.address = found[1]
                self._ready.set()
        self._ready.set()

    def ready(self) -> "Server":
        assert self._ready.wait(60) and self.address, "".join(self.said)
        return self

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=30)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", timeout=30, max_retries=0)

    def worker(self) -> int:
        found = re.search(r"^abyssal_engine_pid (\S+)$", self.http().get("/metrics").text, re.MULTILINE)
        assert found
        return int(float(found[1]))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    config = ModelConfig.load("tiny").replace(max_position_embeddings=2048)
    Transformer(config).init_weights(torch.Generator().manual_seed(0)).save(folder)
    Tokenizer.train([WORDS * 20], config.vocab_size).save(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder).ready()
    yield server
    server.stop()


def test_the_official_client_completes_whole_and_streamed(server: Server) -> None:
    client = server.client()
    [model] = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    asked = {"model": "tiny", "prompt": "the quick", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked)
    again = client.completions.create(**asked)
    assert whole.choices[0].text == again.choices[0].text and whole.usage.completion_tokens <= 12
    logprobs = whole.choices[0].logprobs
    assert all(len(top) == 2 and max(top.values()) <= 0 for top in logprobs.top_logprobs)
    assert all(own == max(top.values()) for own, top in zip(logprobs.token_logprobs, logprobs.top_logprobs))
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_official_client_chats_whole_and_streamed(server: Server) -> None:
    client = server.client()
    asked = {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 10,
        "seed": 3,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 1,
    }
    whole = client.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert all(len(t.top_logprobs) == 1 for choice in whole.choices for t in choice.logprobs.content)
    said = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said == [choice.message.content for choice in whole.choices]


def test_a_prompt_seen_before_is_cached_and_the_answer_stays(server: Server) -> None:
    asked = {"model": "tiny", "prompt": WORDS * 8, "max_tokens": 8, "temperature": 0}
    first, second = (server.client().completions.create(**asked) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens >= 64
    assert first.choices[0].text == second.choices[0].text


def test_a_schema_is_kept_and_a_bad_one_refused(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    client = server.client()
    messages = [{"role": "user", "content": "numbers"}]
    for seed in range(2):
        found = client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=300,
            seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "ab", "schema": schema}},
        )
        assert found.choices[0].finish_reason == "stop"
        said = json.loads(found.choices[0].message.content)
        assert set(said) == {"a", "b"} and isinstance(said["b"], bool)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model="tiny",
                messages=messages,
                stream=stream,
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
            )
        assert refused.value.param == "response_format"


def test_a_tool_can_be_forced(server: Server) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": tools, "max_tokens": 200}
    found = server.client().chat.completions.create(**asked, tool_choice="required", seed=1)
    [call] = found.choices[0].message.tool_calls
    assert call.function.name == "weather" and found.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Paris")
    name, arguments = "", ""
    for chunk in server.client().chat.completions.create(**asked, tool_choice="required", seed=1, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, arguments) == (call.function.name, call.function.arguments)


def test_what_happens_inside_is_told(server: Server) -> None:
    with server.http() as http:
        body = {"prompt": WORDS * 9, "max_tokens": 8, "inspect": True, "temperature": 0, "ignore_eos": True}
        found = http.post("/v1/completions", json=body).json()["choices"][0]
        assert "".join(text for text, _ in found["abyssal"]["spans"]) == found["text"]
        inside = found["abyssal"]["inside"]
        assert inside["mha_bytes"] > inside["latent_bytes"] > 0 and inside["pages"] >= 1
        assert sum(map(sum, inside["expert_load"])) > 0
        metrics = http.get("/metrics").text
        assert "abyssal_engine_alive 1.0" in metrics and "abyssal_expert_tokens_total" in metrics
        stats = http.get("/v1/stats").json()
        assert stats["pages_total"] > 0 and stats["generated_tokens"] > 0


def test_errors_are_those_that_the_client_knows(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="a", max_tokens=5000)
    assert refused.value.code == "context_length_exceeded"


def test_keys_are_asked_for_and_sigterm_lets_what_runs_finish(folder: Path) -> None:
    options = ("--host", "0.0.0.0", "--drain", "30")
    server = Server(folder, *options, variables={"ABYSSAL_API_KEY": "sesame"}).ready()
    address = server.address.replace("0.0.0.0", "127.0.0.1") + "/v1"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="sesam", max_retries=0).models.list()
    client = openai.OpenAI(base_url=address, api_key="sesame", max_retries=0)
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 150, "extra_body": {"ignore_eos": True}, "seed": 1}
    stream = client.completions.create(**asked, stream=True)
    first = next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    rest = list(stream)
    assert first.choices and rest[-1].choices[0].finish_reason == "length"
    assert server.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/models")


def test_no_address_is_bound_that_others_reach_without_a_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ABYSSAL_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["abyssal", "serve", str(folder), "--host", "0.0.0.0"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "expected an API key" in capsys.readouterr().err


def test_sigterm_ends_what_does_not_finish_in_time(folder: Path) -> None:
    server = Server(folder, "--drain", "0.2").ready()
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    stream = server.client().completions.create(**asked, stream=True)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    assert server.process.wait(30) == 0


def test_a_dead_engine_turns_health_red_and_ends_the_process(folder: Path) -> None:
    server = Server(folder).ready()
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    stream = server.client().completions.create(**asked, stream=True)
    next(iter(stream))
    with server.http() as http:
        assert http.get("/health").status_code == 200
        os.kill(server.worker(), signal.SIGKILL)
        killed = time.monotonic()
        red = False
        while not red and time.monotonic() < killed + 5:
            try:
                red = http.get("/health").status_code == 503
            except httpx.TransportError:
                red = True
        assert time.monotonic() - killed < 1
    with pytest.raises(openai.APIError, match="engine has ended"):
        list(stream)
    assert server.process.wait(5) == 1
    assert time.monotonic() - killed < 3
