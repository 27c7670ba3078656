import json
import os
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence
from palimpsest.models.lm import LM
from palimpsest.report import card, certificate, html
from palimpsest.report.certificate import sign, user_key, verify


@pytest.fixture(autouse=True)
def key(tmp_path, monkeypatch):
    """The user's key, in a home of its own."""
    path = tmp_path / "home" / "key.pem"
    monkeypatch.setenv("PALIMPSEST_KEY", str(path))
    return path


@pytest.fixture(scope="module")
def lm():
    return LM.build(["one two three four", "five six seven"], "llama-tiny", vocab_size=300, max_length=32)


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory, make_evidence):
    folder = tmp_path_factory.mktemp("unsigned")
    evidence = make_evidence()
    evidence.write(folder)
    html.write(evidence, folder)
    card.write(evidence, folder)
    return folder


@pytest.fixture
def proof(tmp_path, unsigned):
    """A signed folder without a model."""
    folder = shutil.copytree(unsigned, tmp_path / "out")
    sign(folder)
    return folder


def failed(checks):
    return [check.name for check in checks if not check.ok]


def test_an_untouched_folder_verifies(proof):
    checks = verify(proof)
    assert failed(checks) == []
    names = {check.name for check in checks}
    assert {"certificate", "signature", "evidence", "evidence.json", "records.csv", "report.html", "README.md"} <= names
    assert any("SHA256:" in check.detail and "not pinned" in check.detail for check in checks)


def test_the_certificate_says_what_was_done(proof, make_evidence):
    claims = json.loads((proof / "certificate.json").read_text(encoding="utf-8"))
    evidence = make_evidence()
    assert claims["model"] == evidence.model
    assert claims["data"] == evidence.data
    assert claims["method"] == evidence.method
    assert [row["name"] for row in claims["measurements"]] == [m.name for m in evidence.measurements]
    assert claims["date"].endswith("Z")
    assert claims["fingerprint"].startswith("SHA256:")


@pytest.mark.parametrize("name", ["evidence.json", "records.csv", "measurements.csv", "report.html", "README.md"])
def test_one_changed_byte_in_a_file_is_caught_and_named(proof, name):
    path = proof / name
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 4):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert name in failed(verify(proof))
    path.write_bytes(whole)
    assert failed(verify(proof)) == []


def test_one_changed_byte_anywhere_in_the_certificate_is_caught(proof):
    path = proof / "certificate.json"
    whole = path.read_bytes()
    places = np.random.default_rng(0).integers(0, len(whole), 60)
    for place in [*places, *(i for i, byte in enumerate(whole) if byte == ord("\n"))][:120]:
        for flip in (1, 32):  # 32 turns a into A, and a space into a control character
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            assert set(failed(verify(proof))) & {"certificate", "signature"}, (place, flip)


def test_rearranged_or_spaced_json_is_not_the_certificate(proof):
    path = proof / "certificate.json"
    claims = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(claims, sort_keys=True, ensure_ascii=False), encoding="utf-8")
    assert failed(verify(proof)) == ["certificate"]
    path.write_text(json.dumps({**claims, "signature": claims["signature"].upper()}), encoding="utf-8")
    assert "signature" in failed(verify(proof))


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", '{"files": 3}', "{", "\ud83d".encode("utf-8", "surrogatepass").decode("latin1")]
)
def test_what_is_no_certificate_fails_without_a_crash(proof, content):
    (proof / "certificate.json").write_text(content, encoding="utf-8")
    assert failed(verify(proof)) == ["certificate"]


def test_missing_added_and_linked_files_are_named(proof):
    (proof / "report.html").rename(proof / "report2.html")
    (proof / "README.md").unlink()
    (proof / "README.md").symlink_to(proof / "report2.html")
    details = {check.name: check.detail for check in verify(proof) if not check.ok}
    assert details["report.html"] == "missing"
    assert details["report2.html"] == "added after the certificate was signed"
    assert "link" in details["README.md"]


def test_hidden_files_of_the_system_do_not_matter(proof):
    (proof / ".DS_Store").write_bytes(b"x")
    assert failed(verify(proof)) == []


def test_forged_numbers_need_another_key_and_the_pin_finds_it(proof, make_evidence, key):
    own = json.loads((proof / "certificate.json").read_text(encoding="utf-8"))["fingerprint"]
    assert failed(verify(proof, public_key=own)) == []
    better = make_evidence(knowledge=19.8)
    better.write(proof)
    sign(proof, key=Ed25519PrivateKey.generate())
    assert failed(verify(proof)) == []
    assert failed(verify(proof, public_key=own)) == ["signature"]


def test_a_public_key_file_pins_too(proof, tmp_path, key):
    pem = tmp_path / "public.pem"
    pem.write_bytes(user_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    checks = verify(proof, public_key=pem)
    assert failed(checks) == []
    assert any("by the pinned key SHA256:" in check.detail for check in checks)
    pem.write_text("nonsense")
    with pytest.raises(InputError, match="neither a fingerprint"):
        verify(proof, public_key=pem)


def test_evidence_and_certificate_must_agree(proof, make_evidence):
    """Even when all hashes are right, as after a careless second signature over one file only."""
    claims = json.loads((proof / "certificate.json").read_text(encoding="utf-8"))
    claims["measurements"][0]["after"] = 1.0
    del claims["signature"]
    claims["signature"] = user_key().sign(certificate.sha256_of(claims).encode()).hex()
    (proof / "certificate.json").write_text(certificate._rendered(claims), encoding="utf-8")
    checks = verify(proof)
    assert failed(checks) == ["evidence"]
    assert next(c.detail for c in checks if not c.ok) == "evidence.json and the certificate differ in measurements"


def with_model(folder, evidence: Evidence, lm: LM) -> Evidence:
    lm.save(folder / "model")
    model = {**evidence.model, "after": {"source": "npo", "sha256": lm.sha256}}
    evidence = replace(evidence, model=model)
    evidence.write(folder)
    return evidence


def test_the_weights_are_those_that_were_measured(tmp_path, make_evidence, lm):
    folder = tmp_path / "out"
    with_model(folder, make_evidence(), lm)
    sign(folder)
    checks = verify(folder)
    assert failed(checks) == []
    assert {"model weights", "model/config.json", "model/model.safetensors"} <= {check.name for check in checks}
    weights = folder / "model" / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    assert failed(verify(folder)) == ["model/model.safetensors", "model weights"]
    weights.unlink()
    details = {check.name: check.detail for check in verify(folder) if not check.ok}
    assert details["model/model.safetensors"] == "missing"
    assert "cannot be loaded" in details["model weights"]


def test_another_model_than_the_measured_one_is_not_signed(tmp_path, make_evidence, lm):
    evidence = make_evidence()
    lm.save(tmp_path / "model")
    evidence.write(tmp_path)
    with pytest.raises(InputError, match="not the measured model"):
        sign(tmp_path)
    assert not (tmp_path / "certificate.json").exists()


def test_a_rerun_must_give_the_numbers_back(proof, make_evidence):
    asked = []

    def again(folder):
        asked.append(folder)
        return make_evidence()

    checks = verify(proof, rerun=again)
    assert asked == [proof]
    assert failed(checks) == []
    assert sum(check.name.startswith("rerun of") for check in checks) == 11
    assert failed(verify(proof, rerun=lambda _: make_evidence(knowledge=22.0))) == []  # a tenth of the interval is 0.97
    assert failed(verify(proof, rerun=lambda _: make_evidence(knowledge=23.0))) == ["rerun of knowledge"]
    assert failed(verify(proof, rerun=lambda _: make_evidence(leakage=None))) == ["rerun of privacy_leakage"]


def test_a_rerun_is_not_started_for_a_bad_signature(proof):
    path = proof / "certificate.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"kind": "forget"', '"kind": "forgot"'), encoding="utf-8")

    def never(folder):
        raise AssertionError(folder)

    assert "signature" in failed(verify(proof, rerun=never))


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match=r"certificate\.json: no such file"):
        verify(tmp_path)
    with pytest.raises(InputError, match=r"evidence\.json: no such file"):
        sign(tmp_path)


def test_links_are_not_signed(proof):
    (proof / "more").symlink_to(proof)
    with pytest.raises(InputError, match="more is a link"):
        sign(proof)


def test_the_key_is_made_once_for_its_owner_alone(key):
    first = user_key()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert certificate._raw(user_key().public_key()) == certificate._raw(first.public_key())
    assert os.listdir(key.parent) == ["key.pem"]


def test_the_default_place_is_under_home(tmp_path, monkeypatch):
    monkeypatch.delenv("PALIMPSEST_KEY")
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    user_key()
    assert (tmp_path / "somebody" / ".config" / "palimpsest" / "key.pem").is_file()


def test_keys_that_cannot_be_used(key):
    user_key()
    key.chmod(0o644)
    with pytest.raises(InputError, match="can be read by others; chmod 600"):
        user_key()
    key.chmod(0o600)
    key.write_text("nonsense")
    with pytest.raises(InputError, match="not an unencrypted PEM private key"):
        user_key()
    rsa = generate_private_key(65537, 1024 * 2)
    key.write_bytes(rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(InputError, match="wanted an Ed25519 key, found RSAPrivateKey"):
        user_key()
    locked = Ed25519PrivateKey.generate()
    key.write_bytes(locked.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    with pytest.raises(InputError, match="not an unencrypted PEM private key"):
        user_key()
    with pytest.raises(InputError, match="cannot read the signing key"):
        user_key(key.with_name("absent.pem"))
