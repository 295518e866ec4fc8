"""task=serve: vLLM's server with OpenAI's interface for a run's model, or for a model alone, until it is stopped."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from actors.engines.vllm import server as vllm_server
from actors.engines.vllm.environment import set_environment
from actors.engines.vllm.server import KEY_VARIABLE
from actors.models.loading import load_config, positions_of
from actors.models.peft_folder import write_peft_folder
from conf.errors import UsageError
from conf.schema import Settings
from epiphany.adapters import stored_adapter
from epiphany.rows import system_prompt_of
from epiphany.run_data import evaluation_rendering, load_model_source
from epiphany.run_plan import plan_run
from epiphany.use.model import Load, describe, sized

ADAPTER = "adapter"  # what requests call the model with its adapter
REQUESTS = 8  # at a time, on a machine for which engine.max_num_seqs says nothing else
START_SECONDS, END_SECONDS = 900.0, 20.0
LAST_LINES = 15  # of the log, if the server does not start


class ServerFailed(UsageError):
    """The server did not start, or ended by itself."""


@dataclass(frozen=True)
class Server:
    """A command with its environment, and where it answers."""

    command: list[str]
    environment: dict[str, str]
    host: str
    port: int


def serve(settings: Settings, note: Callable[[str], None]) -> None:
    """Serve until a signal ends this process. Raises UsageError for what cannot be served; ServerFailed has the end of
    the server's log.
    """
    asked = settings.serve
    known_key = os.environ.get(KEY_VARIABLE)
    key = known_key or secrets.token_urlsafe(24)
    with ExitStack() as closing:
        scratch = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="epiphany-serve-")))
        server = _prepare(settings, scratch, key, note)
        log = scratch / "log"
        with log.open("w") as stream, _running(server, stream) as process:
            note(f"starting vLLM's server for {describe(settings)} ...")
            _wait_until_it_answers(server, process, log)
            address = f"http://{asked.host}:{asked.port}/v1"
            names = "base" if settings.model.adapter is None else f"{ADAPTER} and base"
            note(f"serving {names} at {address}; Ctrl-C ends it")
            note(f"its key is that in {KEY_VARIABLE}" if known_key else f"its key: {key}")
            if prompt := system_prompt_of(settings, settings.data.system_prompt):
                note(f"send the system message that it was trained with: {prompt!r}")
            if prefill := evaluation_rendering(settings).prefill:
                note(f"answers do not begin with the prefill {prefill!r}, with which the run was trained")
            process.wait()
            raise ServerFailed(f"task=serve: the server ended by itself:\n{_end_of(log)}")


def _prepare(settings: Settings, scratch: Path, key: str, note: Callable[[str], None]) -> Server:
    """Everything that can be refused before the server starts; what it reads is in `scratch`."""
    asked = settings.serve
    _check_port(asked.host, asked.port)
    if settings.model.keep_16bit and settings.model.quantization == "nf4":
        raise UsageError("model.keep_16bit: vLLM's server cannot leave modules in 16 bits beside nf4; use bf16")
    source, tokenizer = load_model_source(settings)
    config = load_config(source, trust_remote_code=settings.model.trust_remote_code)
    context = min(asked.context_tokens, positions_of(config) or asked.context_tokens)
    load = Load(REQUESTS, context // 2, context - context // 2)
    plan = plan_run(sized(settings, load), source, roles=frozenset({"rollout"}), is_server=True)
    for line in plan.lines():
        note(line)
    if plan.engine_name != "vllm":
        raise UsageError(f"task=serve needs vLLM, and this run would use {plan.engine_name}: {plan.engine_reason}")
    adapter, adapters = stored_adapter(settings, plan.layout), {}
    if adapter is not None:
        adapters = {ADAPTER: scratch / ADAPTER}
        write_peft_folder(adapters[ADAPTER], adapter, base_model=source.path)
    template = None
    if tokenizer.chat_template is not None:
        template = scratch / "chat_template.jinja"
        template.write_text(str(tokenizer.chat_template))
    set_environment(device=plan.device.kind, threads=plan.device.threads)
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = vllm_server.server_command(
        plan.engine,
        parent=os.getpid(),
        host=asked.host,
        port=asked.port,
        adapters=adapters,
        rank=plan.layout.rank,
        chat_template=template,
        template_variables=evaluation_rendering(settings).variables,
    )
    return Server(command, {**environment, KEY_VARIABLE: key}, asked.host, asked.port)


def _check_port(host: str, port: int) -> None:
    """Raises UsageError if this process could not listen there."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UsageError(f"serve.host={host} serve.port={port}: {error.strerror}; choose another") from error


@contextmanager
def _running(server: Server, log: TextIO) -> Iterator["subprocess.Popen[bytes]"]:
    """The server's process, which is ended when this is left, by a signal, too."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    former = signal.signal(signal.SIGTERM, leave)
    process = subprocess.Popen(
        server.command, env=server.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        signal.signal(signal.SIGTERM, former)


def _wait_until_it_answers(server: Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    host = "127.0.0.1" if server.host == "0.0.0.0" else server.host
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None:
            raise ServerFailed(f"task=serve: vLLM's server did not start:\n{_end_of(log)}")
        try:
            with without_proxy.open(f"http://{host}:{server.port}/health", timeout=5):
                if process.poll() is None:
                    return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise ServerFailed(f"task=serve: no answer in {START_SECONDS:.0f} s:\n{_end_of(log)}") from None
            time.sleep(0.5)


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
