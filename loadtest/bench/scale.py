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

from adapters.library import Library
from adapters.slots import SlotPool
from adapters.weights import placed_bytes
from loadtest.bench.client import on_loop, post, repeated, saturate
from loadtest.bench.oracle import COSINE, Mismatch, expected
from loadtest.bench.pairs import quotients, seconds
from loadtest.bench.plan import Plan
from loadtest.bench.process import Running, trunkline
from loadtest.bench.registered import SETS, full_files, name_of, register, tiny_files, write_trunk
from loadtest.bench.report import Report
from loadtest.bench.served import OCTETS, server_arguments
from loadtest.bench.trunk import Adapter, Rows, Trunk, mixed_lengths
from loadtest.workload import Popularity
from model.lora import AdapterWeights
from server.engine.admission import Row
from server.engine.engine import Engine
from server.engine.forward import Forward
from server.engine.job import Ask, Floats
from server.metrics import Metrics

FULL_SIZE = 32  # adapters of full size among the registered
ASKED = 10  # of them under traffic
FEW = 10  # registered: what larger counts are held against
BULK_ROWS = 32
CONNECTIONS = 8
IN_FLIGHT = 256  # rows in the engine at once
ASK = Ask(frozenset({"embedding"}))


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
    lengths = iter(mixed_lengths(2 * ASKED * BULK_ROWS * 80, seed=3))
    questions = []
    for index in range(2 * ASKED):
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


def open_library(plan: Plan, trunk: Trunk, folder: Path) -> Library:
    capacity = plan.sizes.slots * placed_bytes(
        trunk.adapter_set(plan.shape.ranks[0], 0), trunk.dtype
    )
    return Library(
        folder,
        trunk.backbone,
        trunk.encoder,
        lambda read: SlotPool(
            trunk.config,
            trunk.dtype,
            trunk.encoder.device,
            capacity_bytes=capacity,
            max_slots=plan.sizes.slots,
            read=read,
        ),
    )


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
                library.registry.resolve(name)
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


class Batches(Metrics):
    """The engine's metrics, which also note when each batch was done."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[float, int]] = []

    def batch(self, tokens: int, rows: int, seconds: float) -> None:
        super().batch(tokens, rows, seconds)
        self.times.append((time.perf_counter(), tokens))

    def rate(self, ends: float) -> float:
        """Tokens a second from the end of the first batch to the first end after `ends`."""
        counted = [(at, tokens) for at, tokens in self.times if at < ends]
        counted += self.times[len(counted) : len(counted) + 1]
        return sum(tokens for _, tokens in counted[1:]) / (counted[-1][0] - counted[0][0])


async def _measure_zipf(plan: Plan, trunk: Trunk, report: Report) -> None:
    sizes = plan.sizes
    folder = register(
        plan.scratch / "zipf", trunk, full_files(trunk, sizes.zipf, plan.shape.ranks[0])
    )
    library = open_library(plan, trunk, folder)
    batches = Batches()
    engine = _engine(plan, trunk, library, batches)
    engine.start()
    rows = _rows(trunk)
    mixes = {"zipf": _zipf(sizes.zipf, 4), "resident": _zipf(min(FULL_SIZE, sizes.slots // 2), 5)}
    rates: dict[str, list[float]] = {name: [] for name in mixes}
    await _check(plan, trunk, engine, rows, sizes.zipf)
    before = library.slots.stats().loads
    for _ in range(sizes.slow_rounds):
        for name, names in mixes.items():
            rates[name].append(await _flow(engine, batches, rows, names, sizes.window_s))
    loads = library.slots.stats().loads - before
    await engine.stop()
    library.close()
    report.ratio(
        "scale",
        f"Zipf over {sizes.zipf:,} adapters and {sizes.slots} slots / {FULL_SIZE} resident",
        "zipf1000_over_resident",
        quotients(rates["zipf"], rates["resident"]),
        f"every row its own adapter; {loads} loads",
    )


def _engine(plan: Plan, trunk: Trunk, library: Library, metrics: Metrics) -> Engine:
    forward = Forward(trunk.backbone, trunk.dtype, trunk.encoder.device)
    return Engine(
        trunk.backbone,
        library,
        forward,
        metrics,
        max_batch_tokens=plan.sizes.batch_tokens,
        max_queue_tokens=1 << 20,
        max_request_tokens=1 << 20,
        fair_shares={},
    )


def _rows(trunk: Trunk) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    lengths = mixed_lengths(64 * 1024, seed=6)
    made = [torch.randint(trunk.config.vocab_size, (n,), generator=generator) for n in lengths]
    return itertools.cycle(made)


def _zipf(count: int, seed: int) -> Callable[[], str]:
    popularity, rng = Popularity(count, 1.0, 0.0, seed), random.Random(seed)
    return lambda: name_of(popularity.draw(rng, 0.0))


async def _check(
    plan: Plan, trunk: Trunk, engine: Engine, rows: Iterator[torch.Tensor], count: int
) -> None:
    """Some rows under adapters that are not resident yet, against the oracle."""
    for index in random.Random(7).sample(range(count), min(4, count)):
        ids = next(rows)
        adapter = Adapter(trunk.adapter_set(plan.shape.ranks[0], index % SETS), AdapterWeights())
        reference = expected(trunk, Rows([ids], [adapter]), 1)[0].mean(0)
        found = await _ask(engine, ids, name_of(index))
        if not float(torch.cosine_similarity(torch.from_numpy(found), reference, dim=0)) >= COSINE:
            raise Mismatch(f"scale: {name_of(index)} differs from the float32 oracle")


async def _ask(engine: Engine, ids: torch.Tensor, name: str) -> Floats:
    results = await engine.encode([Row(ids.numpy(), name)], ASK, time.monotonic() + 60)
    if results[0].error is not None:
        raise results[0].error
    assert results[0].embedding is not None
    return results[0].embedding


async def _flow(
    engine: Engine,
    batches: Batches,
    rows: Iterator[torch.Tensor],
    name: Callable[[], str],
    window_s: float,
) -> float:
    """Tokens a second through the engine under a closed loop of single rows."""
    ends = time.perf_counter() + window_s

    async def keep_asking() -> None:
        while time.perf_counter() < ends:
            await _ask(engine, next(rows), name())

    batches.times.clear()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(keep_asking())
    return batches.rate(ends)
