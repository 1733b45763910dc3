"""What a soak sends: inference all the time, swaps, and now and then everything else."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from loadtest.bench.client import Answer
from loadtest.bench.process import Running
from loadtest.bench.soak.fleet import KEPT_VERSIONS, Files, Fleet, Name
from loadtest.bench.soak.wire import OCTETS, Wire, request

TEXTS = (
    "To be, or not to be: that is the question.",
    "Now is the winter of our discontent",
    "Friends, Romans, countrymen, lend me your ears; I come to bury Caesar, not to praise him.",
    "The quality of mercy is not strained",
    "All the world's a stage, and all the men and women merely players.",
    "rain " * 40,
)
METADATA = "x-trunkline-metadata"
ALIKE = 0.99  # cosine of two answers for one text by one weight set; of two sets it is far below
# Under way at once of each kind; what is due beyond is left out and counted, so that on a busy
# machine this client does not pile up work of its own.
MOST_ASKED, MOST_SWAPS, MOST_ODD = 48, 6, 4


class Traffic:
    """One soak's requests until `stop` is called."""

    def __init__(
        self, server: Running, keys: list[str], files: Files, fleet: Fleet, dice: random.Random
    ) -> None:
        self.wire, self.server = Wire(server), server
        self._admin, self._infer = keys[0], keys[1:]
        self._files, self._fleet, self._dice = files, fleet, dice
        self._weights: dict[str, int] = {}  # by digest, of the newest files
        self._seen: dict[tuple[int, int], np.ndarray] = {}  # (weights, text) -> unit vector
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        odd = [self._pin, self._alias, self._read, self._tokenize, self._critic, self._load]
        odd += [self._unknown, self._malformed, self._bad_file, self._stale, self._again]
        odd += [self._stranger, self._half_a_request, self._leaves_early, self._list]
        self._odd_jobs = itertools.cycle(odd)

    async def run(self, rate: float, swaps: float, odd: float) -> None:
        """`rate` inference requests a second, `swaps` uploads and `odd` other requests."""
        for name in self._fleet.steady:
            await self._upload(name)
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._every(rate, self._ask, MOST_ASKED))
            loops.create_task(self._every(swaps, self._swap, MOST_SWAPS))
            loops.create_task(self._every(odd, self._odd, MOST_ODD))
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.wire.close()

    def stop(self) -> None:
        self._stopped.set()

    async def _every(self, rate: float, action: Callable[[], Awaitable[None]], most: int) -> None:
        """Start the action when it is due, unless `most` are under way."""
        begins, under_way = time.monotonic(), set[asyncio.Task[None]]()
        for number in itertools.count():
            wait = begins + number / rate - time.monotonic()
            if wait < -1.0:  # this process did not run for a while: what was due then is left out
                begins -= wait
            try:
                await asyncio.wait_for(self._stopped.wait(), max(0.0, wait))
                return
            except TimeoutError:
                if len(under_way) >= most:
                    self.wire.counts["left out"] += 1
                    continue
                task = asyncio.create_task(self._guarded(action))
                for tasks in (under_way, self._tasks):
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)

    async def _guarded(self, action: Callable[[], Awaitable[None]]) -> None:
        try:
            await action()
        except Exception as error:  # a fault of this program must not end an hour's run
            self.wire.fault("failed", f"{action.__name__}: {error!r}")

    # Inference.

    async def _ask(self) -> None:
        name = self._fleet.any()
        if name is not None:
            with name.used():
                await self._ask_name(name, self._dice.randrange(len(TEXTS)))

    async def _ask_name(self, name: Name, text: int) -> None:
        body = {"adapter": name.name, "inputs": TEXTS[text]}
        key = self._dice.choice(self._infer)
        sent = time.monotonic()
        answer = await self.wire.demand(request("POST", "/encode", key, body, accept=OCTETS), {200})
        if answer is not None:
            self._judge(name, text, answer, sent, time.monotonic())

    def _judge(self, name: Name, text: int, answer: Answer, sent: float, received: float) -> None:
        digest = json.loads(answer.header(METADATA))["adapters"][0]["digest"]
        weights = self._weights.get(digest)
        if weights is None or not name.may_mean(digest, sent, received):
            self.wire.fault("wrong", f"{name.name} was answered by {digest}")
            return
        vector = np.frombuffer(answer.body, "<f4")
        vector = vector / np.linalg.norm(vector)
        known = self._seen.setdefault((weights, text), vector)
        if not float(known @ vector) >= ALIKE:
            self.wire.fault("wrong", f"{name.name}: cosine {float(known @ vector):.4f}")
            return
        self.wire.right()

    # Swaps.

    async def _swap(self) -> None:
        """A new name and the oldest deleted, by turns with a new version of a name that lives."""
        self.wire.counts["swaps"] += 1
        if self.wire.counts["swaps"] % 2:
            name = self._fleet.new_name()
            if await self._upload(name):
                self._fleet.passing.append(name)
            while await self._delete_oldest():
                pass
            return
        name = self._fleet.to_change() or self._fleet.new_name()
        await self._upload(name)
        while len(name.versions) > KEPT_VERSIONS:
            number = name.versions[0]
            path = f"/adapters/{name.name}/versions/{number}"
            # 404: an earlier answer to this was lost
            if (
                await self.wire.demand(request("DELETE", path, self._admin), {200, 202, 404})
                is None
            ):
                return  # it is deleted with the next upload
            if number in name.versions:
                name.versions.remove(number)

    async def _upload(self, name: Name) -> bool:
        file = self._files.next()
        self._remember(file.digest, file.weights)
        name.changing = True
        name.sends(file.digest, time.monotonic())
        try:
            put = request("PUT", f"/adapters/{name.name}", self._admin, file.data, OCTETS)
            answer = await self.wire.demand(put, {200, 201})
        finally:
            name.changing = False
        if answer is None:
            return False
        number = json.loads(answer.body)["version"]
        name.uploaded(file.digest, number, time.monotonic())
        self.wire.counts["uploads"] += 1
        return True

    def _remember(self, digest: str, weights: int) -> None:
        self._weights[digest] = weights
        while len(self._weights) > 8192:  # far more than can live
            del self._weights[next(iter(self._weights))]

    async def _delete_oldest(self) -> bool:
        """Whether a name was deleted: one more than should live, with all its versions."""
        name = self._fleet.oldest()
        if name is None:
            return False
        await name.until_unused()
        path = f"/adapters/{name.name}"
        answer = await self.wire.demand(request("DELETE", path, self._admin), {200, 202})
        if answer is None:  # refused: it is still there, and is deleted later
            self._fleet.passing.append(name)
            return False
        if self._dice.random() < 0.2:
            await self.wire.demand(request("GET", path, self._admin), {404})
        return True

    # Everything else, one a turn.

    async def _odd(self) -> None:
        name = self._fleet.any()
        if name is None:
            return
        with name.used():
            await next(self._odd_jobs)(name)

    async def _post(self, name: Name, action: str, *statuses: int) -> None:
        path = f"/adapters/{name.name}/{action}"
        await self.wire.demand(request("POST", path, self._admin), {200, 202, *statuses})

    async def _pin(self, name: Name) -> None:
        await self._post(name, "pin")
        await self._post(name, "unpin")

    async def _load(self, name: Name) -> None:
        await self._post(name, "unload")
        await self._post(name, "load")
        await self._post(name, "verify")

    async def _alias(self, name: Name) -> None:
        """An alias of a name of its own, moved to the oldest live version."""
        alias = f"alias-{self._dice.randrange(4)}"
        if name.versions and not name.changing:
            body = {"version": name.versions[-1]}
            path = f"/adapters/{name.name}/aliases/{alias}"
            # 404: the version was deleted meanwhile
            await self.wire.demand(request("PUT", path, self._admin, body), {200, 404})

    async def _read(self, name: Name) -> None:
        await self.wire.demand(request("GET", f"/adapters/{name.name}", self._admin), {200})
        path = f"/adapters/{name.name}/file"
        await self.wire.demand(request("GET", path, self._admin), {200})
        await self.wire.demand(request("GET", "/info", self._admin), {200})

    async def _list(self, name: Name) -> None:
        sort = self._dice.choice(["name", "created", "used", "requests", "bytes"])
        path = f"/adapters?limit=50&sort={sort}"
        await self.wire.demand(request("GET", path, self._admin), {200})

    async def _tokenize(self, name: Name) -> None:
        body = {"inputs": [self._dice.choice(TEXTS)]}
        await self.wire.demand(request("POST", "/tokenize", self._infer[0], body), {200})

    async def _critic(self, name: Name) -> None:
        body: dict[str, Any] = {"adapters": [name.name, "base"], "inputs": list(TEXTS[:3])}
        await self.wire.demand(request("POST", "/critic", self._infer[0], body), {200})
        body = {"adapter": name.name, "inputs": TEXTS[0]}
        await self.wire.demand(request("POST", "/classify", self._infer[0], body), {200})

    async def _unknown(self, name: Name) -> None:
        """An adapter that never was; a new name every time."""
        body = {"adapter": f"none/{self._dice.randrange(1 << 40)}", "inputs": TEXTS[0]}
        await self.wire.demand(request("POST", "/encode", self._infer[0], body), {404})
        path = f"/nowhere/{self._dice.randrange(1 << 40)}"
        await self.wire.demand(request("GET", path, self._admin), {404})

    async def _malformed(self, name: Name) -> None:
        body = b'{"inputs": ["unfinished'
        await self.wire.demand(request("POST", "/encode", self._infer[0], body), {400})
        wrong = {"adapter": name.name, "inputs": [[-1, 1 << 40]]}
        await self.wire.demand(request("POST", "/encode", self._infer[0], wrong), {422})

    async def _bad_file(self, name: Name) -> None:
        """An upload that is cut off, under a name that therefore never comes to be."""
        data = self._files.next().data
        path = f"/adapters/refused/{self._dice.randrange(1 << 40)}"
        cut = data[: len(data) // 2]
        await self.wire.demand(request("PUT", path, self._admin, cut, OCTETS), {422})

    async def _stale(self, name: Name) -> None:
        """An upload whose condition fails."""
        put = request(
            "PUT",
            f"/adapters/{name.name}",
            self._admin,
            self._files.next().data,
            OCTETS,
            if_match='"999999999"',
        )
        await self.wire.demand(put, {412})

    async def _again(self, name: Name) -> None:
        """The bytes that are current, downloaded and uploaded again: no new version."""
        if name.changing:
            return
        name.changing = True  # no other upload comes in between
        try:
            path = f"/adapters/{name.name}"
            file = await self.wire.demand(request("GET", f"{path}/file", self._admin), {200})
            if file is not None:
                again = request("PUT", path, self._admin, file.body, OCTETS)
                await self.wire.demand(again, {200})
        finally:
            name.changing = False

    async def _stranger(self, name: Name) -> None:
        """A key that does not exist, another one each time, and a scope that is not there."""
        key = f"tl_{self._dice.randrange(1 << 40):012x}_none"
        body = {"adapter": name.name, "inputs": TEXTS[0]}
        await self.wire.demand(request("POST", "/encode", key, body), {401})
        path = f"/adapters/{name.name}"
        await self.wire.demand(request("DELETE", path, self._infer[0]), {403})

    async def _half_a_request(self, name: Name) -> None:
        """A connection that sends half of an upload and goes away."""
        data = self._files.next().data
        put = request("PUT", f"/adapters/{name.name}", self._admin, data, OCTETS)
        await self._send_and_leave(put[: len(put) // 2], 0.1)

    async def _leaves_early(self, name: Name) -> None:
        """A client that asks and does not wait for the answer."""
        body = {"adapter": name.name, "inputs": TEXTS[5]}
        await self._send_and_leave(request("POST", "/encode", self._infer[0], body), 0.0)

    async def _send_and_leave(self, data: bytes, wait_s: float) -> None:
        _, writer = await asyncio.open_connection(self.server.host, self.server.port)
        writer.write(data)
        await asyncio.sleep(wait_s)
        writer.close()
        self.wire.counts["left early"] += 1
