"""The real download path of the libraries against a small hub of our own on the loopback: what loads, and what is said."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs

import pytest
from huggingface_hub.errors import HfHubHTTPError

from sparsebench.data import hub
from tests.helpers import QUICK_RUN, record_of, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
ERRORS = {401: "GatedRepo", 404: "RepoNotFound"}


def commit_of(repository: str, revision: str) -> str:
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


class Answer(BaseHTTPRequestHandler):
    """What huggingface.co answers to the requests that its libraries make."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def do_POST(self):
        self.posted = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.answer(True)

    def answer(self, body: bool):
        path = self.path.partition("?")[0].strip("/")
        kind, _, rest = path.removeprefix("api/").partition("/")
        path = rest if kind in ("models", "datasets") else path
        name, parts = "/".join(path.split("/")[:2]), path.split("/")[2:]
        about = self.server.repositories.get(name)
        if about is None or about.get("status"):
            status = about["status"] if about else 404
            return self.send(status, b'{"error": "no"}', body, {"X-Error-Code": ERRORS.get(status, "")})
        what, revision, *inner = [*parts, *["", "main"][len(parts) :]]
        revision = {commit_of(name, r): r for r in about["revisions"]}.get(revision, revision)
        if revision not in about["revisions"]:
            return self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        files, commit = about["revisions"][revision], commit_of(name, revision)
        if what == "resolve":
            return self.file(about, files, "/".join(inner), commit, body)
        listed = [
            {"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for f, c in files.items()
        ]
        if what == "tree":
            return self.json(listed if not inner else [], body)
        if what == "paths-info":
            return self.json([each for each in listed if each["path"] in parse_qs(self.posted)["paths"]], body)
        siblings = [{"rfilename": f} for f in files]
        return self.json(
            {"id": name, "sha": commit, "siblings": siblings, "private": False, "gated": False, "tags": []}, body
        )

    def json(self, content, body):
        self.send(200, json.dumps(content).encode(), body, {"Content-Type": "application/json"})

    def file(self, about, files, name, commit, body):
        if name not in files:
            return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, status = files[name], 200
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        time.sleep(about.get("slow", 0))
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
        whole = content[start:]
        cut = about.get("cut") if body and name.endswith(".safetensors") else None
        if cut == "once":
            about["cut"] = None
        self.send(status, whole, body, headers, whole[: len(whole) // 2] if cut == "once" else b"" if cut else whole)

    def send(self, status, content, body, headers, sent=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content if sent is None else sent)
        if sent is not None and len(sent) < len(content):
            self.close_connection = True


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A hub with a sharded model of two revisions, broken ones, and a data set; its address as the libraries take it."""
    folder = tmp_path_factory.mktemp("repository")
    revisions = {}
    for revision, seed in (("main", 0), ("v1", 1)):
        tiny_model(seed=seed).save_pretrained(folder / revision, max_shard_size="200KB")
        tiny_tokenizer().save_pretrained(folder / revision)
        revisions[revision] = {p.name: p.read_bytes() for p in (folder / revision).iterdir()}
    assert len([name for name in revisions["main"] if name.endswith(".safetensors")]) > 1
    rows = "\n".join(json.dumps({"text": f"row {i} of the set"}) for i in range(40)).encode()
    served = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    served.repositories = {
        "Some/Sharded": {"revisions": revisions}, "some/slow": {"revisions": revisions, "slow": 0.1},
        "some/cut-once": {"revisions": revisions, "cut": "once"}, "some/cut": {"revisions": revisions, "cut": "always"},
        "some/hanging": {"revisions": revisions, "slow": 30}, "some/gated": {"status": 401}, "some/busy": {"status": 503},
        "Some/WikiSet": {"revisions": {"main": {"train.jsonl": rows, "validation.jsonl": rows.replace(b"row", b"held out row")}}},
    }  # fmt: skip
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()


CLIENT = """
import json, pathlib, sys
import torch
from huggingface_hub import constants
from sparsebench.config.identity import contents
from sparsebench.data import hub
from tests.helpers import built, work
folder = pathlib.Path(sys.argv[1])
hardware = work(folder)
model, data = built("model", "model=hf", path="a/b"), built("dataset", "dataset=c4", hub_config=None, max_documents=None)
def told(do):
    try:
        return do()
    except ValueError as error:
        return str(error)
names = {}
def named(name, key, config, do):  # the answer to `do`; in `names`: what the run is named by before and after it
    before = contents(config).get(key + " stands for")
    answer = told(do)
    names[name] = [before, contents(config).get(key + " stands for")]
    return answer
def load(name, path, revision):
    model.path, model.revision = path, revision
    problem = hub.model_problem(path, "model.path", revision)
    return problem or named(name, "model.path", {"model": {"path": path, "revision": revision}},
        lambda: sum(p.double().abs().sum().item() for p in model.load(hardware, None).module.parameters()))
def read(name, hub_id):
    data.hub_id = hub_id
    problem = hub.dataset_problem(data)
    return problem or named(name, "dataset.hub_id", {"dataset": {"path": None, "source": "hub", "hub_id": hub_id}},
        lambda: [len(s.documents) for s in (lambda d: (d.fit, d.dev, d.test))(data.load(0))])
answers = {}
for name, path, revision in json.loads(sys.argv[2]):
    if name == "offline":
        constants.HF_HUB_OFFLINE = True
        hub.reachable.cache_clear()
    else:
        answers[name] = read(name, path) if name.startswith("data") else load(name, path, revision)
print(json.dumps(answers | {"names": names}))
"""


def environment(server, home) -> dict[str, str]:
    """Of a process whose Hub is `server`, with an empty cache in `home`."""
    here = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    return here | dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "") | {
        "HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def client(server, home, asked):
    """What one process, which begins with an empty cache in `home`, gets for each (name, repository, revision)."""
    process = subprocess.run([sys.executable, "-c", CLIENT, str(home), json.dumps(asked)], cwd=ROOT,
                             env=environment(server, home), capture_output=True, text=True, timeout=500)  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers(server, tmp_path_factory):
    """The last ones are without the Hub."""
    return client(server, tmp_path_factory.mktemp("home"), [
        ("sharded", "Some/Sharded", None), ("revision", "Some/Sharded", "v1"), ("no revision", "Some/Sharded", "v9"),
        ("cut once", "some/cut-once", None), ("gated", "some/gated", None), ("unknown", "some/unknown", None),
        ("data", "Some/WikiSet", None), ("data unknown", "some/unknown", None), ("offline", None, None),
        ("sharded again", "Some/Sharded", None), ("revision again", "Some/Sharded", "v1"), ("uncached", "some/uncached", None),
        ("data again", "Some/WikiSet", None), ("data uncached", "some/uncached", None),
    ])  # fmt: skip


def weights(seed):
    return sum(p.double().abs().sum().item() for p in tiny_model(seed=seed).parameters())


def test_what_the_hub_has_is_loaded(answers):
    for name, seed in (("sharded", 0), ("revision", 1), ("cut once", 0)):
        assert answers[name] == pytest.approx(weights(seed), rel=1e-3), name
    assert answers["data"] == [40, 20, 20]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gated", "model.path=some/gated is gated: accept its terms on the Hub and set HF_TOKEN"),
        (
            "unknown",
            "model.path=some/unknown does not exist on the Hub, or is private: check its name, or set HF_TOKEN",
        ),
        ("no revision", "model.revision=v9 does not exist in Some/Sharded"),
        ("data unknown", "dataset.hub_id=some/unknown does not exist on the Hub, or is private: check its name"),
        (
            "uncached",
            "model.path=some/uncached is neither a folder nor in the local Hub cache, and the Hub can't be reached",
        ),
        ("data uncached", "some/uncached is not in the local cache of datasets and the Hub can't be reached"),
    ],
)
def test_what_the_hub_has_not_is_one_line(answers, name, said):
    assert isinstance(answers[name], str) and said in answers[name] and "\n" not in answers[name], answers[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [("slow", None), ("cut", "the connection to the Hub broke"), ("busy", "the Hub answered with status 503"),
     ("hanging", "the Hub did not answer in time")],
)  # fmt: skip
def test_a_hub_that_is_slow_busy_or_breaks_off(server, tmp_path, name, said):
    """The libraries try again for a minute or two; then it is one line."""
    told = client(
        server, tmp_path, [(name, f"some/{name}", None), ("offline", None, None), ("again", f"some/{name}", None)]
    )
    if said is None:
        assert told[name] == told["again"] == pytest.approx(weights(0), rel=1e-3)
        return
    assert told[name].startswith(f"model.path=some/{name}: {said}"), told
    assert "local cache does not hold all of it" in told["again"] or "nor in the local Hub cache" in told["again"], told


def test_the_cache_serves_without_the_hub(answers):
    """Before: the folder of a data set was looked for in lower case, so that `Salesforce/wikitext` was refused."""
    assert answers["sharded again"] == answers["sharded"] and answers["revision again"] == answers["revision"]
    assert answers["data again"] == answers["data"]


def test_a_run_is_named_the_same_before_and_after_its_first_download(answers):
    """Before: no commit stood in its identity until then, and the same command ran once more."""
    for name, repository, revision in (
        ("sharded", "Some/Sharded", "main"), ("revision", "Some/Sharded", "v1"), ("data", "Some/WikiSet", "main"),
    ):  # fmt: skip
        for each in (name, f"{name} again"):
            assert answers["names"][each] == [[commit_of(repository, revision), {}]] * 2, each


@pytest.mark.slow
def test_a_second_start_answers_from_the_record_of_the_first_download(server, sparsebench, text_file, tmp_path):
    given = ["model=hf", "model.path=Some/Sharded", f"dataset.path={text_file}", *QUICK_RUN, "measure.latency=false"]
    first, second = (sparsebench(*given, env=environment(server, tmp_path / "home")) for _ in range(2))
    assert first.returncode == second.returncode == 0, (first.stderr, second.stderr)
    assert record_of(first, tmp_path) == record_of(second, tmp_path) and "finished before" in second.stderr


def test_errors_of_others_pass():
    with pytest.raises(KeyError), hub.answering("model.path", "x"):
        raise KeyError("mine")
    response = SimpleNamespace(status_code=500, headers={}, request=None)
    with (
        pytest.raises(ValueError, match="model.path=x: the Hub answered with status 500"),
        hub.answering("model.path", "x"),
    ):
        raise OSError("wrapped") from HfHubHTTPError("no", response=response)
