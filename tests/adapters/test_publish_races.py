"""An acknowledged upload keeps its file, whatever fails beside it."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from test_library_states import adapter_file, backbone, encoder, make_pool

from adapters.conditions import MUST_BE_NEW, UNCONDITIONAL, Condition
from adapters.errors import Conflict
from adapters.library import Library, Upload
from adapters.versions import Version


def publish(library: Library, name: str, condition: Condition = UNCONDITIONAL) -> Version:
    incoming = library.store.incoming()
    try:
        incoming.write(adapter_file(3))
        return library.publish(Upload(name, "test", condition=condition), incoming)[0]
    finally:
        incoming.discard()


def meanwhile(work: Callable[[], object]) -> threading.Thread:
    """Begin it, and give it time to end: it has to wait where the caller holds a transaction."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.3)
    return thread


def test_a_failed_upload_never_takes_the_file_of_another_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is published between the look for a version and the delete of the file."""
    library = Library(tmp_path, backbone(), encoder(), make_pool)
    publish_taken = Library.check_upload
    has_blob = library.registry.has_blob
    others: list[threading.Thread] = []

    def overtaken(digest: str) -> bool:
        found = has_blob(digest)
        others.append(meanwhile(lambda: publish(library, "other")))
        return found

    def late(self: Library, upload: Upload) -> None:
        """As if the condition had held until the transaction."""
        if upload.condition is UNCONDITIONAL:
            publish_taken(self, upload)

    incoming = library.store.incoming()
    incoming.write(adapter_file(4))
    library.publish(Upload("taken", "test"), incoming)
    incoming.discard()
    monkeypatch.setattr(Library, "check_upload", late)
    monkeypatch.setattr(library.registry, "has_blob", overtaken)
    with pytest.raises(Conflict):
        publish(library, "taken", MUST_BE_NEW)
    others[0].join(30)
    version = library.version("other")
    assert library.store.verify(version.digest) is None
    library.close()
