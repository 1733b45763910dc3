"""The rate-limit headers of answers to keys with quotas, by OpenAI's names and in its format."""

import math

from starlette.types import Message, Send

from server.keys import Bucket, Caller

Headers = list[tuple[bytes, bytes]]


def rate_headers(caller: Caller) -> Headers:
    """Limit, what remains, and when all of it is there again: of requests, and of tokens."""
    headers: Headers = []
    for what, bucket in (("requests", caller.requests), ("tokens", caller.tokens)):
        if bucket is not None:
            headers += _of_quota(what, bucket)
    return headers


def _of_quota(what: str, bucket: Bucket) -> Headers:
    reset = duration(bucket.full_s())  # brings what is left up to date too
    values = {"limit": bucket.quota.count, "remaining": max(0, math.floor(bucket.left))}
    named = [(name, str(value)) for name, value in values.items()] + [("reset", reset)]
    return [(f"x-ratelimit-{name}-{what}".encode(), value.encode()) for name, value in named]


def duration(seconds: float) -> str:
    """As OpenAI writes them: 120ms, 1s, 6m0s, 1h0m0s. Rounded up."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{math.ceil(seconds * 1e3)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def with_rate_headers(send: Send, caller: Caller) -> Send:
    """Sends the same answers with the key's headers, as its quotas are when the answer begins."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *rate_headers(caller)]
        await send(message)

    return send_with_headers
