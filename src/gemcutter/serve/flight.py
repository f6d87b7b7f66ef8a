"""Flight: the news of one API request's sequences, on its way from the bridge to the task that answers."""

import asyncio

from gemcutter.schedule.request import Update

MOST = 256  # updates at once: with 20 logprobs each their chunks take 25 ms, for which all else waits


class Flight:
    """`news` hands over what arrived since the last call, MOST updates at a time: a slow reader catches up in few
    goes, between which others have their turn.

    Unread news is bounded by the tokens that the request may still generate.
    """

    def __init__(self, ids: list[str]) -> None:
        self.ids = ids
        self._index = {id: index for index, id in enumerate(ids)}
        self._news: list[tuple[int, Update]] = []
        self._error: Exception | None = None
        self._arrived = asyncio.Event()

    def put(self, update: Update) -> None:
        self._news.append((self._index[update.id], update))
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """End the flight: what is here can still be read, then the first error given is raised."""
        self._error = self._error or error
        self._arrived.set()

    async def news(self) -> list[tuple[int, Update]]:
        """At least one update, each with the index of its sequence. Raises what `fail` was given."""
        await self._arrived.wait()
        if not self._news:
            assert self._error is not None, "woken without news"
            raise self._error
        news, self._news = self._news[:MOST], self._news[MOST:]
        if self._news:
            await asyncio.sleep(0)
        elif self._error is None:
            self._arrived.clear()
        return news
