"""Counters of a server, and their text for Prometheus."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Metrics:
    """Totals since the start.

    Attributes:
        requests: chat completions by outcome: answered, cancelled, failed, or the status of a
            refusal.
        seconds, first_token_seconds: sums over answered requests, and over those that streamed.
        streamed: answered requests with a first token to time.
    """

    requests: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    streamed: int = 0

    def text(self, rows: int, waiting: int) -> str:
        """Return the exposition format, version 0.0.4.

        Args:
            rows: completions that are being decoded.
            waiting: requests without a row.
        """
        lines = ["# HELP r1v3_requests_total Chat completions by outcome."]
        lines.append("# TYPE r1v3_requests_total counter")
        for outcome, number in sorted(self.requests.items()):
            lines.append(f'r1v3_requests_total{{outcome="{outcome}"}} {number}')
        totals = (
            ("prompt_tokens", "Prompt tokens, image tokens among them.", self.prompt_tokens),
            ("completion_tokens", "Tokens sampled or forced.", self.completion_tokens),
            ("decoding_steps", "Steps of the model after prompts.", self.steps),
        )
        for name, text, value in totals:
            lines.append(f"# HELP r1v3_{name}_total {text}")
            lines.append(f"# TYPE r1v3_{name}_total counter")
            lines.append(f"r1v3_{name}_total {value}")
        sums = (
            ("request_seconds", "From a request to the end of its answer.", self.seconds,
             self.requests["answered"]),
            ("first_token_seconds", "From a streamed request to its first token.",
             self.first_token_seconds, self.streamed),
        )  # fmt: skip
        for name, text, total, number in sums:
            lines.append(f"# HELP r1v3_{name} {text}")
            lines.append(f"# TYPE r1v3_{name} summary")
            lines.append(f"r1v3_{name}_sum {total}")
            lines.append(f"r1v3_{name}_count {number}")
        now = (
            ("rows", "Completions that are being decoded.", rows),
            ("waiting_requests", "Requests that have no row yet.", waiting),
        )
        for name, text, value in now:
            lines.append(f"# HELP r1v3_{name} {text}")
            lines.append(f"# TYPE r1v3_{name} gauge")
            lines.append(f"r1v3_{name} {value}")
        return "\n".join(lines) + "\n"
