"""scale: from one registered adapter to ten thousand.

Each count is a server of its own: its time from the process's beginning to /ready, its throughput
on the same traffic over the same few adapters, and the bytes that its slots take. Beside that, in
this process: opening the library, resolving names, listing a page. The adapters beyond the first 32
have one site of rank 1, so that ten thousand fit on a disk.

A Zipf(1.0) mix over 1,000 adapters of full size and 64 slots, every row under its own adapter, goes
through the engine in this process, loads and evictions with it; beside the same mix over 32
adapters, which stay resident.
"""

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import torch

from loadtest.bench.client import on_loop, post, repeated, saturate
from loadtest.bench.in_process import InProcess, engine_of, open_library
from loadtest.bench.oracle import COSINE, Mismatch, expected
from loadtest.bench.pairs import quotients, seconds
from loadtest.bench.plan import Plan
from loadtest.bench.process import Running, trunkline
from loadtest.bench.registered import (
    SETS,
    full_files,
    name_of,
    register,
    server_arguments,
    tiny_files,
    write_trunk,
)
from loadtest.bench.report import Report
from loadtest.bench.served import OCTETS
from loadtest.bench.trunk import Adapter, Rows, Trunk, mixed_lengths
from loadtest.workload import Popularity
from model.lora import AdapterWeights

FULL_SIZE = 32  # adapters of full size among the registered
ASKED = 10  # of them under traffic
FEW = 10  # registered: what larger counts are held against
BULK_ROWS = 16
CONNECTIONS = 8
IN_FLIGHT = 128  # rows in the engine at once


def measure(plan: Plan, trunk: Trunk, report: Report) -> None:
    data = {count: plan.scratch / f"registered-{count}" for count in plan.sizes.registered}
    folders = {}
    for count, root in data.items():
        full = full_files(trunk, min(count, FULL_SIZE), plan.shape.ranks[0])
        tiny = tiny_files(trunk, range(FULL_SIZE, count))
        folders[count] = register(root, trunk, itertools.chain(full, tiny))
    _measure_servers(plan, trunk, report, data)
    if plan.sizes.further:
        _measure_registry(plan, trunk, report, folders)
    on_loop(_measure_zipf(plan, trunk, report))


def _measure_servers(plan: Plan, trunk: Trunk, report: Report, data: dict[int, Path]) -> None:
    folder = write_trunk(plan.scratch, trunk)
    starts: dict[int, list[float]] = {count: [] for count in data}
    rates: dict[int, list[float]] = {count: [] for count in data}
    over_file = []
    for _ in range(plan.sizes.starts):
        for count, root in data.items():
            arguments = server_arguments(plan, folder, root)
            with trunkline(plan.scratch / "scale.log", *arguments) as server:
                starts[count].append(server.start_s)
                rates[count].append(_throughput(plan, trunk, server, min(count, ASKED)))
                if count == FEW:
                    over_file.append(_bytes_over_file(server))
    report.ratio(
        "scale",
        "resident bytes / bytes of the file",
        "bytes_over_file",
        over_file,
        str(trunk.dtype),
    )
    for count in data:
        if count == FEW:
            continue
        what = f"{count:,} registered / {FEW}"
        required = count == 10_000
        key = f"start_{count}_over_{FEW}"
        report.ratio(
            "scale",
            f"start, {what}",
            key if required else f"also.{key}",
            quotients(starts[count], starts[FEW]),
            f"{statistics.median(starts[count]):.2f} s and {statistics.median(starts[FEW]):.2f} s",
        )
        report.ratio(
            "scale",
            f"throughput, {what}",
            f"also.throughput_{count}_over_{FEW}",
            quotients(rates[count], rates[FEW]),
            f"over {min(count, ASKED)} of them",
        )


def _throughput(plan: Plan, trunk: Trunk, server: Running, adapters: int) -> float:
    generator = torch.Generator().manual_seed(3)
    lengths = iter(mixed_lengths(ASKED * BULK_ROWS * 80, seed=3))
    questions = []
    for index in range(ASKED):
        taken = list(itertools.islice(lengths, BULK_ROWS))
        rows = [torch.randint(trunk.config.vocab_size, (n,), generator=generator) for n in taken]
        body = {"adapter": name_of(index % adapters), "inputs": [row.tolist() for row in rows]}
        questions.append(post("/encode", body, OCTETS, sum(taken)))
    first = on_loop(saturate(server, questions, CONNECTIONS))  # adapters are loaded with it
    questions = repeated(questions, first, plan.sizes.window_s)
    return on_loop(saturate(server, questions, CONNECTIONS))


def _bytes_over_file(server: Running) -> float:
    with httpx.Client(base_url=f"http://{server.host}:{server.port}") as client:
        slots: dict[str, int] = client.get("/info").json()["slots"]
        page = client.get("/adapters", params={"limit": 1000}).json()["data"]
    resident: list[int] = [row["bytes"] for row in page if row["resident"]]
    assert len(resident) == slots["resident"], "an adapter came or went while nobody asked"
    used: int = slots["used_bytes"]
    return used / sum(resident)


def _measure_registry(plan: Plan, trunk: Trunk, report: Report, folders: dict[int, Path]) -> None:
    """Open, resolve and list, with the fewest and the most registered."""
    most = max(folders)
    if most == FEW:
        return
    times: dict[str, dict[int, list[float]]] = {
        name: {FEW: [], most: []} for name in ("opening the library", "resolving", "a page of 100")
    }
    for _ in range(plan.sizes.rounds):
        for count in (FEW, most):
            began = time.perf_counter()
            library = open_library(plan, trunk, folders[count])
            times["opening the library"][count].append(time.perf_counter() - began)
            names = [name_of(index) for index in range(0, count, max(1, count // 10))]
            for name in names:  # connections and statements warm, as in a server
                library.registry.read(name)
            resolve = [seconds(partial(library.registry.resolve, name)) for name in names]
            times["resolving"][count].append(statistics.median(resolve))
            page = seconds(partial(library.registry.page, limit=100))
            times["a page of 100"][count].append(page)
            library.close()
    for name, by_count in times.items():
        middle = [statistics.median(by_count[count]) * 1e3 for count in (most, FEW)]
        report.ratio(
            "scale",
            f"{name}, {most:,} registered / {FEW}",
            f"also.{name.split()[0]}_{most}_over_{FEW}",
            quotients(by_count[most], by_count[FEW]),
            f"{middle[0]:.2f} ms and {middle[1]:.2f} ms",
        )


async def _measure_zipf(plan: Plan, trunk: Trunk, report: Report) -> None:
    sizes = plan.sizes
    files = full_files(trunk, sizes.zipf, plan.shape.ranks[0])
    folder = register(plan.scratch / "zipf", trunk, files)
    rows = _rows(trunk)
    mixes = {"zipf": _zipf(sizes.zipf, 4), "resident": _zipf(min(FULL_SIZE, sizes.slots // 2), 5)}
    rates: dict[str, list[float]] = {name: [] for name in mixes}
    async with engine_of(plan, trunk, folder) as it:
        await _check(plan, trunk, it, rows)
        for names in mixes.values():  # a warm-up
            await _flow(it, rows, names, sizes.window_s)
        before = it.library.slots.stats().loads
        for _ in range(sizes.slow_rounds):
            for name, names in mixes.items():
                rates[name].append(await _flow(it, rows, names, sizes.window_s))
        loads = it.library.slots.stats().loads - before
    report.ratio(
        "scale",
        f"Zipf over {sizes.zipf:,} adapters and {sizes.slots} slots / {FULL_SIZE} resident",
        "zipf1000_over_resident",
        quotients(rates["zipf"], rates["resident"]),
        f"every row its own adapter; {loads} loads",
    )


def _rows(trunk: Trunk) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    lengths = mixed_lengths(64 * 1024, seed=6)
    made = [torch.randint(trunk.config.vocab_size, (n,), generator=generator) for n in lengths]
    return itertools.cycle(made)


def _zipf(count: int, seed: int) -> Callable[[], str]:
    popularity, rng = Popularity(count, 1.0, 0.0, seed), random.Random(seed)
    return lambda: name_of(popularity.draw(rng, 0.0))


async def _check(plan: Plan, trunk: Trunk, it: InProcess, rows: Iterator[torch.Tensor]) -> None:
    """Some rows under adapters that are not resident yet, against the oracle."""
    for index in random.Random(7).sample(range(plan.sizes.zipf), 4):
        ids = next(rows)
        adapter = Adapter(trunk.adapter_set(plan.shape.ranks[0], index % SETS), AdapterWeights())
        reference = expected(trunk, Rows([ids], [adapter]), 1)[0].mean(0)
        (found,) = await it.ask([ids], name_of(index))
        if not float(torch.cosine_similarity(torch.from_numpy(found), reference, dim=0)) >= COSINE:
            raise Mismatch(f"scale: {name_of(index)} differs from the float32 oracle")


async def _flow(
    it: InProcess, rows: Iterator[torch.Tensor], name: Callable[[], str], window_s: float
) -> float:
    """Tokens a second through the engine under a closed loop of single rows."""
    it.metrics.times.clear()
    it.forward.batches.clear()
    ends = time.perf_counter() + window_s

    async def keep_asking() -> None:
        while time.perf_counter() < ends or len(it.metrics.times) < 2:
            await it.ask([next(rows)], name())

    async with asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(keep_asking())
    return it.metrics.rate(ends)
