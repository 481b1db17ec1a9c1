"""A store on S3: the same promises over a network that fails, and what only a network has."""

import json
import os
import threading
import time

import numpy as np
import pytest
from control import write_control
from s3 import BUCKET, CREDENTIALS, Faults, moto_server, proxy
from test_store import eight_writers, findings, recipe, write

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store import cache, s3
from flows.store.store import Store, attempt_of
from schemas.errors import StoreError
from schemas.tables import ReferenceLogprobs


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with moto_server(tmp_path_factory.mktemp("moto")) as port:
        yield port


@pytest.fixture
def uri(server, tmp_path, monkeypatch):
    """A store's address that nobody has used, on the server itself."""
    for key, value in CREDENTIALS.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("BATON_S3_ENDPOINT", f"http://127.0.0.1:{server}")
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    return f"s3://{BUCKET}/{tmp_path.name}"


def through(monkeypatch, address):
    monkeypatch.setenv("BATON_S3_ENDPOINT", address)


def stored(uri, key):
    """The bytes of an object, by another library."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["BATON_S3_ENDPOINT"])
    return client.get_object(Bucket=BUCKET, Key=f"{uri.split('/')[-1]}/{key}")["Body"].read()


def test_what_is_committed_is_read_back_elsewhere(uri, tmp_path, monkeypatch):
    store = Store(uri)
    manifest = store.commit(write(store, recipe()))
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "another machine"))
    there = Store(uri)
    assert there.find(manifest.ref) == manifest and there.artifacts() == [manifest.ref]
    assert there.table(manifest.ref, ReferenceLogprobs).logprobs.values.tolist() == [-1] * 7
    assert json.loads((there.folder(manifest.ref, "model") / "config.json").read_text()) == {"a": 1}
    assert findings(there, manifest.ref) == []
    assert there.place(manifest.ref, "model").startswith(f"{uri}/artifacts/reference/")


WAYS = ("500", "lost", "slow0.2")


@pytest.mark.parametrize("ways", [(), WAYS], ids="+".join)
def test_of_eight_writers_one_wins_and_seven_adopt(uri, server, monkeypatch, ways):
    """One of three puts fails before it arrives, or after, or comes late; who is told so must not mistake himself."""
    faults = Faults(*ways, every=3) if ways else lambda method, path: None
    with proxy(server, faults) as address:
        through(monkeypatch, address)
        eight_writers(uri)
    assert not ways or faults.made >= 8


def test_a_manifest_whose_reply_is_lost_is_ours(uri, server, monkeypatch):
    faults = Faults("lost", every=1, path="manifest.json")
    with proxy(server, lambda method, path: faults(method, path) if faults.made == 0 else None) as address:
        through(monkeypatch, address)
        store = Store(uri)
        made = write(store, recipe())
        assert store.commit(made) == made and faults.made == 1
        assert findings(store, made.ref) == []


def test_a_put_that_meets_another_is_tried_again(uri, server, monkeypatch):
    """As AWS answers where two are put at one time, of which neither is there yet."""
    faults = Faults("409", every=1, path="manifest.json")
    with proxy(server, lambda method, path: faults(method, path) if faults.made < 2 else None) as address:
        through(monkeypatch, address)
        store = Store(uri)
        made = write(store, recipe())
        assert store.commit(made) == made and faults.made == 2


def test_credentials_that_are_refused_are_said(uri, server, monkeypatch, capsys):
    with proxy(server, lambda method, path: "403") as address:
        through(monkeypatch, address)
        assert run_command(["runs", "--store", uri]) == 2
    error = capsys.readouterr().err
    assert "the server refuses these credentials" in error and error.count("\n") == 1


def test_what_is_being_made_is_never_let_go_of(uri, monkeypatch):
    """By another process that is over its limit, however long the making takes."""
    monkeypatch.setenv("BATON_CACHE_GB", "1e-9")
    store = Store(uri)
    attempt = store.attempt(recipe())
    attempt.path("data").write_bytes(bytes(1000))
    for path in (attempt.folder, attempt.folder / "data"):
        os.utime(path, (time.time() - 86400,) * 2)
    Store(uri).files.cache.make_room()
    assert (attempt.folder / "data").stat().st_size == 1000


def test_a_checkpoint_goes_up_in_parts_some_of_which_fail(uri, server, monkeypatch):
    """A file of three parts: one refused, one slow, one whose reply is lost."""
    monkeypatch.setattr(s3, "PART", 5 * 2**20)
    data = np.random.default_rng(0).bytes(12 * 2**20)
    faults = Faults(*WAYS, every=1, path="partNumber")
    with proxy(server, lambda method, path: faults(method, path) if faults.made < 3 else None) as address:
        through(monkeypatch, address)
        store = Store(uri)
        attempt = store.attempt(recipe())
        attempt.path("model.safetensors").write_bytes(data)
        made = write(store, recipe()).model_copy(update={"attempt": attempt.name, "files": attempt.seal()})
        store.commit(made)
    assert faults.made == 3
    through(monkeypatch, f"http://127.0.0.1:{server}")
    assert stored(uri, f"{attempt_of(made)}/model.safetensors") == data


def test_a_server_that_overwrites_is_refused(uri, server, monkeypatch):
    with proxy(server, lambda method, path: "unconditional") as address:
        through(monkeypatch, address)
        store = Store(uri)
        with pytest.raises(StoreError, match="does not honour If-None-Match"):
            store.commit(write(store, recipe()))
        assert store.files.names("probes") == [] and store.artifacts() == []


def test_a_damaged_object_is_noticed_and_a_damaged_copy_fetched_again(uri):
    store = Store(uri)
    made = store.commit(write(store, recipe()))
    key = f"{attempt_of(made)}/reference.parquet"
    copy = store.files.local(attempt_of(made), "reference.parquet")
    copy.write_bytes(copy.read_bytes()[:-1])
    assert Store(uri).table(made.ref, ReferenceLogprobs).row_id.tolist() == [0, 1, 2]
    assert copy.read_bytes() == stored(uri, key)

    store.files.fs.pipe_file(store.files._path(key), stored(uri, key)[:-1])
    assert len(findings(store, made.ref)) == 1  # whatever lies in the cache
    store.files.cache.remove(key)
    with pytest.raises(StoreError, match=f"{uri}/{key}: size: expected"):
        Store(uri).table(made.ref, ReferenceLogprobs)
    assert len(findings(store, made.ref)) == 1


def test_the_cache_stays_within_its_limit(uri, monkeypatch):
    """Eight artifacts of 100 kB through a cache of 300 kB, as if each had been used last an hour after the one before."""
    monkeypatch.setenv("BATON_CACHE_GB", "3e-4")
    store, refs = Store(uri), []
    for n in range(8):
        attempt = store.attempt(recipe(seed=n))
        attempt.write("data", bytes(100_000))
        made = write(store, recipe(seed=n)).model_copy(update={"attempt": attempt.name, "files": attempt.seal()})
        refs.append(store.commit(made).ref)
        store.files.cache._used.clear()
        for folder in store.files.cache.folder.glob("artifacts/*/*/attempts/*"):
            os.utime(folder, (time.time() - cache.IN_USE - 3600 * (8 - n),) * 2)
    store.files.cache.make_room()
    kept = list(store.files.cache.folder.rglob("data"))
    assert 0 < sum(path.stat().st_size for path in kept) <= 300_000
    for ref in refs:
        assert Store(uri).file(ref, "data").stat().st_size == 100_000


def test_an_upload_that_was_broken_off_is_found_by_gc(uri, capsys):
    store = Store(uri)
    made = store.commit(write(store, recipe()))
    key = store.files._object(f"{attempt_of(made)}/more")
    store.files.fs.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
    assert run_command(["gc", "--dry-run", "--older-than", "0", "--store", uri, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["found"]
    assert sorted(one["kind"] for one in found) == ["artifact", "unfinished"]
    assert run_command(["gc", "--older-than", "0", "--store", uri, "--json"]) == 0
    assert store.files.unfinished() == [] and Store(uri).artifacts() == []


def test_a_run_on_s3_is_the_run_on_disk_byte_for_byte(uri, tmp_path, prefect_server, capsys):
    example = write_control(tmp_path / "small", policy={"normalize_observations": True}, tracking={"enabled": False})
    for root in (uri, str(tmp_path / "disk")):
        assert run_command(["train", str(example), "--store", root, "--quiet"]) == 0
    there, here = open_run(Store(uri), "small"), open_run(Store(tmp_path / "disk"), "small")
    for one, other in zip(there.states(), here.states(), strict=True):
        assert one.model_copy(update={"seconds": 0}) == other.model_copy(update={"seconds": 0})
        for ref in one.artifacts.values():
            assert there.store.manifest(ref).digests() == here.store.manifest(ref).digests()
    assert run_command(["verify", "--store", uri]) == 0
    assert run_command(["fork", "small", "--at", "1", "--run", "again", "--store", uri]) == 0
    assert run_command(["train", "--run", "again", "--store", uri, "--quiet"]) == 0
    capsys.readouterr()
    assert run_command(["diff", "small", "again", "--store", uri]) == 0
    assert "the same bytes in all 4 states" in capsys.readouterr().out
    assert run_command(["rm", "small", "--store", uri]) == 0
    assert Store(uri).files.names("runs") == ["again"]


def test_a_lock_is_held_by_one_and_lapses_with_its_holder(uri, monkeypatch):
    monkeypatch.setattr(s3, "HEARTBEAT_INTERVAL", 0.2)
    monkeypatch.setattr(s3, "LEASE_TIMEOUT", 2)
    one, other, order, told = Store(uri).files, Store(uri).files, [], []

    def work():
        with other.exclusive("runs/x/lease", b"other", told.append):
            order.append("other")

    with one.exclusive("runs/x/lease", b"one", told.append):
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(4)  # twice as long as a holder that shows no life would have
        assert one.holder("runs/x/lease") == b"one"
        order.append("one")
    thread.join(20)
    assert order == ["one", "other"] and told == [b"one"] and one.holder("runs/x/lease") is None

    monkeypatch.setattr(s3.S3Files, "_beat", lambda *_: None)  # as if its machine had been taken away
    dead = Store(uri).files.exclusive("runs/x/lease", b"dead", told.append)
    dead.__enter__()
    with one.exclusive("runs/x/lease", b"one", told.append):
        order.append("after")
    assert order[-1] == "after" and told[-1] == b"dead"


def test_what_is_wrong_with_the_address_is_said(uri, monkeypatch, capsys):
    for root, code, message in (
            ("s3://nobody/x", 2, "there is no bucket 'nobody'; make it first"),
            ("s3://me:secret@bucket/x", 2, "expected s3://bucket/prefix; credentials come from AWS_ACCESS_KEY_ID")):
        assert run_command(["runs", "--store", root]) == code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "secret" not in error.replace("AWS_SECRET", "")
    monkeypatch.setenv("BATON_S3_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(s3, "TRIES", 1)
    assert run_command(["runs", "--store", uri]) == 1
    assert "Could not connect to the endpoint URL" in (error := capsys.readouterr().err) and "BATON_S3_ENDPOINT" in error


def test_a_path_that_leaves_the_artifact_is_refused(uri):
    store = Store(uri)
    made = store.commit(write(store, recipe()))
    with pytest.raises(StoreError, match="leaves the artifact"):
        store.files.local(attempt_of(made), "../../../x")
