"""A slot: one resident adapter, the API keys that use it and the versions it was loaded for."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from adapters.arena import Extent
from model.lora import AdapterWeights

Use = tuple[str, int]  # a version as its users name it: adapter name and version number
# Versions that one slot remembers. Identical bytes under more names than this are rare.
MOST_USES = 64


class Uses:
    """The versions that one digest is resident for, at most MOST_USES; the oldest is forgotten."""

    def __init__(self) -> None:
        self._known: OrderedDict[Use, None] = OrderedDict()
        self._complete = True  # False once one was forgotten

    def add(self, uses: Iterable[Use]) -> None:
        for use in uses:
            self._known[use] = None
            if len(self._known) > MOST_USES:
                self._known.popitem(last=False)
                self._complete = False

    def discard(self, use: Use) -> None:
        self._known.pop(use, None)

    def __contains__(self, use: Use) -> bool:
        return use in self._known

    def __iter__(self) -> Iterator[Use]:
        return iter(self._known)

    @property
    def gone(self) -> bool:
        """Whether no version uses the digest any more, as far as that is known."""
        return self._complete and not self._known


@dataclass(eq=False)
class Slot:
    digest: str
    extent: Extent
    weights: AdapterWeights
    fresh_until: float = 0.0  # time.monotonic()
    used_at: float = 0.0  # time.monotonic() of its load or its last batch
    holds: int = 0  # batches that use it now: at most the one on the device
    leaving: bool = False  # to be freed when the last hold ends; not found by its digest any more
    keys: OrderedDict[str, None] = field(default_factory=OrderedDict)  # last user last
    uses: Uses = field(default_factory=Uses)
