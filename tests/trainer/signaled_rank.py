"""`r1v3 grpo` under torchrun, in which a signal comes in the middle of a step.

python -m tests.trainer.signaled_rank EVENT STEP ARGUMENTS: in the forward of the second
micro-batch of step STEP, rank 2 kills itself ("kill"), or rank 0 asks torchrun to end ("stop"). The
file `signaled` in the working folder then tells when.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any


def main(event: str, step: int, arguments: list[str]) -> None:
    from r1v3.cli import app
    from r1v3.trainer.grpo import GRPOTrainer

    update, rank = GRPOTrainer.update, {"kill": "2", "stop": "0"}[event]

    def send() -> None:
        Path("signaled").touch()
        if event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGTERM)

    def signaled(trainer: GRPOTrainer, episode: Any) -> dict[str, Any]:
        engine: Any = trainer.engine
        pack, packed = engine._pack, 0

        def count(batch: Any) -> Any:
            nonlocal packed
            packed += 1
            if packed == 2:
                send()
            return pack(batch)

        if trainer.step + 1 == step:
            engine._pack = count
        try:
            return update(trainer, episode)
        finally:
            engine._pack = pack

    if os.environ["RANK"] == rank:
        GRPOTrainer.update = signaled  # type: ignore[method-assign]
    app(args=arguments, prog_name="r1v3")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
