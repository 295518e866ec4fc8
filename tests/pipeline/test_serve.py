"""task=serve: vLLM's server starts, answers with the adapter, asks for its key, and ends with its parent."""

import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from actors.engines.vllm import server
from conf.errors import UsageError
from epiphany.run_settings import load_settings
from epiphany.use import serve
from tests.helpers.runs import Launched, launch, overrides, wait_for
from tests.helpers.tiny import make_tiny_model

STAND_IN = """
import http.server, sys
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        raise SystemExit
print("not all is well", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).handle_request()
sys.exit(3)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_a_server_that_does_not_start_shows_the_end_of_its_log(
    whole: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
):
    settings = load_settings("task=serve", f"run={whole[0]}", f"serve.port={free_port()}", "engine.name=vllm")
    failing = [sys.executable, "-c", "import sys; print('no such device'); sys.exit(7)"]
    monkeypatch.setattr(server, "server_command", lambda *_, **__: failing)
    with pytest.raises(serve.ServerFailed, match="did not start:\nno such device"):
        serve.serve(settings, lambda _line: None)


def test_a_server_that_ends_by_itself_is_told(whole: tuple[Path, str], monkeypatch: pytest.MonkeyPatch):
    port, lines = free_port(), []
    settings = load_settings("task=serve", f"run={whole[0]}", f"serve.port={port}", "engine.name=vllm")
    monkeypatch.setattr(server, "server_command", lambda *_, **__: [sys.executable, "-c", STAND_IN, str(port)])
    with pytest.raises(serve.ServerFailed, match="ended by itself:\nnot all is well"):
        serve.serve(settings, lines.append)
    assert any(line.startswith(f"serving adapter and base at http://127.0.0.1:{port}/v1") for line in lines)


def test_a_port_that_is_taken_is_refused(whole: tuple[Path, str]):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        settings = load_settings("task=serve", f"run={whole[0]}", f"serve.port={port}", "engine.name=vllm")
        with pytest.raises(UsageError, match=f"serve.port={port}: Address already in use"):
            serve.serve(settings, lambda _line: None)


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(port: int, key: str, model: str, path: str = "/v1/chat/completions") -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "3 + 4 ="}], "temperature": 0, "max_tokens": 8}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    with DIRECT.open(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


@pytest.mark.nightly
def test_a_run_is_served_with_its_adapter_and_a_key(tmp_path: Path):
    model = make_tiny_model(tmp_path / "model", hidden=256)  # vLLM has no attention on a CPU for heads under 32
    launch(overrides(model, tmp_path / "run", "run.steps=1"))
    port, log = free_port(), tmp_path / "log"
    arguments = ["task=serve", f"run={tmp_path}/run", f"serve.port={port}", "serve.context_tokens=512"]
    arguments.append("engine.name=vllm")
    served = Launched(arguments, log)
    try:
        wait_for(lambda: log.is_file() and "its key: " in log.read_text(), seconds=150)
        key = log.read_text().partition("its key: ")[2].split()[0]
        assert ask(port, key, "adapter") != ask(port, key, "base")
        for path in ("/v1/chat/completions", "/invocations", "/tokenize"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask(port, "another", "base", path)
        os.kill(served.pid, signal.SIGTERM)
        assert served.wait()[0] == 143
        with pytest.raises(urllib.error.URLError):
            ask(port, key, "base")
    finally:
        served.kill()
