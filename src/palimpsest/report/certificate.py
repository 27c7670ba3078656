"""The certificate: what was forgotten, from what, with what result, signed so that a change of one byte shows.

What the signature proves: whoever held the key put their name to exactly these files and numbers.  What it does not
prove: who that is, when it was (the date is the signer's word), or that the numbers are true.  The key is the signer's
own and nobody vouches for it, and anybody can sign other files with another key.  So a third party must get the key's
fingerprint from the signer by another way and pin it: ``verify(folder, public_key="SHA256:...")``.  A re-run shows that
the numbers are true (``rerun=``); whoever holds the data can check that the hashes name it.

The signature (Ed25519) is over the hexadecimal SHA-256 of the certificate's canonical JSON (sorted keys, no spaces,
UTF-8), the signature itself left out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import palimpsest
from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_file, sha256_of, write_text
from palimpsest.core.records import Evidence
from palimpsest.report.words import given

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

NAME = "certificate.json"
FORMAT = 1
# how far a re-run may be from the certified number: other hardware breaks ties in greedy decoding differently
TOLERANCE = {"relative": 0.02, "of_interval": 0.1, "absolute": 1e-6}
_CLAIMS = {"kind": str, "method": dict, "model": dict, "data": dict, "measurements": list}  # copied from the evidence
_PARTS = {**_CLAIMS, "files": dict, "public_key": str, "signature": str}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and whether it is as it should be."""

    name: str
    ok: bool
    detail: str


def sign(folder: str | Path, *, key: str | Path | Ed25519PrivateKey | None = None) -> Path:
    """Write ``certificate.json`` over everything that lies in `folder` (hidden files apart); returns its path.

    `key` is an Ed25519 key or the path of its PEM file; by default the user's own, made on first use (`user_key`).
    Raises InputError if the folder holds no evidence, holds links, or ``folder/model`` is not the model that was
    measured.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    folder = Path(folder)
    evidence = Evidence.read(folder).to_json()
    files, links = _files(folder)
    if links:
        raise InputError(f"{folder / links[0]} is a link; a certificate is over real files")
    weights = _weights(folder, evidence)
    if weights is not None and not weights.ok:
        raise InputError(f"{folder / 'model'}: {weights.detail}")
    private = key if isinstance(key, Ed25519PrivateKey) else user_key(key)
    public = _raw(private.public_key())
    claims = {
        "format": FORMAT,
        "palimpsest": palimpsest.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **{name: evidence[name] for name in _CLAIMS},
        **_removal(evidence),
        "tolerance": TOLERANCE,
        "files": files,
        "public_key": public.hex(),
        "fingerprint": fingerprint(public),
    }
    claims["signature"] = private.sign(sha256_of(claims).encode()).hex()
    path = folder / NAME
    write_text(path, _rendered(claims))
    return path


def verify(
    folder: str | Path,
    *,
    public_key: str | Path | None = None,
    rerun: Callable[[Path], Evidence] | None = None,
) -> list[Check]:
    """Check the certificate in `folder` against itself and everything beside it.  All checks ok: nothing changed.

    `public_key` pins the signer: a fingerprint ``SHA256:...`` or the PEM file of a public key.  Without it a valid
    signature only shows that one and the same unknown person signed all of it.
    `rerun(folder)` measures again; every certified number must come back within the tolerance in the certificate.
    Raises InputError if there is no certificate, or `public_key` is not a key.
    """
    folder = Path(folder)
    path = folder / NAME
    if not path.is_file():
        raise InputError(f"{path}: no such file; wanted a folder signed by palimpsest")
    pinned = None if public_key is None else _pinned(public_key)
    written = path.read_bytes()
    try:
        claims = json.loads(written)
        whole = written == _rendered(claims).encode()
    except (ValueError, RecursionError) as error:
        return [Check("certificate", False, f"{NAME} is not valid JSON ({error})")]
    given_parts = claims if isinstance(claims, dict) else {}
    lacks = [name for name, kind in _PARTS.items() if not isinstance(given_parts.get(name), kind)]
    if lacks:
        return [Check("certificate", False, f"{NAME} lacks {', '.join(lacks)}")]
    signature = _signature(claims, pinned)
    checks = [
        Check("certificate", whole, f"{NAME} is {'as' if whole else 'not as'} palimpsest writes it"),
        signature,
        *_file_checks(folder, claims["files"]),
        _evidence(folder, claims),
    ]
    weights = _weights(folder, claims)
    if weights is not None:
        checks.append(weights)
    if rerun is not None and signature.ok:
        checks += _compared(claims, rerun(folder))
    return checks


def fingerprint(public_key: bytes) -> str:
    """``SHA256:...`` of the 32 raw bytes of a public key, to be compared by eye or pinned."""
    return f"SHA256:{base64.b64encode(hashlib.sha256(public_key).digest()).decode().rstrip('=')}"


def user_key(path: str | Path | None = None) -> Ed25519PrivateKey:
    """The signing key: the PEM file `path`, or $PALIMPSEST_KEY, or ``~/.config/palimpsest/key.pem``.

    The last two are made on first use, readable by their owner alone.  Raises InputError for a file that others may
    read, that is encrypted, or that is no Ed25519 key, and for a `path` that is not there.
    """
    if path is not None:
        return _read_key(Path(path))
    own = Path(os.environ.get("PALIMPSEST_KEY") or Path.home() / ".config" / "palimpsest" / "key.pem")
    if not own.exists():
        _make_key(own)
    return _read_key(own)


def _make_key(path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # a key that another process has made meanwhile stays
            os.link(temporary, path)
    finally:
        temporary.unlink()


def _read_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        mode, pem = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the signing key ({error.strerror})") from None
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise InputError(f"{path}: the signing key can be read by others; chmod 600 it")
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not an unencrypted PEM private key ({error})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: wanted an Ed25519 key, found {type(key).__name__.strip('_')}")
    return key


def _pinned(public_key: str | Path) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if str(public_key).startswith("SHA256:"):
        return str(public_key)
    try:
        key = load_pem_public_key(Path(public_key).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{public_key}: neither a fingerprint SHA256:... nor a PEM public key ({error})") from None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{public_key}: wanted an Ed25519 public key, found {type(key).__name__.strip('_')}")
    return fingerprint(_raw(key))


def _raw(key: Ed25519PublicKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def _rendered(claims: Any) -> str:
    return json.dumps(claims, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _signature(claims: Mapping[str, Any], pinned: str | None) -> Check:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    unsigned = {name: value for name, value in claims.items() if name != "signature"}
    try:
        raw, signature = bytes.fromhex(claims["public_key"]), bytes.fromhex(claims["signature"])
        Ed25519PublicKey.from_public_bytes(raw).verify(signature, sha256_of(unsigned).encode())
    except (InvalidSignature, ValueError, TypeError):
        return Check("signature", False, "does not fit the certificate: something in it was changed")
    if signature.hex() != claims["signature"] or claims.get("fingerprint") != fingerprint(raw):
        return Check("signature", False, "is not written as palimpsest writes it: it was changed")
    own = fingerprint(raw)
    if pinned is None:
        return Check("signature", True, f"valid, by key {own} (not pinned: compare it with what the signer told you)")
    if own != pinned:
        return Check("signature", False, f"valid, but by key {own}, not {pinned}")
    return Check("signature", True, f"valid, by the pinned key {own}")


def _files(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every file under `folder`, hidden ones and the certificate apart, with size and hash; and the links."""
    files, links = {}, []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            links.append(name)
        elif name != NAME:
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return files, links


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _file_checks(folder: Path, listed: Mapping[str, Any]) -> list[Check]:
    found, links = _files(folder)
    checks = []
    for name in sorted({*listed, *found, *links}):
        if name in links:
            checks.append(Check(name, False, "is a link, not the file that was signed"))
        elif name not in found:
            checks.append(Check(name, False, "missing"))
        elif name not in listed:
            checks.append(Check(name, False, "added after the certificate was signed"))
        elif found[name] != listed[name]:
            signed = listed[name].get("sha256") if isinstance(listed[name], Mapping) else listed[name]
            checks.append(Check(name, False, f"changed: sha256 is {found[name]['sha256']}, signed was {signed}"))
        else:
            checks.append(Check(name, True, f"sha256 {found[name]['sha256']}"))
    return checks


def _evidence(folder: Path, claims: Mapping[str, Any]) -> Check:
    try:
        evidence = Evidence.read(folder).to_json()
    except InputError as error:
        return Check("evidence", False, str(error))
    differing = [name for name in _CLAIMS if evidence[name] != claims[name]]
    if _removal(evidence).get("removal") != claims.get("removal"):
        differing.append("removal")
    if differing:
        return Check("evidence", False, f"evidence.json and the certificate differ in {', '.join(differing)}")
    return Check("evidence", True, "evidence.json says what the certificate says")


def _removal(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict of the battery of attacks, where one was run: {"removal": {"verdict", "why", "access", ...}}."""
    found = evidence["extras"].get("attacks")
    if not isinstance(found, Mapping) or "verdict" not in found:
        return {}
    return {"removal": {name: found.get(name) for name in ("verdict", "why", "access", "held_against", "rule")}}


def _weights(folder: Path, claims: Mapping[str, Any]) -> Check | None:
    """Are the weights in ``folder/model`` those that were measured?  None where there is no model or no hash of it."""
    from palimpsest.models.lm import LM

    after = claims["model"].get("after")
    told = after.get("sha256") if isinstance(after, Mapping) else None
    if not told or not (folder / "model").is_dir():
        return None
    try:
        found = LM.load(folder / "model").sha256
    except InputError as error:
        return Check("model weights", False, f"cannot be loaded ({error})")
    if found != told:
        return Check("model weights", False, f"not the measured model: sha256 is {found}, should be {told}")
    return Check("model weights", True, f"those that were measured, sha256 {found}")


def _compared(claims: Mapping[str, Any], again: Evidence) -> list[Check]:
    """A check for every certified number: does it come back?"""
    allowed = claims["tolerance"]
    measured = {m.name: m.after for m in again.measurements}
    checks = []
    for row in claims["measurements"]:
        told, found = row["after"], measured.get(row["name"])
        if told is None:
            continue
        name = f"rerun of {row['name']}"
        if found is None or not given(found):
            checks.append(Check(name, False, f"certified {told:g}, but it was not measured again"))
            continue
        width = row["high"] - row["low"] if row["low"] is not None and row["high"] is not None else 0.0
        limit = max(allowed["relative"] * abs(told), allowed["of_interval"] * width, allowed["absolute"])
        ok = math.isfinite(found) and abs(found - told) <= limit
        checks.append(Check(name, ok, f"certified {told:g}, again {found:g} (may differ by {limit:.3g})"))
    return checks
