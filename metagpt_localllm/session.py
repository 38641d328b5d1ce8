"""This process's run in the journal: which earlier one it goes on with, and what that has left to it.

Two runs are the same when they were started by the same command line in the same folder. The configuration is not compared
as a whole, since longer time-outs or another port are what people change before they start again; the model and all that
shapes an answer are part of each request's fingerprint. The latest run of a command is gone on with when it did not end
well and no process runs it any more: its answers are given again to the requests that they were given to, the n-th
identical one the n-th, and its first unfinished answer is continued.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

from filelock import FileLock, Timeout

from metagpt_localllm.fingerprint import Fingerprint
from metagpt_localllm.journal import CallRecord, Journal, RunRecord, new_id
from metagpt_localllm.leftovers import Leftovers, without_what_broke_it
from metagpt_localllm.settings import JournalSettings
from metagpt_localllm.state import State, state_at

__all__ = ["Session", "Start", "broke_off", "check_variable", "command_line", "current", "is_alive", "is_open", "key_of", "locks_of", "session_for", "tell_by"]

#: Environment variable that overrules ``journal.resume``: auto, ask, never, or the beginning of a run's name.
VARIABLE = "METAGPT_LOCALLLM_RESUME"

_log = logging.getLogger(__name__)
#: Where the process was started: a program may change to another folder before its first call.
try:
    _FOLDER = os.getcwd()
except OSError:  # it is gone
    _FOLDER = ""


@dataclass(frozen=True)
class Start:
    """How this process was started.

    Attributes:
        command: the command line, with the interpreter where there was one.
        folder: the working directory.
        repeatable: whether the command line says what is done: not in a notebook, an interactive interpreter or pytest.
    """

    command: tuple[str, ...]
    folder: str
    repeatable: bool


def command_line() -> Start:
    """Of this process."""
    command = tuple(getattr(sys, "orig_argv", None) or (sys.executable, *sys.argv))  # orig_argv: from Python 3.10 on
    interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules or "pytest" in sys.modules or not sys.argv[0]
    return Start(command, _FOLDER, not interactive)


def key_of(start: Start) -> str:
    """What makes two runs the same."""
    # The interpreter and its options may be another after an update; what it runs may not.
    command = [os.path.basename(part) if index == 0 else part for index, part in enumerate(start.command)]
    return hashlib.sha256(json.dumps([command, start.folder]).encode("utf-8", "replace")).hexdigest()


class Session:
    """The run of this process.

    Args:
        journal: where it is written.
        folder: for the lock that shows which runs a process still works on.
        settings: ``llm.local.journal``.
        start: how the process was started.
        tell: gets what a person should know, in a sentence.
        ask: puts a yes-or-no question, where ``journal.resume`` is "ask"; None where nobody can answer.

    Raises:
        ValueError: METAGPT_LOCALLLM_RESUME names a run that there is not.
    """

    def __init__(
        self, journal: Journal, folder: Path, settings: JournalSettings, start: Start,
        tell: Callable[[str], None] = _log.warning, ask: Optional[Callable[[str], bool]] = None,
    ) -> None:  # fmt: skip
        self._journal, self._folder, self._tell, self._ask = journal, folder, tell, ask
        self._start = start
        self._lock: Optional[FileLock] = None
        self._guard = threading.Lock()
        self._left = Leftovers(())
        self._number = 0
        self._open: set[int] = set()
        self._last = ""
        self.process = os.getpid()
        self.broken_off = False
        self.id = self._resumed(settings, os.environ.get(VARIABLE, "") or settings.resume) or self._begun()
        threading.Thread(target=self._tidy, args=(settings,), name="metagpt-localllm-prune", daemon=True).start()
        atexit.register(self.end)

    # ------------------------------------------------------------------ which run

    def _begun(self) -> str:
        now, start = time.time(), self._start
        run = RunRecord(new_id(now), key_of(start), start.command, start.folder, now, now, owner=str(self.process))
        self._hold(run.id)
        self._journal.begin_run(run)
        return run.id

    def _resumed(self, settings: JournalSettings, how: str) -> Optional[str]:
        """The run that is gone on with, whose lock this process then holds; None where there is none."""
        if how == "never":
            return None
        if how not in ("auto", "ask"):
            candidates = [_named(self._journal, how)]
        else:
            candidates = self._journal.latest(key_of(self._start)) if self._start.repeatable else []
        found: list[tuple[Leftovers, RunRecord, Sequence[CallRecord]]] = []
        for run in candidates:
            if how in ("auto", "ask") and (run.outcome == "done" or time.time() - run.touched > settings.keep.age):
                break  # what came before a run that ended well is over
            calls: Sequence[CallRecord] = () if is_alive(self._folder, run.id) else self._journal.calls(run.id)
            useful = without_what_broke_it(calls, run.outcome)
            left = Leftovers(useful)
            if left.count:
                found.append((left, run, calls[len(useful) :]))
        if not found:
            return None
        # A short one that was begun later by mistake does not hide it; of equals the newest.
        left, run, broken = max(found, key=lambda one: one[0].count)
        if not self._wished(run, left.count, how) or not self._hold(run.id):
            return None
        if not self._journal.adopt(run.id, str(self.process), run.resumed):
            self._release()
            return None
        self._take_over(run, left, broken)
        return run.id

    def _take_over(self, run: RunRecord, left: Leftovers, broken: Sequence[CallRecord]) -> None:
        self._number, self._left = self._journal.last_number(run.id), left
        for call in broken:
            self._journal.supersede(run.id, call.number)
        more = f", but for its last {len(broken)}, of which MetaGPT could make nothing" if broken else ""
        self._tell(
            f"{_described(run, self._left.count)} goes on: what it has answered is not computed again{more}. "
            f"{VARIABLE}=never starts afresh."
        )

    def _wished(self, run: RunRecord, count: int, how: str) -> bool:
        if how != "ask":
            return True
        what = _described(run, count)
        if self._ask is None:
            self._tell(f"{what} is not continued, since nobody can be asked here; {VARIABLE}=auto continues it.")
            return False
        return self._ask(f"{what} can be continued. Continue it?")

    def _hold(self, run: str) -> bool:
        """Takes the lock that shows that this process works on the run; false where another one holds it."""
        try:
            for folder in (self._folder.parent, self._folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock(str(_lock_of(self._folder, run)), mode=0o600)
            self._lock.acquire(blocking=False)
        except Timeout:
            self._lock = None
            return False
        except OSError as error:  # a home that is read-only: then nothing can be written there either
            _log.debug("no lock: %s", error)
            self._lock = None
        return True

    def _release(self) -> None:
        if self._lock is not None:
            # First the file, so that nobody takes the lock of one that is gone.
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def _tidy(self, settings: JournalSettings) -> None:
        """Removes what is too old, and the locks of runs that were killed."""
        others = (path.stem for path in self._folder.glob("*.lock") if path.stem != self.id)
        alive = {self.id, *(run for run in others if is_alive(self._folder, run))}
        self._journal.prune(settings.keep.age / 86400, settings.keep.size / 1e6, lambda run: run.id in alive)

    # ------------------------------------------------------------------ its calls

    def recall(self, asked: Fingerprint, wanted: int) -> tuple[Optional[CallRecord], bool]:
        """What the earlier run has left for this request, and whether it may be used; see :meth:`Leftovers.take`."""
        with self._guard:
            return self._left.take(asked, wanted)

    def begin(self, call: CallRecord, instead: Optional[CallRecord]) -> int:
        """Writes down that a call is made; its number.

        Args:
            instead: what the earlier run has left for it; it gives way, and the beginning of its answer goes over to this one.
        """
        with self._guard:
            self._number += 1
            number = self._number
        self._open.add(number)
        if instead is not None and instead.outcome != "done":
            call = replace(call, partial=instead.partial, request=instead.request)
        self._journal.begin_call(self.id, replace(call, number=number))
        if instead is not None:
            self._journal.supersede(self.id, instead.number)
        return number

    def checkpoint(self, number: int, partial: Mapping[str, Any], request: Optional[bytes] = None) -> None:
        self._journal.checkpoint(self.id, number, partial, request)

    def finish(self, number: int, outcome: str, **what: Any) -> None:
        """``outcome``: done, failed or cancelled."""
        self._open.discard(number)
        self._last = outcome
        self.broken_off = False
        self._journal.end_call(self.id, number, outcome, **what)

    def replayed(self, number: int, tokens: int) -> None:
        """An answer of so many tokens was given again."""
        self._last = "done"
        self._journal.replayed(self.id, number, tokens)

    # ------------------------------------------------------------------ its end

    def kept(self) -> int:
        """Whole answers of the run that the journal has. Waits for the disk."""
        self._journal.flush()
        run = self._journal.run(self.id)
        return run.calls if run is not None else 0

    def end(self) -> None:
        """Whether the run ended well decides whether it is gone on with when the same command is started again."""
        if os.getpid() != self.process:  # a fork, which has no part in the run
            return
        error = getattr(sys, "last_value", None)
        if isinstance(error, KeyboardInterrupt) or self._open:
            outcome = "interrupted"
        elif error is not None or self.broken_off or self._last == "failed":
            outcome = "failed"
        else:
            outcome = "done"
        self._journal.end_run(self.id, outcome)
        self._journal.flush()
        self._release()


_sessions: dict[str, Session] = {}
_making = threading.Lock()


def broke_off() -> None:
    """MetaGPT's team ended by an exception that nobody else hears of."""
    for session in _sessions.values():
        session.broken_off = True


def current() -> tuple[str, int]:
    """The name of this process's run, and how many answers are kept of it; "" and 0 where there is none. Waits for the disk."""
    for opened in _sessions.values():
        if opened.process == os.getpid():
            return opened.id, opened.kept()
    return "", 0


_log_to: list[Callable[[str], None]] = [_log.warning]


def tell_by(say: Callable[[str], None]) -> None:
    """Says from now on where a person reads it what concerns the run as a whole."""
    _log_to[0] = say


def session_for(settings: JournalSettings) -> Optional[Session]:
    """This process's run in the journal that the settings name; None where there is to be none, or in a fork.

    The first time it reads what an earlier run has left: not on an event loop.
    """
    if not settings.enabled:
        return None
    state = state_at(settings.path)
    key = str(state.path)
    with _making:
        if key not in _sessions:
            if multiprocessing.parent_process() is not None:
                return None
            _sessions[key] = Session(Journal(state), locks_of(state), settings, command_line(), _log_to[0], asker())
    return _sessions[key] if _sessions[key].process == os.getpid() else None


def check_variable(settings: JournalSettings) -> None:
    """Refuses a METAGPT_LOCALLLM_RESUME that names no run.

    Raises:
        ValueError: that.
    """
    how = os.environ.get(VARIABLE, "")
    if settings.enabled and how not in ("", "auto", "ask", "never"):
        _named(Journal(state_at(settings.path)), how)


def is_open(settings: JournalSettings) -> bool:
    """Whether :func:`session_for` answers at once."""
    return not settings.enabled or str(state_at(settings.path).path) in _sessions


def _named(journal: Journal, how: str) -> RunRecord:
    """The run that the environment variable names."""
    run = journal.run(how)
    if run is None:
        raise ValueError(f"{VARIABLE} is '{how}': there is no such run; metagpt-localllm runs lists them")
    return run


def _described(run: RunRecord, count: int) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.touched))
    return f"The run of this command that was left unfinished on {when} ({run.id}, {count} answers)"


def locks_of(state: State) -> Path:
    """The folder of the locks of the runs in a state file."""
    return state.path.parent / "runs"


def _lock_of(folder: Path, run: str) -> Path:
    return folder / f"{run}.lock"


def is_alive(folder: Path, run: str) -> bool:
    """Whether a process works on the run: it holds the lock."""
    path = _lock_of(folder, run)
    if not path.exists():
        return False
    lock = FileLock(str(path), mode=0o600)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:
        return False
    path.unlink(missing_ok=True)  # of a process that was killed
    lock.release()
    return False


def ask_on_terminal(question: str) -> bool:
    """Asks whoever sits at the terminal."""
    try:
        return input(f"{question} [Y/n] ").strip().lower() in ("", "y", "yes")
    except (EOFError, OSError):
        return False


def asker() -> Optional[Callable[[str], bool]]:
    """:func:`ask_on_terminal` where there is one."""
    try:
        return ask_on_terminal if sys.stdin.isatty() and sys.stdout.isatty() else None
    except (AttributeError, ValueError):
        return None
