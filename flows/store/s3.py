"""A store on S3, or on what speaks its protocol: uploads in parts, manifests put if absent, a local cache of what is read.

    BATON_S3_ENDPOINT   the address of a server other than AWS's
    BATON_CACHE         the folder of the cache; ~/.cache/baton by default
    BATON_CACHE_GB      how much it may hold; 20 by default

Credentials are those of AWS's own variables and files (AWS_ACCESS_KEY_ID …). s3fs does the work; it is an extra, `s3`.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from flows.store.cache import Cache
from flows.store.files import Stat
from schemas.errors import ConfigError, StoreError, UnreachableStoreError, installed_by
from stages.ops.progress import progress_bar

PART = 32 * 2**20  # bytes of an upload's part
AT_ONCE = 4  # parts, and files
TRIES = 5  # of every request, by botocore, with growing pauses
TIMEOUT = 60  # seconds without an answer after which a request has failed
HEARTBEAT_INTERVAL = 10  # seconds between heartbeats of the process that holds a lock
LEASE_TIMEOUT = 60  # seconds without a heartbeat after which a lock expires


class S3Files:
    """`s3://bucket/prefix`."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        if "@" in parts.netloc or not parts.netloc:
            raise ConfigError("--store s3://…: expected s3://bucket/prefix; credentials come from AWS_ACCESS_KEY_ID and "
                              "AWS_SECRET_ACCESS_KEY")
        self.uri, self.bucket = uri.rstrip("/"), parts.netloc
        self.root = f"{parts.netloc}{parts.path}".rstrip("/")
        self.fs = _filesystem()
        endpoint = os.environ.get("BATON_S3_ENDPOINT", "")
        self.cache = Cache(sha256(f"{endpoint} {self.uri}".encode()).hexdigest()[:16])
        self.beside = self.cache.folder
        self._probed = False
        with self._errors("bucket"):
            self.fs.call_s3("head_bucket", Bucket=self.bucket)

    # --- reading ---

    def read(self, key: str) -> bytes | None:
        with self._errors(key), contextlib.suppress(FileNotFoundError):
            return self.fs.cat_file(self._path(key))
        return None

    def exists(self, key: str) -> bool:
        with self._errors(key), contextlib.suppress(FileNotFoundError):
            self.fs.call_s3("head_object", Bucket=self.bucket, Key=self._object(key))
            return True
        return False

    def names(self, key: str) -> list[str]:
        with self._errors(key), contextlib.suppress(FileNotFoundError):
            return sorted(path.rstrip("/").rpartition("/")[2] for path in self.fs.ls(self._path(key), detail=False))
        return []

    def walk(self, key: str) -> Iterator[Stat]:
        with self._errors(key):
            found = self.fs.find(self._path(key), detail=True)
        for path, about in found.items():
            yield Stat(path.removeprefix(f"{self.root}/"), about["size"], about["LastModified"].timestamp())

    def local(self, key: str, inner: str) -> Path:
        path = self.cache.path(key, inner)
        if path.is_file():
            return path
        with self._errors(f"{key}/{inner}"), contextlib.suppress(FileNotFoundError), self.cache.arriving(path) as new:
            self.fs.get_file(self._path(f"{key}/{inner}"), str(new))
        return path

    def forget(self, key: str, inner: str) -> bool:
        path = self.cache.path(key, inner)
        there = path.exists()
        path.unlink(missing_ok=True)
        return there

    def address(self, key: str) -> str:
        return f"{self.uri}/{key}"

    # --- writing ---

    def put_once(self, key: str, data: bytes) -> bool:
        self.probe()
        return self._put_once(key, data)

    def _put_once(self, key: str, data: bytes) -> bool:
        """A put that failed may have arrived, and its repetition then finds itself: what counts is whose bytes are there."""
        with self._errors(key):
            for wait in (0.1, 0.2, 0.5, 1, 2, 5, None):
                try:
                    self.fs.pipe_file(self._path(key), data, mode="create")
                    return True
                except OSError as error:
                    if _code(error) in ("PreconditionFailed", "412") or isinstance(error, FileExistsError):
                        return self.fs.cat_file(self._path(key)) == data
                    if _code(error) not in ("ConditionalRequestConflict", "409") or wait is None:
                        raise
                time.sleep(wait)  # another process is putting it, and may yet fail

    def probe(self) -> None:
        """Raises `StoreError` unless the store refuses to put a second time what is there: without that nothing is safe."""
        if self._probed:
            return
        key = f"probes/{uuid.uuid4().hex}"
        try:
            honoured = self._put_once(key, b"first") and not self._put_once(key, b"second")
        finally:
            self.remove(key)
        if not honoured:
            raise StoreError(f"{self.uri}: the server does not honour If-None-Match: two writers of one artifact would "
                             "overwrite each other; use AWS S3, or a newer version of this server")
        self._probed = True

    def begin(self, key: str) -> Path:
        return self.cache.begin(key)

    def sync(self, path: Path) -> None:
        """Not needed: it is durable when it is uploaded."""

    def publish(self, key: str) -> None:
        self.probe()
        folder = self.cache.making(key)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]

        with ThreadPoolExecutor(AT_ONCE) as pool:
            uploads = pool.map(lambda path: self.put_file(path, f"{key}/{path.relative_to(folder).as_posix()}"), files)
            list(progress_bar(uploads, "upload", total=len(files)))
        self.cache.keep(key)

    def put_file(self, path: Path, key: str) -> None:
        with self._errors(key):
            self.fs.put_file(str(path), self._path(key), chunksize=PART, max_concurrency=AT_ONCE)

    def remove(self, key: str) -> None:
        with self._errors(key):
            paths = list(self.fs.find(self._path(key)))
            if paths:
                self.fs.rm(paths)
        self.cache.remove(key)

    def unfinished(self) -> list[Stat]:
        with self._errors("uploads"):
            found = self.fs.call_s3("list_multipart_uploads", Bucket=self.bucket, Prefix=self._object("artifacts/"))
        prefix = self._object("")
        return [Stat(f"{one['Key'].removeprefix(prefix)}?uploadId={one['UploadId']}", 0, one["Initiated"].timestamp())
                for one in found.get("Uploads", ())]

    def abort(self, unfinished: Stat) -> None:
        key, _, upload = unfinished.key.partition("?uploadId=")
        with self._errors(key), contextlib.suppress(FileNotFoundError):
            self.fs.call_s3("abort_multipart_upload", Bucket=self.bucket, Key=self._object(key), UploadId=upload)

    # --- locking ---

    @contextlib.contextmanager
    def exclusive(self, key: str, holder: bytes, waiting: Callable[[bytes], None]) -> Iterator[None]:
        """By terms with growing numbers: `<key>/000007` is put if absent, `.beat` is its heartbeat, `.end` ends it.

        A term whose heartbeat does not change for LEASE_TIMEOUT seconds, by the clock of the waiting process, has expired.
        """
        mine = holder + f"\n{uuid.uuid4().hex}".encode()
        term = self._win(key, mine, waiting)
        over = threading.Event()
        beats = threading.Thread(target=self._beat, args=(f"{key}/{term:06d}.beat", over), daemon=True)
        beats.start()
        try:
            yield
        finally:
            over.set()
            beats.join()
            with contextlib.suppress(StoreError, OSError):  # it will lapse
                self._end(key, term, mine)

    def _end(self, key: str, term: int, mine: bytes) -> None:
        """Ends the term. One that was removed meanwhile, with all else of its run, is over, and its number another's."""
        there = self.read(f"{key}/{term:06d}")
        if there == mine:
            self._put_once(f"{key}/{term:06d}.end", b"")
        elif there is None:
            self.remove(f"{key}/{term:06d}.beat")

    def _win(self, key: str, mine: bytes, waiting: Callable[[bytes], None]) -> int:
        self.probe()
        seen, since, warned = None, time.monotonic(), False
        while True:
            last, ended = self._last_term(key)
            sign = (last, self.read(f"{key}/{last:06d}.beat"))
            if sign != seen:
                seen, since = sign, time.monotonic()
            if ended or time.monotonic() - since > LEASE_TIMEOUT:
                if self._put_once(f"{key}/{last + 1:06d}", mine):
                    self._clear(key, last)
                    return last + 1
                continue
            if not warned:
                waiting((self.read(f"{key}/{last:06d}") or b"").rpartition(b"\n")[0])
                warned = True
            time.sleep(HEARTBEAT_INTERVAL / 5)

    def _last_term(self, key: str) -> tuple[int, bool]:
        """The number of the last term, 0 where there was none, and whether it is over."""
        names = self.names(key)
        last = max((int(name) for name in names if re.fullmatch("[0-9]+", name)), default=0)
        return last, last == 0 or f"{last:06d}.end" in names

    def _clear(self, key: str, last: int) -> None:
        for name in self.names(key):
            if int(name[:6]) <= last:
                self.remove(f"{key}/{name}")

    def _beat(self, key: str, over: threading.Event) -> None:
        count = 0
        while not over.wait(HEARTBEAT_INTERVAL):
            count += 1
            with contextlib.suppress(StoreError, ConfigError, OSError), self._errors(key):  # the next one may arrive
                self.fs.pipe_file(self._path(key), str(count).encode())

    def holder(self, key: str) -> bytes | None:
        last, ended = self._last_term(key)
        signs = [] if ended else [stat.modified for stat in self.walk(key) if stat.key.startswith(f"{key}/{last:06d}")]
        if not signs or self._now() - max(signs) > LEASE_TIMEOUT:
            return None
        return (self.read(f"{key}/{last:06d}") or b"").rpartition(b"\n")[0]

    def _now(self) -> float:
        """By the server's clock."""
        key = f"probes/{uuid.uuid4().hex}"
        self._put_once(key, b"")
        try:
            return next(iter(self.walk(key))).modified
        finally:
            self.remove(key)

    # --- names and errors ---

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}".rstrip("/")

    def _object(self, key: str) -> str:
        return self._path(key).removeprefix(f"{self.bucket}/") + ("/" if key.endswith("/") or not key else "")

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turns botocore's own exceptions, which are no OSErrors, into `StoreError`, transient where network or server is in
        trouble; a missing bucket, or one that is not ours, into `ConfigError`."""
        from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

        try:
            yield
        except BotoCoreError as error:
            kind = UnreachableStoreError if isinstance(error, (ConnectionError, HTTPClientError)) else StoreError
            raise kind(f"{self.address(what)}: {' '.join(str(error).split())}; check AWS_ACCESS_KEY_ID, AWS_SECRET_"
                       "ACCESS_KEY, BATON_S3_ENDPOINT and the network, then the same command goes on") from error
        except PermissionError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--store {self.uri}: the server refuses these credentials ({reason}); check "
                              "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do in the bucket") from None
        except FileNotFoundError as error:
            if what == "bucket" or "NoSuchBucket" in str(error.__cause__):
                raise ConfigError(f"--store {self.uri}: there is no bucket {self.bucket!r}; make it first") from None
            raise
        except OSError as error:
            if not isinstance(error, TimeoutError) and _status(error) < 500:
                raise
            reason = " ".join(str(error).split())
            raise UnreachableStoreError(f"{self.address(what)}: {reason}; what was committed before is whole: check the "
                                        "server, then the same command goes on") from error
        except ClientError as error:
            raise StoreError(f"{self.address(what)}: {error}") from error


def _filesystem():
    try:
        import s3fs
    except ImportError:
        raise ConfigError(f"--store s3://…: s3fs is not installed; {installed_by('s3')}") from None
    client = {"retries": {"mode": "standard", "max_attempts": TRIES}, "connect_timeout": 10, "read_timeout": TIMEOUT}
    return s3fs.S3FileSystem(endpoint_url=os.environ.get("BATON_S3_ENDPOINT"), use_listings_cache=False,
                             skip_instance_cache=True, config_kwargs=client)


def _status(error: OSError) -> int:
    """The HTTP status that the server answered with; 0 where it did not."""
    return (getattr(error.__cause__, "response", None) or {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _code(error: OSError) -> str:
    """The server's own code of an error."""
    return (getattr(error.__cause__, "response", None) or {}).get("Error", {}).get("Code", "")
