"""What no service may accept: tokens and Authorization headers, whether they are tried on a `Verifier` or over HTTP."""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from issuer import (
    ALGORITHMS,
    FORGER,
    Issuer,
    SigningKey,
    base64url,
    compact,
    json_bytes,
    rsa_key,
    signing_key,
    unusable_keys,
)

Headers = list[tuple[str, str]]
Attack = Callable[[Issuer], str | Headers]


def attack_tokens(issuer: Issuer) -> list[tuple[str, str | Headers]]:
    """Return every attack by name, with the value of an Authorization header, or with all headers where it needs two.

    Each has to be answered with 401. The HTTP server itself answers those of 10 MB, or hangs up on them.
    Those named "expired …" are `token_expired`, those named "scheme: …" `token_missing`, all others `token_invalid`.
    """
    return [(name, attack(issuer)) for name, attack in ATTACKS.items()]


def token_of_size(issuer: Issuer, characters: int) -> str:
    """Return a good token of at least so many characters, and few more."""
    padding = 0
    while len(token := issuer.token(claims={"more": "x" * padding})) < characters:
        padding += max(1, (characters - len(token)) * 3 // 4 - 2)
    return token


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def _bearer(make: Callable[[Issuer], str]) -> Attack:
    return lambda issuer: f"Bearer {make(issuer)}"


def _with_header(**header: Any) -> Attack:
    return _bearer(lambda issuer: issuer.token(header=header))


def _with_claims(**claims: Any) -> Attack:
    return _bearer(lambda issuer: issuer.token(claims=claims))


def _without(*names: str) -> Attack:
    return _bearer(lambda issuer: issuer.token(without=names))


def _at(**seconds_from_now: float) -> Attack:
    """Return a good token with its times so many seconds from now."""
    return _bearer(lambda issuer: issuer.token(claims={k: time.time() + v for k, v in seconds_from_now.items()}))


def _signed(header: Any = None, payload: Any = None) -> Attack:
    """Return a token that is truly signed over a header or payload of any bytes."""

    def make(issuer: Issuer) -> str:
        key = issuer.keys["EdDSA"]
        return compact(header or issuer.header(key), payload or issuer.claims(), key.sign)

    return _bearer(make)


def _rewritten(rewrite: Callable[[bytes], bytes]) -> Attack:
    """Return a token that is truly signed over good claims in other bytes."""

    def make(issuer: Issuer) -> str:
        key = issuer.keys["EdDSA"]
        return compact(issuer.header(key), rewrite(json_bytes(issuer.claims())), key.sign)

    return _bearer(make)


def _changed(change: Callable[[str, str, str], str], algorithm: str = "EdDSA") -> Attack:
    """Return a good token with its three parts changed after it was signed."""
    return _bearer(lambda issuer: change(*issuer.token(algorithm).split(".")))


def _resigned(algorithm: str, sign: Callable[[SigningKey, bytes], bytes], **header: Any) -> Attack:
    """Return a token in the name of the issuer's key whose signature was not made by that key."""

    def make(issuer: Issuer) -> str:
        key = issuer.keys[algorithm]
        return compact(issuer.header(key, **header), issuer.claims(), lambda data: sign(key, data))

    return _bearer(make)


def _forged(header: Mapping[str, Any], kid_of: str | None = None) -> Attack:
    """Return a token signed by the forger, whose header offers the key. `kid_of` names the issuer's key instead."""

    def make(issuer: Issuer) -> str:
        kid = issuer.keys[kid_of].kid if kid_of else FORGER.kid
        offered = {name: f"{issuer.url}/{value}" if name in ("jku", "x5u") else value for name, value in header.items()}
        return issuer.token(key=FORGER, header={"kid": kid, **offered})

    return _bearer(make)


def _hmac(secret: Callable[[SigningKey], bytes], algorithm: str = "RS256", alg: str = "HS256") -> Attack:
    """Return a token signed with what everybody knows of the issuer's public key, as if that were a shared secret."""
    digest = getattr(hashlib, f"sha{alg[2:]}") if alg.startswith("HS") else hashlib.sha256
    return _resigned(algorithm, lambda key, data: hmac.new(secret(key), data, digest).digest(), alg=alg)


def _symmetric(issuer: Issuer) -> str:
    header = {"alg": "HS256", "kid": "symmetric"}
    return compact(header, issuer.claims(), lambda data: hmac.digest(issuer.secret, data, "sha256"))


def _unsigned(alg: Any) -> Attack:
    return _bearer(lambda i: compact(i.header(i.keys["EdDSA"], alg=alg), i.claims(), lambda _: b""))


def _by_unusable(name: str) -> Attack:
    return _bearer(lambda issuer: issuer.token(key=issuer.unusable[name]))


def _authorization(make: Callable[[str], str]) -> Attack:
    return lambda issuer: make(issuer.token())


def _several(make: Callable[[str], list[str]]) -> Attack:
    return lambda issuer: [("Authorization", value) for value in make(issuer.token())]


def _spare_bits_set(signature: str) -> str:
    """Return other text for the same 64 bytes: base64 leaves four bits over, which sloppy readers ignore."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return signature[:-1] + alphabet[alphabet.index(signature[-1]) + 1]


def _edited(part: str, **changes: Any) -> str:
    members = json.loads(base64.urlsafe_b64decode(part + "=="))
    return base64url(json_bytes({**members, **changes}))


def _flipped(signature: str) -> str:
    return ("B" if signature[0] == "A" else "A") + signature[1:]


def _in_standard_alphabet(issuer: Issuer) -> str:
    while True:
        head, _, signature = issuer.token(claims={"jti": secrets.token_hex(4)}).rpartition(".")
        if "-" in signature or "_" in signature:
            return f"{head}.{signature.replace('-', '+').replace('_', '/')}"


def _pem(key: SigningKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _der(key: SigningKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


_NONE_SPELT = ("none", "None", "NONE", "nOnE", "none ", "", "null")
_ABSURD_TIMES: dict[str, Any] = {
    "null": None,
    "a text": "4102444800",
    "true": True,
    "a list": [4102444800],
    "an object": {"seconds": 4102444800},
    "negative": -1,
    "in milliseconds": 4102444800000,
    "a huge integer": 10**300,
    "infinite": float("inf"),
    "minus infinite": float("-inf"),
    "not a number": float("nan"),
}
_ODD_KIDS: dict[str, Any] = {
    "null": None,
    "empty": "",
    "a number": 0,
    "a list": ["kid"],
    "an object": {},
    "unknown": "unknown",
    "a path": "../../../../dev/null",
    "SQL": "' OR '1'='1",
    "with new lines": "x\r\n2030-01-01 token accepted",
}
_ABSURD_NAMES: dict[str, Any] = {
    "null": None,
    "empty": "",
    "a number": 5,
    "true": True,
    "an object": {"id": "alice"},
    "an empty list": [],
    "a nested list": [["alice"]],
}

ATTACKS: dict[str, Attack] = {
    # the three parts
    "tampered: another typ in the header": _changed(lambda h, p, s: f"{_edited(h, typ='JWT')}.{p}.{s}"),
    "tampered: another user in the payload": _changed(lambda h, p, s: f"{h}.{_edited(p, sub='bob')}.{s}"),
    "tampered: a later exp in the payload": _changed(lambda h, p, s: f"{h}.{_edited(p, exp=4102444800)}.{s}"),
    "tampered: the payload of another token": _bearer(
        lambda i: ".".join([(t := i.token().split("."))[0], i.token(claims={"sub": "bob"}).split(".")[1], t[2]])
    ),
    **{
        f"tampered: one byte of an {name} signature": _changed(lambda h, p, s: f"{h}.{p}.{_flipped(s)}", name)
        for name in ALGORITHMS
    },
    "signature: empty": _changed(lambda h, p, s: f"{h}.{p}."),
    "signature: shortened": _changed(lambda h, p, s: f"{h}.{p}.{s[:-8]}"),
    "signature: lengthened": _changed(lambda h, p, s: f"{h}.{p}.{s}AAAA"),
    "signature: twice": _changed(lambda h, p, s: f"{h}.{p}.{s}{s}"),
    "signature: with padding": _changed(lambda h, p, s: f"{h}.{p}.{s}=="),
    "signature: with junk inside": _changed(lambda h, p, s: f"{h}.{p}.{s[:10]}!*{s[10:]}"),
    "signature: with spare bits set": _changed(lambda h, p, s: f"{h}.{p}.{_spare_bits_set(s)}"),
    "signature: in the standard alphabet": _bearer(_in_standard_alphabet),
    "signature: all zero, EdDSA": _resigned("EdDSA", lambda key, data: bytes(64)),
    "signature: all zero, ES256": _resigned("ES256", lambda key, data: bytes(64)),
    "signature: all zero, RS256": _resigned("RS256", lambda key, data: bytes(256)),
    "signature: ES256 in DER": _resigned("ES256", lambda key, data: key.sign_der(data)),
    "signature: by another Ed25519 key": _resigned("EdDSA", lambda key, data: FORGER.sign(data)),
    "signature: by another EC key": _resigned("ES256", lambda key, data: signing_key("ES256").sign(data)),
    "signature: by another RSA key": _resigned(
        "RS256", lambda key, data: signing_key("RS256", private=rsa_key("forger")).sign(data)
    ),
    "parts: none": _bearer(lambda i: "token"),
    "parts: two": _changed(lambda h, p, s: f"{h}.{p}"),
    "parts: four": _changed(lambda h, p, s: f"{h}.{p}.{s}.{s}"),
    "parts: five, as if encrypted": _changed(lambda h, p, s: f"{h}.{s}.{s}.{p}.{s}"),
    "parts: all empty": _bearer(lambda i: ".."),
    "parts: with padding": _changed(lambda h, p, s: f"{h}=.{p}=.{s}="),
    "parts: in JSON": _changed(
        lambda h, p, s: json.dumps({"payload": p, "protected": h, "signature": s}, separators=(",", ":"))
    ),
    "header: a list": _signed(header=["EdDSA"]),
    "header: no JSON": _signed(header=b"alg=EdDSA"),
    "header: no UTF-8": _signed(header=b'{"alg":"EdDSA\xff"}'),
    "header: in UTF-16": _signed(header='{"alg":"EdDSA"}'.encode("utf-16")),
    "header: nested 1 500 deep": _signed(header=_nested(1500)),
    "payload: a list": _signed(payload=["alice"]),
    "payload: a text": _signed(payload="alice"),
    "payload: no JSON": _signed(payload=b"sub=alice"),
    "payload: no UTF-8": _signed(payload=b'{"sub":"alice\xff"}'),
    "payload: in UTF-16": _rewritten(lambda claims: claims.decode().encode("utf-16")),
    "payload: after a byte order mark": _rewritten(lambda claims: b"\xef\xbb\xbf" + claims),
    "payload: with more after its end": _rewritten(lambda claims: claims + b"{}"),
    "payload: nested 1 500 deep": _signed(payload=_nested(1500)),
    "size: one character too long": _bearer(lambda i: token_of_size(i, 8193)),
    "size: a good token of 12 KB": _with_claims(more="x" * 9000),
    "size: 10 MB": _changed(lambda h, p, s: f"{h}.{p * (10_000_000 // len(p))}.{s}"),
    "size: 10 MB of dots": _bearer(lambda i: "." * 10_000_000),
    # the algorithm
    **{f"alg: {name!r}, no signature": _unsigned(name) for name in _NONE_SPELT},
    **{f"alg: {name!r} under a signature": _with_header(alg=name) for name in _NONE_SPELT},
    **{
        f"alg: {name}": _with_header(alg=alg)
        for name, alg in {
            "null": None,
            "a list": ["EdDSA"],
            "an object": {"name": "EdDSA"},
            "a number": 5,
            "in lower case": "eddsa",
            "with a NUL after it": "EdDSA\0",
            "of another kind of key": "ES256",
            "of RSA for an Ed25519 key": "RS256",
            "unknown": "XX256",
        }.items()
    },
    "alg: missing": _without("alg"),
    "alg: RS512 for a key that is for RS256": _resigned(
        "RS256", lambda key, data: signing_key("RS512", private=key.private).sign(data), alg="RS512"
    ),
    "alg: PS256 for a key that is for RS256": _resigned(
        "RS256", lambda key, data: signing_key("PS256", private=key.private).sign(data), alg="PS256"
    ),
    "alg: HS256 with the PEM of the RSA key": _hmac(_pem),
    "alg: HS384 with the PEM of the RSA key": _hmac(_pem, alg="HS384"),
    "alg: HS512 with the PEM of the RSA key": _hmac(_pem, alg="HS512"),
    "alg: HS256 with the bare PEM of the RSA key": _hmac(lambda key: _pem(key).strip()),
    "alg: HS256 with the PKCS 1 of the RSA key": _hmac(lambda key: key.public_bytes(Encoding.PEM, PublicFormat.PKCS1)),
    "alg: HS256 with the DER of the RSA key": _hmac(_der),
    "alg: HS256 with the n of the RSA key": _hmac(lambda key: str(key.jwk["n"]).encode()),
    "alg: HS256 with the JWK of the RSA key": _hmac(lambda key: json_bytes(key.jwk)),
    "alg: HS256 with the PEM of the EC key": _hmac(_pem, "ES256"),
    "alg: HS256 with the PEM of the Ed25519 key": _hmac(_pem, "EdDSA"),
    "alg: HS256 with the bytes of the Ed25519 key": _hmac(
        lambda key: key.public_bytes(Encoding.Raw, PublicFormat.Raw), "EdDSA"
    ),
    "alg: HS256 with the x of the Ed25519 key": _hmac(lambda key: str(key.jwk["x"]).encode(), "EdDSA"),
    "alg: HS256 with the JWK of the Ed25519 key": _hmac(lambda key: json_bytes(key.jwk), "EdDSA"),
    "alg: HS256 with an empty secret": _hmac(lambda key: b"", "EdDSA"),
    "alg: EdDSA over an HMAC": _hmac(lambda key: key.public_bytes(Encoding.Raw, PublicFormat.Raw), "EdDSA", "EdDSA"),
    "alg: HS256 with the symmetric key that is listed": _bearer(_symmetric),
    # the header
    "embedded: jwk": _forged({"jwk": FORGER.jwk}),
    "embedded: jwk, under the issuer's kid": _forged({"jwk": FORGER.jwk}, "EdDSA"),
    "embedded: jku": _forged({"jku": "forged/jwks"}),
    "embedded: jku, under the issuer's kid": _forged({"jku": "forged/jwks"}, "EdDSA"),
    "embedded: x5u": _forged({"x5u": "forged/chain"}),
    "embedded: x5u, under the issuer's kid": _forged({"x5u": "forged/chain"}, "EdDSA"),
    "embedded: x5c": _forged({"x5c": [base64.b64encode(_der(FORGER)).decode()]}),
    "embedded: x5c, under the issuer's kid": _forged({"x5c": [base64.b64encode(_der(FORGER)).decode()]}, "EdDSA"),
    "crit: exp": _with_header(crit=["exp"]),
    "crit: unknown": _with_header(crit=["x-strict"], **{"x-strict": True}),
    "crit: b64": _with_header(crit=["b64"], b64=False),
    "crit: empty": _with_header(crit=[]),
    "crit: null": _with_header(crit=None),
    **{
        f"typ: {typ!r}": _with_header(typ=typ)
        for typ in ("dpop+jwt", "logout+jwt", "secevent+jwt", "JWE", "JWT ", "", None, 5, ["JWT"])
    },
    "kid: missing": _without("kid"),
    **{f"kid: {name}": _with_header(kid=kid) for name, kid in _ODD_KIDS.items()},
    "kid: of the issuer's key of another kind": _bearer(lambda i: i.token(header={"kid": i.keys["RS256"].kid})),
    "kid: of the symmetric key": _with_header(kid="symmetric"),
    **{f"key: {name}": _by_unusable(name) for name in unusable_keys()},
    # the claims
    "expired an hour ago": _at(exp=-3600, iat=-4500),
    "expired 31 seconds ago": _at(exp=-31, iat=-900),
    "expired in 1970": _with_claims(exp=0, iat=0),
    "times: valid only in a minute": _at(nbf=60),
    "times: issued in a minute": _at(iat=60),
    "exp: missing": _without("exp"),
    **{
        f"{claim}: {name}": _with_claims(**{claim: value})
        for claim in ("exp", "nbf", "iat")
        for name, value in _ABSURD_TIMES.items()
    },
    "exp: of 5 000 digits": _signed(payload=b'{"sub":"alice","exp":' + b"9" * 5000 + b"}"),
    "exp: 1e999": _rewritten(lambda claims: claims.replace(b'"exp":', b'"exp":1e999,"was":')),
    **{f"{claim}: missing": _without(claim) for claim in ("iss", "aud", "sub")},
    **{
        f"{claim}: {name}": _with_claims(**{claim: value})
        for claim in ("iss", "aud", "sub")
        for name, value in _ABSURD_NAMES.items()
    },
    "iss: another": _with_claims(iss="https://elsewhere.example"),
    "iss: in a list": _bearer(lambda i: i.token(claims={"iss": [i.url]})),
    "iss: with a slash after it": _bearer(lambda i: i.token(claims={"iss": i.url + "/"})),
    "iss: in upper case": _bearer(lambda i: i.token(claims={"iss": i.url.upper()})),
    "iss: that begins alike": _bearer(lambda i: i.token(claims={"iss": i.url + ".elsewhere.example"})),
    "aud: another": _with_claims(aud="https://elsewhere.example"),
    "aud: others": _with_claims(aud=["https://elsewhere.example", "account"]),
    "aud: that begins alike": _bearer(lambda i: i.token(claims={"aud": i.url + ".elsewhere.example"})),
    "aud: within a text": _bearer(lambda i: i.token(claims={"aud": f"account {i.url}"})),
    "aud: a key of an object": _bearer(lambda i: i.token(claims={"aud": {i.url: True}})),
    "aud: in a list with what is no text": _bearer(lambda i: i.token(claims={"aud": [i.url, 5]})),
    "sub: blank": _with_claims(sub="  "),
    "sub: with a new line": _with_claims(sub="alice\nbob"),
    "sub: with a NUL": _with_claims(sub="alice\0"),
    "sub: with an escape sequence": _with_claims(sub="\x1b[2Jalice"),
    "sub: with a zero-width space": _with_claims(sub="alice\u200b"),
    "sub: half a character": _with_claims(sub="alice\ud800"),
    "sub: of 256 characters": _with_claims(sub="a" * 256),
    "sub: nested 900 deep": _rewritten(lambda claims: claims.replace(b'"alice"', _nested(900))),
    # the Authorization header
    "headers: the same good token twice": _several(lambda good: [f"Bearer {good}", f"Bearer {good}"]),
    "headers: a good token and another": _several(lambda good: [f"Bearer {good}", "Bearer x.y.z"]),
    "headers: another scheme and a good token": _several(lambda good: ["Basic YTpi", f"Bearer {good}"]),
    "scheme: and no token": _authorization(lambda good: "Bearer"),
    "form: two tokens": _authorization(lambda good: f"Bearer {good} {good}"),
    "form: a list": _authorization(lambda good: f"Bearer {good}, Bearer {good}"),
    "form: a comma after it": _authorization(lambda good: f"Bearer {good},"),
    "form: in quotes": _authorization(lambda good: f'Bearer "{good}"'),
    "form: a parameter": _authorization(lambda good: f"Bearer token={good}"),
    "form: a tab inside": _authorization(lambda good: f"Bearer {good}\t{good}"),
    "form: the scheme twice": _authorization(lambda good: f"Bearer Bearer {good}"),
    "form: null": _authorization(lambda good: "Bearer null"),
    "form: an object": _authorization(lambda good: "Bearer [object Object]"),
    "scheme: none": _authorization(lambda good: good),
    "scheme: Basic": _authorization(lambda good: f"Basic {good}"),
    "scheme: JWT": _authorization(lambda good: f"JWT {good}"),
    "scheme: DPoP": _authorization(lambda good: f"DPoP {good}"),
    "scheme: without a space": _authorization(lambda good: f"Bearer{good}"),
    "scheme: with a colon": _authorization(lambda good: f"Bearer: {good}"),
    "scheme: with an equals sign": _authorization(lambda good: f"Bearer={good}"),
    "scheme: with a tab": _authorization(lambda good: f"Bearer\t{good}"),
    "scheme: after the token": _authorization(lambda good: f"{good} Bearer"),
}
