"""Whether a server stays as it is while adapters come and go for an hour.

    python -m loadtest.bench.soak [--seconds 3600] [--swaps 2] [--rate 40] [--out soak]

A server of its own, the demo trunk with keys, gets `rate` inference requests a second, each answer
checked by the digest that it names and by its values; `swaps` uploads a second, half of them under
names that were never used, for which the oldest name is deleted; and pins, aliases, lists, refused
uploads, failed requests and connections that go away. The number of live names stays the same.
Every ten seconds its memory, threads, descriptors, disk and registry rows are sampled.

Writes OUT.csv while it runs, and OUT.svg and OUT.md at the end, also after SIGTERM or Ctrl-C.
Exits with 1 where an answer was wrong, a request failed, or something grew after the warm-up.
"""

import asyncio
import json
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from loadtest.bench.client import on_loop
from loadtest.bench.process import Running, cpu_seconds, trunkline
from loadtest.bench.soak.fleet import Files, Fleet
from loadtest.bench.soak.report import is_sound, picture, summary, write_csv
from loadtest.bench.soak.samples import Sample, Sampler
from loadtest.bench.soak.traffic import Traffic
from server.keys import new_key

KEYS = 3  # for inference, beside the administrator's


async def soak(
    traffic: Traffic, sampler: Sampler, out: Path, options: dict[str, Any]
) -> list[Sample]:
    """Runs the traffic for the seconds of `options`; returns the samples taken meanwhile."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, traffic.stop)
    running = asyncio.create_task(traffic.run(options["rate"], options["swaps"], options["odd"]))
    samples: list[Sample] = []
    began = time.monotonic()
    while not running.done() and time.monotonic() < began + options["seconds"]:
        await asyncio.wait([running], timeout=min(options["every"], options["seconds"]))
        try:
            sample = await asyncio.to_thread(sampler.take)
        except OSError:  # the process is gone
            break
        samples.append({"at_s": time.monotonic() - began} | sample | _counts(traffic))
        write_csv(out.with_suffix(".csv"), samples)
    traffic.stop()
    await running
    return samples


def _counts(traffic: Traffic) -> Sample:
    kinds = ("uploads", "right", "wrong", "failed", "refused")
    counted = {f"count_{kind}": float(traffic.wire.counts[kind]) for kind in kinds}
    counted["count_client_cpu_s"] = time.process_time()
    return counted | {"count_server_cpu_s": cpu_seconds(traffic.server.pid)}


def run(
    backbone: Sequence[str], scratch: Path, out: Path, options: dict[str, Any]
) -> tuple[Traffic, list[Sample]]:
    """On a server of its own; `backbone` are the first arguments of `trunkline serve`."""
    data = scratch / "data"
    admin = new_key(data / "keys.json", "admin", scopes=frozenset({"admin", "metrics"}))[1]
    keys = [
        new_key(data / "keys.json", f"tenant-{number}", scopes=frozenset({"infer"}))[1]
        for number in range(KEYS)
    ]
    with trunkline(scratch / "log", *backbone, "--data", data) as server:
        dice = random.Random(0)
        info = _get(server, "/info", admin)
        files = Files(info["config"], info["backbone"]["digest"], options["rank"])
        traffic = Traffic(server, [admin, *keys], files, Fleet(options["names"], dice), dice)
        metrics = _request(server, "/metrics", admin)
        sampler = Sampler(server.pid, data, scratch / "log", metrics)
        samples = on_loop(soak(traffic, sampler, out, options))
    return traffic, samples


def _request(server: Running, path: str, key: str) -> urllib.request.Request:
    url = f"http://{server.host}:{server.port}{path}"
    return urllib.request.Request(url, headers={"authorization": f"Bearer {key}"})


def _get(server: Running, path: str, key: str) -> Any:
    with urllib.request.urlopen(_request(server, path, key), timeout=60) as answer:
        return json.load(answer)


@click.command()
@click.argument("backbone", default="demo")
@click.option("--seconds", envvar="SOAK_S", default=3600.0, show_default=True)
@click.option("--swaps", envvar="SOAK_SWAPS", default=2.0, help="Uploads a second.")
@click.option("--rate", envvar="SOAK_RATE", default=40.0, help="Inference requests a second.")
@click.option("--odd", envvar="SOAK_ODD", default=1.0, help="Other requests a second.")
@click.option("--names", envvar="SOAK_NAMES", default=64, help="Live adapter names.")
@click.option("--rank", default=4, help="Of the adapters.")
@click.option("--every", default=10.0, help="Seconds from sample to sample.")
@click.option("--warm", envvar="SOAK_WARM_S", default=None, type=float, help="Seconds of warm-up.")
@click.option("--slots", default=48, help="Fewer than versions, so that some are loaded again.")
@click.option("--serve", multiple=True, help="A further argument of `trunkline serve`.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("soak"))
def main(
    backbone: str, out: Path, warm: float | None, serve: tuple[str, ...], **options: Any
) -> None:
    warm_s = min(600.0, options["seconds"] / 6) if warm is None else warm
    with tempfile.TemporaryDirectory(prefix="trunkline-soak-") as scratch:
        traffic, samples = run(
            [backbone, "--slots", str(options["slots"]), *serve], Path(scratch), out, options
        )
        log = (Path(scratch) / "log").read_text("utf-8", "replace")
    counts = traffic.wire.counts
    text = summary(samples, counts, traffic.wire.faults, warm_s)
    write_csv(out.with_suffix(".csv"), samples)
    out.with_suffix(".svg").write_text(picture(samples, warm_s), "utf-8")
    out.with_suffix(".md").write_text(text, "utf-8")
    click.echo(text)
    click.echo(f"The end of the server's log:\n{log[-2000:]}", err=True)
    sys.exit(0 if is_sound(samples, counts, warm_s) else 1)


if __name__ == "__main__":
    main()
