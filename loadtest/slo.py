"""Objectives that decide the exit code."""

from dataclasses import dataclass

from loadtest.recording import Recording


@dataclass(frozen=True)
class Objectives:
    """None: not asked for. Wrong answers are never allowed, whatever the objectives say."""

    p99_ms: float | None = None
    error_rate: float = 0.0
    min_tokens_per_s: float | None = None


def breaches(objectives: Objectives, recording: Recording, wrong_samples: int) -> list[str]:
    """A sentence for each objective that was missed."""
    found = []
    wrong = recording.wrong() + wrong_samples
    if wrong:
        found.append(f"{wrong} wrong answers")
    done = sum(second.done for second in recording.seconds.values())
    failed = sum(second.failed for second in recording.seconds.values())
    if not done:
        found.append("nothing was answered")
        return found
    rate = failed / (done + failed)
    if rate > objectives.error_rate:
        found.append(f"error rate {rate:.4%} over {objectives.error_rate:.4%}")
    p99 = recording.latencies().percentile(99)
    if objectives.p99_ms is not None and p99 > objectives.p99_ms:
        found.append(f"p99 {p99:.1f} ms over {objectives.p99_ms:g} ms")
    tokens = tokens_per_s(recording)
    if objectives.min_tokens_per_s is not None and tokens < objectives.min_tokens_per_s:
        found.append(f"{tokens:.0f} tokens/s under {objectives.min_tokens_per_s:g}")
    return found


def tokens_per_s(recording: Recording) -> float:
    """Over the seconds in which anything was due or answered."""
    tokens = sum(second.tokens for second in recording.seconds.values())
    return tokens / max(1, len(recording.seconds))
