"""A canary: passwords and tokens that a run is given are in nothing that it writes or says."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from conftest import write_example
from s3 import BUCKET, moto_server

from flows.cli.main import run_command
from flows.language.server_access import server_token
from schemas.errors import ConfigError

CANARY = "canary-d41d8cd98f"


@pytest.fixture
def reward_server():
    """Scores everything 1 for those who know the token; (its address, the headers it was shown)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(self.headers.get("Authorization"))
            answer = json.dumps({"scores": [1.0] * len(body["responses"])}).encode()
            self.send_response(200 if seen[-1] == f"Bearer {CANARY}" else 401)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score", seen
    server.shutdown()


def test_no_secret_is_in_anything_that_was_written(tmp_path, reward_server, prefect_server):
    """Store on S3, cache, MLflow's database, Prefect's, the config as it was recorded, and all that was printed."""
    url, seen = reward_server
    example = write_example(tmp_path / "tiny")
    config = yaml.safe_load((example / "config.yaml").read_text())
    config |= {"reward": {"components": {"server": {"source": url}}}, "reward_model": None, "value": {"start": "actor"},
               "tracking": {"enabled": True}}
    config["data"] = {key: value for key, value in config["data"].items() if "pairs" not in key}
    (example / "config.yaml").write_text(yaml.safe_dump(config))
    with moto_server(tmp_path) as port:
        environment = os.environ | {
            "BATON_REWARD_TOKEN": f"127.0.0.1={CANARY}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": CANARY,
            "AWS_SESSION_TOKEN": CANARY, "AWS_DEFAULT_REGION": "us-east-1", "BATON_S3_ENDPOINT": f"http://127.0.0.1:{port}",
            "BATON_CACHE": str(tmp_path / "cache"), "MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": CANARY}
        said = []
        for tracking in ({}, {"MLFLOW_TRACKING_URI": f"http://me:{CANARY}@127.0.0.1:9"}):
            command = [sys.executable, "-m", "flows.cli.main", "train", str(example), "--verbose", "--store",
                       f"s3://{BUCKET}/store"]
            done = subprocess.run(command, env=environment | tracking, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            said += [done.stdout, done.stderr]
        assert seen and set(seen) == {f"Bearer {CANARY}"}
        assert "training goes on without it" in said[2]
        import s3fs

        fs = s3fs.S3FileSystem(key="key", secret="secret", endpoint_url=f"http://127.0.0.1:{port}")
        objects = {path: fs.cat_file(path) for path in fs.find(f"{BUCKET}/store")}
    written = {path: path.read_bytes() for place in (tmp_path, Path(os.environ["PREFECT_HOME"]))
               for path in place.rglob("*") if path.is_file()}
    assert len(objects) > 40 and any(path.suffix == ".db" for path in written)
    assert any(path.name == "mlflow.db" for path in written)
    for place, data in {**objects, **written}.items():
        assert CANARY.encode() not in data, place
    assert CANARY not in "".join(said)


@pytest.mark.parametrize("setting, field", [
    (f"tracking.uri=http://me:{CANARY}@example.org", "tracking.uri"),
    (f"tracking.uri=http://me:p@{CANARY}@example.org", "tracking.uri"),
    (f"tracking.uri=postgresql://me:pa/{CANARY}@db/mlflow", "tracking.uri"),
    (f"tracking.uri=postgresql://db/mlflow?password={CANARY}", "tracking.uri"),
    (f"reward.components={{a: {{source: 'https://me:{CANARY}@example.org/score'}}}}", "reward.components.a.source"),
])
def test_a_password_in_a_setting_is_refused_and_not_repeated(example, tmp_path, setting, field, capsys):
    assert run_command(["train", str(example), "--set", setting, "--store", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert f"{field}: holds a user name or password" in error and CANARY not in error
    assert not (tmp_path / "store" / "runs").exists()


@pytest.mark.parametrize("tokens, url, token", [
    ("127.0.0.1=a", "http://127.0.0.1:8000/score", "a"), ("127.0.0.1:8000=a", "http://127.0.0.1:8000/score", "a"),
    ("127.0.0.1:8000=a", "http://127.0.0.1:9000/score", None), ("a.org=a,b.org=b==", "https://b.org/score", "b=="),
    ("a.org=a", "https://a.org.evil.net/score", None), ("a.org=a", "https://A.ORG/score", "a"),
    ("a.org=a", "https://evil.net/a.org", None), ("", "https://a.org/score", None)])
def test_a_token_is_sent_to_its_host_alone(monkeypatch, tokens, url, token):
    monkeypatch.setenv("BATON_REWARD_TOKEN", tokens)
    assert server_token(url) == token


@pytest.mark.parametrize("tokens, url, message", [
    (f"a.org={CANARY}", "http://a.org/score", "which would be sent in clear; use https://"),
    (CANARY, "https://a.org/score", "BATON_REWARD_TOKEN: expected host=token"),
    (f"{CANARY}=", "https://a.org/score", "BATON_REWARD_TOKEN: expected host=token"),
    (f"a.org=x,{CANARY}==", "https://a.org/score", "BATON_REWARD_TOKEN: expected host=token")])
def test_a_token_that_cannot_be_kept_secret_is_refused(monkeypatch, tokens, url, message):
    monkeypatch.setenv("BATON_REWARD_TOKEN", tokens)
    with pytest.raises(ConfigError, match=message) as error:
        server_token(url)
    assert CANARY not in str(error.value)
