"""One streamed question to the gateway, printed as it arrives."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from hack.demo.console import DemoError


class Chat:
    """Questions to one gateway, as any OpenAI client would put them."""

    def __init__(self, base_url: str, key: str) -> None:
        self.base_url = base_url
        self.key = key

    def ask(self, model: str, question: str) -> str:
        """Stream an answer to the terminal; return how quickly it came.

        Raises:
            DemoError: the gateway refused, with its own words.
        """
        print(f"        {model} <- {question}\n        {model} -> ", end="", flush=True)
        began = time.monotonic()
        first_s = None
        tokens = 0
        for text in self._stream(model, question):
            first_s = first_s or time.monotonic() - began
            tokens += 1
            print(text.replace("\n", "\n           "), end="", flush=True)
        print()
        seconds = time.monotonic() - began
        if first_s is None:
            raise DemoError(f"{model} answered with no text.")
        return f"first token after {first_s:.2f} s, {tokens / seconds:.0f} tokens/s"

    def _stream(self, model: str, question: str) -> Iterator[str]:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "stream": True,
            "max_tokens": 60,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"{self.base_url}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                for line in response:
                    data = line.decode().removeprefix("data: ").strip()
                    if not data or data == "[DONE]" or data.startswith(":"):
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise DemoError(f"The stream ended: {chunk['error']['message']}")
                    for choice in chunk.get("choices", []):
                        if text := choice["delta"].get("content"):
                            yield text
        except urllib.error.HTTPError as error:
            raise DemoError(f"The gateway said {error.code}: {error.read().decode()}") from error
