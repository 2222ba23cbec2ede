"""Which handler takes which topic: filled by the services when a worker is made, started when it is ready."""

from __future__ import annotations

from .base import Consumer, Handler, Queue, check_topic


class Handlers:
    """A small registry, one per worker. A service registers its handlers; ``start`` sets them to work."""

    def __init__(self) -> None:
        self._handlers: dict[str, tuple[Handler, int | None]] = {}

    def register(self, topic: str, handler: Handler, *, concurrency: int | None = None) -> None:
        """Let a handler take a topic.

        :raises BadRequest: it is no name of a topic.
        :raises ValueError: the topic has a handler.
        """
        check_topic(topic)
        if topic in self._handlers:
            raise ValueError(f"topic {topic} has a handler")
        self._handlers[topic] = (handler, concurrency)

    def topics(self) -> list[str]:
        """All topics that have a handler."""
        return sorted(self._handlers)

    def start(self, queue: Queue) -> list[Consumer]:
        """Let every handler work on the queue; ``Queue.close`` ends them."""
        return [
            queue.consume(topic, handler, concurrency=concurrency)
            for topic, (handler, concurrency) in self._handlers.items()
        ]
