"""What each run did, call by call, so that one that was cut short can be resumed without asking anything twice.

Kept in the state file. Whatever is recorded returns at once and is written from the State's thread. Every write
carries all that it takes: after one that failed (a full disk), or after a damaged file was set aside, the next
ones are as good as ever.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
import zlib
from collections import abc
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Callable, Hashable, Iterable, Mapping, Optional, Sequence, TypeVar

from metagpt_localllm.quoting import quoted
from metagpt_localllm.state import State, transaction

__all__ = ["CallRecord", "Journal", "Replay", "RunRecord", "new_id"]

T = TypeVar("T")
Row = TypeVar("Row", "RunRecord", "CallRecord", "Replay")
Json = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """One run; times in seconds since 1970.

    Args:
        key: what makes two runs the same; a digest.
        outcome: running, done, failed or interrupted.
        owner: who runs it now.
        resumed: times that it was continued.
        calls: those that are done, without superseded ones.
        tokens: decoded in these, as their usage says.
    """

    id: str
    key: str
    command: tuple[str, ...]
    folder: str
    started: float
    touched: float
    outcome: str = "running"
    owner: str = ""
    resumed: int = 0
    calls: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class CallRecord:
    """One call of a run; times in seconds since 1970.

    Args:
        number: from 1 in its run.
        digest: what makes two calls the same.
        loose: the same, but for what is volatile in them (:mod:`metagpt_localllm.fingerprint`).
        volatile: what that was.
        outcome: running, done, failed or cancelled.
        wanted_tokens: that it might decode at most.
        attempts: one mapping each: ``at``, ``prompt_tokens`` (may be an estimate), ``deadlines`` (seconds by name), and of
            one that has ended ``ended``, ``tokens``, ``ttft``, ``longest_gap``, and where it failed ``error`` and ``detail``.
        cached_tokens: of the prompt that came from the server's prefix cache; None where it does not say.
        queued: seconds that it waited for its turn on our side.
        answer: whole; any JSON, as all that follows.
        partial: what was received of it, as long as there is no whole one.
        request: the body as it was sent, likewise.
        saved_tokens: that an earlier run's answer made it unnecessary to decode.
        superseded: another call has taken its place.
    """

    number: int
    digest: str
    loose: str = ""
    volatile: Sequence[str] = ()
    action: str = ""
    role: str = ""
    tier: str = ""
    model: str = ""
    server: str = ""
    started: float = 0.0
    ended: Optional[float] = None
    outcome: str = "running"
    finish_reason: Optional[str] = None
    wanted_tokens: int = 0
    answer: Optional[Json] = None
    partial: Optional[Json] = None
    request: Optional[bytes] = None
    usage: Optional[Json] = None
    timings: Json = field(default_factory=dict)
    deadlines: Json = field(default_factory=dict)
    attempts: Sequence[Any] = field(default_factory=list)
    trims: Sequence[Any] = field(default_factory=list)
    saved_tokens: int = 0
    cached_tokens: Optional[int] = None
    queued: float = 0.0
    superseded: bool = False


@dataclass(frozen=True)
class Replay:
    """The answer of a call that was given again: ``tokens`` that were not decoded again, ``at`` in seconds since 1970."""

    run: str
    number: int
    at: float
    tokens: int


#: Types of the fields of all records; others are text.
_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("started", "touched", "ended", "at", "queued"), (int, float)),
    **dict.fromkeys(("number", "resumed", "calls", "tokens", "wanted_tokens", "saved_tokens", "cached_tokens"), int),
    **dict.fromkeys(("usage", "timings", "deadlines", "answer", "partial"), abc.Mapping),
    **dict.fromkeys(("volatile", "attempts", "trims", "command"), (list, tuple)),
    "superseded": bool,
    "request": bytes,
}
_MAY_BE_NONE = {"ended", "finish_reason", "answer", "partial", "request", "usage", "cached_tokens"}
#: No moment, and no number of tokens, is larger; a request has no more bytes.
_LARGEST, _MOST_BYTES = 10**11, 1 << 28
_OF_CALL = {known.name for known in fields(CallRecord)}
#: Kept in columns or tables of their own; the rest of a CallRecord is one JSON.
_ELSEWHERE = {"number", "digest", "outcome", "superseded", "answer", "partial", "request"}
_IN_RUN = "id, key, started, touched, outcome, owner, resumed, calls, tokens, about"
_IN_CALL = "run, number, digest, outcome, superseded, about, answer, crc"
_PUT_CALL = f"INSERT INTO calls ({_IN_CALL}, tokens) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run, number) DO "
_UPDATE = f"UPDATE SET ({_IN_CALL}, tokens) = (excluded.{_IN_CALL.replace(', ', ', excluded.')}, excluded.tokens) "


def new_id(started: float) -> str:
    """An id for a run: its date in UTC, so that ids sort by age, and two random bytes."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(started))}-{secrets.token_hex(2)}"


class Journal:
    """The runs in a state file.

    Reads, ``adopt``, ``forget`` and ``prune`` wait for the disk, and find nothing where it cannot be read; all
    other methods return at once. A mapping that is handed over must not be changed afterwards.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._runs: dict[str, RunRecord] = {}  # that this process runs
        self._calls: dict[tuple[str, int], CallRecord] = {}  # that this process began and has not ended

    # ------------------------------------------------------------------------------------------ reading

    def latest(self, key: str, limit: int = 10) -> list[RunRecord]:
        """The newest runs of this key, the newest first."""
        return self._select_runs("WHERE key = ? ORDER BY started DESC, id DESC LIMIT ?", key, limit)

    def last_number(self, run: str) -> int:
        """The highest number of its calls, of those that are superseded, too; 0 where there are none."""

        def query(database: sqlite3.Connection) -> int:
            of = "SELECT max(number) FROM calls WHERE run = ? AND typeof(number) = 'integer'"
            (number,) = database.execute(of, (run,)).fetchone()
            return int(number or 0)

        return self._state.read(query, 0)

    def runs(self, limit: int = 50) -> list[RunRecord]:
        """The newest first."""
        return self._select_runs("ORDER BY started DESC, id DESC LIMIT ?", limit)

    def run(self, id_or_prefix: str) -> Optional[RunRecord]:
        """The run of this id, or the only one whose id begins so."""
        found = self._select_runs("WHERE id >= ? AND id < ? ORDER BY id LIMIT 2", id_or_prefix, id_or_prefix + "\x7f")
        return found[0] if found and (len(found) == 1 or found[0].id == id_or_prefix) else None

    def calls(self, run: str, digest: Optional[str] = None) -> list[CallRecord]:
        """The calls of a run, or those of one digest, in their order; superseded ones are left out."""

        def query(database: sqlite3.Connection) -> list[CallRecord]:
            asked, values = ("run = ?", [run]) if digest is None else ("run = ? AND digest = ?", [run, digest])
            rows = database.execute(
                f"SELECT {_IN_CALL} FROM calls WHERE {asked} AND NOT superseded ORDER BY number", values
            ).fetchall()
            drafts: dict[int, dict[str, bytes]] = {}
            of_run = "SELECT number, kind, body, crc FROM drafts WHERE run = ?"
            if any(row[3] != "done" for row in rows):
                for number, kind, body, crc in database.execute(of_run, (run,)):
                    if crc == _crc(run, number, kind, body):
                        drafts.setdefault(number, {})[kind] = body
            return self._whole(rows, lambda row: _call(row, drafts.get(row[1], {})))

        return self._state.read(query, [])

    def recorded(self, run: Optional[str] = None, since: float = 0.0) -> list[tuple[str, CallRecord]]:
        """The calls of all runs, or of one, each with the id of its run; for statistics, hence without what was answered.

        Superseded ones are among them: they took their time, too. The checksum is not looked at, which would take the answers.

        Args:
            since: those that began later, in seconds since 1970.
        """

        def query(database: sqlite3.Connection) -> list[tuple[str, CallRecord]]:
            asked, values = ("WHERE run = ?", [run]) if run is not None else ("", [])
            rows = database.execute(
                f"SELECT run, number, digest, outcome, superseded, about FROM calls {asked} ORDER BY run, number", values
            ).fetchall()
            found = self._whole(rows, lambda row: (str(row[0]), _sound(_about(row[1:]))))
            return [one for one in found if one[1].started >= since]

        return self._state.read(query, [])

    def replays(self, run: Optional[str] = None, since: float = 0.0) -> list[Replay]:
        """The answers of all runs, or of one, that were given again, in the order of time."""

        def query(database: sqlite3.Connection) -> list[Replay]:
            rows = database.execute(
                "SELECT run, number, at, tokens FROM replays WHERE run = ifnull(?, run) AND at >= ? ORDER BY at", (run, since)
            )
            return self._whole(rows.fetchall(), lambda row: _sound(Replay(*row)))

        return self._state.read(query, [])

    def _select_runs(self, how: str, *values: object) -> list[RunRecord]:
        def query(database: sqlite3.Connection) -> list[RunRecord]:
            return self._whole(database.execute(f"SELECT {_IN_RUN} FROM runs {how}", values).fetchall(), _run)

        return self._state.read(query, [])

    def _whole(self, rows: Iterable[tuple[Any, ...]], record: Callable[[tuple[Any, ...]], T]) -> list[T]:
        records = []
        for row in rows:
            try:
                records.append(record(row))
            except Exception as error:  # a disk that changed some bytes may cause any
                self._state.say("record", f"{self._state.path} is damaged: a run or a call cannot be read ({quoted(str(error))}).")
        return records

    def flush(self) -> bool:
        """Waits some seconds for what is still to be written; whether all of it was."""
        return self._state.flush()

    # ------------------------------------------------------------------------------------------ runs

    def begin_run(self, run: RunRecord) -> None:
        self._runs[run.id] = run
        self._state.write(lambda database: _put_run(database, run))

    def adopt(self, run: str, owner: str, resumed: Optional[int] = None) -> bool:
        """Continues a run: it has a new owner, is running, and was resumed once more.

        Args:
            resumed: times that it was when the caller looked; if it was since, another process was quicker.

        Returns:
            Whether the run is this process's now.
        """

        def job(database: sqlite3.Connection) -> Optional[RunRecord]:
            with transaction(database):
                changed = database.execute(
                    "UPDATE runs SET owner = ?, outcome = 'running', resumed = resumed + 1, touched = ? "
                    "WHERE id = ? AND resumed = ifnull(?, resumed)",
                    (owner, time.time(), run, resumed),
                ).rowcount
            row = database.execute(f"SELECT {_IN_RUN} FROM runs WHERE id = ?", (run,)).fetchone()
            return _run(row) if changed else None

        adopted = self._state.read(job, None)
        if adopted is not None:
            self._runs[run] = adopted
        return adopted is not None

    def end_run(self, run: str, outcome: str) -> None:
        known, now = self._runs.pop(run, None), time.time()

        def job(database: sqlite3.Connection) -> None:
            if _touch(database, run, known, now):
                database.execute("UPDATE runs SET outcome = ? WHERE id = ?", (outcome, run))

        self._state.write(job)

    def forget(self, run: str) -> bool:
        """Removes a run and its calls; whether there was one."""

        def job(database: sqlite3.Connection) -> bool:
            with transaction(database):
                return _remove(database, run)

        self._runs.pop(run, None)
        forgotten = self._state.read(job, False)
        if forgotten:
            self._state.shrink()
        return forgotten

    def prune(
        self,
        days: float,
        megabytes: float,
        running: Callable[[RunRecord], bool] = lambda run: run.outcome == "running",
    ) -> int:
        """Removes whole runs, those first that were not touched for longest.

        Args:
            days: runs that were not touched for so long go.
            megabytes: and so many of the others that the file holds no more than this.
            running: which ones stay in any case.

        Returns:
            How many went. The file shrinks afterwards, in the thread.
        """

        def job(database: sqlite3.Connection) -> int:
            removed, now = 0, time.time()
            rows = database.execute(f"SELECT {_IN_RUN} FROM runs ORDER BY touched").fetchall()
            for run in self._whole(rows, _run):
                if run.touched >= now - days * 86400 and _bytes_used(database) <= megabytes * 1e6:
                    break
                if not running(run):
                    with transaction(database):
                        removed += _remove(database, run.id, run.touched)
            return removed

        removed = self._state.read(job, 0)
        if removed:
            self._state.shrink()
        return removed

    # ------------------------------------------------------------------------------------------ calls

    def begin_call(self, run: str, call: CallRecord) -> None:
        """Records a call; one that was begun before and has no whole answer keeps what was received."""
        self._calls[run, call.number] = replace(call, partial=None, request=None)

        def job(database: sqlite3.Connection) -> None:
            if _put_call(database, run, call):
                _put_draft(database, run, call.number, call.partial, call.request)

        self._write(run, job)

    def checkpoint(self, run: str, number: int, partial: Json, request: Optional[bytes] = None) -> None:
        """Keeps what was received so far, and what was sent; only the newest where the disk is slow.

        Ignored for a call that this process has not begun, or that has ended.
        """
        begun = self._calls.get((run, number))
        if begun is None:
            return

        def job(database: sqlite3.Connection, partial: Optional[Json], request: Optional[bytes]) -> None:
            _put_call(database, run, begun, new=True)
            of = "SELECT outcome FROM calls WHERE run = ? AND number = ?"
            if database.execute(of, (run, number)).fetchone() == ("running",):
                _put_draft(database, run, number, partial, request)

        # The request apart: a newer checkpoint may come without one.
        if request is not None:
            self._write(run, lambda database: job(database, None, request), (run, number, "request"))
        self._write(run, lambda database: job(database, partial, None), (run, number, "partial"))

    def end_call(self, run: str, number: int, outcome: str, **what: Any) -> None:
        """Records how a call ended; one that is done stays as it is.

        Args:
            what: fields of CallRecord that are known now. ``ended`` is now unless it is given.

        Raises:
            TypeError: there is no such field.
        """
        if not what.keys() <= _OF_CALL - {"number", "outcome"}:
            raise TypeError(f"a call cannot end with {', '.join(sorted(what.keys() - _OF_CALL)) or 'these'}")
        what = {"ended": time.time(), **what, "outcome": outcome}
        key = run, number
        begun = self._calls.pop(key, None)

        def job(database: sqlite3.Connection) -> None:
            call = begun
            if call is None:
                row = database.execute(f"SELECT {_IN_CALL} FROM calls WHERE run = ? AND number = ?", key).fetchone()
                if row is None:
                    return
                call = _call(row)
            call = replace(call, **what)
            if not _put_call(database, run, call):
                return
            if outcome != "done":
                _put_draft(database, run, number, call.partial, call.request)
                return
            database.execute("DELETE FROM drafts WHERE run = ? AND number = ?", key)
            if not call.superseded:
                _count(database, run, 1, _tokens(call))

        self._write(run, job)

    def replayed(self, run: str, number: int, tokens: int) -> None:
        """The answer of a call, of so many tokens, was given again instead of being computed."""
        row = run, number, time.time(), tokens
        self._write(run, lambda database: _insert_replay(database, row))

    def supersede(self, run: str, number: int) -> None:
        """Another call has taken the place of this one."""
        key = run, number
        self._calls.pop(key, None)

        def job(database: sqlite3.Connection) -> None:
            row = database.execute(
                "SELECT outcome, tokens FROM calls WHERE run = ? AND number = ? AND NOT superseded", key
            ).fetchone()
            if row is None:
                return
            database.execute("UPDATE calls SET superseded = 1 WHERE run = ? AND number = ?", key)
            database.execute("DELETE FROM drafts WHERE run = ? AND number = ?", key)
            if row[0] == "done":
                _count(database, run, -1, -row[1])

        self._write(run, job)

    def _write(self, run: str, job: Callable[[sqlite3.Connection], None], key: Optional[Hashable] = None) -> None:
        """Does this for a run that is there, or that this process runs."""
        known, now = self._runs.get(run), time.time()

        def whole(database: sqlite3.Connection) -> None:
            if _touch(database, run, known, now):
                job(database)

        self._state.write(whole, key)


# ---------------------------------------------------------------------------------------------- rows


def _dump(value: Any) -> bytes:
    # Not ASCII: two lone surrogates in a row would come back as one character.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _load(blob: bytes) -> Any:
    return json.loads(blob.decode("utf-8", "surrogatepass"))


def _crc(*parts: Any) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part if isinstance(part, bytes) else str(part).encode(), value)
    return value


def _run(row: Sequence[Any]) -> RunRecord:
    id, key, started, touched, outcome, owner, resumed, calls, tokens, about = row
    known = _load(about)
    command = tuple(known["command"])
    return _sound(RunRecord(id, key, command, known["folder"], started, touched, outcome, owner, resumed, calls, tokens))


def _call(row: Sequence[Any], draft: Mapping[str, bytes] = MappingProxyType({})) -> CallRecord:
    run, number, digest, outcome, superseded, about, answer, crc = row
    if crc != _crc(run, number, digest, outcome, about, answer):
        raise ValueError(f"wrong checksum of call {number} of {run}")
    whole = replace(
        _about((number, digest, outcome, superseded, about)),
        answer=None if answer is None else _load(answer),
        partial=_load(draft["partial"]) if "partial" in draft else None,
        request=_unpacked(draft["request"]) if "request" in draft else None,
    )
    return _sound(whole)


def _unpacked(draft: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(draft, _MOST_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError(f"a request is over {_MOST_BYTES:,} bytes")
    return unpacked


def _sound(record: Row) -> Row:
    """The record, each field of which has the type that it should.

    Raises:
        TypeError: a disk, or somebody, has changed it.
        ValueError: a moment or a number that cannot be.
    """
    for name, value in vars(record).items():
        if value is None and name in _MAY_BE_NONE:
            continue
        if not isinstance(value, _TYPES.get(name, str)) or (isinstance(value, bool) and name not in ("superseded", "resumed")):
            raise TypeError(f"{name} is a {type(value).__name__}")
        if isinstance(value, (int, float)) and not -_LARGEST < value < _LARGEST:
            raise ValueError(f"{name} is out of range")
    if isinstance(record, RunRecord) and not all(isinstance(part, str) for part in record.command):
        raise TypeError("a command has parts that are no text")
    return record


def _about(row: Sequence[Any]) -> CallRecord:
    number, digest, outcome, superseded, about = row
    more = {name: value for name, value in _load(about).items() if name in _OF_CALL}
    return CallRecord(number=number, digest=digest, outcome=outcome, superseded=bool(superseded), **more)


def _put_run(database: sqlite3.Connection, run: RunRecord) -> None:
    about = _dump({"command": run.command, "folder": run.folder})
    database.execute(
        f"INSERT OR IGNORE INTO runs ({_IN_RUN}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (run.id, run.key, run.started, run.touched, run.outcome, run.owner, run.resumed, run.calls, run.tokens, about),
    )


def _touch(database: sqlite3.Connection, run: str, known: Optional[RunRecord], now: float) -> bool:
    """Whether there is such a run; one that this process runs is put back where it was lost."""
    if known is not None:
        _put_run(database, known)
    return database.execute("UPDATE runs SET touched = ? WHERE id = ?", (now, run)).rowcount == 1


def _put_call(database: sqlite3.Connection, run: str, call: CallRecord, new: bool = False) -> bool:
    """Whether it was put; never in place of one that is done, and if ``new`` of none."""
    about = _dump({name: getattr(call, name) for name in _OF_CALL - _ELSEWHERE})
    answer = None if call.answer is None else _dump(call.answer)
    crc = _crc(run, call.number, call.digest, call.outcome, about, answer)
    row = (run, call.number, call.digest, call.outcome, call.superseded, about, answer, crc, _tokens(call))
    clash = "NOTHING" if new else f"{_UPDATE} WHERE calls.outcome <> 'done'"
    return database.execute(_PUT_CALL + clash, row).rowcount > 0


def _put_draft(
    database: sqlite3.Connection, run: str, number: int, partial: Optional[Json], request: Optional[bytes]
) -> None:
    for kind, body in (
        ("partial", None if partial is None else _dump(partial)),
        ("request", None if request is None else zlib.compress(request)),
    ):
        if body is not None:
            row = run, number, kind, body, _crc(run, number, kind, body)
            database.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?, ?, ?, ?)", row)


def _insert_replay(database: sqlite3.Connection, row: tuple[str, int, float, int]) -> None:
    database.execute("INSERT INTO replays VALUES (?, ?, ?, ?)", row)


def _count(database: sqlite3.Connection, run: str, calls: int, tokens: int) -> None:
    database.execute("UPDATE runs SET calls = calls + ?, tokens = tokens + ? WHERE id = ?", (calls, tokens, run))


def _tokens(call: CallRecord) -> int:
    tokens = (call.usage or {}).get("completion_tokens")
    return tokens if isinstance(tokens, int) else 0


def _remove(database: sqlite3.Connection, run: str, touched: Optional[float] = None) -> bool:
    """Whether there was such a run, and nobody had touched it since."""
    gone = database.execute("DELETE FROM runs WHERE id = ? AND touched = ifnull(?, touched)", (run, touched)).rowcount
    if gone:
        database.execute("DELETE FROM calls WHERE run = ?", (run,))
        database.execute("DELETE FROM drafts WHERE run = ?", (run,))
        database.execute("DELETE FROM replays WHERE run = ?", (run,))
    return gone > 0


def _bytes_used(database: sqlite3.Connection) -> int:
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)
