"""vLLM's own server with OpenAI's interface, in a process that ends with ours: `python -m actors.engines.vllm.server
<parent> <argument> ...`. Knows vLLM's arguments and environment; does not know what is served or why.
"""

import json
import os
import runpy
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import TypeAlias

from actors.engines.base import EngineOptions
from actors.engines.vllm.adapter_slot import slot_rank
from actors.engines.vllm.environment import check_nf4, check_version
from rewards.process import bind_to_parent

MODULE = "vllm.entrypoints.openai.api_server"
BASE = "base"  # what requests call the model without an adapter
KEY_VARIABLE = "VLLM_API_KEY"
OPEN_PATHS = ("/health",)

Message: TypeAlias = MutableMapping[str, object]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]


class RequireKey:
    """Refuses a request for any path but OPEN_PATHS without the key. vLLM's own check leaves out paths that answer
    questions, such as /invocations.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _has_key(self, scope: Message) -> bool:
        headers = scope.get("headers")
        given = [value for name, value in headers if name == b"authorization"] if isinstance(headers, list) else []
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)


def server_command(
    options: EngineOptions,
    *,
    parent: int,
    host: str,
    port: int,
    adapters: Mapping[str, Path],
    rank: int,
    chat_template: Path | None,
    template_variables: Mapping[str, object],
) -> list[str]:
    """The command of a server for the process `parent`.

    `adapters` are folders in PEFT's layout by the names that requests give them, of `rank` at most. Raises
    EngineUnavailable if this vLLM cannot serve the model.
    """
    check_version()
    arguments: dict[str, object] = {
        "model": options.model_path,
        "served-model-name": BASE,
        "revision": options.revision,
        "host": host,
        "port": port,
        "dtype": options.dtype,
        "seed": options.seed,
        "max-model-len": options.max_model_len,
        "max-num-seqs": options.max_num_seqs,
        "kv-cache-memory-bytes": options.kv_cache_bytes,
        "kv-cache-dtype": options.kv_cache_dtype,
        "gpu-memory-utilization": 0.05,  # only a start-up check once the cache is given in bytes
        "tensor-parallel-size": options.tensor_parallel_size,
        "uvicorn-log-level": "warning",
        "chat-template": chat_template,
        # Not the sampling settings that the model's own files suggest: those of the request, and no others.
        "generation-config": "vllm",
        "middleware": f"{__spec__.name}.{RequireKey.__name__}",
    }
    if template_variables:
        arguments |= {"default-chat-template-kwargs": json.dumps(dict(template_variables))}
    if options.quantization == "nf4":
        check_nf4(options.device)
        arguments |= {"quantization": "bitsandbytes", "load-format": "bitsandbytes"}
    if adapters:
        arguments |= {"max-lora-rank": slot_rank(rank)}
    flags = {
        "enforce-eager": options.enforce_eager,
        "trust-remote-code": options.trust_remote_code,
        "enable-lora": bool(adapters),
    }
    named = [text for name, value in arguments.items() if value is not None for text in (f"--{name}", str(value))]
    modules = ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())] if adapters else []
    asked = [f"--{name}" for name, is_on in flags.items() if is_on]
    return [sys.executable, "-m", __spec__.name, str(parent), *named, *asked, *modules]


def main() -> None:
    bind_to_parent(int(sys.argv[1]), by=signal.SIGTERM)  # on which vLLM ends its engine's process, too
    sys.argv = [MODULE, *sys.argv[2:]]
    runpy.run_module(MODULE, run_name="__main__")


if __name__ == "__main__":
    main()
