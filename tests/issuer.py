"""A token issuer for tests: a real JWKS endpoint on this machine, with keys of each supported kind and of others."""

import asyncio
import base64
import json
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

import uvicorn
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

HASHES: dict[str, hashes.HashAlgorithm] = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
CURVES: dict[str, tuple[str, ec.EllipticCurve]] = {
    "ES256": ("P-256", ec.SECP256R1()),
    "ES384": ("P-384", ec.SECP384R1()),
    "ES512": ("P-521", ec.SECP521R1()),
}
ALGORITHMS = ("EdDSA", "ES256", "ES384", "ES512", "RS256", "RS384", "RS512")


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _number(value: int, size: int | None = None) -> str:
    return base64url(value.to_bytes(size or (value.bit_length() + 7) // 8, "big"))


def json_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()


def compact(header: Any, payload: Any, sign: Callable[[bytes], bytes]) -> str:
    """Return header, payload and signature as one token. Bytes are taken as they are, anything else becomes JSON."""
    signed = f"{base64url(json_bytes(header))}.{base64url(json_bytes(payload))}"
    return f"{signed}.{base64url(sign(signed.encode()))}"


@cache
def rsa_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    """Return the same key for the same name: making one takes a tenth of a second."""
    return rsa.generate_private_key(65537, bits)


def new_private_key(algorithm: str) -> PrivateKey:
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    if algorithm in CURVES:
        return ec.generate_private_key(CURVES[algorithm][1])
    return rsa_key(algorithm)


@dataclass(frozen=True)
class SigningKey:
    """A private key, and how it stands in a key set."""

    algorithm: str
    kid: str
    private: PrivateKey = field(repr=False)
    listed_as: Mapping[str, Any]
    """Members that its entry has beyond kid and key, or that replace those."""

    def sign(self, data: bytes) -> bytes:
        if isinstance(self.private, ed25519.Ed25519PrivateKey):
            return self.private.sign(data)
        digest = HASHES[self.algorithm[2:]]
        if isinstance(self.private, rsa.RSAPrivateKey):
            if self.algorithm.startswith("PS"):
                pss = padding.PSS(padding.MGF1(digest), digest.digest_size)
                return self.private.sign(data, pss, digest)
            return self.private.sign(data, padding.PKCS1v15(), digest)
        r, s = decode_dss_signature(self.sign_der(data))
        size = (self.private.curve.key_size + 7) // 8
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")

    def sign_der(self, data: bytes) -> bytes:
        assert isinstance(self.private, ec.EllipticCurvePrivateKey)
        return self.private.sign(data, ec.ECDSA(HASHES[self.algorithm[2:]]))

    def public_bytes(self, encoding: Encoding, public_format: PublicFormat) -> bytes:
        return self.private.public_key().public_bytes(encoding, public_format)

    @property
    def jwk(self) -> dict[str, Any]:
        return {"kid": self.kid, **self._public_members(), **self.listed_as}

    def _public_members(self) -> dict[str, str]:
        if isinstance(self.private, ed25519.Ed25519PrivateKey):
            x = self.public_bytes(Encoding.Raw, PublicFormat.Raw)
            return {"kty": "OKP", "crv": "Ed25519", "x": base64url(x)}
        if isinstance(self.private, rsa.RSAPrivateKey):
            rsa_numbers = self.private.public_key().public_numbers()
            return {"kty": "RSA", "n": _number(rsa_numbers.n), "e": _number(rsa_numbers.e)}
        numbers, size = self.private.public_key().public_numbers(), (self.private.curve.key_size + 7) // 8
        crv = next(name for name, curve in CURVES.values() if curve.name == self.private.curve.name)
        return {"kty": "EC", "crv": crv, "x": _number(numbers.x, size), "y": _number(numbers.y, size)}


def signing_key(
    algorithm: str, kid: str | None = None, private: PrivateKey | None = None, **listed_as: Any
) -> SigningKey:
    """Return a key, made anew where none is given (RSA keys are made once for each algorithm)."""
    return SigningKey(
        algorithm, kid or secrets.token_urlsafe(8), private or new_private_key(algorithm), listed_as=listed_as
    )


class Issuer:
    """Serves its keys while it is entered. `url` is the `iss` and `aud` of its tokens.

    `keys` hold one key for each algorithm. `unusable` stand before them in the key set, and a verifier has to pass
    over each: see `unusable_keys`.
    """

    def __init__(self) -> None:
        self._port = 0
        self._server: uvicorn.Server | None = None
        self.reset()

    def reset(self) -> None:
        """Be as new, with new keys, on the same port."""
        self.keys = {algorithm: signing_key(algorithm, alg=algorithm) for algorithm in ALGORITHMS}
        self.unusable = unusable_keys()
        self.secret = secrets.token_bytes(32)
        self.answer: Callable[[], Response] | None = None
        """Takes the place of the key set when it is set."""
        self.delay_seconds = 0.0
        self.fetched_at: list[float] = []
        """When each fetch of the key set began, in `time.monotonic()`."""
        self.fetched_elsewhere: list[str] = []
        """Paths that were asked for and hold no key set of ours."""
        self.most_at_once = 0
        self._fetching: set[Request] = set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on the same port as before if it was stopped."""
        if self._server is not None:
            return
        listener = socket.create_server(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        routes = [Route("/jwks", self._serve_keys), Route("/{path:path}", self._serve_elsewhere)]
        config = uvicorn.Config(Starlette(routes=routes), lifespan="off", log_config=None, log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join()
            self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def jwks_url(self) -> str:
        return f"{self.url}/jwks"

    @property
    def fetches(self) -> int:
        return len(self.fetched_at)

    @property
    def open_connections(self) -> int:
        return len(self._server.server_state.connections) if self._server else 0

    def jwks(self) -> dict[str, Any]:
        symmetric = {"kid": "symmetric", "kty": "oct", "alg": "HS256", "k": base64url(self.secret)}
        return {"keys": [symmetric, *(key.jwk for key in (*self.unusable.values(), *self.keys.values()))]}

    def rotate(self, algorithm: str) -> SigningKey:
        """Put a new key in the place of the old one, which is listed no longer. Return the new one."""
        self.keys[algorithm] = signing_key(algorithm)
        return self.keys[algorithm]

    def header(self, key: SigningKey, **changes: Any) -> dict[str, Any]:
        return {"alg": key.algorithm, "kid": key.kid, **changes}

    def claims(self, **changes: Any) -> dict[str, Any]:
        now = int(time.time())
        return {"iss": self.url, "aud": self.url, "sub": "alice", "iat": now, "exp": now + 900, **changes}

    def token(
        self,
        algorithm: str = "EdDSA",
        *,
        key: SigningKey | None = None,
        header: Mapping[str, Any] | None = None,
        claims: Mapping[str, Any] | None = None,
        without: Collection[str] = (),
    ) -> str:
        """Return a token that is good but for the changes to its header and claims, and for what it is without."""
        key = key or self.keys[algorithm]
        headers = self.header(key, **(header or {}))
        payload = self.claims(**(claims or {}))
        return compact(_except(headers, without), _except(payload, without), key.sign)

    async def _serve_keys(self, request: Request) -> Response:
        self.fetched_at.append(time.monotonic())
        fetching = self._fetching  # of this reset
        fetching.add(request)
        self.most_at_once = max(self.most_at_once, len(fetching))
        try:
            await asyncio.sleep(self.delay_seconds)
            return self.answer() if self.answer else JSONResponse(self.jwks())
        finally:
            fetching.remove(request)

    async def _serve_elsewhere(self, request: Request) -> Response:
        self.fetched_elsewhere.append(request.url.path)
        return JSONResponse({"keys": [FORGER.jwk]})


def _except(members: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if name not in names}


async def endless(sent: list[int], chunk: bytes = b" " * 65536, pause_seconds: float = 0.0) -> AsyncIterator[bytes]:
    """Stream a body without end, and count in `sent` the bytes that the client took."""
    while True:
        yield chunk
        sent.append(len(chunk))
        await asyncio.sleep(pause_seconds)


FORGER = signing_key("EdDSA", "forger")
"""The attacker's own key, which no key set lists."""


def unusable_keys() -> dict[str, SigningKey]:
    """Return keys that a key set may list and a verifier must not use, by what is wrong with them."""
    return {
        "of an unknown kind": signing_key("ES256", "odd", kty="ML-DSA"),
        "of an unknown curve": signing_key("ES256", "curve", crv="secp256k1"),
        "for encryption": signing_key("RS256", "enc", rsa_key("enc"), use="enc"),
        "for signing only": signing_key("EdDSA", "ops", key_ops=["sign"]),
        "for another algorithm": signing_key("RS256", "rs512", rsa_key("rs512"), alg="RS512"),
        "for PS256": signing_key("PS256", "ps256", rsa_key("ps256"), alg="PS256"),
        "too short": signing_key("RS256", "short", rsa_key("short", 1024)),
        "with its private part published": signing_key("EdDSA", "leaked", d=base64url(secrets.token_bytes(32))),
        "with a broken number": signing_key("RS256", "broken", rsa_key("broken"), n=5),
    }
