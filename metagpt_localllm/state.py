"""What lasts across runs: one SQLite file, written from a thread so that no call ever waits for the disk.

``~/.metagpt/localllm/state.db``, readable by its owner alone, in WAL mode: many processes may write at once,
readers see whole transactions, and a process killed in mid-write leaves the file as it was before. A disk
that is full, a home that is read-only or a file from a newer release cost a warning and never a call: what
is learned then lasts for this run.
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
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

__all__ = ["State", "default_path"]

#: Version of the tables. A file of an older one is brought forward by MIGRATIONS, one step each.
_VERSION = 1
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
)
#: Samples kept of each server and model: enough for a quantile of 0.99, few enough to be read at every start.
_KEPT = 200
#: Seconds that a write waits for another process's.
_BUSY = 5.0
#: Seconds that the end of the program waits for the last writes.
_AT_EXIT = 2.0

_log = logging.getLogger(__name__)


def default_path() -> Path:
    return Path.home() / ".metagpt" / "localllm" / "state.db"


class State:
    """One state file.

    Args:
        path: where it is; the folders are made when it is first written.
        warn: told once, in a sentence, when nothing can be kept.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = _log.warning) -> None:
        self.path = path
        self._warn = warn
        self._broken = False
        self._jobs: queue.SimpleQueue[Optional[Callable[[sqlite3.Connection], None]]] = queue.SimpleQueue()
        self._thread: Optional[threading.Thread] = None
        self._inode: Optional[int] = None
        self._pending = 0
        self._idle = threading.Condition()

    def samples(self, server: str, model: str) -> list[Mapping[str, Any]]:
        """What earlier calls to this server and model took, the oldest first; none where there is no file."""
        if not self.path.exists():
            return []
        try:
            with closing(self._connect()) as database:
                rows = database.execute(
                    "SELECT sample FROM samples WHERE server = ? AND model = ? ORDER BY id DESC LIMIT ?",
                    (server, model, _KEPT),
                ).fetchall()
            return [json.loads(row[0]) for row in reversed(rows)]
        except (sqlite3.Error, OSError, ValueError) as error:
            self._give_up(error)
            return []

    def add_sample(self, server: str, model: str, sample: Mapping[str, Any]) -> None:
        """Keeps one more; returns at once."""
        row = (time.time(), server, model, json.dumps(sample))

        def write(database: sqlite3.Connection) -> None:
            with database:
                database.execute("INSERT INTO samples (at, server, model, sample) VALUES (?, ?, ?, ?)", row)
                database.execute(
                    "DELETE FROM samples WHERE server = ? AND model = ? AND id <= ("
                    "SELECT id FROM samples WHERE server = ? AND model = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                    (server, model, server, model, _KEPT),
                )

        self._submit(write)

    def flush(self, limit: float = _AT_EXIT) -> bool:
        """Waits at most ``limit`` seconds for what is still to be written; whether all of it was."""
        with self._idle:
            return self._idle.wait_for(lambda: self._pending == 0, limit)

    def close(self) -> None:
        """Writes what is left and lets go of the file; a later sample opens it again."""
        with self._idle:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join(_AT_EXIT)

    # ------------------------------------------------------------------------------------------ inside

    def _submit(self, job: Callable[[sqlite3.Connection], None]) -> None:
        if self._broken:
            return
        with self._idle:
            self._pending += 1
            if self._thread is None or not self._thread.is_alive():  # a fork has no threads
                self._thread = threading.Thread(target=self._work, name="metagpt-localllm-state", daemon=True)
                self._thread.start()
                atexit.register(self.flush)
        self._jobs.put(job)

    def _work(self) -> None:
        database: Optional[sqlite3.Connection] = None
        while True:
            job = self._jobs.get()
            if job is None:
                if database is not None:
                    database.close()
                return
            try:
                if not self._broken:
                    database = database or self._connect()
                    job(database)
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)
            finally:
                with self._idle:
                    self._pending -= 1
                    self._idle.notify_all()

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite makes its -wal and -shm files with the same rights.
        file = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        inode = os.fstat(file).st_ino
        os.close(file)
        if self._inode not in (None, inode):
            # A new database would truncate the -shm file that the old connection has mapped: SIGBUS.
            raise OSError("it was removed while this run used it")
        self._inode = inode
        database = sqlite3.connect(self.path, timeout=_BUSY, isolation_level="IMMEDIATE")
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            self._migrate(database)
        except BaseException:
            database.close()
            raise
        return database

    def _migrate(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == _VERSION:
            return
        if version > _VERSION:
            raise OSError(f"it was written by a newer metagpt-localllm (version {version} of its tables)")
        database.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have done it while we waited.
            (version,) = database.execute("PRAGMA user_version").fetchone()
            for step in _MIGRATIONS[version:]:
                for statement in filter(str.strip, step.split(";")):
                    database.execute(statement)
            database.execute(f"PRAGMA user_version = {_VERSION}")
        except BaseException:
            database.rollback()
            raise
        database.commit()

    def _give_up(self, error: Exception) -> None:
        if not self._broken:
            self._broken = True
            self._warn(f"{self.path} cannot be used ({error}); what is learned about the server lasts for this run only.")
