"""Runs, networks and images in buckets, `s3://bucket/run` or `gs://bucket/run`, by fsspec.

Runs need locks and renaming, which buckets have not. So a command works in a copy on this disk, of
which what is new is sent after every checkpoint: first its files, then a commit that names the
complete checkpoints, `.commits/00000007.json`. Others are not fetched. A commit is only written
where none has its number (a conditional write), so that two runs do not mix.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from cgd_jax.runtime import files, packages
from cgd_jax.runtime.errors import UserError
from cgd_jax.runtime.locks import one_at_a_time

LOOK_EVERY = 1.0  # seconds, for a new checkpoint

log = logging.getLogger(__name__)


class BucketError(UserError, OSError):
    """A bucket that cannot be read or written."""


def is_bucket(address: str | Path) -> bool:
    """Returns whether an address is of a bucket, rather than a path."""
    return re.match("(s3|gs)://", str(address)) is not None


def local(address: str) -> str:
    """Returns where a copy lies of what is at an address, fetched if need be; a path as it is."""
    return str(Copy(address).fetch()) if is_bucket(address) else address


@contextlib.contextmanager
def fetched(address: str, scratch: Path) -> Iterator[Path]:
    """Yields a copy below `scratch` of what is at an address, for a while; a path as it is."""
    if not is_bucket(address):
        yield Path(address)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incomplete.fetched_", dir=scratch) as folder:
        yield Copy(address, Path(folder)).fetch()


def fingerprint(address: str) -> str:
    """Returns 12 hexadecimal digits that change when what is at an address does."""
    with _reaching(address, "listed"):
        return hashlib.sha256(Copy(address).there()[0].encode()).hexdigest()[:12]


def objects(address: str) -> list[tuple[str, int, int]]:
    """Lists what is below an address: names, bytes, and when each was changed, in ns since 1970."""
    store, root = _open(address)
    with _reaching(address, "listed"):
        found = {key[len(root) + 1 :]: of for key, of in store.find(root, detail=True).items()}
        changed = {name: of.get("LastModified") or of["mtime"] for name, of in found.items()}
        return [
            (name, of["size"], int(changed[name].timestamp()) * 10**9)
            for name, of in found.items()
            if name and not name.endswith("/")
        ]


def read(address: str) -> bytes:
    """Reads an object."""
    store, key = _open(address)
    with _reaching(address, "read"):
        return store.cat_file(key)


@contextlib.contextmanager
def mirrored(address: str, trains: bool) -> Iterator[str]:
    """Yields a folder to work in, of which what is new is sent to an address; a path as it is.

    It is sent in the end and, of a command that trains, after every checkpoint.
    """
    if not is_bucket(address):
        yield address
        return
    copy, ended = Copy(address), threading.Event()
    copy.fetch(new=True)
    watching = threading.Thread(target=copy.watch, args=[ended], daemon=True)
    if trains:
        watching.start()
    try:
        yield str(copy.folder)
    finally:
        ended.set()
        if trains:
            watching.join()
        copy.send(trains)
    log.info("It is in %s too.", address)


class Copy:
    """A folder on this disk, and the place in a bucket whose content it has."""

    def __init__(self, address: str, place: Path | None = None):
        self.address = address.rstrip("/")
        self.commits, self.by = 0, ""  # that this copy has seen; its name in those it makes
        self.store, self.root = _open(self.address)
        name = self.address.rpartition("/")[2]
        digest = hashlib.sha256(self.address.encode()).hexdigest()[:8]
        cache = Path(platformdirs.user_cache_dir("cgd_jax"), "buckets", f"{name}-{digest}")
        self.place = place or cache
        self.folder, self.record = self.place / name, self.place / "record.json"

    def fetch(self, new: bool = False) -> Path:
        """Brings the folder up to date, unless it is ahead of the bucket or a run is at work there.

        Returns the folder, or the file if there is one object. Raises BucketError if there is
        nothing, and it need not be new.
        """
        with _reaching(self.address, "fetched"), one_at_a_time(self.place / "lock"):
            version, keys, self.commits, by = self.there()
            known = self.known()
            self.by = known["by"]
            # The answer to a commit may have been lost, so that it is not known to be there.
            unchanged = by == self.by or known["commits"] == self.commits
            ahead = unchanged and known["files"] != self.files()
            if version != known["version"] and not ahead:
                with (
                    contextlib.suppress(BlockingIOError),
                    one_at_a_time(self.folder / ".lock", wait=False),
                ):
                    self.record.unlink(missing_ok=True)
                    for path in self.folder.iterdir():
                        if path.name != ".lock":
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
                    if keys:
                        self.store.get(list(keys.values()), [str(self.folder / n) for n in keys])
                    self.note(version, self.files())
        if not keys and not new:
            raise BucketError(f"There is nothing at {self.address}.")
        return self.folder / self.folder.name if [*keys.values()] == [self.root] else self.folder

    def there(self) -> tuple[str, dict[str, str], int, str]:
        """Returns what is complete there: a text that changes with it; name → key of its files.

        Then the number of commits, and by which copy the last one is.
        """
        found = self.store.find(self.root, detail=True)
        base = self.root.rpartition("/")[0] if self.root in found else self.root
        # An index may lie within a run; folders may be objects; no name leads out of the folder.
        ignored = re.compile(r"index/\w+\.lance/|(.*/)?$|.*\.\./|/")
        keys = {key[len(base) + 1 :]: key for key in found}
        keys = {name: key for name, key in keys.items() if not ignored.match(name)}
        commits = sorted(name for name in keys if name.startswith(".commits/"))
        last: dict = {"by": "", "steps": []}
        if commits:  # else it was put there by hand
            last = json.loads(self.store.cat_file(keys[commits[-1]]))
            steps = ["", *last["steps"]]
            keys = {n: k for n, k in keys.items() if n not in commits and step_of(n) in steps}
        marks = [[key, found[key].get("ETag") or found[key].get("etag")] for key in keys.values()]
        return json.dumps([len(commits), marks]), keys, len(commits), last["by"]

    def known(self) -> dict:
        """Returns what `note` has written."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.record.read_text(encoding="utf-8"))
        return {"version": None, "commits": None, "by": uuid.uuid4().hex, "files": {}}

    def note(self, version: str | None, found: dict[str, list[int]]) -> None:
        """Writes down what the folder has of the bucket, and its files as they were."""
        about = {"version": version, "commits": self.commits, "by": self.by, "files": found}
        files.write_json(self.record, about)

    def files(self) -> dict[str, list[int]]:
        """Returns name → size and time of all files, without checkpoints that are not complete."""
        found = {}
        walked = os.walk(self.folder)  # which passes over folders that go meanwhile
        for path in (Path(folder, name) for folder, _, names in walked for name in names):
            name = path.relative_to(self.folder).as_posix()
            passing = path.name == ".lock" or path.name.startswith("incomplete.")
            if not passing and Path(step_of(name) or "0").name.isdigit():
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file():
                        found[name] = [path.stat().st_size, path.stat().st_mtime_ns]
        return found

    def watch(self, ended: threading.Event) -> None:
        """Sends what is new whenever there are other checkpoints, until the event."""
        steps = lambda: {step_of(name) for name in self.files()}
        seen = {step_of(name) for name in self.known()["files"]}  # that was sent
        while not ended.wait(LOOK_EVERY):
            if (now := steps()) != seen:
                seen = now
                try:
                    self.send(trains=True)
                except BucketError as error:
                    if steps() == seen:  # else one was deleted while it was read
                        log.warning("%s Training goes on.", error)

    def send(self, trains: bool) -> None:
        """Sends what is new; of a command that trains, commits, then deletes what is gone."""
        with _reaching(self.address, "written", self.folder), one_at_a_time(self.place / "lock"):
            known, found = self.known()["files"], self.files()
            new = [n for n in found if found[n] != known.get(n) and (trains or not step_of(n))]
            if not new:
                return
            *_, commits, by = self.there()
            if trains and commits != self.commits and by != self.by:
                raise BucketError(
                    f"Another run has sent a checkpoint to {self.address} that this one did not "
                    f"begin with, so nothing of this one is sent any more. It is in {self.folder}."
                )
            # A history may be ahead of its checkpoints; behind them, it would have a gap.
            for part in ([n for n in new if not step_of(n)], [n for n in new if step_of(n)]):
                if part:
                    here = [str(self.folder / name) for name in part]
                    self.store.put(here, [f"{self.root}/{name}" for name in part])
            sent = known | {name: found[name] for name in new}
            if trains:
                commit = {"by": self.by, "steps": sorted({step_of(name) for name in found})}
                key = f"{self.root}/.commits/{commits + 1:08}.json"
                self.store.pipe_file(key, json.dumps(commit).encode(), mode="create")
                self.commits, sent = commits + 1, found
                for name in known.keys() - found.keys():
                    with contextlib.suppress(FileNotFoundError):
                        self.store.rm_file(f"{self.root}/{name}")
            version, keys, *_ = self.there()
            # Others, of which there may be files too, are fetched the next time.
            self.note(version if keys.keys() <= sent.keys() else None, sent)


def _open(address: str) -> tuple[Any, str]:
    """Returns the file system of an address, and what it calls it."""
    packages.require(address, "buckets", "fsspec", "s3fs" if address[0] == "s" else "gcsfs")
    import fsspec

    # What it keeps of listings would hide what others write.
    return fsspec.url_to_fs(address, use_listings_cache=False)


def step_of(name: str) -> str:
    """Returns the folder of the checkpoint that a file belongs to, "" for none."""
    found = re.match("((?:.*/)?checkpoints/[^/]+)/", name)
    return found[1] if found else ""


@contextlib.contextmanager
def _reaching(address: str, done: str, folder: Path | None = None) -> Iterator[None]:
    """Raises what the libraries raise, each its own, as errors that say what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        kept = f" Nothing is lost: it is in {folder}, and the same command sends it."
        raise BucketError(
            f"{address} could not be {done}: {text}. Look at the name of the bucket, at what its "
            f"owner lets you do, and at the credentials: `aws configure`, or for gs:// `gcloud "
            f"auth application-default login`.{kept if folder else ''}"
        ) from error
