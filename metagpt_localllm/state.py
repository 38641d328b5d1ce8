"""What lasts across runs: one SQLite file, written from a thread so that no call ever waits for the disk.

``~/.metagpt/localllm/state.db``, readable by its owner alone, in WAL mode: many processes may write at once,
readers see whole transactions, and a process killed in mid-write leaves the file as it was before. A disk
that is full, a home that is read-only or a file from a newer release cost a warning and never a call; each
write is tried anew, for a disk may have room again. A damaged file is set aside, and a new one begun.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Hashable, Iterator, Literal, Mapping, Optional, TypeVar

from metagpt_localllm.quoting import quoted

__all__ = ["State", "state_at", "transaction"]

#: Version of the tables. A file of an older one is brought forward by MIGRATIONS, one step each.
_VERSION = 3
_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE samples (
        id INTEGER PRIMARY KEY,
        at REAL NOT NULL,          -- seconds since 1970
        server TEXT NOT NULL,      -- base_url, without a user name and password
        model TEXT NOT NULL,
        sample TEXT NOT NULL       -- JSON of latency.Sample: counts and seconds, no text of any prompt
    );
    CREATE INDEX samples_of ON samples (server, model, id);
    """,
    # The journal. BLOBs of JSON are UTF-8 with lone surrogates, which SQLite's TEXT cannot hold.
    """
    CREATE TABLE runs (
        id TEXT PRIMARY KEY,
        key TEXT NOT NULL,
        started REAL NOT NULL,     -- seconds since 1970
        touched REAL NOT NULL,
        outcome TEXT NOT NULL,
        owner TEXT NOT NULL,
        resumed INTEGER NOT NULL,
        calls INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        about BLOB NOT NULL        -- JSON: what else a RunRecord has
    );
    CREATE INDEX runs_of ON runs (key, started);
    CREATE TABLE calls (
        id INTEGER PRIMARY KEY,
        run TEXT NOT NULL,
        number INTEGER NOT NULL,
        digest TEXT NOT NULL,
        outcome TEXT NOT NULL,
        superseded INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        about BLOB NOT NULL,       -- JSON: what else a CallRecord has
        answer BLOB,               -- JSON
        crc INTEGER NOT NULL       -- of all that stays as it is: a damaged index may lead to another row
    );
    CREATE UNIQUE INDEX calls_of ON calls (run, number);
    CREATE INDEX calls_for ON calls (run, digest, number);  -- with the number, or it is not chosen
    CREATE TABLE drafts (          -- of calls without a whole answer
        run TEXT NOT NULL,
        number INTEGER NOT NULL,
        kind TEXT NOT NULL,        -- partial: JSON of what was received; request: what was sent, zlib
        body BLOB NOT NULL,
        crc INTEGER NOT NULL,
        PRIMARY KEY (run, number, kind)
    );
    """,
    """
    CREATE TABLE replays (         -- answers that were given again
        run TEXT NOT NULL,
        number INTEGER NOT NULL,   -- of the call
        at REAL NOT NULL,          -- seconds since 1970
        tokens INTEGER NOT NULL    -- that were not decoded again
    );
    CREATE INDEX replays_of ON replays (run);
    """,
)
#: What each version has added.
_TABLES: tuple[frozenset[str], ...] = (frozenset({"samples"}), frozenset({"runs", "calls", "drafts"}), frozenset({"replays"}))
#: Samples kept of each server and model: enough for a quantile of 0.99, few enough to be read at every start.
_KEPT = 200
#: Seconds that a read, and a write from the thread, wait for others' writes.
_BUSY, _BUSY_WRITE = 5.0, 30.0
#: Seconds without a write after which the thread lets go of the file: its -wal is merged, a fork inherits nothing.
_IDLE = 2.0
#: Seconds that the end of the program waits for the last writes.
_AT_EXIT = 2.0
#: Bytes to which a -wal file shrinks once it is merged, and pages given back to the disk at a time.
_WAL_LIMIT, _PAGES = 4 << 20, 1000

_LOST = (
    "As long as that lasts, what is learned about the server lasts for this run only, and answers are not kept: "
    "this run cannot be resumed."
)
_GONE = (
    "what was learned about the servers is lost, and no earlier run can be resumed, nor what this one did before now."
)

_log = logging.getLogger(__name__)

T = TypeVar("T")
Job = Callable[[sqlite3.Connection], None]


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; others wait with their writes."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if database.in_transaction:  # a full disk has rolled it back
            database.rollback()
        raise
    database.commit()


class _Connection(sqlite3.Connection):
    inode = 0


class State:
    """One state file.

    Args:
        path: where it is; the folders are made when it is first written.
        warn: told, in a sentence, when something cannot be kept or was lost; once for each reason.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = _log.warning) -> None:
        self.path = path
        self._warn = warn
        self._said: set[str] = set()
        self._inherited = False
        self._fresh()

    def _fresh(self) -> None:
        self._process = os.getpid()
        self._jobs: queue.SimpleQueue[Optional[Hashable]] = queue.SimpleQueue()  # keys of _waiting
        self._waiting: dict[Hashable, Job] = {}
        self._thread: Optional[threading.Thread] = None
        self._pending = 0
        self._idle = threading.Condition()
        self._opening = threading.RLock()
        self._inode: Optional[int] = None  # of the file that the thread has open

    def samples(self, server: str, model: str) -> list[Mapping[str, Any]]:
        """What earlier calls to this server and model took, the oldest first; none where there is no file."""

        def query(database: sqlite3.Connection) -> list[Mapping[str, Any]]:
            rows = database.execute(
                "SELECT sample FROM samples WHERE server = ? AND model = ? ORDER BY id DESC LIMIT ?",
                (server, model, _KEPT),
            ).fetchall()
            return [sample for sample in map(_sample, reversed(rows)) if sample is not None]

        return self.read(query, [])

    def add_sample(self, server: str, model: str, sample: Mapping[str, Any]) -> None:
        """Keeps one more; returns at once."""
        row = (time.time(), server, model, json.dumps(sample))

        def job(database: sqlite3.Connection) -> None:
            database.execute("INSERT INTO samples (at, server, model, sample) VALUES (?, ?, ?, ?)", row)
            database.execute(
                "DELETE FROM samples WHERE server = ? AND model = ? AND id <= ("
                "SELECT id FROM samples WHERE server = ? AND model = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (server, model, server, model, _KEPT),
            )

        self.write(job)

    def write(self, job: Job, key: Optional[Hashable] = None) -> None:
        """Has the thread do this, in one transaction and in the order of asking; returns at once.

        A job that fails is undone and left out, after a warning; one that meets a damaged file is done again,
        in a new file. So a job should take nothing for granted that an earlier one wrote.

        Args:
            key: the job takes the place of one with this key that still waits.
        """

        def whole(database: sqlite3.Connection) -> None:
            with transaction(database):
                job(database)

        self._submit(whole, key)

    def read(self, query: Callable[[sqlite3.Connection], T], default: T) -> T:
        """Does this now, on a connection of its own, on which it may write, too; waits for the disk.

        Returns:
            The default where there is no file, and, after a warning, where it cannot be read.
        """
        self._here()
        try:
            if not self.path.exists():
                return default
            with self._opening:  # the thread does not change over to another file meanwhile
                database = self._open_to_read()
                try:
                    with closing(database):
                        return query(database)
                except sqlite3.DatabaseError as error:
                    self._set_aside(error, database.inode)
        except Exception as error:  # of a damaged file may come any
            self._complain(error)
        return default

    def shrink(self) -> None:
        """Gives the disk back what was removed, in small steps that others can write between; returns at once."""

        def step(database: sqlite3.Connection) -> None:
            if not _number(database, "auto_vacuum"):  # the file is one of version 1
                database.execute("PRAGMA auto_vacuum = INCREMENTAL")
                database.execute("VACUUM")
                return
            before = _number(database, "page_count")
            database.execute(f"PRAGMA incremental_vacuum({_PAGES})").fetchall()
            if _number(database, "freelist_count") and _number(database, "page_count") < before:
                self._submit(step)

        self._submit(step)

    def flush(self, limit: float = _AT_EXIT) -> bool:
        """Waits at most ``limit`` seconds for what is still to be written; whether all of it was tried."""
        self._here()
        with self._idle:
            return self._idle.wait_for(lambda: self._pending == 0, limit)

    def close(self) -> None:
        """Writes what is left and lets go of the file; a later write opens it again."""
        self._here()
        with self._idle:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join(_AT_EXIT)

    # ------------------------------------------------------------------------------------------ the thread

    def _here(self) -> None:
        if self._process != os.getpid():  # a fork has no threads, and its parent does what is in the queue
            self._inherited |= self._inode is not None
            self._fresh()

    def _submit(self, job: Job, key: Optional[Hashable] = None) -> None:
        self._here()
        key = object() if key is None else key
        with self._idle:
            waits = key in self._waiting
            self._waiting[key] = job
            if waits:
                return
            self._pending += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="metagpt-localllm-state", daemon=True)
                self._thread.start()
                atexit.register(self.flush)
            self._jobs.put(key)

    def _work(self) -> None:
        database: Optional[_Connection] = None
        while True:
            try:
                key = self._jobs.get() if database is None else self._jobs.get(timeout=_IDLE)
            except queue.Empty:
                self._let_go(database)
                database = None
                continue
            if key is None:
                self._let_go(database)
                return
            with self._idle:
                job = self._waiting.pop(key)
            try:
                database = self._do(job, database)
            finally:
                with self._idle:
                    self._pending -= 1
                    self._idle.notify_all()

    def _do(self, job: Job, database: Optional[_Connection]) -> Optional[_Connection]:
        for again in (True, False):
            try:
                if database is not None and self._is_other(database.inode):
                    self._let_go(database)
                    database = None
                    if "damaged" not in self._said:
                        self.say("other", f"{self.path} was removed or set aside while this run used it: {_GONE}")
                if database is None:
                    with self._opening:
                        database = self._open()
                        self._inode = database.inode
                    database.execute(f"PRAGMA busy_timeout = {_BUSY_WRITE * 1000:.0f}")
                job(database)
                return database
            except Exception as error:  # a job that fails must not end the thread
                inode = database.inode if database is not None else 0
                self._let_go(database)
                database = None
                try:
                    if not again:
                        raise
                    self._set_aside(error, inode)
                except Exception as reason:
                    self._complain(reason)
                    break
        return None

    def _let_go(self, database: Optional[_Connection]) -> None:
        if database is not None:
            with suppress(sqlite3.Error):
                database.close()
        self._inode = None

    # ------------------------------------------------------------------------------------------ the file

    def _open(self) -> _Connection:
        inode = [0]
        try:
            return self._connect(inode)
        except sqlite3.DatabaseError as error:
            self._set_aside(error, inode[0])
            return self._connect(inode)

    def _connect(self, seen: list[int]) -> _Connection:
        if self._inherited:  # SQLite would rely on locks that it does not have here
            raise OSError("this process was forked while it was in use")
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = not self.path.exists() or not self.path.stat().st_size
        with self._locked("alone" if new else "shared"):
            _create(self.path)
            seen[0] = self.path.stat().st_ino
            if self._inode not in (None, seen[0]):
                # A new database would truncate the -shm file that the old connection has mapped: SIGBUS.
                raise OSError("it was removed while this run used it")
            database = sqlite3.connect(self.path, timeout=_BUSY, isolation_level=None, factory=_Connection)
            try:
                database.inode = seen[0]
                database.text_factory = _text
                _version(database)
                if not _number(database, "page_count"):
                    database.execute("PRAGMA auto_vacuum = INCREMENTAL")
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = FULL")  # an hour's answer outlives a power cut
                database.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT}")
                self._migrate(database)
            except BaseException:
                database.close()
                raise
            return database

    def _open_to_read(self) -> _Connection:
        try:
            return self._open()
        except (sqlite3.OperationalError, OSError) as error:
            # SQLite needs room for a -shm file even to read. Where there is none, and nothing but the file
            # itself, it can be read as it is.
            wal = self._beside("-wal")
            if "locked" in str(error) or self._inode is not None or (wal.exists() and wal.stat().st_size):
                raise
            name = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
            database = sqlite3.connect(name, uri=True, isolation_level=None, factory=_Connection)
            try:
                database.text_factory = _text
                _checked_version(database)
            except BaseException:
                database.close()
                raise
            return database

    def _migrate(self, database: sqlite3.Connection) -> None:
        if _checked_version(database) == _VERSION:
            return
        with transaction(database):
            # Another process may have done it while we waited.
            for step in _MIGRATIONS[_version(database) :]:
                for statement in "\n".join(line.split("--")[0] for line in step.splitlines()).split(";"):
                    database.execute(statement)
            database.execute(f"PRAGMA user_version = {_VERSION}")

    def _set_aside(self, error: Exception, inode: int) -> None:
        """Makes way for a new file if that of this inode is damaged; raises the error if that is no help."""
        said = str(error)
        damaged = type(error) is sqlite3.DatabaseError and ("malformed" in said or "not a data" in said)
        damaged = damaged or (isinstance(error, sqlite3.DatabaseError) and said == "unsupported file format")
        if not damaged or not inode:
            raise error
        with self._locked("alone"):
            if self._is_other(inode):
                return  # another process has done it
            if "damaged" in self._said:
                raise error
            name = f"{self.path.name}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
            while self.path.with_name(name).exists():
                name += "x"
            # Those that have it open go on with the old three until their next write. Without its -wal and
            # -shm the new file cannot be taken for the old.
            for end in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    self._beside(end).rename(self.path.with_name(name + end))
        self.say(
            "damaged",
            f"{self.path} was damaged ({quoted(said)}). It is now called {name}, and a new one is begun: {_GONE}",
        )

    def _is_other(self, inode: int) -> bool:
        try:
            return self.path.stat().st_ino != inode
        except FileNotFoundError:
            return True

    def _beside(self, end: str) -> Path:
        return self.path.with_name(self.path.name + end)

    @contextmanager
    def _locked(self, how: Literal["alone", "shared"]) -> Iterator[None]:
        """Across processes: whoever makes the file or sets it aside is alone, those who open it are not.

        The lock is SQLite's, on an empty file: it works wherever SQLite does, and ends with its process.
        """
        path = self._beside("-lock")
        _create(path)
        with closing(sqlite3.connect(path, timeout=_BUSY, isolation_level=None)) as lock:
            if how == "alone":
                lock.execute("PRAGMA journal_mode = OFF")
                lock.execute("BEGIN EXCLUSIVE")
            else:
                lock.execute("BEGIN")
                lock.execute("SELECT 1 FROM sqlite_master").fetchall()
            yield

    # ------------------------------------------------------------------------------------------ warnings

    def _complain(self, error: Exception) -> None:
        self.say(type(error).__name__, f"{self.path} cannot be used ({quoted(str(error))}). {_LOST}")

    def say(self, reason: str, text: str) -> None:
        """Warns, once for each reason."""
        if reason not in self._said:
            self._said.add(reason)
            self._warn(text)


def _sample(row: tuple[Any, ...]) -> Optional[Mapping[str, Any]]:
    """None where a disk has changed some bytes of it: the others are as good as before."""
    try:
        sample = json.loads(row[0])
    except (TypeError, ValueError, RecursionError):
        return None
    return sample if isinstance(sample, dict) else None


def _create(path: Path) -> None:
    """An empty file that its owner alone can read; SQLite makes its -wal and -shm files with the same rights.

    One that is there must not be opened: to close it would release the locks that SQLite has on it in this
    process, and another process would remove the -wal file from under us.
    """
    if not path.exists():
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _number(database: sqlite3.Connection, pragma: str) -> int:
    (value,) = database.execute(f"PRAGMA {pragma}").fetchone()
    return int(value)


def _version(database: sqlite3.Connection) -> int:
    version = _number(database, "user_version")
    if version > _VERSION:
        raise OSError(f"it was written by a newer metagpt-localllm (version {version} of its tables)")
    return version


def _checked_version(database: sqlite3.Connection) -> int:
    """The version of the file's tables, which are there.

    Raises:
        OSError: it is of a newer release, or the database of another program.
        sqlite3.DatabaseError: it is damaged.
    """
    database.execute("BEGIN")  # both of one moment: another process may bring it forward
    try:
        version = _version(database)
        named = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        there, ours = {str(name) for (name,) in named.fetchall()}, set().union(*_TABLES)
    finally:
        database.rollback()
    if there and not there & ours:
        raise OSError("it is the database of another program")
    if version < 0 or there & ours != set().union(*_TABLES[:version]):
        raise sqlite3.DatabaseError(f"malformed: tables of version {version} are missing or too many")
    return version


def _text(held: bytes) -> str:
    """TEXT of which a disk has changed some bytes fails no query: only its row is of no use."""
    return held.decode("utf-8", "replace")


_states: dict[str, State] = {}


def state_at(path: str) -> State:
    """The state file at ``path``, where "~" is the home; one object for each in this process."""
    expanded = Path(path).expanduser()
    return _states.setdefault(str(expanded), State(expanded))
