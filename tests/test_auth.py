"""What the verifier promises, against a real key set over HTTP."""

import asyncio
import contextlib
import gzip
import io
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse

from attacks import ATTACKS, Attack, attack_tokens, token_of_size
from auth import Claims, InvalidToken, KeysUnavailable, TokenMissing, Verifier, bearer_token
from issuer import ALGORITHMS, Issuer, endless, rsa_key, signing_key
from keyset import KeySet

pytestmark = pytest.mark.anyio

MINUTE, HOUR = 60.0, 3600.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Clock:
    """Both clocks of a machine, which go on by themselves and can be set forward."""

    def __init__(self) -> None:
        self.ahead_seconds = 0.0

    def now(self) -> float:
        return time.time() + self.ahead_seconds

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_seconds

    def advance(self, seconds: float) -> None:
        self.ahead_seconds += seconds


@pytest.fixture(scope="module")
def shared_issuer() -> Iterator[Issuer]:
    """An issuer whose keys and answers no test changes."""
    with Issuer() as issuer:
        yield issuer


@pytest.fixture(scope="module")
async def shared_verifier(shared_issuer: Issuer, anyio_backend: str) -> AsyncIterator[Verifier]:
    async with Verifier(shared_issuer.jwks_url, shared_issuer.url) as verifier:
        await verifier.wait_until_ready()
        yield verifier


@pytest.fixture(scope="module")
def running_issuer() -> Iterator[Issuer]:
    with Issuer() as issuer:
        yield issuer


@pytest.fixture
def issuer(running_issuer: Issuer) -> Issuer:
    """An issuer that the test may change, and stop."""
    running_issuer.reset()
    running_issuer.start()
    return running_issuer


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def verifier(issuer: Issuer, clock: Clock) -> AsyncIterator[Verifier]:
    """One that knows the issuer's keys."""
    async with verifier_of(issuer, clock) as verifier:
        await verifier.wait_until_ready()
        yield verifier


def verifier_of(issuer: Issuer, clock: Clock | None = None) -> Verifier:
    clock = clock or Clock()
    return Verifier(issuer.jwks_url, issuer.url, now=clock.now, monotonic=clock.monotonic)


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def lateness() -> AsyncIterator[Callable[[], float]]:
    """Measure how late this process was meanwhile, in all, with what it had to do every hundredth of a second."""
    late = 0.0

    async def measure() -> None:
        nonlocal late
        while True:
            due_at = time.monotonic() + 0.01
            await asyncio.sleep(0.01)
            late += time.monotonic() - due_at

    measuring = asyncio.create_task(measure())
    try:
        yield lambda: late
    finally:
        measuring.cancel()
        await asyncio.wait({measuring})


async def refusal(verification: Awaitable[Claims]) -> InvalidToken:
    with pytest.raises(InvalidToken) as refused:
        await verification
    return refused.value


def random_kid_token(issuer: Issuer) -> str:
    return issuer.token(header={"kid": f"invented-{random.random()}"})


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "service.auth"]


# Good tokens


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_good_token_names_its_user(shared_issuer: Issuer, shared_verifier: Verifier, algorithm: str) -> None:
    claims = await shared_verifier.verify(shared_issuer.token(algorithm, claims={"email": "alice@example.org"}))

    assert claims.user_id == "alice"
    assert claims.all["email"] == "alice@example.org"
    assert "example.org" not in repr(claims)


@pytest.mark.parametrize("algorithm", ["RS256", "RS384", "RS512"])
async def test_an_rsa_key_that_names_no_algorithm_verifies_each_of_its_kind(
    issuer: Issuer, verifier: Verifier, clock: Clock, algorithm: str
) -> None:
    key = signing_key(algorithm, "rsa", rsa_key("any"))
    issuer.keys["any"] = key
    clock.advance(MINUTE)

    assert (await verifier.verify(issuer.token(key=key))).user_id == "alice"


@pytest.mark.parametrize(
    "header",
    [
        *({"typ": typ} for typ in ("JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", "application/jwt")),
        {"x5t": "c29tZSBwcmludA", "cty": "example"},
    ],
    ids=str,
)
async def test_a_header_may_say_what_the_standards_let_it_say(
    shared_issuer: Issuer, shared_verifier: Verifier, header: Mapping[str, Any]
) -> None:
    assert (await shared_verifier.verify(shared_issuer.token(header=header))).user_id == "alice"


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ["https://elsewhere.example", "AUDIENCE"]},
        {"aud": ["AUDIENCE"]},
        {"at_hash": "x", "nonce": 5, "jti": 7},
        {"exp": 253402300799},
        {"sub": "auth0|5f7c8ec7c33c6c004bbafe82"},
        {"sub": "Zoë Müller"},
        {"sub": "x" * 255},
    ],
    ids=str,
)
async def test_claims_may_take_every_form_that_issuers_give_them(
    shared_issuer: Issuer, shared_verifier: Verifier, changes: Mapping[str, Any]
) -> None:
    aud = changes.get("aud")
    if aud:
        changes = {"aud": [shared_issuer.url if each == "AUDIENCE" else each for each in aud]}

    claims = await shared_verifier.verify(shared_issuer.token(claims=changes))

    assert claims.user_id == changes.get("sub", "alice")


async def test_a_token_without_iat_is_good(shared_issuer: Issuer, shared_verifier: Verifier) -> None:
    assert (await shared_verifier.verify(shared_issuer.token(without=["iat"]))).user_id == "alice"


async def test_a_good_token_of_8_kib_is_read(shared_issuer: Issuer, shared_verifier: Verifier) -> None:
    token = token_of_size(shared_issuer, 8180)

    assert len(token) <= 8192
    assert (await shared_verifier.verify(token)).user_id == "alice"


async def test_the_clocks_may_differ_by_up_to_30_seconds(shared_issuer: Issuer) -> None:
    def at(**times: float) -> str:
        return shared_issuer.token(claims={"exp": 2_000_000_000, **times}, without=() if "iat" in times else ("iat",))

    noon = 1_800_000_000
    async with Verifier(shared_issuer.jwks_url, shared_issuer.url, now=lambda: noon) as verifier:
        for times in ({"exp": noon - 29.9}, {"nbf": noon + 30}, {"iat": noon + 30}):
            assert (await verifier.verify(at(**times))).user_id == "alice"
        assert (await refusal(verifier.verify(at(exp=noon - 30)))).code == "token_expired"
        assert (await refusal(verifier.verify(at(nbf=noon + 30.1)))).code == "token_invalid"
        assert (await refusal(verifier.verify(at(iat=noon + 30.1)))).code == "token_invalid"


async def test_a_token_is_good_until_it_expires(issuer: Issuer, verifier: Verifier, clock: Clock) -> None:
    token = issuer.token()
    await verifier.verify(token)

    clock.advance(900 + 31)

    assert (await refusal(verifier.verify(token))).code == "token_expired"


async def test_another_audience_can_be_required(shared_issuer: Issuer) -> None:
    async with Verifier(shared_issuer.jwks_url, shared_issuer.url, "https://chat.example") as verifier:
        claims = await verifier.verify(shared_issuer.token(claims={"aud": "https://chat.example"}))
        refused = await refusal(verifier.verify(shared_issuer.token()))

    assert claims.user_id == "alice"
    assert refused.reason == f"its aud is '{shared_issuer.url}', expected 'https://chat.example'"


async def test_another_claim_can_name_the_user_and_sub_is_required_all_the_same(shared_issuer: Issuer) -> None:
    named = {"https://example.org/id": "u-17"}
    async with Verifier(shared_issuer.jwks_url, shared_issuer.url, user_claim="https://example.org/id") as verifier:
        assert (await verifier.verify(shared_issuer.token(claims=named))).user_id == "u-17"
        for token in (
            shared_issuer.token(),
            shared_issuer.token(claims={"https://example.org/id": ""}),
            shared_issuer.token(claims=named, without=["sub"]),
        ):
            assert (await refusal(verifier.verify(token))).code == "token_invalid"


# Refusals


@pytest.mark.parametrize(("name", "attack"), ATTACKS.items(), ids=ATTACKS)
async def test_every_attack_is_refused(
    shared_issuer: Issuer, shared_verifier: Verifier, name: str, attack: Attack
) -> None:
    given = attack(shared_issuer)
    headers = [given] if isinstance(given, str) else [value for _, value in given]

    try:
        await shared_verifier.verify(bearer_token(headers))
        code = "accepted"
    except (InvalidToken, TokenMissing) as refused:
        code = refused.code

    assert code == {"expired": "token_expired", "scheme:": "token_missing"}.get(name.split()[0], "token_invalid")
    assert shared_issuer.fetched_elsewhere == []


async def test_whatever_is_no_token_is_refused_and_nothing_else_raised(
    shared_issuer: Issuer, shared_verifier: Verifier
) -> None:
    chance = random.Random(5)
    letters = shared_issuer.token()
    odd = ["", ".", "...", "ä.ö.ü", "\ud800.\ud800.\ud800", "\0.\0.\0"]
    for _ in range(1000):
        at, length = chance.randrange(len(letters)), chance.randrange(4)
        junk = "".join(chance.choice('AZaz09-_.=+/ {}"\n\0é') for _ in range(chance.randrange(1, 5)))
        odd.append(letters[:at] + junk + letters[at + length :])

    for unverified_token in odd:
        if unverified_token != letters:
            await refusal(shared_verifier.verify(unverified_token))


@pytest.mark.parametrize("size", [10, 1000, 1_000_000])
async def test_a_token_over_8_kib_is_refused_unread(
    shared_issuer: Issuer, shared_verifier: Verifier, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    refused = await refusal(shared_verifier.verify(token_of_size(shared_issuer, 8192 + size)))

    assert refused.reason == "it is longer than 8192 characters"
    assert "iss missing" in messages(caplog)[-1]


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        ("kid: missing", "it has no kid"),
        ("kid: unknown", "its kid is not among the issuer's keys"),
        ("alg: RS512 for a key that is for RS256", "its alg is RS512, expected RS256 for its kid"),
        ("iss: another", "its iss is 'https://elsewhere.example', expected 'URL'"),
        ("aud: another", "its aud is 'https://elsewhere.example', expected 'URL'"),
        ("exp: missing", "it has no exp: it would be valid for ever"),
        ("sub: missing", "its sub is not 1 to 255 printable characters"),
        ("signature: by another Ed25519 key", "its signature does not fit"),
        ("header: no JSON", "its header is not JSON"),
        ("expired an hour ago", "its exp has passed; this machine's clock says NOW"),
    ],
)
async def test_the_owner_is_told_why_and_the_client_what_to_do(shared_issuer: Issuer, attack: str, reason: str) -> None:
    now = time.time()
    clock_says = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now))
    async with Verifier(shared_issuer.jwks_url, shared_issuer.url, now=lambda: now) as verifier:
        token = dict(attack_tokens(shared_issuer))[attack]
        assert isinstance(token, str)
        refused = await refusal(verifier.verify(bearer_token([token])))

    assert refused.reason == reason.replace("URL", shared_issuer.url).replace("NOW", clock_says)
    assert str(refused) == refused.message
    assert refused.message in (
        "This token is not accepted. Sign in again.",
        "Your session has expired. Get a new token and try again.",
    )


async def test_an_expired_token_of_another_issuer_is_not_called_expired(
    shared_issuer: Issuer, shared_verifier: Verifier
) -> None:
    token = shared_issuer.token(claims={"exp": 5, "iss": "https://elsewhere.example"})

    assert (await refusal(shared_verifier.verify(token))).code == "token_invalid"


# The log


async def test_the_log_names_what_was_expected_and_nothing_about_the_user(
    shared_issuer: Issuer, shared_verifier: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    private = {"sub": "alice-17", "email": "alice@example.org", "exp": 1234567890123, "name": {"first": "Alice"}}
    token = shared_issuer.token(claims={"iss": "https://elsewhere.example", "aud": ["a", "b"], **private})

    await refusal(shared_verifier.verify(token))

    [line] = messages(caplog)
    assert f"iss 'https://elsewhere.example', expected '{shared_issuer.url}'" in line
    assert f"aud ['a', 'b'], expected '{shared_issuer.url}'" in line
    assert f"kid '{shared_issuer.keys['EdDSA'].kid}', expected ['rs512'" in line
    assert "alg 'EdDSA', expected ['RS256', 'RS384'" in line
    assert not any(secret in line.lower() for secret in ("alice", "1234567890123", token.lower()[:40]))


async def test_a_token_cannot_forge_a_line_of_the_log_nor_make_it_long(
    shared_issuer: Issuer, shared_verifier: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    evil = "x\r\n2030-01-01 token accepted\u2028\x1b[2J\u202e" + "🐴" * 300
    await refusal(shared_verifier.verify(shared_issuer.token(header={"kid": evil})))
    await refusal(shared_verifier.verify(shared_issuer.token(header={"alg": evil})))
    await refusal(shared_verifier.verify(shared_issuer.token(claims={"iss": evil, "aud": [evil] * 20})))

    lines = messages(caplog)
    assert len(lines) == 3
    for line in lines:
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 2000


async def test_an_expired_token_is_no_warning(
    shared_issuer: Issuer, shared_verifier: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.auth")
    await refusal(shared_verifier.verify(shared_issuer.token(claims={"exp": 5})))
    await refusal(shared_verifier.verify(shared_issuer.token(claims={"iss": "x"})))

    levels = [record.levelname for record in caplog.records if "token refused" in record.getMessage()]
    assert levels == ["INFO", "WARNING"]


# Keys that come and go


async def test_a_new_key_is_known_at_once_and_the_old_one_refused(
    issuer: Issuer, verifier: Verifier, clock: Clock
) -> None:
    old_token = issuer.token("EdDSA")
    await verifier.verify(old_token)
    issuer.rotate("EdDSA")
    clock.advance(30)

    assert (await verifier.verify(issuer.token("EdDSA"))).user_id == "alice"
    assert (await refusal(verifier.verify(old_token))).reason == "its kid is not among the issuer's keys"
    assert issuer.fetches == 2


async def test_a_key_that_is_no_longer_listed_is_refused_after_ten_minutes(
    issuer: Issuer, verifier: Verifier, clock: Clock
) -> None:
    old_token = issuer.token("ES256")
    issuer.rotate("ES256")
    clock.advance(9 * MINUTE)
    await verifier.verify(old_token)
    assert issuer.fetches == 1

    before = verifier.key_summaries()
    clock.advance(MINUTE)
    await verifier.verify(old_token)  # nobody waits for the refresh that is due now
    await until(lambda: verifier.key_summaries() != before)

    assert (await refusal(verifier.verify(old_token))).reason == "its kid is not among the issuer's keys"
    assert issuer.fetches == 2


async def test_keys_are_refreshed_without_any_request_and_one_fetch_at_a_time(issuer: Issuer) -> None:
    issuer.delay_seconds = 0.1
    async with KeySet(issuer.jwks_url, refresh_seconds=0.05):
        await until(lambda: issuer.fetches >= 4)

    assert issuer.most_at_once == 1


async def test_a_thousand_invented_kids_cause_one_fetch_in_30_seconds(
    issuer: Issuer, verifier: Verifier, clock: Clock
) -> None:
    tokens = [random_kid_token(issuer) for _ in range(1000)]
    await asyncio.gather(*(refusal(verifier.verify(token)) for token in tokens))
    assert issuer.fetches == 1  # the one at the start is not 30 seconds ago

    clock.advance(30)
    await asyncio.gather(*(refusal(verifier.verify(token)) for token in tokens))
    await asyncio.gather(*(refusal(verifier.verify(token)) for token in tokens))

    assert issuer.fetches == 2


async def test_all_who_wait_for_a_new_key_share_one_fetch(issuer: Issuer, verifier: Verifier, clock: Clock) -> None:
    issuer.rotate("EdDSA")
    issuer.delay_seconds = 0.2
    clock.advance(30)

    verified = await asyncio.gather(*(verifier.verify(issuer.token("EdDSA")) for _ in range(100)))

    assert {claims.user_id for claims in verified} == {"alice"}
    assert issuer.fetches == 2


async def test_nobody_with_a_known_key_waits_for_the_fetch_that_an_invented_kid_causes(
    issuer: Issuer, verifier: Verifier, clock: Clock
) -> None:
    issuer.delay_seconds = 3
    clock.advance(30)
    invented = asyncio.create_task(refusal(verifier.verify(random_kid_token(issuer))))
    await until(lambda: issuer.fetches == 2)

    await verifier.verify(issuer.token())

    assert not invented.done()
    await invented


async def test_a_request_that_is_given_up_does_not_end_the_fetch_for_others(
    issuer: Issuer, verifier: Verifier, clock: Clock
) -> None:
    issuer.rotate("EdDSA")
    issuer.delay_seconds = 0.2
    clock.advance(30)
    given_up = asyncio.create_task(verifier.verify(issuer.token("EdDSA")))
    other = asyncio.create_task(verifier.verify(issuer.token("EdDSA")))
    await until(lambda: issuer.fetches == 2)

    given_up.cancel()

    assert (await other).user_id == "alice"


async def test_keys_of_other_kinds_do_no_harm_and_are_named_with_the_reason(
    shared_issuer: Issuer, shared_verifier: Verifier
) -> None:
    summaries = shared_verifier.key_summaries()

    assert summaries[:10] == [
        "'symmetric' 'oct' ignored: its kind is not supported",
        "'odd' 'ML-DSA' ignored: its kind is not supported",
        "'curve' 'EC' ignored: its kind is not supported",
        "'enc' 'RSA' ignored: it is not meant for signatures",
        "'ops' 'OKP' ignored: it is not meant for signatures",
        "'rs512' 'RSA' RS512",
        "'ps256' 'RSA' ignored: its alg is not one of RS256, RS384, RS512",
        "'short' 'RSA' ignored: it is shorter than 2048 bits",
        "'leaked' 'OKP' ignored: its private part is published, so anybody may have signed with it",
        "'broken' 'RSA' ignored: it cannot be read",
    ]
    assert summaries[10] == f"'{shared_issuer.keys['EdDSA'].kid}' 'OKP' EdDSA"


@pytest.mark.parametrize(
    "junk", [None, 5, "key", [], {}, {"kty": ["EC"]}, {"kty": "EC", "kid": "EdDSA", "crv": {}}, {"kid": 5}], ids=str
)
async def test_a_broken_entry_does_not_cost_the_good_ones(issuer: Issuer, junk: Any) -> None:
    issuer.answer = lambda: JSONResponse({"keys": [junk, *issuer.jwks()["keys"], junk]})
    async with verifier_of(issuer) as verifier:
        assert (await verifier.verify(issuer.token())).user_id == "alice"


@pytest.mark.parametrize(
    "members",
    [
        {"use": "sig"},
        {"key_ops": ["verify"]},
        {"use": "sig", "key_ops": ["sign", "verify"], "alg": "EdDSA"},
        {"use": None},
    ],
    ids=str,
)
async def test_a_key_that_says_it_is_for_verifying_is_used(issuer: Issuer, members: Mapping[str, Any]) -> None:
    issuer.keys["EdDSA"] = signing_key("EdDSA", **members)
    async with verifier_of(issuer) as verifier:
        assert (await verifier.verify(issuer.token())).user_id == "alice"


async def test_two_keys_may_share_a_kid_when_their_kinds_differ(issuer: Issuer) -> None:
    issuer.keys = {name: signing_key(name, "the-kid") for name in ("RS256", "EdDSA", "ES256")}
    async with verifier_of(issuer) as verifier:
        for name in issuer.keys:
            assert (await verifier.verify(issuer.token(name))).user_id == "alice"


@pytest.mark.parametrize("kid", [None, "", 5, ["kid"]], ids=repr)
async def test_a_key_without_a_proper_kid_verifies_nothing_and_does_no_harm(issuer: Issuer, kid: Any) -> None:
    nameless = signing_key("EdDSA")
    entry = (
        {**nameless.jwk, "kid": kid} if kid is not None else {"kty": "OKP", "crv": "Ed25519", "x": nameless.jwk["x"]}
    )
    issuer.answer = lambda: JSONResponse({"keys": [entry, *issuer.jwks()["keys"]]})
    async with verifier_of(issuer) as verifier:
        for token in (issuer.token(key=nameless, header={"kid": kid}), issuer.token(key=nameless, without=["kid"])):
            await refusal(verifier.verify(token))
        assert (await verifier.verify(issuer.token())).user_id == "alice"


# Issuers that do not answer, or not with keys


async def test_known_keys_are_believed_through_an_outage_of_a_day_but_no_longer(
    issuer: Issuer, verifier: Verifier, clock: Clock
) -> None:
    issuer.stop()
    clock.advance(23.9 * HOUR)
    await verifier.verify(issuer.token(claims={"exp": clock.now() + 60}))

    clock.advance(0.2 * HOUR)
    with pytest.raises(KeysUnavailable):
        await verifier.verify(issuer.token(claims={"exp": clock.now() + 60}))

    issuer.start()
    clock.advance(30)
    assert (await verifier.verify(issuer.token(claims={"exp": clock.now() + 60}))).user_id == "alice"


async def test_an_invented_kid_is_refused_in_an_outage_as_long_as_the_keys_are_fresh(
    issuer: Issuer, verifier: Verifier, clock: Clock
) -> None:
    issuer.stop()
    clock.advance(5 * MINUTE)
    await refusal(verifier.verify(random_kid_token(issuer)))

    clock.advance(6 * MINUTE)
    with pytest.raises(KeysUnavailable):
        await verifier.verify(random_kid_token(issuer))
    await verifier.verify(issuer.token())


async def test_in_an_outage_the_issuer_is_asked_every_30_seconds(
    issuer: Issuer, verifier: Verifier, clock: Clock
) -> None:
    issuer.answer = lambda: Response(status_code=503)
    clock.advance(30)
    await refusal(verifier.verify(random_kid_token(issuer)))
    for _ in range(30):
        await verifier.verify(issuer.token())
        await asyncio.sleep(0.002)
    assert issuer.fetches == 2

    clock.advance(30)
    await verifier.verify(issuer.token())
    await until(lambda: issuer.fetches == 3)


async def test_an_outage_is_logged_when_it_begins_and_when_it_ends(
    issuer: Issuer, verifier: Verifier, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.auth")
    issuer.answer = lambda: Response(status_code=503)
    for _ in range(3):
        clock.advance(11 * MINUTE)
        with pytest.raises(KeysUnavailable):
            await verifier.verify(random_kid_token(issuer))
    assert issuer.fetches == 4
    issuer.answer = None
    clock.advance(30)
    await refusal(verifier.verify(random_kid_token(issuer)))

    assert [message for message in messages(caplog) if "token refused" not in message] == [
        "the issuer's keys cannot be fetched: it answers with status 503",
        "the issuer's keys are fetched again",
    ]


async def test_an_issuer_that_cannot_be_reached_at_the_start_is_tried_again_after_one_and_two_seconds(
    issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    token = issuer.token()
    issuer.stop()
    async with lateness() as late:
        begun_at = time.monotonic()
        async with verifier_of(issuer) as verifier:
            with pytest.raises(KeysUnavailable) as unavailable:
                await verifier.verify(token)
            issuer.answer = lambda: Response(status_code=500)
            issuer.start()  # in good time for the second try
            for _ in range(100):
                with pytest.raises(KeysUnavailable):
                    await verifier.verify(token)
            assert unavailable.value.code == "keys_unavailable"
            assert "ConnectError" in unavailable.value.reason
            assert str(unavailable.value) == unavailable.value.message

            await until(lambda: issuer.fetches == 1)
            issuer.answer = None
            await until(lambda: bool(verifier.key_summaries()))

            assert (await verifier.verify(issuer.token())).user_id == "alice"
    first, second = issuer.fetched_at
    assert 1 <= first - begun_at < 2 + late()
    assert 2 <= second - first < 3 + late()
    assert len(messages(caplog)) == 1


async def test_what_is_plainly_no_token_is_refused_even_while_no_keys_are_known(issuer: Issuer) -> None:
    issuer.stop()
    async with verifier_of(issuer) as verifier:
        await refusal(verifier.verify("token"))
        await refusal(verifier.verify(issuer.token(header={"alg": "none"})))


async def test_entering_does_not_wait_for_the_issuer_and_the_first_request_does(issuer: Issuer) -> None:
    issuer.delay_seconds = 1
    async with verifier_of(issuer) as verifier:
        assert verifier.key_summaries() == []
        assert (await verifier.verify(issuer.token())).user_id == "alice"
    assert issuer.fetches == 1


async def test_neither_a_fetch_nor_a_request_that_waits_for_it_takes_longer_than_five_seconds() -> None:
    async def waited_seconds(issuer: Issuer) -> float:
        async with verifier_of(issuer) as verifier:
            begun_at = time.monotonic()
            with pytest.raises(KeysUnavailable):
                await verifier.verify(issuer.token())
            seconds = time.monotonic() - begun_at
            await until(lambda: issuer.open_connections == 0, 0.5)
            return seconds

    with Issuer() as silent, Issuer() as dripping:
        silent.delay_seconds = 60
        dripping.answer = lambda: StreamingResponse(endless([], b" ", pause_seconds=0.1))
        async with lateness() as late:
            waited = await asyncio.gather(waited_seconds(silent), waited_seconds(dripping))
        for seconds in waited:
            assert 4.5 < seconds < 5.5 + late()


NO_KEY_SET = "it is JSON, but no key set (an object with a list `keys`)"
GARBAGE: dict[str, tuple[str, Callable[[], Response]]] = {
    "not found": ("it answers with status 404", lambda: JSONResponse({"keys": []}, 404)),
    "failure": ("it answers with status 500", lambda: Response(status_code=500)),
    "no content": ("it answers with status 204", lambda: Response(status_code=204)),
    "redirect": ("it answers with status 302", lambda: RedirectResponse("/elsewhere", 302)),
    "lasting redirect": ("it answers with status 308", lambda: RedirectResponse("/elsewhere", 308)),
    "page": ("it is not JSON", lambda: PlainTextResponse("<html>Sign in</html>")),
    "nested": ("it is not JSON", lambda: PlainTextResponse("[" * 100_000)),
    "compressed": (
        "it is not JSON",
        lambda: Response(gzip.compress(b'{"keys":[]}'), headers={"content-encoding": "gzip"}),
    ),
    "no UTF-8": ("it is not JSON", lambda: Response(b'{"keys":[],"\xff":1}')),
    "list": (NO_KEY_SET, lambda: JSONResponse([])),
    "object of keys": (NO_KEY_SET, lambda: JSONResponse({"keys": {"kid": "x"}})),
    "discovery document": (NO_KEY_SET, lambda: JSONResponse({"issuer": "x", "jwks_uri": "y"})),
    "too long": (
        "it is longer than 256 KiB",
        lambda: JSONResponse({"keys": [], "more": "x" * 256 * 1024}),
    ),
}
WITHDRAWN: dict[str, tuple[str, Callable[[], Response]]] = {
    "no keys": ("it lists no key that can be used", lambda: JSONResponse({"keys": []})),
    "symmetric keys only": (
        "it lists no key that can be used",
        lambda: JSONResponse({"keys": [{"kid": "x", "kty": "oct", "k": "x"}]}),
    ),
}


@pytest.mark.parametrize(("reason", "answer"), [*GARBAGE.values(), *WITHDRAWN.values()], ids=[*GARBAGE, *WITHDRAWN])
async def test_an_answer_without_keys_is_no_fault_of_the_token(
    issuer: Issuer, reason: str, answer: Callable[[], Response]
) -> None:
    issuer.answer = answer
    async with verifier_of(issuer) as verifier:
        with pytest.raises(KeysUnavailable) as unavailable:
            await verifier.verify(issuer.token())

    assert unavailable.value.reason == reason
    assert issuer.fetched_elsewhere == []


@pytest.mark.parametrize("answer", [answer for _, answer in GARBAGE.values()], ids=GARBAGE)
async def test_an_answer_that_is_no_key_set_does_not_cost_the_keys_that_are_known(
    issuer: Issuer, verifier: Verifier, clock: Clock, answer: Callable[[], Response]
) -> None:
    issuer.answer = answer
    clock.advance(30)
    await refusal(verifier.verify(random_kid_token(issuer)))
    assert issuer.fetches == 2

    assert (await verifier.verify(issuer.token())).user_id == "alice"


async def test_an_issuer_that_lists_no_key_costs_nobody_their_login_for_a_day(
    issuer: Issuer, verifier: Verifier, clock: Clock
) -> None:
    issuer.answer = lambda: JSONResponse({"keys": []})
    clock.advance(30)
    await refusal(verifier.verify(random_kid_token(issuer)))
    assert issuer.fetches == 2
    assert (await verifier.verify(issuer.token())).user_id == "alice"

    clock.advance(24 * 3600)
    with pytest.raises(KeysUnavailable) as unavailable:
        await verifier.verify(issuer.token())
    assert unavailable.value.reason == "it lists no key that can be used"


async def test_a_key_set_of_256_kib_is_read(issuer: Issuer) -> None:
    body = json.dumps(issuer.jwks())
    issuer.answer = lambda: Response(body.ljust(256 * 1024))
    async with verifier_of(issuer) as verifier:
        assert (await verifier.verify(issuer.token())).user_id == "alice"


async def test_reading_ends_where_a_key_set_is_too_long(issuer: Issuer) -> None:
    sent: list[int] = []
    issuer.answer = lambda: StreamingResponse(endless(sent))
    async with verifier_of(issuer) as verifier:
        with pytest.raises(KeysUnavailable) as unavailable:
            await verifier.verify(issuer.token())
        await until(lambda: issuer.open_connections == 0)

    assert unavailable.value.reason == "it is longer than 256 KiB"
    assert sum(sent) < 16 * 1024 * 1024  # what the sockets hold


@pytest.mark.parametrize("delay_seconds", [0.0, 60.0])
async def test_leaving_leaves_no_task_and_no_connection(issuer: Issuer, delay_seconds: float) -> None:
    issuer.delay_seconds = delay_seconds
    before = asyncio.all_tasks()
    async with verifier_of(issuer):
        await until(lambda: issuer.fetches == 1)

    assert asyncio.all_tasks() == before
    await until(lambda: issuer.open_connections == 0)


# The Authorization header


@pytest.mark.parametrize("header", ["Bearer a.b.c", "bearer a.b.c", "BEARER   a.b.c", "Bearer a.b.c "])
def test_a_bearer_token_is_taken_from_its_header(header: str) -> None:
    assert bearer_token([header]) == "a.b.c"


@pytest.mark.parametrize(
    "headers",
    [[], [""], ["Basic YTpi"], ["a.b.c"], ["Bearera.b.c"], [" Bearer a.b.c"], ["Bearer"], ["Bearer   "]],
    ids=str,
)
def test_without_a_bearer_token_it_is_missing(headers: list[str]) -> None:
    with pytest.raises(TokenMissing) as missing:
        bearer_token(headers)
    assert missing.value.code == "token_missing"


@pytest.mark.parametrize(
    "headers",
    [["Bearer a b"], ["Bearer a\tb"], ["Bearer a", "Bearer a"], ["Basic a", "Bearer b"]],
)
def test_where_it_is_unclear_which_token_is_meant_none_is_taken(headers: list[str]) -> None:
    with pytest.raises(InvalidToken) as refused:
        bearer_token(headers)
    assert refused.value.code == "token_invalid"


# What it costs


async def test_no_attack_costs_much_more_than_a_good_token(
    shared_issuer: Issuer,
    shared_verifier: Verifier,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run with `-s` to see the figures. The log is written, as it is in service."""
    logger = logging.getLogger("service.auth")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(io.StringIO())])

    async def microseconds(headers: list[str]) -> float:
        """Of the fastest of several runs: whatever else the machine does only adds to it."""
        fastest = float("inf")
        for _ in range(7):
            begun_at = time.perf_counter()
            with contextlib.suppress(InvalidToken, TokenMissing):
                await shared_verifier.verify(bearer_token(headers))
            fastest = min(fastest, time.perf_counter() - begun_at)
        return fastest * 1e6

    good = {name: await microseconds([f"Bearer {shared_issuer.token(name)}"]) for name in ALGORITHMS}
    costs = {}
    for name, given in attack_tokens(shared_issuer):
        costs[name] = await microseconds([given] if isinstance(given, str) else [value for _, value in given])

    print("\na good token:", ", ".join(f"{name} {cost:.0f} µs" for name, cost in good.items()))
    print("attacks, in good EdDSA tokens:")
    for name, cost in sorted(costs.items(), key=lambda each: -each[1]):
        print(f"  {cost / good['EdDSA']:6.2f}  {name}")
    assert max(costs.values()) < 20 * good["EdDSA"]
