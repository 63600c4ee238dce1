"""Crash files have what a report needs, and no secrets."""

import errno

import pytest

from core.machine import describe
from core.reporting import crash as crashes
from core.reporting.crash import crash, refusal
from core.reporting.redaction import HIDDEN, redacted


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(crashes, "CRASHES", tmp_path / "runs" / "crashes")
    return tmp_path / "runs" / "crashes"


def fault(message: str = "size mismatch\nof two tensors") -> Exception:
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        return error


def test_a_crash_is_one_line_and_a_file(folder):
    said = crash(fault(), ["grm", "ppo", "ppo.steps=3"])
    (file,) = folder.iterdir()
    text = file.read_text()
    assert said.splitlines() == [said] and said.startswith("RuntimeError: size mismatch; ") and str(file) in said
    for part in ("grm ppo ppo.steps=3", "of two tensors", "test_crash.py", "package   torch ", "python    3."):
        assert part in text


def test_a_crash_is_told_where_no_file_can_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(crashes, "CRASHES", tmp_path / "file" / "crashes")
    monkeypatch.setattr(crashes.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    assert str(tmp_path / "temporary" / "grm-") in crash(fault(), ["grm"])
    monkeypatch.setattr(crashes.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    assert "no file could be written about it" in (said := crash(fault(), ["grm"])) and "test_crash.py" in said


SECRETS = {
    "HF_TOKEN": "a-token-of-the-hub", "WANDB_API_KEY": "0123456789abcdef", "MY_PASSWORD": "correct horse",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
}  # fmt: skip


def test_no_secret_reaches_a_crash_file_or_the_line_about_it(folder, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    hidden = [*SECRETS.values(), "hf_abcdefghijklmnop", "user:pass", "eyJhbGciOi.x"]
    message = f"{' '.join(hidden[:5])} at http://{hidden[5]}@host/x, Authorization: Bearer {hidden[6]} falsefalse"
    said = crash(fault(message), ["grm", "rm-serve", "--token", "opensesame", "--token=hush1"])
    text = said + next(folder.iterdir()).read_text() + "\n".join(describe(device=False))
    assert not [secret for secret in (*hidden, "opensesame", "hush1") if secret in text]
    assert "falsefalse" in text and "host/x" in text and HIDDEN in said


def test_ordinary_text_is_left_as_it_is():
    for text in ("ppo.kl.coef=0.1 max_tokens=5", "token_ids: [1, 2]", "hf_hub and sk-learn", "a: b@c", "bearer"):
        assert redacted(text) == text


def test_what_the_system_refuses_is_told_without_a_crash():
    full = OSError(errno.ENOSPC, "No space left on device")
    assert refusal(full) == "No space left on device"
    cut = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1554112 vs 1554000")
    assert refusal(cut) == "a state could not be written whole: No space left on device"
    assert refusal(PermissionError(errno.EACCES, "Permission denied", "/a")) == "Permission denied: /a"
    assert refusal(OSError(errno.EACCES, "Permission denied", "/a", None, "/b")) == "Permission denied: /a -> /b"
    of_a_library = RuntimeError("while writing:\nI/O error: No space left on device (os error 28)\nat 3")
    assert refusal(of_a_library) == "I/O error: No space left on device (os error 28)" and refusal(fault()) is None
    assert refusal(OSError("anything")) is None and refusal(ConnectionResetError(errno.ECONNRESET, "reset")) is None
