"""The issuer's public keys: fetched in the background, kept through an outage, believed only while they are listed."""

import asyncio
import json
import logging
import math
import ssl
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Self

import httpx2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from jose import jwk as jose_jwk
from jose.backends.base import Key
from jose.utils import base64url_decode

import metrics

log = logging.getLogger("service.auth")

REFRESH_SECONDS = 600.0
"""From one fetch to the next while the issuer answers. Keys that were fetched within it count as fresh."""
RETRY_SECONDS = 30.0
"""The least time between two fetches while keys are known, and the most while none are."""
KEEP_SECONDS = 24 * 3600.0
"""How long keys are believed that could not be fetched again."""
FETCH_SECONDS = 5.0
"""For a whole fetch, and so the longest that a request waits for one."""
MAX_JWKS_BYTES = 256 * 1024
MIN_RSA_BITS = 2048
"""RFC 7518 §3.3."""

ALGORITHMS_BY_KIND: Mapping[tuple[str, str | None], tuple[str, ...]] = {
    ("RSA", None): ("RS256", "RS384", "RS512"),  # no PS256: python-jose 3.5 has none
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
"""What a key may verify, by `kty` and `crv`. All are asymmetric: what is published must not be able to sign."""
ALGORITHMS = tuple(algorithm for algorithms in ALGORITHMS_BY_KIND.values() for algorithm in algorithms)

KeyByAlgorithm = Mapping[str, Key]
"""One published key, prebuilt for each algorithm that it may verify; building costs as much as verifying."""


class KeysUnavailable(Exception):
    """The issuer's keys are not known, or not well enough to refuse a token: no fault of the token's.

    `message` is fit for the client; `reason` says why, for the owner of the service.
    """

    code = "keys_unavailable"
    message = "The sign-in service does not answer. Try again in a moment."

    def __init__(self, reason: str):
        super().__init__(self.message)
        self.reason = reason


class UnreadableKeySet(Exception):
    """The issuer's answer is not a key set. The message says what it is, and quotes nothing of it."""


class UnusableKey(Exception):
    """A key that is none of ours to use. The message says why."""


class Ed25519Key(Key):  # type: ignore[misc]  # python-jose has no types
    """EdDSA for python-jose, which has none (3.5). It verifies and never signs."""

    def __init__(self, key: Mapping[str, str], algorithm: str):
        self._public_key = Ed25519PublicKey.from_public_bytes(base64url_decode(key["x"].encode("ascii")))

    def verify(self, msg: bytes, sig: bytes) -> bool:
        try:
            self._public_key.verify(sig, msg)
        except InvalidSignature:
            return False
        return True


jose_jwk.register_key("EdDSA", Ed25519Key)


class KeySet:
    """The keys at one address, known while it is entered. Entering and leaving wait for no answer."""

    def __init__(
        self,
        url: str,
        monotonic: Callable[[], float] = time.monotonic,
        refresh_seconds: float = REFRESH_SECONDS,
    ):
        self._url = url
        self._monotonic = monotonic
        self._refresh_seconds = refresh_seconds
        self._keys: dict[str, dict[str, Key]] = {}
        self._fetch: asyncio.Task[None] | None = None
        self._begun_at = self._fetched_at = self._due_at = -math.inf
        self._problem: str | None = "the first fetch has not ended"
        self._failures = 0
        self.summaries: list[str] = []

    async def __aenter__(self) -> Self:
        self._refreshing = asyncio.create_task(self._refresh_for_ever(), name="refresh keys")
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (tasks := {self._refreshing, *([self._fetch] if self._fetch else [])}):
            task.cancel()
        await asyncio.wait(tasks)

    @property
    def ready(self) -> bool:
        """Whether keys are known, and were fetched so recently that they are still believed."""
        return bool(self._keys) and self._age() <= KEEP_SECONDS

    @property
    def kids(self) -> list[str]:
        return list(self._keys)

    async def wait_until_ready(self) -> None:
        """Wait for a fetch that is under way, if no keys are known. Raise `KeysUnavailable` if it brings none."""
        if not self.ready:
            await self._look_again()
        if not self.ready:
            raise KeysUnavailable(self._problem or "the keys are too old to be believed")

    async def find(self, kid: str) -> KeyByAlgorithm | None:
        """Return the key of that id, or None when the issuer lists none that could be used.

        Waits only for what is not known yet: for one fetch, shared by all who wait. Raises `KeysUnavailable` where
        an unknown key may be the issuer's new one: when none are known, or those known are not fresh.
        """
        await self.wait_until_ready()
        if kid not in self._keys:
            await self._look_again()
            if kid not in self._keys and (not self._keys or self._age() > self._refresh_seconds):
                raise KeysUnavailable(self._problem or "the keys are not fresh")
        elif self._monotonic() >= self._due_at:  # the machine slept, say: nobody waits, the known key counts
            self._begin_fetch()
        return self._keys.get(kid)

    async def _look_again(self) -> None:
        """Wait for the fetch under way, or for one begun now, unless that would be too soon after the last."""
        if self._under_way() or self._monotonic() - self._begun_at >= RETRY_SECONDS:
            await asyncio.wait({self._begin_fetch()}, timeout=FETCH_SECONDS)

    def _under_way(self) -> bool:
        return self._fetch is not None and not self._fetch.done()

    def _begin_fetch(self) -> asyncio.Task[None]:
        """Return the fetch under way, begun now if there is none: never two at once."""
        if self._fetch is None or self._fetch.done():
            self._begun_at = self._monotonic()
            self._due_at = self._begun_at + RETRY_SECONDS
            self._fetch = asyncio.create_task(self._fetch_once(), name="fetch keys")
        return self._fetch

    async def _refresh_for_ever(self) -> None:
        while True:
            if self._under_way() or self._monotonic() >= self._due_at:
                await asyncio.wait({self._begin_fetch()})
            left = self._due_at - self._monotonic()
            await asyncio.sleep(min(max(left, 0), RETRY_SECONDS))  # a fetch for an unknown key may move `_due_at`

    async def _fetch_once(self) -> None:
        try:
            problem = self._take_keys(await fetch_jwks(self._url))
        except TimeoutError:
            problem = f"no answer within {FETCH_SECONDS:.0f} s"
        except UnreadableKeySet as error:
            problem = str(error)
        except Exception as error:  # whatever happens to one fetch, the next must come
            problem = f"{type(error).__name__} {str(error)!a:.200}"
        self._note(problem)
        self._due_at = self._monotonic() + self._pause_seconds()

    def _take_keys(self, jwks: Mapping[str, Any]) -> str | None:
        """Believe the keys that are listed, or return why not: an issuer that signs has one, so none is a mishap."""
        before = self.summaries
        keys, self.summaries = read_key_set(jwks)
        if self.summaries != before:
            log.info("the issuer's keys: %.2000s", "; ".join(self.summaries) or "none")
        if not keys:
            return "it lists no key that can be used"
        self._keys, self._fetched_at = keys, self._monotonic()
        return None

    def _note(self, problem: str | None) -> None:
        metrics.count_jwks_fetch(failed=problem is not None)
        if problem and not self._failures:
            log.warning("the issuer's keys cannot be fetched: %s", problem)
        if self._failures and not problem:
            log.info("the issuer's keys are fetched again")
        self._problem = problem
        self._failures = self._failures + 1 if problem else 0

    def _pause_seconds(self) -> float:
        if not self._failures:
            return self._refresh_seconds
        return RETRY_SECONDS if self._keys else min(2.0 ** min(self._failures - 1, 9), RETRY_SECONDS)

    def _age(self) -> float:
        return self._monotonic() - self._fetched_at


async def fetch_jwks(url: str) -> dict[str, Any]:
    """Return what stands at the address, within the time and size that a key set may take. Redirects are not followed.

    Raises `UnreadableKeySet`, and what httpx raises.
    """
    async with asyncio.timeout(FETCH_SECONDS):
        ssl_context = await asyncio.to_thread(_ssl_context)
        # Uncompressed and raw, or 256 KiB of gzip could unpack to as much as it likes.
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        # A client for each fetch, so that no connection stays open for ten minutes.
        async with (
            httpx2.AsyncClient(verify=ssl_context) as client,
            client.stream("GET", url, headers=headers) as response,
        ):
            if response.status_code != 200:
                raise UnreadableKeySet(f"it answers with status {response.status_code}")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_JWKS_BYTES:
                    raise UnreadableKeySet(f"it is longer than {MAX_JWKS_BYTES // 1024} KiB")
    try:
        jwks = json.loads(body)
    except (ValueError, RecursionError):
        raise UnreadableKeySet("it is not JSON") from None
    if not isinstance(jwks, dict) or not isinstance(jwks.get("keys"), list):
        raise UnreadableKeySet("it is JSON, but no key set (an object with a list `keys`)")
    return jwks


@cache
def _ssl_context() -> ssl.SSLContext:
    """Load the trusted certificates, which takes 30 to 70 ms."""
    return httpx2.create_ssl_context()


def read_key_set(jwks: Mapping[str, Any]) -> tuple[dict[str, dict[str, Key]], list[str]]:
    """Return the usable keys by id and algorithm, and a line about each key, usable or not."""
    keys: dict[str, dict[str, Key]] = {}
    summaries = []
    for jwk in jwks["keys"]:
        try:
            key = read_key(jwk)
        except UnusableKey as error:
            summaries.append(f"{_label(jwk)} ignored: {error}")
        except Exception:  # jose and cryptography raise anything; one bad key must not cost the others
            summaries.append(f"{_label(jwk)} ignored: it cannot be read")
        else:
            keys[jwk["kid"]] = key | keys.get(jwk["kid"], {})
            summaries.append(f"{_label(jwk)} {'/'.join(key)}")
    return keys, summaries


def read_key(jwk: Mapping[str, Any]) -> dict[str, Key]:
    """Return the key for each algorithm that it may verify. Raises `UnusableKey`, and anything where it is broken."""
    curve = None if jwk["kty"] == "RSA" else jwk.get("crv")
    algorithms = ALGORITHMS_BY_KIND.get((jwk["kty"], curve))
    if not algorithms:
        raise UnusableKey("its kind is not supported")
    if "d" in jwk:
        raise UnusableKey("its private part is published, so anybody may have signed with it")
    if not isinstance(jwk.get("kid"), str) or not jwk["kid"]:
        raise UnusableKey("it has no kid")
    key_ops = jwk.get("key_ops")
    if jwk.get("use") not in (None, "sig") or (key_ops is not None and "verify" not in list(key_ops)):
        raise UnusableKey("it is not meant for signatures")
    named = jwk.get("alg")
    if named is not None and named not in algorithms:
        raise UnusableKey(f"its alg is not one of {', '.join(algorithms)}")
    key = {name: jose_jwk.construct(jwk, name) for name in algorithms if named in (None, name)}
    if jwk["kty"] == "RSA" and any(each.prepared_key.key_size < MIN_RSA_BITS for each in key.values()):
        raise UnusableKey(f"it is shorter than {MIN_RSA_BITS} bits")
    return key


def _label(jwk: Any) -> str:
    return f"{jwk.get('kid')!a:.80} {jwk.get('kty')!a:.20}" if isinstance(jwk, dict) else "an entry"
