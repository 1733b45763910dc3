"""Admission: what may enter the queue, under which version, with which permits."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from adapters.errors import TrunklineError
from adapters.leases import Lease
from adapters.library import Library
from adapters.names import BASE
from adapters.validate import Manifest
from adapters.versions import Version
from model.checkpoint import Backbone
from model.heads import SEQUENCE_HEAD
from server.engine.errors import (
    BadInput,
    ClassifierNotAvailable,
    CriticNotAvailable,
    Overloaded,
    SequenceTooLong,
    TokenOutOfRange,
    TooManyTokens,
)
from server.engine.job import Ask, Ids, Job, Reply
from server.engine.lines import line_key
from server.engine.permits import TokenPermits
from server.engine.queue import JobQueue
from server.engine.rate import DrainRate

LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Row:
    """What a front end hands over: ids, and the adapter reference they are for (None: base)."""

    ids: Ids
    adapter: str | None


def overloaded(sentence: str, wait_s: float) -> Overloaded:
    """With a Retry-After of the time that the excess takes at the present rate."""
    retry_after_s = min(LONGEST_RETRY_S, max(1, math.ceil(wait_s)))
    return Overloaded(sentence, retry_after_s=retry_after_s)


Leased = tuple[Version, Lease] | None  # None: the backbone alone


class SharedLease:
    """One request's lease on a version, released by the last of its rows (device thread only)."""

    def __init__(self, leased: Leased) -> None:
        self.version: Version | None = leased[0] if leased else None
        self._lease: Lease | None = leased[1] if leased else None
        self.rows = 0

    def row_done(self) -> None:
        self.rows -= 1
        if self.rows == 0 and self._lease is not None:
            self._lease.release()


def _release_all(leases: Mapping[str | None, Leased]) -> None:
    for leased in leases.values():
        if leased is not None:
            leased[1].release()


class Admission:
    def __init__(
        self,
        library: Library,
        backbone: Backbone,
        permits: TokenPermits,
        queue: JobQueue,
        rate: DrainRate,
        max_request_tokens: int,
        max_wait_s: float,
    ) -> None:
        self.library, self.config, self.permits = library, backbone.config, permits
        self.has_critic = "critic_head.weight" in backbone.tensors
        self.has_sequence_head = SEQUENCE_HEAD[0] in backbone.tensors
        self.max_request_tokens = max_request_tokens
        self.queue, self.rate, self.max_wait_s = queue, rate, max_wait_s

    def admit(
        self, rows: Sequence[Row], ask: Ask, deadline: float, key: str = ""
    ) -> tuple[list[Job], Reply]:
        """One job a row. Raises a TrunklineError, and then holds nothing."""
        if ask.layer > self.config.n_layer:
            raise BadInput(f"layer must be 1 to {self.config.n_layer}", field="layer")
        self._check_rows(rows)
        tokens = sum(len(row.ids) for row in rows)
        if tokens > self.max_request_tokens:
            raise TooManyTokens(
                f"the request has {tokens} tokens; max_request_tokens is {self.max_request_tokens}",
                tokens=tokens,
                limit=self.max_request_tokens,
                setting="max_request_tokens",
            )
        references = {row.adapter for row in rows}
        most_s = min(self.max_wait_s, deadline - time.monotonic())
        error = self.refusal(references, most_s, key, tokens)  # first: it is to cost little
        if error is not None:
            raise error
        leases = self._lease_all(references, rows, ask, key)
        self.permits.take(tokens, key)
        return self._jobs(rows, leases, ask, deadline, key)

    @property
    def crowded(self) -> bool:
        """Whether there may be a line now whose rows would be refused."""
        rate, held = self.rate.per_s, self.permits.held
        if held and self.permits.crowded():
            return True
        return rate > 0 and self.queue.may_be_late(held, rate, self.max_wait_s)

    def refusal(
        self, references: Collection[str | None], most_s: float, key: str, tokens: int = 1
    ) -> Overloaded | None:
        """Of rows with so many tokens that would wait for more than `most_s`, or find no room.

        None: they may come. Raises as Library.version for a reference to nothing.
        """
        lines = [line_key(key, self._version(reference)) for reference in references]
        rate, held = self.rate.per_s, self.permits.held
        if not held:  # an empty server takes any request within the request's own limit
            return None
        late_s = self.queue.lateness(lines, held, rate, most_s) if rate else 0.0
        if late_s > 0:
            sentence = f"a row would wait for {most_s + late_s:.2f} s, and may for {most_s:.2f} s"
            return overloaded(sentence, late_s)
        lacking = self.permits.lacking(tokens, key, self.queue.longest(lines))
        if not lacking:
            return None
        # Other keys' tokens run beside those of the key; and an empty server takes any request.
        own = self.permits.of_key(key)
        until = held if lacking >= own else lacking * held / own
        return overloaded("the queue has no room for more of this key", self.rate.seconds(until))

    def _version(self, reference: str | None) -> Version | None:
        if reference is None or reference == BASE:
            return None
        try:
            return self.library.version(reference)
        except TrunklineError as error:
            error.details["adapter"] = reference
            raise

    def _lease_all(
        self, references: Collection[str | None], rows: Sequence[Row], ask: Ask, key: str
    ) -> dict[str | None, Leased]:
        """Each reference resolved once, with a lease; all or none."""
        leases: dict[str | None, Leased] = {}
        try:
            for reference in references:
                if reference is None or reference == BASE:
                    leases[reference] = None
                else:
                    leases[reference] = self.library.lease(reference, key)
                self._check_heads(leases[reference], reference, rows, ask)
        except TrunklineError as error:
            error.details["adapter"] = reference or BASE
            _release_all(leases)
            raise
        return leases

    def _check_heads(
        self, leased: Leased, reference: str | None, rows: Sequence[Row], ask: Ask
    ) -> None:
        manifest = leased[0].manifest if leased else None
        if "critic" in ask.outputs and not (self.has_critic or (manifest and manifest.critic)):
            self._check_sequence_heads(manifest, [row for row in rows if row.adapter == reference])
        if "labels" in ask.outputs and not (manifest and manifest.labels):
            raise ClassifierNotAvailable(
                "the adapter has no classifier"
                if leased
                else "the backbone alone has no classifier: an adapter with one has to be named"
            )

    def _check_sequence_heads(self, manifest: Manifest | None, rows: Sequence[Row]) -> None:
        """Without a critic head, a row can still have a sequence score where [CLS] leads it.

        Raises CriticNotAvailable for rows that nothing could be answered for.
        """
        if not (self.has_sequence_head or (manifest and manifest.sequence_head)):
            raise CriticNotAvailable("neither the backbone nor the adapter has a critic head")
        if any(row.ids[0] != self.config.cls_token_id for row in rows):
            raise CriticNotAvailable(
                "neither the backbone nor the adapter has a critic head, only a sequence head, "
                "which scores rows whose first token is [CLS]"
            )

    def _jobs(
        self,
        rows: Sequence[Row],
        leases: Mapping[str | None, Leased],
        ask: Ask,
        deadline: float,
        key: str,
    ) -> tuple[list[Job], Reply]:
        reply, now = Reply(len(rows)), time.monotonic()
        shared = {reference: SharedLease(leased) for reference, leased in leases.items()}
        for row in rows:
            shared[row.adapter].rows += 1
        jobs = [
            Job(
                ids=row.ids,
                ask=ask,
                adapter=shared[row.adapter].version,
                deadline=deadline,
                admitted=now,
                reply=reply,
                row=index,
                release=partial(self._release, shared[row.adapter], len(row.ids), key),
                key=key,
            )
            for index, row in enumerate(rows)
        ]
        return jobs, reply

    def _release(self, shared: "SharedLease", tokens: int, key: str) -> None:
        self.permits.give_back(tokens, key)
        shared.row_done()

    def _check_rows(self, rows: Sequence[Row]) -> None:
        """All rows in one pass, since thousands of them are checked on the event loop; row by row
        where one is at fault."""
        short = all(len(row.ids) <= self.config.block_size for row in rows)
        ids = np.concatenate([row.ids for row in rows]) if short else None
        if ids is not None and ids.view(np.uint64).max() < self.config.vocab_size:
            return
        for index, row in enumerate(rows):
            self._check_ids(row.ids, index)

    def _check_ids(self, ids: Ids, row: int) -> None:
        if len(ids) > self.config.block_size:
            raise SequenceTooLong(
                f"the row has {len(ids)} tokens; block_size is {self.config.block_size}",
                row=row,
                tokens=len(ids),
                limit=self.config.block_size,
            )
        # An id below 0 is a very large one without a sign.
        if ids.view(np.uint64).max() >= self.config.vocab_size:
            raise TokenOutOfRange(
                f"token ids must be 0 to {self.config.vocab_size - 1}",
                row=row,
                index=int(np.flatnonzero((ids < 0) | (ids >= self.config.vocab_size))[0]),
            )
