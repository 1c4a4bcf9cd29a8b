"""The command with which vLLM serves the same model, and the body of a request in each mode."""

import json
import shlex
from pathlib import Path
from typing import Any

from r1v3.config import Serve
from r1v3.data.tokenizer import load_tokenizer
from r1v3.evaluation.generate import model_folder
from r1v3.files import read_json_object
from r1v3.model.conversion.config import is_original, read_config
from r1v3.serve.prompt import MODES

_PROCESSORS = ("r1v3.integrations.vllm:NoWait", "r1v3.integrations.vllm:ThoughtBudget")


def vllm_command(config: Serve) -> list[str]:
    """Return the words of the command, for the machine that has r1v3 and vLLM installed."""
    folder = model_folder(config.model)
    words = ["vllm", "serve", str(folder), "--host", config.host, "--port", str(config.port)]
    words += ["--served-model-name", config.name or folder.resolve().name]
    if is_original(read_config(folder)):
        words.append("--trust-remote-code")
    words += ["--max-num-seqs", str(config.rows)]
    words += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    template = str(load_tokenizer(folder).chat_template)
    if template != _own_template(folder):
        words += ["--chat-template", template]
    return [*words, "--logits-processors", *_PROCESSORS]


def _own_template(folder: Path) -> object:
    """The chat template that vLLM would find in a model folder."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    return read_json_object(settings).get("chat_template") if settings.is_file() else None


def vllm_bodies(config: Serve) -> dict[str, dict[str, Any]]:
    """Return what the body of a request holds for each mode, beside `model` and `messages`."""
    words = list(config.monitor.words)
    extras: dict[str, dict[str, Any]] = {
        "slow": {},
        "nothink": {"chat_template_kwargs": {"enable_thinking": False}},
        "nowait": {"vllm_xargs": {"nowait": words}},
        "budget-512": {"vllm_xargs": {"thought_budget": 512}},
    }
    assert set(MODES) < set(extras)
    return {mode: {"temperature": 1.0, "max_tokens": 16384, **extra}
            for mode, extra in extras.items()}  # fmt: skip


def vllm_guide(config: Serve) -> str:
    """Return command and bodies as text, with what a client has to know."""
    name = config.name or model_folder(config.model).resolve().name
    lines = ["# On the machine with the GPUs; --tensor-parallel-size takes their number:"]
    # Where Triton runs, vLLM takes its V2 runner by itself, which refuses the processors.
    lines.append(f"VLLM_USE_V2_MODEL_RUNNER=0 {shlex.join(vllm_command(config))}")
    if config.api_key_file is not None:
        lines.append(f'# and the key: --api-key "$(cat {shlex.quote(str(config.api_key_file))})"')
    lines += ["", f"# POST http://{config.host}:{config.port}/v1/chat/completions, by mode:"]
    for mode, body in vllm_bodies(config).items():
        messages = [{"role": "user", "content": "..."}]
        lines.append(f"{mode}: {json.dumps({'model': name, 'messages': messages, **body})}")
    lines += [
        "",
        "# The text holds thought and answer; the answer is what follows the last </think>.",
    ]
    return "\n".join(lines)
