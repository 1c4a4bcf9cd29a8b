"""`r1v3 serve`: the model, the server, and its end."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import uvicorn

from r1v3.config import Serve
from r1v3.data.encoding import model_image_shape
from r1v3.data.lengths import PositionLimit
from r1v3.data.tokenizer import load_tokenizer
from r1v3.engine.hf.rows import RowDecoder
from r1v3.evaluation.generate import model_folder
from r1v3.model.internvl import load_model
from r1v3.rollout.contract import TokenRules
from r1v3.serve.app import Endpoint
from r1v3.serve.batching import Batcher
from r1v3.serve.metrics import Metrics
from r1v3.serve.prompt import Prompts
from r1v3.serve.text import token_bytes


def load_endpoint(config: Serve) -> Endpoint:
    """Load the model of a configuration, or of the last stage of a run folder.

    Raises:
        ValueError: the folder, its tokenizer or the key file cannot be used.
    """
    folder = model_folder(config.model)
    key = None
    if config.api_key_file is not None:
        key = config.api_key_file.read_text(encoding="utf-8").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError(f"{config.api_key_file} must hold a key of printable ASCII characters")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_model(folder, dtype=getattr(torch, config.dtype), device=config.device).eval()
    tokenizer = load_tokenizer(folder)
    rules = TokenRules.of(tokenizer)
    batcher = Batcher(
        RowDecoder(model, config.rows),
        rules,
        token_bytes(tokenizer),
        rows=config.rows,
        queue=config.queue,
        unfinished=config.unfinished,
        metrics=Metrics(),
    )
    prompts = Prompts(
        config,
        config.name or folder.resolve().name,
        tokenizer,
        rules,
        model_image_shape(model.config, config.max_tiles, config.pictures),
        PositionLimit.of(model.config, "error").positions,
    )
    return Endpoint(config, batcher, prompts, key)


class _Server(uvicorn.Server):
    """Tells the endpoint that it drains."""

    def __init__(self, config: uvicorn.Config, endpoint: Endpoint) -> None:
        super().__init__(config)
        self._endpoint = endpoint

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._endpoint.draining = True
        super().handle_exit(sig, frame)


def run_server(config: Serve, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests that are open then are still answered.

    Raises:
        ValueError: as `load_endpoint`.
        OSError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.create_server((config.host, config.port), family=family, backlog=512) as listener:
        endpoint = load_endpoint(config)
        server = _Server(
            uvicorn.Config(
                endpoint.application(),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=config.drain_seconds,
            ),
            endpoint,
        )
        host = f"[{config.host}]" if ":" in config.host else config.host
        port = listener.getsockname()[1]
        say(f"{', '.join(endpoint.prompts.models)} at http://{host}:{port}/v1")
        say(f"chat page: http://{host}:{port}/   stop: Ctrl-C, SIGTERM (open requests go on)")
        if endpoint.key is None and config.host not in ("127.0.0.1", "localhost", "::1"):
            say("anybody who reaches this address can use it: api_key_file sets a key")
        with _ended_by_signal():
            server.run(sockets=[listener])


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """A signal that has ended the server, which uvicorn raises once more, is a regular end."""
    kept = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for sig, handler in kept.items():
            signal.signal(sig, handler)
