"""Many answers are read in turns, so that what is new does not wait for all of them in each round of the loop."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta

import httpx2
import pytest

import considerate
from considerate import FIRST_PIECES, ROUNDS_TO_CLIENT, ConsiderateStream, Turnstile
from provider import open_upstream
from standin import Say, StandIn

pytestmark = pytest.mark.anyio


class Rounds:
    """Counts the rounds of the event loop while it is entered."""

    number = 0

    async def __aenter__(self) -> "Rounds":
        self._counting = asyncio.create_task(self._count())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._counting.cancel()

    async def _count(self) -> None:
        while True:
            self.number += 1
            await asyncio.sleep(0)


class Pieces(httpx2.AsyncByteStream):
    """A stream of numbered pieces, each after so many seconds."""

    closed = ended = False

    def __init__(self, *seconds: float):
        self._seconds = seconds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for number, seconds in enumerate(self._seconds):
                if seconds:
                    await asyncio.sleep(seconds)
                yield b"%d" % number
        finally:
            self.ended = True

    async def aclose(self) -> None:
        self.closed = True


async def test_so_many_pass_in_a_round_in_the_order_in_which_they_came() -> None:
    turnstile, passed = Turnstile(4), []

    async def come(number: int) -> None:
        await turnstile.passed()
        passed.append((rounds.number, number))

    async with Rounds() as rounds:
        await asyncio.gather(*[come(number) for number in range(18)])
    assert [number for _, number in passed] == list(range(18))
    assert max(Counter(at for at, _ in passed).values()) == 4
    assert passed[-1][0] - passed[0][0] <= 18 // 4 + 1  # no round is left empty


async def test_who_comes_alone_never_waits() -> None:
    turnstile = Turnstile(4)
    async with Rounds() as rounds:
        for _ in range(20):
            begin = rounds.number
            await turnstile.passed()
            assert rounds.number == begin
            await asyncio.sleep(0)


async def test_nobody_waits_in_another_event_loop() -> None:
    nobody_passes = Turnstile(0)
    async with asyncio.timeout(5):
        await asyncio.to_thread(lambda: asyncio.run(nobody_passes.passed()))


async def test_a_stream_that_is_closed_while_it_waits_takes_nobodys_place() -> None:
    turnstile = Turnstile(1)
    _, gone, *others = [asyncio.create_task(turnstile.passed()) for _ in range(4)]
    await asyncio.sleep(0)
    gone.cancel()
    async with asyncio.timeout(5):
        await asyncio.gather(*others)
    await asyncio.wait({gone})
    assert gone.cancelled()


async def test_only_a_piece_that_had_to_be_waited_for_waits_again_and_never_the_first_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(considerate, "AT_ONCE_SECONDS", at_once := 0.1)  # long enough not to be taken by the machine
    nobody_passes, came, late = Turnstile(0), [], 1.5 * at_once
    stream = ConsiderateStream(Pieces(*[late] * FIRST_PIECES, 0, 0, late, 0), nobody_passes)

    async def read() -> None:
        async for piece in stream:
            came.append(piece)

    reading = asyncio.create_task(read())
    async with asyncio.timeout(10):
        while len(came) < FIRST_PIECES + 2:
            await asyncio.sleep(0.01)
    await asyncio.sleep(3 * late)
    assert len(came) == FIRST_PIECES + 2
    reading.cancel()
    await asyncio.wait({reading})


async def test_the_first_words_are_on_their_way_before_the_rest_of_what_came_with_them_is_read() -> None:
    async with Rounds() as rounds:
        at = [rounds.number async for _ in ConsiderateStream(Pieces(*[0] * 20), Turnstile(0))]
    first, last = at[: FIRST_PIECES - 1], at[FIRST_PIECES - 1 :]
    assert len({*first}) == len({*last}) == 1
    assert last[0] - first[0] == ROUNDS_TO_CLIENT


async def test_the_models_answers_are_read_so_and_closed_as_ever(model: StandIn) -> None:
    model.will(Say("Hello"))
    upstream = open_upstream(
        api_key="k", base_url=model.url, default_model=None, api="responses", max_connections=0, timeout_seconds=9
    )
    async with upstream as opened:
        assert opened.client is not None
        asking = opened.client.responses.with_streaming_response.create(model="m", input="Hi", stream=True)
        async with asking as response:
            stream = response.http_response.stream
            assert isinstance(stream, ConsiderateStream)
            assert b"Hello" in await response.read()
            assert response.elapsed > timedelta(0)


async def test_a_stream_that_is_closed_leaves_no_generator_behind() -> None:
    unread, begun, read = Pieces(0, 0), Pieces(0, 0), Pieces(60)
    await ConsiderateStream(unread, Turnstile()).aclose()
    assert unread.closed
    stream = ConsiderateStream(begun, Turnstile())
    assert await anext(aiter(stream)) == b"0"
    await stream.aclose()
    assert (begun.ended, begun.closed) == (True, True)
    stream = ConsiderateStream(read, Turnstile())
    reading = asyncio.ensure_future(anext(aiter(stream)))
    await asyncio.sleep(0.01)
    await stream.aclose()  # under whoever reads
    assert (read.ended, read.closed) == (False, True)
    reading.cancel()
    await asyncio.wait({reading})
    assert read.ended
