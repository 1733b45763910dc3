"""Administrators' work is shared by key, bounded by key, and ends when its client leaves."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app, direct
from server.connection import CLIENT, Client
from server.engine.errors import Overloaded
from server.keys import new_key
from server.places import Places
from server.settings import load_settings

ADMIN = frozenset({"admin"})
FLOOD = 50


class Site:
    """An application, the keys of two administrators, and what its store was asked to verify.

    A verification waits until `gate` is open.
    """

    def __init__(self, app: FastAPI, secrets: dict[str, str]) -> None:
        self.app, self.secrets = app, secrets
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        self.order: list[str] = []
        self.library = app.state.server.library
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(direct(app)), base_url="http://a", timeout=60
        )

    def hold(self, owner: Any, method: str, name: Callable[..., str]) -> None:
        """Have this method note its call, and wait for the gate before it goes on."""
        original = getattr(owner, method)

        def held(*args: Any) -> Any:
            self.order.append(name(*args))
            self.begun.release()
            self.gate.wait()
            return original(*args)

        setattr(owner, method, held)

    def ask(self, who: str, method: str, path: str, **more: Any) -> "asyncio.Task[httpx.Response]":
        headers = {"authorization": f"Bearer {self.secrets[who]}"}
        return asyncio.ensure_future(self.http.request(method, path, headers=headers, **more))


@asynccontextmanager
async def site(backbone: Path, folder: Path) -> AsyncIterator[Site]:
    keys = folder / "keys.json"
    secrets = {who: new_key(keys, who, scopes=ADMIN)[1] for who in ("flood", "quiet")}
    app = create_app(
        load_settings({"backbone": backbone, "data_dir": folder / "data", "keys": keys})
    )
    async with app.router.lifespan_context(app):
        here = Site(app, secrets)
        try:
            yield here
        finally:
            here.gate.set()
            await here.http.aclose()


Run = Callable[[Callable[[Site], Awaitable[None]]], None]


@pytest.fixture
def run(tiny_backbone: Path, tmp_path: Path) -> Run:
    def with_site(test: Callable[[Site], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with site(tiny_backbone, tmp_path) as here:
                await test(here)

        asyncio.run(whole())

    return with_site


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0.005)


def codes(tasks: "list[asyncio.Task[httpx.Response]]") -> list[int]:
    return [task.result().status_code for task in tasks if task.done()]


def test_another_key_is_served_between_the_pieces_of_a_flooding_keys_work(run: Run) -> None:
    async def test(here: Site) -> None:
        library = here.library
        names = {library.version(name).digest: name for name in ("plain", "full")}
        here.hold(library.store, "verify", lambda digest: names[digest])
        here.hold(library.store, "read", lambda _: "a diff")
        flood = [here.ask("flood", "POST", "/adapters/plain/verify") for _ in range(FLOOD)]
        flood += [here.ask("flood", "GET", "/diff?a=plain&b=plain") for _ in range(FLOOD)]
        await settle()
        assert set(codes(flood)) == {503}
        assert all(int(task.result().headers["retry-after"]) >= 1 for task in flood if task.done())
        # What is short waits for none of it.
        listed = await here.ask("quiet", "GET", "/adapters")
        assert listed.status_code == 200
        quiet = here.ask("quiet", "POST", "/adapters/full/verify")
        await settle()
        here.order.clear()
        here.gate.set()
        assert (await quiet).json()["sound"]
        others = await asyncio.gather(*flood)
        verified = [name for name in here.order if name != "a diff"]
        assert "full" in verified[:2]  # behind one piece of the other key at most
        assert len(verified) > 3
        assert {answer.status_code for answer in others} == {200, 503}
        assert sum(answer.status_code == 200 for answer in others) < FLOOD

    run(test)


def test_loads_that_wait_hold_no_thread_and_have_a_bound_by_key(run: Run) -> None:
    async def test(here: Site) -> None:
        here.hold(here.library, "load", lambda name, *_: name)
        here.gate.set()
        here.library.slots.load_now = lambda *_, **__: False  # it never becomes resident
        loads = [here.ask("flood", "POST", "/adapters/plain/load") for _ in range(3 * FLOOD)]
        await settle()
        assert set(codes(loads)) == {503}
        assert here.app.state.server.admin.loads.held < 3 * FLOOD
        for _ in range(3):
            assert (await here.ask("quiet", "GET", "/adapters/plain")).status_code == 200
        assert not all(load.done() for load in loads)
        for load in loads:
            load.cancel()

    run(test)


def test_a_client_that_leaves_drops_the_rest_of_its_work(run: Run) -> None:
    """The scope of our own connection tells who is gone, as server/connection.py does it."""

    async def test(here: Site) -> None:
        here.hold(here.library.store, "verify", lambda digest: digest)
        clients: list[Client] = []
        inner = direct(here.app)

        async def connected(scope: Any, receive: Any, send: Any) -> None:
            clients.append(Client())
            await inner(scope | {CLIENT: clients[-1]}, receive, send)

        transport = httpx.ASGITransport(connected)
        here.http = httpx.AsyncClient(transport=transport, base_url="http://a", timeout=60)
        asked = [here.ask("flood", "POST", "/adapters/plain/verify") for _ in range(4)]
        await settle()
        assert here.begun.acquire(timeout=30)
        for client in clients:
            client.leave()
        await settle()
        assert here.app.state.server.admin.verify.waiting(key(here)) == 0
        here.gate.set()
        await asyncio.gather(*asked, return_exceptions=True)
        assert len(here.order) == 1
        assert here.app.state.server.admin.verifications.held == 0

    def key(here: Site) -> str:
        return here.secrets["flood"].split("_")[1]

    run(test)


def test_an_upload_holds_a_file_from_its_first_bytes_and_uploads_have_a_bound_by_key(
    run: Run,
) -> None:
    async def test(here: Site) -> None:
        end = asyncio.Event()

        async def body(first: bytes) -> AsyncIterator[bytes]:
            yield first
            await end.wait()

        def uploads(first: bytes) -> "list[asyncio.Task[httpx.Response]]":
            kind = {"content-type": "application/octet-stream"}
            return [
                asyncio.ensure_future(
                    here.http.put(
                        f"/adapters/new-{index}",
                        content=body(first),
                        headers=kind | {"authorization": f"Bearer {here.secrets['flood']}"},
                    )
                )
                for index in range(FLOOD)
            ]

        incoming = here.library.store.incoming_folder
        silent = uploads(b"")
        await settle()
        assert list(incoming.iterdir()) == []
        started = uploads(b"1234")
        await settle()
        assert 0 < len(list(incoming.iterdir())) < FLOOD
        assert set(codes(started)) == {503}
        end.set()
        await asyncio.gather(*silent, *started)
        assert list(incoming.iterdir()) == []

    run(test)


def test_places_are_shared_by_key_and_there_is_always_one_for_another() -> None:
    places, held = Places(8, "things"), []
    for key, share in (("a", 4), ("b", 2), ("c", 1)):
        for _ in range(share):
            held.append(places.take(key))
            held[-1].__enter__()
        with pytest.raises(Overloaded), places.take(key):
            pass
    for place in held:
        place.__exit__(None, None, None)
    assert places.held == 0


def test_downloads_are_bounded_by_key_and_give_their_places_back(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    """Each has a file descriptor open until its client has read it."""

    async def run() -> None:
        async with site(tiny_backbone, tmp_path) as at:
            places = at.app.state.server.admin.downloads
            flood = at.secrets["flood"].split("_")[1]
            with ExitStack() as unread:
                with suppress(Overloaded):
                    for _ in range(FLOOD):
                        unread.enter_context(places.take(flood))
                path = "/adapters/plain/file"
                assert (await at.ask("flood", "GET", path)).status_code == 503
                for method in ("GET", "HEAD", "GET"):
                    assert (await at.ask("quiet", method, path)).status_code == 200
                gone = await at.ask("quiet", "GET", "/adapters/none/file")
                assert gone.status_code == 404
            assert places.held == 0

    asyncio.run(run())
