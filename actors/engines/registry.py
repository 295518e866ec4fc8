"""The engines by name, and the choice between them. An engine's own code is imported only when it is built."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from packaging.version import Version

from actors.engines.base import Engine, EngineOptions, EngineUnavailable
from actors.types import AdapterLayout
from conf.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from actors.models.families import ModelFamily


class BuildEngine(Protocol):
    """Starts an engine and loads the base weights; `eos_token_ids` end a completion."""

    def __call__(
        self,
        options: EngineOptions,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        layout: AdapterLayout,
        eos_token_ids: Sequence[int],
    ) -> Engine: ...


@dataclass(frozen=True)
class EngineSpec:
    """An engine before it is built.

    `unavailable(device, quantization, family)` says why it cannot run, or None. `version` is that of the package behind
    it, and `tensor_parallel` whether it can shard a model over several devices.
    """

    name: str
    version: Callable[[], str]
    unavailable: Callable[[str, str, "ModelFamily"], str | None]
    build: BuildEngine
    tensor_parallel: bool = False


def choose_engine(
    name: str, *, device: str, quantization: str, family: "ModelFamily", tensor_parallel_size: int
) -> tuple[str, str]:
    """The name of the engine to build, and the reason for it.

    `auto` takes the first of ENGINES that can run. Raises EngineUnavailable if none can, or the engine `name` cannot.
    """
    if name != "auto" and name not in ENGINES:
        raise UsageError(f"engine.name={name}: choose auto, {', '.join(ENGINES)}")
    reasons: list[str] = []
    for spec in ENGINES.values() if name == "auto" else [ENGINES[name]]:
        if tensor_parallel_size > 1 and not spec.tensor_parallel:
            reasons.append(f"engine.tensor_parallel_size={tensor_parallel_size}: {spec.name} runs on one device")
            continue
        reason = spec.unavailable(device, quantization, family)
        if reason is None:
            return spec.name, reasons[0] if reasons else f"version {spec.version()}"
        reasons.append(reason)
    raise EngineUnavailable(f"engine.name={name}: {'; '.join(reasons)}")


def _vllm_version() -> str:
    from actors.engines.vllm.environment import check_version

    return check_version()


def _vllm_unavailable(device: str, quantization: str, family: "ModelFamily") -> str | None:
    from actors.engines.vllm.environment import check_nf4, check_version

    try:
        version = check_version()
        if Version(version) < Version(family.oldest_vllm):
            return f"vLLM {version} does not compute {family.name} as transformers does; {family.oldest_vllm} does"
        if quantization == "nf4":
            check_nf4(device)
        if family.has_experts:
            return (
                "nobody has compared vLLM's mixtures of experts with transformers' here; use engine.name=transformers"
            )
        if family.has_linear_attention:
            return f"nobody has compared vLLM's {family.name} with transformers' here; use engine.name=transformers"
        if family.has_image_encoder and find_spec("torchvision") is None:
            return (
                f"vLLM needs torchvision for {family.name}, which is not installed; engine.name=transformers does not"
            )
    except EngineUnavailable as error:
        return str(error)
    return None


def _build_vllm(
    options: EngineOptions,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    layout: AdapterLayout,
    eos_token_ids: Sequence[int],
) -> Engine:
    from actors.engines.vllm.engine import VllmEngine

    return VllmEngine(options, tokenizer, layout=layout, eos_token_ids=eos_token_ids)


def _transformers_version() -> str:
    from importlib.metadata import version

    return version("transformers")


def _build_transformers(
    options: EngineOptions,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    layout: AdapterLayout,
    eos_token_ids: Sequence[int],
) -> Engine:
    from actors.engines.transformers import build_engine

    return build_engine(options, tokenizer, layout=layout, eos_token_ids=eos_token_ids)


# In the order in which `auto` prefers them.
ENGINES: dict[str, EngineSpec] = {
    "vllm": EngineSpec("vllm", _vllm_version, _vllm_unavailable, _build_vllm, tensor_parallel=True),
    "transformers": EngineSpec("transformers", _transformers_version, lambda *_: None, _build_transformers),
}
