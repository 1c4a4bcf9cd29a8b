"""Two ranks whose first one works for longer than a collective may take."""

import time
from pathlib import Path
from typing import Any

from r1v3.ranks import is_lost_peer, join_job

LIMIT = 3.0


def attempt(work: Any) -> str:
    try:
        return str(work())
    except RuntimeError as error:
        return "lost peer" if is_lost_peer(error) else f"other: {error}"


def main(folder: Path) -> None:
    ranks = join_job("cpu", LIMIT)
    busy = attempt(lambda: ranks.on_main(lambda: time.sleep(2.5 * LIMIT) or "done"))
    # The same wait for a rank that should be there is one too many.
    late = attempt(lambda: (time.sleep(0 if ranks.rank else 4 * LIMIT), ranks.gather(1))[1])
    (folder / f"rank{ranks.rank}").write_text(f"{busy}, then {late}")
