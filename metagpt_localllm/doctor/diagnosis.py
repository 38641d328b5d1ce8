"""The doctor's course: the configuration, the installation, the machine, and each server, in this order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

import anyio
from pydantic import ValidationError

from metagpt_localllm import servers
from metagpt_localllm.checking import NO_LIST, NOT_OURS, Seen, Trouble, config_problems, endpoint_of, our_blocks, see
from metagpt_localllm.doctor import fitting, gguf, machine, serving, timing
from metagpt_localllm.doctor.findings import Finding, SettingChange, Severity
from metagpt_localllm.doctor.machine import Machine
from metagpt_localllm.doctor.measuring import LIMIT, measure
from metagpt_localllm.doctor.places import Configuration, configuration
from metagpt_localllm.doctor.subject import Subject
from metagpt_localllm.doctor.timing import TierOf
from metagpt_localllm.installation import check_hook, check_metagpt, installed_version, metagpt_problems
from metagpt_localllm.journal import CallRecord, Journal
from metagpt_localllm.latency import Sample
from metagpt_localllm.scanning import Found, scan
from metagpt_localllm.servers import Ask
from metagpt_localllm.servers.base import Anatomy, Work
from metagpt_localllm.settings import LocalSettings
from metagpt_localllm.state import state_at

__all__ = ["Diagnosis", "diagnose"]

#: Seconds for one question to a server beside the chat, and for a model to be loaded.
_QUESTION, _LOAD = 5.0, 300.0
#: Seconds for a look at each variant of an address.
_VARIANT = 2.0
#: Seconds: calls in the journal that are older say little about what is asked today.
_RECENT = 90 * 86400.0
#: Ways in which MetaGPT itself may be set up to use a local server.
_COMPATIBLE = ("openai", "open_llm", "ollama", "")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Diagnosis:
    """What came of it.

    Attributes:
        config: the file that the ``llm`` block is in.
        machine: this one.
        subjects: the models, each on its server.
        findings: the worst first.
        tiers: the deadlines that the measured speed gives, by the block's path.
        offline: no server was asked.
    """

    config: Path
    machine: Machine
    subjects: tuple[Subject, ...]
    findings: tuple[Finding, ...]
    tiers: Mapping[str, list[TierOf]]
    offline: bool

    @property
    def changes(self) -> tuple[SettingChange, ...]:
        """The settings that mend the findings; of two for one setting that of the worse finding."""
        found: dict[Any, SettingChange] = {}
        for finding in self.findings:
            for change in finding.changes:
                found.setdefault(change.steps, change)
        return tuple(found.values())


def diagnose(named: Optional[Path], *, offline: bool, quick: bool, say: Say) -> Diagnosis:
    """Looks at everything. KeyboardInterrupt ends it at once, and the request that runs.

    Args:
        named: the configuration to look at; None for those that MetaGPT reads.
        offline: ask no server.
        quick: ask servers, but measure nothing.
        say: gets a line before each thing that takes time.
    """
    return asyncio.run(_diagnose(named, offline, quick, say))


async def _diagnose(named: Optional[Path], offline: bool, quick: bool, say: Say) -> Diagnosis:
    config = configuration(named)
    findings = [*config.findings, *_judge_config(config), *_judge_installation()]
    say("looking at this machine")
    here = await anyio.to_thread.run_sync(machine.survey)
    subjects: list[Subject] = []
    tiers: dict[str, list[TierOf]] = {}
    for about, block in [] if offline else _blocks(config.content):
        subject, found, deadlines = await _examine(about, block, here, quick, say)
        subjects.append(subject)
        findings += found
        if deadlines:
            tiers[about] = deadlines
    once = list(dict.fromkeys(findings))
    once.sort(key=lambda finding: finding.severity)
    return Diagnosis(config.path, here, tuple(subjects), tuple(once), tiers, offline)


# ---------------------------------------------------------------------------- configuration and installation


def _judge_config(config: Configuration) -> list[Finding]:
    if not config.content and any(finding.severity is Severity.BROKEN for finding in config.findings):
        return []
    llm = config.content.get("llm")
    if not isinstance(llm, dict):
        remedy = "Run `metagpt-localllm init`, which writes it."
        return [Finding(Severity.BROKEN, "config", f"{config.path}: there is no block 'llm'", remedy=remedy)]
    findings = []
    for problem in config_problems(config.content):
        if problem == NOT_OURS:
            findings.append(_not_ours(config, llm))
            continue
        title, *rest = problem.splitlines()
        findings.append(Finding(Severity.BROKEN, "config", title, f"in {config.path}", "\n".join(rest)))
    return findings


def _not_ours(config: Configuration, llm: Mapping[str, Any]) -> Finding:
    fit = str(llm.get("api_type") or "") in _COMPATIBLE and llm.get("base_url")
    changes = (SettingChange.at("llm", "api_type", "local_llm"),) if fit else ()
    return Finding(
        Severity.WARNING, "api_type", "MetaGPT does not use this package", f"{config.path}: {NOT_OURS}",
        "Set llm.api_type: local_llm", changes, "llm",
    )  # fmt: skip


def _judge_installation() -> list[Finding]:
    broken = set(metagpt_problems())
    findings = []
    for name, checks in (("metagpt", check_metagpt()), ("hook", check_hook())):
        for check in checks:
            if not check.fine:
                title, *rest = check.text.splitlines()
                severe = name == "hook" or check.text in broken
                severity = Severity.BROKEN if severe else Severity.WARNING
                findings.append(Finding(severity, name, title, remedy="\n".join(line.strip() for line in rest)))
    return findings


def _blocks(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What is set up for this package; where nothing is, the server that MetaGPT would use without it."""
    llm = content.get("llm")
    if not isinstance(llm, dict):
        return []
    ours = our_blocks(content)
    if not ours and llm.get("base_url") and llm.get("model"):
        subject = Subject("llm", llm, LocalSettings(), Seen(endpoint_of(llm)))
        if subject.here and str(llm.get("api_type") or "") in _COMPATIBLE:
            return [("llm", llm)]
    return [(about, block) for about, block in ours if str(block["base_url"]).startswith(("http://", "https://"))]


# ----------------------------------------------------------------------------------------------- a server


async def _examine(
    about: str, block: Mapping[str, Any], here: Machine, quick: bool, say: Say
) -> tuple[Subject, list[Finding], list[TierOf]]:
    settings = _settings(block)
    endpoint = endpoint_of(block)
    say(f"asking {endpoint.address}")
    subject = Subject(about, block, settings, await see(endpoint, settings.server), own=machine.own_addresses())
    findings = await _judge_reach(subject, say)
    if any(finding.severity is not Severity.NOTE for finding in findings):
        return subject, findings, []
    if subject.server.any_name:
        subject = replace(subject, seen=replace(subject.seen, trouble=None))
    subject = await _ready(subject, quick, say)
    subject = replace(subject, work=await _work(subject), anatomy=await _anatomy(subject))
    calls, samples = _recorded(settings, subject)
    wanted = fitting.wanted_window(installed_version("metagpt"), calls)
    load = fitting.judge_load(subject, here) if subject.here else []
    if not quick:
        say(f"measuring {endpoint.model}: some seconds, {LIMIT:g} at the most (Ctrl-C stops it)")
        subject = replace(subject, measured=await measure(endpoint, subject.server))
    findings += fitting.judge_context(subject, wanted)
    findings += serving.judge_slots(subject, wanted.good)
    findings += serving.judge_answers(subject)
    if subject.here:
        findings += [*fitting.judge_memory(subject, here), *load]
    else:
        findings.append(_elsewhere(subject))
    estimator = timing.estimator_of(subject, samples)
    window = subject.window or wanted.good
    findings += timing.judge_deadlines(subject, estimator, min(wanted.prompt, window * 3 // 4))
    return subject, findings, timing.proposed_tiers(subject, estimator, window)


def _settings(block: Mapping[str, Any]) -> LocalSettings:
    """The block's own, or the defaults where it has a mistake, which is told elsewhere."""
    try:
        return LocalSettings.model_validate(block.get("local") or {})
    except ValidationError:
        return LocalSettings()


async def _judge_reach(subject: Subject, say: Say) -> list[Finding]:
    seen, mended = subject.seen, None
    others: list[Found] = []
    if seen.trouble is None and not seen.names and not seen.server.lists:
        # It need not have a list; but where a variant of its address has one, that is the API's.
        mended = await _mended(subject)
        if mended is not None:
            subject = replace(subject, seen=replace(seen, trouble=Trouble.NO_MODEL_SERVER, reason=NO_LIST))
    elif seen.trouble in (Trouble.NO_SERVER, Trouble.NO_MODEL_SERVER):
        say("looking for servers on this machine")
        mended = await _mended(subject)
        if mended is None:
            usable = [one for one in await scan() if not one.needs_key]
            others = [one for one in usable if one.base_url != subject.endpoint.base_url]
    return serving.judge_reach(subject, mended, others)


async def _mended(subject: Subject) -> Optional[str]:
    for url in serving.variants(subject.endpoint.base_url):
        seen = await see(replace(subject.endpoint, base_url=url), limit=_VARIANT)
        if seen.names or seen.trouble is Trouble.LOADING:
            return url
    return None


async def _ready(subject: Subject, quick: bool, say: Say) -> Subject:
    """With the model loaded, where the server loads it on demand: before that it tells no window."""
    if subject.server.facts.loaded is not False or quick:
        return subject
    say(f"the server loads {subject.endpoint.model}: that may take minutes (Ctrl-C stops it)")
    await servers.load(subject.server, subject.endpoint, _LOAD)
    servers.forget(subject.endpoint)
    return replace(subject, seen=await see(subject.endpoint, subject.settings.server))


async def _work(subject: Subject) -> Optional[Work]:
    if not subject.server.watchable:
        return None
    with contextlib.suppress(Exception), anyio.move_on_after(_QUESTION):
        return await subject.server.work(Ask(subject.endpoint))
    return None


async def _anatomy(subject: Subject) -> Anatomy:
    known = Anatomy()
    with contextlib.suppress(Exception), anyio.move_on_after(_QUESTION):
        known = await subject.server.anatomy(Ask(subject.endpoint))
    path = Path(known.path)
    if known.layers or not known.path or not subject.here or not path.is_absolute():
        return known
    with contextlib.suppress(OSError, ValueError):
        told = Anatomy.of_metadata(await anyio.to_thread.run_sync(gguf.metadata, path))
        return replace(
            told,
            weights=known.weights or path.stat().st_size,
            parameters=known.parameters or told.parameters,
            path=known.path,
        )
    return known


def _recorded(settings: LocalSettings, subject: Subject) -> tuple[list[CallRecord], list[Sample]]:
    """What the user's own runs have left; nothing where there is no file, which is not made."""
    path = settings.journal.path
    if not Path(path).expanduser().exists():
        return [], []
    state = state_at(path)
    calls = [call for _, call in Journal(state).recorded(since=time.time() - _RECENT)]
    rows = state.samples(subject.endpoint.address, subject.endpoint.model)
    return calls, [Sample.from_row(row) for row in rows]


def _elsewhere(subject: Subject) -> Finding:
    return Finding(
        Severity.NOTE, "remote", "The server is on another machine, whose memory, swap and load cannot be seen from here",
        f"{subject.endpoint.address} is not an address of this machine",
        "Run `metagpt-localllm doctor` there, too, to have them looked at.", about=subject.about,
    )  # fmt: skip
