"""A model behind a server that speaks OpenAI's API, such as `abyssal serve`, asked one question at a time."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """Where a model is served, and how it is asked. The key goes to the server and nowhere else."""

    url: str  # up to and with /v1
    model: str
    key: str = ""
    max_tokens: int = 2048  # of an answer
    temperature: float = 0.0
    seconds: float = 600.0  # for an answer

    def answer(self, prompt: str) -> str:
        """What the model says to a user who says `prompt`. Raises ValueError with what the server says is wrong, and
        ConnectionError if it can't be reached."""
        body = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens, "temperature": self.temperature,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http:// or https://, got {self.url}")
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as response:
                told = json.load(response)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{address}: {error.code}: {error.read(4096).decode('utf-8', 'replace')}") from None
        except OSError as error:
            raise ConnectionError(f"{address}: {error}") from error
        return str(told["choices"][0]["message"]["content"] or "")
