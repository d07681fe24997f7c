"""`Verifier`: from an unverified token to `Claims`, or a refusal that says what to do."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from jose import jws
from jose.exceptions import JWSError
from jose.utils import base64url_decode, base64url_encode

from keyset import ALGORITHMS, KeyByAlgorithm, KeySet, KeysUnavailable

__all__ = ["Claims", "InvalidToken", "KeysUnavailable", "TokenMissing", "Verifier", "bearer_token"]

log = logging.getLogger("service.auth")

MAX_TOKEN_CHARACTERS = 8 * 1024
MAX_USER_ID_CHARACTERS = 255
LEEWAY_SECONDS = 30
"""By how much the issuer's clock may differ from ours."""
YEAR_10000 = 253_402_300_800
"""Seconds since 1970. A time from then on is no time that an issuer would write."""


@dataclass(frozen=True)
class Claims:
    """What a verified token says. Only a `Verifier` makes it."""

    user_id: str
    all: Mapping[str, Any] = field(repr=False, compare=False)


class TokenMissing(Exception):
    """The request carries no bearer token."""

    code = "token_missing"
    message = "Sign in, and send the token as `Authorization: Bearer …`."

    def __init__(self) -> None:
        super().__init__(self.message)


class InvalidToken(Exception):
    """The token is refused. `message` is fit for the client, and says the same whatever was wrong.

    `reason` tells the owner of the service. Of the token it quotes `iss`, `aud`, `kid` and `alg` only.
    """

    def __init__(self, reason: str, *, expired: bool = False):
        self.code = "token_expired" if expired else "token_invalid"
        self.message = (
            "Your session has expired. Get a new token and try again."
            if expired
            else "This token is not accepted. Sign in again."
        )
        self.reason = reason
        super().__init__(self.message)


def bearer_token(authorization_headers: Sequence[str]) -> str:
    """Return the unverified token, given every `Authorization` header of a request (RFC 6750 §2.1, RFC 9110 §11.4).

    Raises `TokenMissing`, or `InvalidToken` where it is unclear which token is meant.
    """
    if not authorization_headers:
        raise TokenMissing
    if len(authorization_headers) > 1:
        raise InvalidToken("there are several Authorization headers")
    if len(authorization_headers[0]) > len("Bearer ") + MAX_TOKEN_CHARACTERS:  # unread: reading it is what costs
        raise InvalidToken(f"it is longer than {MAX_TOKEN_CHARACTERS} characters")
    scheme, _, rest = authorization_headers[0].partition(" ")
    if scheme.lower() != "bearer":
        raise TokenMissing
    unverified_token = rest.strip(" ")
    if not unverified_token:
        raise TokenMissing
    if len(unverified_token.split()) != 1:
        raise InvalidToken("the Authorization header does not hold exactly one token")
    return unverified_token


class Verifier:
    """Verifies tokens of one issuer for one audience, while it is entered.

    Entering begins to fetch the issuer's keys and does not wait for them; leaving ends all that it began.
    """

    def __init__(
        self,
        jwks_url: str,
        issuer: str,
        audience: str | None = None,
        user_claim: str = "sub",
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self._keys = KeySet(jwks_url, monotonic)
        self._issuer = issuer
        self._audience = audience or issuer
        self._user_claim = user_claim
        self._now = now

    async def __aenter__(self) -> Self:
        await self._keys.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._keys.__aexit__()

    async def wait_until_ready(self) -> None:
        """Wait for the first fetch of keys, 5 s at most. Raise `KeysUnavailable`, with the reason, if it fails."""
        await self._keys.wait_until_ready()

    def key_summaries(self) -> list[str]:
        """Return a line about each key that the issuer lists: its id, kind, algorithms, or why it is ignored."""
        return list(self._keys.summaries)

    async def verify(self, unverified_token: str) -> Claims:
        """Raise `InvalidToken`, or `KeysUnavailable` where it cannot be judged. Waits 5 s at most, as a rule not."""
        with self._judging(unverified_token):
            header = _checked_header(unverified_token)
        key = await self._keys.find(header["kid"])
        with self._judging(unverified_token):
            payload = _signed_payload(unverified_token, header["alg"], key)
            return self._checked_claims(_read_json(payload, "payload"))

    @contextmanager
    def _judging(self, unverified_token: str) -> Iterator[None]:
        try:
            yield
            return
        except InvalidToken as refused:
            refusal = refused
        except Exception as error:  # jose 3.5 and json raise RecursionError, TypeError, OverflowError, …
            refusal = InvalidToken(f"it cannot be read ({type(error).__name__})")
        self._log_refusal(unverified_token, refusal)
        raise refusal from None

    def _checked_claims(self, claims: Any) -> Claims:
        if not isinstance(claims, dict):
            raise InvalidToken("its payload is no JSON object")
        if claims.get("iss") != self._issuer:
            raise InvalidToken(f"its iss is {_shown(claims.get('iss'))}, expected {self._issuer!r}")
        if self._audience not in _audiences(claims):
            raise InvalidToken(f"its aud is {_shown(claims.get('aud'))}, expected {self._audience!r}")
        for name in ("sub", self._user_claim):
            if not _names_a_user(claims.get(name)):
                raise InvalidToken(f"its {name} is not 1 to {MAX_USER_ID_CHARACTERS} printable characters")
        self._check_times(claims)
        return Claims(claims[self._user_claim], claims)

    def _check_times(self, claims: Mapping[str, Any]) -> None:
        if "exp" not in claims:
            raise InvalidToken("it has no exp: it would be valid for ever")
        for name in ("exp", "nbf", "iat"):
            if name in claims and not _is_time(claims[name]):
                raise InvalidToken(f"its {name} is no number of seconds since 1970")
        now = self._now()
        for name in ("nbf", "iat"):
            if claims.get(name, 0) > now + LEEWAY_SECONDS:
                raise InvalidToken(f"its {name} is still to come; this machine's clock says {_clock(now)}")
        if now >= claims["exp"] + LEEWAY_SECONDS:
            raise InvalidToken(f"its exp has passed; this machine's clock says {_clock(now)}", expired=True)

    def _log_refusal(self, unverified_token: str, refusal: InvalidToken) -> None:
        """Log why. Of the token only `iss`, `aud`, `kid` and `alg`: other claims are about the user."""
        header, claims = _unverified_parts(unverified_token)
        compared = (
            ("iss", claims, self._issuer),
            ("aud", claims, self._audience),
            ("kid", header, self._keys.kids),
            ("alg", header, ALGORITHMS),
        )
        log.log(
            logging.INFO if refusal.code == "token_expired" else logging.WARNING,
            "token refused: %s (%s)",
            refusal.reason,
            "; ".join(f"{name} {_shown(part.get(name))}, expected {_shown(known)}" for name, part, known in compared),
        )


def _checked_header(unverified_token: str) -> dict[str, Any]:
    if len(unverified_token) > MAX_TOKEN_CHARACTERS:
        raise InvalidToken(f"it is longer than {MAX_TOKEN_CHARACTERS} characters")
    segments = unverified_token.split(".")
    if len(segments) != 3 or not all(map(_is_base64url, segments)):
        raise InvalidToken("it is not three parts of base64url")
    header = _read_json(base64url_decode(segments[0].encode()), "header")
    if not isinstance(header, dict):
        raise InvalidToken("its header is no JSON object")
    if header.get("alg") not in ALGORITHMS:
        raise InvalidToken(f"its alg is {_shown(header.get('alg'))}, expected one of {', '.join(ALGORITHMS)}")
    if "crit" in header:  # RFC 7515 §4.1.11: what is critical and not understood is refused, and we understand none
        raise InvalidToken("its header has crit")
    if str(header.get("typ", "JWT")).lower().removeprefix("application/") not in ("jwt", "at+jwt"):
        raise InvalidToken("its typ is neither JWT nor at+jwt: it was made for another use")
    if not isinstance(header.get("kid"), str):
        raise InvalidToken("it has no kid")
    return header


def _read_json(data: bytes, part: str) -> Any:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):  # no UTF-8, no JSON, numbers of too many digits, too deep
        raise InvalidToken(f"its {part} is not JSON") from None


def _signed_payload(unverified_token: str, algorithm: str, key: KeyByAlgorithm | None) -> bytes:
    if key is None:
        raise InvalidToken("its kid is not among the issuer's keys")
    if algorithm not in key:
        raise InvalidToken(f"its alg is {algorithm}, expected {' or '.join(key)} for its kid")
    try:
        payload: bytes = jws.verify(unverified_token, key[algorithm], [algorithm])
    except JWSError:
        raise InvalidToken("its signature does not fit") from None
    return payload


def _is_base64url(segment: str) -> bool:
    """Whether it is the one way to write its bytes: jose 3.5 skips what is not base64, and ignores spare bits."""
    data = segment.encode("ascii")
    return bool(data) and bool(base64url_encode(base64url_decode(data)) == data)


def _audiences(claims: Mapping[str, Any]) -> list[str]:
    audience = claims.get("aud")
    audiences: list[Any] = audience if isinstance(audience, list) else [audience]
    return audiences if all(isinstance(each, str) for each in audiences) else []


def _names_a_user(value: Any) -> bool:
    """Whether it can be a key in the store: no lone surrogates, which no database takes, nor control characters."""
    if not isinstance(value, str) or len(value) > MAX_USER_ID_CHARACTERS:
        return False
    return value.isprintable() and bool(value.strip())


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < YEAR_10000


def _clock(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")


def _unverified_parts(unverified_token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return header and claims as far as they can be read, to be named in the log."""
    if len(unverified_token) > MAX_TOKEN_CHARACTERS:
        return {}, {}
    parts: list[dict[str, Any]] = []
    for segment in [*unverified_token.split(".", 2), ""][:2]:
        try:
            part = json.loads(base64url_decode(segment.encode()).decode())
        except Exception:  # as in judging: anything
            part = None
        parts.append(part if isinstance(part, dict) else {})
    return parts[0], parts[1]


def _shown(value: Any) -> str:
    """Return it fit for a line of the log: bounded, and in printable ASCII, so that it cannot pretend to be lines."""
    match value:
        case None:
            return "missing"
        case str():
            return ascii(value[:100])[:200]
        case list() | tuple():
            return f"[{', '.join(_shown(each) for each in value[:10] if isinstance(each, str))}"[:200] + "]"
    return f"of type {type(value).__name__}"
