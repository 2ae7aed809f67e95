"""Secrets leave the process nowhere, whatever characters they have and however they are spelled."""

import json
import logging
from urllib.parse import quote

import pytest

from sparsebench import cli, sweep
from sparsebench.records import files, record, terminal, tracking

SECRETS = ['hf_"quoted"', "hf_back\\slash", "hf_näïve_ключ", "plain-0123456789", "with space/and@signs:?"]
PROXY = "p%40ss-word"


@pytest.fixture(params=SECRETS)
def secret(request, monkeypatch):
    """A secret in the environment, and a proxy with a password."""
    monkeypatch.setenv("WANDB_API_KEY", request.param)
    monkeypatch.setenv("https_proxy", f"http://user:{PROXY}@proxy.example:3128")
    return request.param


def forms(secret):
    return [secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe=""), PROXY, "p@ss-word"]


def leaking(secret) -> str:
    """What a user or a library might say."""
    return f"401 for {secret} via http://user:{PROXY}@proxy.example:3128 ({secret!r}, p@ss-word, ?t={quote(secret, safe='')})"


def test_a_record_and_what_is_shown_of_it(secret, tmp_path, capsys):
    """Before: scrubbing ran over the JSON, where a secret with a quotation mark, a backslash or an umlaut stands otherwise."""
    error = {"type": "E", "message": leaking(secret), "traceback": leaking(secret)}
    content = record.Record(
        "ab" * 32, leaking(secret), {"a": [leaking(secret)], secret: 1}, status="failed", error=error
    )
    record.write(content, tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    kept = json.loads(text)
    assert kept["error"]["message"].startswith("401 for <WANDB_API_KEY> via http://<")
    sweep.note(tmp_path, 0, [f"a={secret}"], tmp_path / secret.replace("/", "-"), kept, "failed")
    text += (tmp_path / "0.json").read_text(encoding="utf-8")
    terminal.show({**kept, "name": leaking(secret), "error": error}, tmp_path / "r")
    cli.complain(leaking(secret))
    shown = text + "".join(capsys.readouterr())
    assert not [form for form in forms(secret) if form in shown]


def test_logs_and_wandb(secret, caplog):
    entry = logging.LogRecord("x", logging.INFO, "f", 1, "said %s", (leaking(secret),), None)
    assert files.scrubbing(entry)
    sent = []

    class Run:
        log = staticmethod(sent.append)

    tracking.WandbTracker(Run()).log({"note": leaking(secret), "loss": 1.0})
    shown = entry.getMessage() + str(sent)
    assert not [form for form in forms(secret) if form in shown] and sent[0]["loss"] == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("git+ssh://me:pw@host/x", "git+ssh://<credentials>@host/x"),
        ("https://hf_token@host/x?a=1", "https://<credentials>@host/x?a=1"),
        ("https://u:p@ss@host", "https://<credentials>@host"),
        ("https://h/x?b=1&X-Amz-Signature=abc&c=2", "https://h/x?b=1&X-Amz-Signature=<secret>&c=2"),
        ("https://h/x?token=abc", "https://h/x?token=<secret>"),
        ("https://huggingface.co/a/b?tokens=3", "https://huggingface.co/a/b?tokens=3"),
        ("mail me@there.org, C://x", "mail me@there.org, C://x"),
    ],
)
def test_urls(text, expected):
    assert files.scrub(text, {}) == expected


def test_ordinary_settings_of_the_environment_are_no_secrets(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    assert files.scrub("parallel short sk-0123456789") == "parallel short <OPENAI_API_KEY>"


def test_printable():
    text = "tab\t, line\n, \x1b[31mred, \u202eturned, \ud800half, \U0001f600"
    assert files.printable({text: [text, 1]}) == {
        (clean := "tab\t, line\n, \ufffd[31mred, \ufffdturned, \ufffdhalf, \U0001f600"): [clean, 1]
    }
