"""What a report is made of."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Mapping, Optional, Sequence

from metagpt_localllm.journal import CallRecord, Replay, RunRecord
from metagpt_localllm.reporting.phases import Attempt, Phase, attempts_of, phases_of
from metagpt_localllm.reporting.timeline import Axis, axis_of
from metagpt_localllm.statistics import CallFigures, Group, figures_of, known_number, mappings, per_call, summarize

__all__ = ["OUTCOMES", "Call", "Recorded"]

#: How the outcome of a call is called.
OUTCOMES: Mapping[str, str] = {"done": "answered", "failed": "failed", "cancelled": "cancelled", "running": "unfinished"}


@dataclass(frozen=True)
class Call:
    """A call with all that the report says of it."""

    record: CallRecord
    figures: CallFigures
    phases: Sequence[Phase]
    attempts: Sequence[Attempt]

    @property
    def begin(self) -> float:
        """Seconds since 1970."""
        return self.phases[0].begin if self.phases else self.record.started

    @property
    def end(self) -> float:
        """Seconds since 1970, as far as it is known."""
        return self.phases[-1].end if self.phases else self.record.started

    @property
    def trims(self) -> Sequence[Mapping[str, Any]]:
        """What its prompt lost; what a damaged record makes no sense of is left out."""
        return mappings(self.record.trims)

    @property
    def outcome(self) -> str:
        told = OUTCOMES.get(self.record.outcome, self.record.outcome)
        return f"{told}, replaced" if self.record.superseded else told


@dataclass(frozen=True)
class Recorded:
    """What was read from the journal for a report.

    Attributes:
        runs: those that calls are of, the oldest first.
        standing: how each of them stands, by id: running, killed, done …
        everything: calls with the id of their run; those that began before ``since`` as well, which may have been replayed since.
        since: what began earlier is left out; seconds since 1970.
        now: when the report is made; seconds since 1970.
        zone: of all times in it.
    """

    runs: Sequence[RunRecord]
    standing: Mapping[str, str]
    everything: Sequence[tuple[str, CallRecord]]
    replays: Sequence[Replay] = ()
    since: float = 0.0
    now: float = 0.0
    zone: Optional[datetime.tzinfo] = datetime.timezone.utc

    @cached_property
    def calls(self) -> Sequence[Call]:
        """In the order of their beginnings."""
        # A call without an end: where its process still works, or was killed while it did, it lasted until then.
        until = {run.id: self.now for run in self.runs if self.standing.get(run.id) == "running"}
        until.update({run.id: run.touched for run in self.runs if self.standing.get(run.id) == "killed"})
        found = []
        for run, record in self.everything:
            attempts = attempts_of(record)
            started = known_number(record.started) or (attempts[0].at if attempts else 0.0)
            if started and started >= self.since:
                record = replace(record, started=started)
                last = attempts[-1].at if attempts else started  # as far as is known
                phases = phases_of(record, last if record.superseded else until.get(run, last))
                found.append(Call(record, per_call(run, record), phases, attempts))
        return sorted(found, key=lambda call: (call.begin, call.figures.run, call.record.number))

    @cached_property
    def axis(self) -> Axis:
        """The time axis on which all calls lie."""
        return axis_of((call.begin, call.end) for call in self.calls)

    @cached_property
    def figures(self) -> Sequence[CallFigures]:
        """As ``metagpt-localllm stats`` has them."""
        return figures_of(self.everything, self.replays, self.since)

    @cached_property
    def total(self) -> Group:
        return summarize(self.figures, ())[0]

    def clock(self, moment: float, how: str = "%Y-%m-%d %H:%M:%S") -> str:
        """A moment as a person of this zone writes it."""
        return datetime.datetime.fromtimestamp(moment, self.zone).strftime(how)

    def offset(self, moment: float) -> float:
        """The zone's, in seconds."""
        offset = datetime.datetime.fromtimestamp(moment, self.zone).utcoffset()
        return offset.total_seconds() if offset else 0.0
