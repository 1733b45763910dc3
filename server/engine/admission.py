"""Admission: what may enter the queue, under which version, with which permits."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.names import BASE
from adapters.registry import FolderRegistry, Version
from model.checkpoint import Backbone
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


@dataclass(frozen=True)
class Row:
    """What a front end hands over: ids, and the adapter reference they are for (None: base)."""

    ids: Ids
    adapter: str | None


class TokenPermits:
    """Tokens admitted and not answered yet, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._lock = threading.Lock()

    def take(self, tokens: int) -> None:
        """Raises Overloaded, having taken nothing, where there are not so many left."""
        with self._lock:
            # An empty server takes any request within the request's own limit.
            if self.held and self.held + tokens > self.limit:
                raise Overloaded(
                    f"{self.held} tokens are waiting, and {self.limit} may", retry_after_s=1
                )
            self.held += tokens

    def give_back(self, tokens: int) -> None:
        with self._lock:
            self.held -= tokens


class Admission:
    def __init__(
        self,
        registry: FolderRegistry,
        backbone: Backbone,
        permits: TokenPermits,
        max_request_tokens: int,
    ) -> None:
        self.registry, self.config, self.permits = registry, backbone.config, permits
        self.has_critic = "critic_head.weight" in backbone.tensors
        self.max_request_tokens = max_request_tokens

    def admit(self, rows: Sequence[Row], ask: Ask, deadline: float) -> tuple[list[Job], Reply]:
        """One job a row. Raises a TrunklineError, and then holds nothing."""
        if ask.layer > self.config.n_layer:
            raise BadInput(f"layer must be 1 to {self.config.n_layer}")
        for row in rows:
            self._check_ids(row.ids)
        tokens = sum(len(row.ids) for row in rows)
        if tokens > self.max_request_tokens:
            raise TooManyTokens(
                f"the request has {tokens} tokens; the limit is {self.max_request_tokens}",
                tokens=tokens,
                limit=self.max_request_tokens,
            )
        versions = {name: self._resolve(name, ask) for name in {row.adapter for row in rows}}
        self.permits.take(tokens)
        reply, now = Reply(len(rows)), time.monotonic()
        jobs = [
            self._job(row, versions[row.adapter], ask, deadline, now, reply, index)
            for index, row in enumerate(rows)
        ]
        return jobs, reply

    def _job(
        self,
        row: Row,
        version: Version | None,
        ask: Ask,
        deadline: float,
        now: float,
        reply: Reply,
        index: int,
    ) -> Job:
        weights = None if version is None else self.registry.weights(version.digest)
        release = lambda: self.permits.give_back(len(row.ids))  # noqa: E731
        return Job(row.ids, ask, version, weights, deadline, now, reply, index, release)

    def _resolve(self, reference: str | None, ask: Ask) -> Version | None:
        version = None if reference in (None, BASE) else self.registry.resolve(str(reference))
        manifest = version.manifest if version else None
        if "critic" in ask.outputs and not (self.has_critic or (manifest and manifest.critic)):
            raise CriticNotAvailable("neither the backbone nor the adapter has a critic head")
        if "labels" in ask.outputs and not (manifest and manifest.labels):
            raise ClassifierNotAvailable("the adapter has no classifier")
        return version

    def _check_ids(self, ids: Ids) -> None:
        if len(ids) > self.config.block_size:
            raise SequenceTooLong(
                f"a row has {len(ids)} tokens; block_size is {self.config.block_size}",
                tokens=len(ids),
                limit=self.config.block_size,
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise TokenOutOfRange(
                f"token ids must be 0 to {self.config.vocab_size - 1}",
                index=int(np.flatnonzero((ids < 0) | (ids >= self.config.vocab_size))[0]),
            )
