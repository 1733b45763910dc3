"""A short tour of the five adapter sets, by a server of its own.

    python -m model.demo.tour TRUNK --adapters FOLDER

The arguments are those of `trunkline serve`: what model/demo/train.sh made.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

SAMPLES = Path(__file__).with_name("samples.jsonl")
START_SECONDS = 120
SETS = {"supersense", "era", "verses", "translators", "scripture"}
MARKED = 0.4  # wrongness from which a word is red; half of it: yellow
WRONG_SENTENCE = (
    "The king sent his banana to the gate of the city, and they besieged it seven days."
)
MASKED = (
    "And the LORD said unto Moses, Speak unto the [MASK] of Israel.",
    "a large [MASK] of the sea",
)

Rows = list[dict[str, Any]]


@contextmanager
def server(*arguments: str) -> Iterator[httpx.Client]:
    """`trunkline serve` on a free port, ready; ended on the way out."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", *arguments]
        root = str(Path(__file__).parent.parent.parent)  # its own packages, in any folder
        environment = os.environ | {"TRUNKLINE_DATA_DIR": f"{folder}/data", "PYTHONPATH": root}
        environment["PYTHONSAFEPATH"] = "1"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            with httpx.Client(base_url=_address(process, log), timeout=60) as client:
                yield client
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        for word in log.read_text("utf-8").split():
            if word.startswith("http://127.0.0.1") and _is_ready(word):
                return word
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text('utf-8')}")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).is_success
    except httpx.TransportError:
        return False


def missing_sets(client: httpx.Client) -> list[str]:
    """Which of the tour's adapter sets the server lacks."""
    listed = client.get("/v1/models").raise_for_status().json()["data"]
    return sorted(SETS - {model["id"] for model in listed})


class Tour:
    """Each stop asks the server and prints what it answered."""

    def __init__(self, client: httpx.Client, console: Console, samples: Rows) -> None:
        self.client, self.console, self.samples = client, console, samples

    def walk(self) -> None:
        for stop in (self.verses, self.labels, self.critic, self.three_adapters, self.masks):
            stop()

    def ask(self, path: str, inputs: Any, **body: Any) -> Rows:
        response = self.client.post(path, json=body | {"inputs": inputs})
        response.raise_for_status()
        data: Rows = response.json()["data"]
        return data

    def of(self, task: str) -> Rows:
        return [row for row in self.samples if row["task"] == task]

    def title(self, sentence: str) -> None:
        self.console.print(f"\n[bold cyan]{sentence}[/]")

    def line(self, left: str, right: Text | str) -> None:
        self.console.print(Text.assemble((f"  {left:>16}  ", "dim"), right))

    def verses(self) -> None:
        self.title("Nearest verses: the World English Bible's for a verse of the King James")
        rows = self.of("verses")
        pool = [row["web"] for row in rows]
        for row in rows[:2]:
            self.line("asked", row["kjv"])
            for adapter in ("verses", "base"):
                query, *others = self.ask("/encode", [row["kjv"], *pool], adapter=adapter)
                scores = [_dot(query["embedding"], other["embedding"]) for other in others]
                best = max(range(len(pool)), key=scores.__getitem__)
                self.line(f"{adapter} {scores[best]:.2f}", _verdict(pool[best], row["web"]))

    def labels(self) -> None:
        self.title("Labels: what a definition defines (supersense), when a passage was said (era)")
        for task in ("supersense", "era"):
            rows = self.of(task)
            answers = self.ask("/classify", [r["text"] for r in rows], adapter=task, top_k=1)
            for row, answer in zip(rows, answers, strict=True):
                best = answer["labels"][0]
                self.line(f"{best['score']:.2f}", _verdict(best["label"], row["label"]))
                self.line("", _short(row["text"]))

    def critic(self) -> None:
        self.title("Suspicious words: the trunk's critic, and the words the translators added")
        legend = f"[wrongness from {MARKED}], yellow from {MARKED / 2}"
        self.line("", Text(legend, "dim"))
        (answer,) = self.ask("/critic", WRONG_SENTENCE)
        self.line("trunk", _marked(WRONG_SENTENCE, answer["tokens"]))
        worst = max(answer["tokens"], key=lambda token: float(token["wrongness"]))
        self.line("at most", f"{worst['wrongness']:.2f}, at {worst['text'].strip()!r}")
        for row in self.of("translators"):
            (answer,) = self.ask("/critic", row["kjv"], adapter="translators")
            self.line("translators", _marked(row["kjv"], answer["tokens"]))
            added = ", ".join(row["kjv"][a:b] for a, b in row["added"])
            self.line("truly added", Text(added, "dim"))

    def three_adapters(self) -> None:
        self.title("The same text under three adapters, out of one batch")
        text = self.of("era")[0]["text"]
        self.line("text", _short(text))
        names = ["supersense", "era", "scripture"]
        answers = self.ask("/encode", text, adapters=[*names, "base"], dimensions=6)
        for answer, name in zip(answers, [*names, "base"], strict=True):
            self.line(name, " ".join(f"{x:+.2f}" for x in answer["embedding"]))

    def masks(self) -> None:
        self.title("A mask filled in, by the trunk and by scripture")
        for text in MASKED:
            self.line("text", text)
            for adapter in ("base", "scripture"):
                (answer,) = self.ask("/encode", text, adapter=adapter, outputs=["logits"])
                top = answer["logits"][0]["top"]
                self.line(
                    adapter, ", ".join(f"{t['text'].strip()} ({t['logprob']:.1f})" for t in top)
                )


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _short(text: str, width: int = 88) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _verdict(answer: str, truth: str) -> Text:
    """Green where right; red, with the truth, where not."""
    if answer == truth:
        return Text(f"✓ {answer}", "green")
    return Text(f"✗ {answer} (it is: {truth})", "red")


def _marked(text: str, tokens: Rows) -> Text:
    """The text with its suspicious words in colour, the worst in brackets.

    A word is as suspicious as its most suspicious token.
    """
    marked, end = Text(), 0
    for word in re.finditer(r"\w+", text):
        start, stop = word.span()
        wrong = max(t["wrongness"] for t in tokens if t["start"] < stop and start < t["end"])
        marked.append(text[end:start])
        style = "bold red" if wrong >= MARKED else "yellow" if wrong >= MARKED / 2 else ""
        marked.append(f"[{word[0]}]" if wrong >= MARKED else word[0], style)
        end = stop
    marked.append(text[end:])
    return marked


def main() -> None:
    with SAMPLES.open(encoding="utf-8") as lines:
        samples = [json.loads(line) for line in lines]
    console = Console(highlight=False)
    with ExitStack() as stack:
        with console.status("starting the server"):
            client = stack.enter_context(server(*sys.argv[1:]))
        lacking = missing_sets(client)
        if lacking:
            raise SystemExit(
                f"this trunk has no adapter set {', '.join(lacking)}: see model/demo/README.md"
            )
        Tour(client, console, samples).walk()
        console.print("\nEverything above came from a server of this tour, ended now")


if __name__ == "__main__":
    main()
