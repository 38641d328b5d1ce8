"""Whether the server can be used as it is configured, and whether it gives what it could. Pure."""

from __future__ import annotations

from typing import Optional, Sequence
from urllib.parse import urlsplit, urlunsplit

from metagpt_localllm.checking import Trouble
from metagpt_localllm.doctor.findings import Finding, Severity, shown
from metagpt_localllm.doctor.measuring import LIMIT
from metagpt_localllm.doctor.subject import Subject
from metagpt_localllm.scanning import Found

__all__ = ["judge_answers", "judge_reach", "judge_slots", "variants"]

#: Below this part of a repeated beginning the cache is of no use.
_CACHED = 0.5


def variants(base_url: str) -> list[str]:
    """The same address with the mistakes mended that people make: ``/v1`` left out, https for http, or the reverse."""
    parts = urlsplit(base_url)
    path = parts.path.rstrip("/")
    paths = [path] if path.endswith("/v1") else [f"{path}/v1", "/v1"]
    other = {"http": "https", "https": "http"}.get(parts.scheme, "http")
    found = [urlunsplit(parts._replace(path=p)) for p in paths]
    found += [urlunsplit(parts._replace(scheme=other, path=p)) for p in paths]
    return [url for url in dict.fromkeys(found) if url.rstrip("/") != base_url.rstrip("/")]


def judge_reach(subject: Subject, mended: Optional[str], others: Sequence[Found]) -> list[Finding]:
    """Why the server cannot be used, and what would do.

    Args:
        mended: a variant of its address where a model server answers.
        others: model servers that answer on this machine.
    """
    seen, about = subject.seen, subject.about
    if seen.trouble is None:
        return []
    if seen.trouble is Trouble.NO_SUCH_MODEL:
        return [_no_such_model(subject)]
    if seen.trouble is Trouble.NEEDS_KEY:
        return [
            Finding(
                Severity.BROKEN, "key", "The server refuses the API key", f"{seen.endpoint.address} answered {seen.reason}",
                f"Set {about}.api_key to the key that the server was started with.", about=about,
            )
        ]  # fmt: skip
    if seen.trouble is Trouble.LOADING:
        return [
            Finding(
                Severity.WARNING, "loading", "The server is still loading its model", f"{seen.endpoint.address} says so",
                "Run doctor again when it is done. A run of MetaGPT waits for it by itself.", about=about,
            )
        ]  # fmt: skip
    evidence = f"{seen.endpoint.address}: {seen.reason}"
    if mended is not None:
        return [
            Finding(
                Severity.BROKEN, "base_url", "The server's address is not quite right",
                f"{evidence}; but a model server answers at {shown(mended)}", f"Set {about}.base_url: {shown(mended)}",
                subject.change("base_url", mended), about,
            )
        ]  # fmt: skip
    if others:
        best = next((one for one in others if seen.endpoint.model in one.models), others[0])
        listed = "; ".join(f"{one.kind} at {one.base_url}" for one in others[:4])
        changes = subject.change("base_url", best.base_url)
        remedy = f"Set {about}.base_url: {best.base_url}"
        if best.models and seen.endpoint.model not in best.models:
            changes += subject.change("model", best.models[0])
            remedy += f" and {about}.model: {best.models[0]}"
        remedy += f". Or start the server at {seen.endpoint.address}."
        title = "No model server answers at the address that is configured, but one does elsewhere"
        return [Finding(Severity.BROKEN, "server", title, f"{evidence}; found: {listed}", remedy, changes, about)]
    something = seen.trouble is Trouble.NO_MODEL_SERVER
    return [
        Finding(
            Severity.BROKEN, "server",
            "Something answers at the server's address, but it is no model server" if something else "The server cannot be reached",
            evidence, f"Start the server, or set {about}.base_url to where it listens (it usually ends in /v1).", about=about,
        )
    ]  # fmt: skip


def _no_such_model(subject: Subject) -> Finding:
    seen, near = subject.seen, subject.seen.near
    model, listed = seen.endpoint.model, ", ".join(seen.names[:8])
    if seen.server.any_name:
        return Finding(
            Severity.NOTE, "model_name", f"The server has no model '{model}', and answers with the one that it has",
            f"it lists {listed}", f"Set {subject.about}.model: {near[0]} so that logs and reports name it.", about=subject.about,
        )  # fmt: skip
    remedy = f"Set {subject.about}.model: {near[0]}"
    if seen.server.name == "ollama":
        remedy += f", or fetch the other one: `ollama pull {model}`"
    return Finding(
        Severity.BROKEN, "model", f"The server has no model '{model}'",
        f"it lists {listed}; nearest: {', '.join(near)}", f"{remedy}.", subject.change("model", near[0]), subject.about,
    )  # fmt: skip


def judge_slots(subject: Subject, wanted: int) -> list[Finding]:
    """Requests at once: more than the server has places for, or places that take the context from each other.

    Args:
        wanted: context window in tokens that MetaGPT should have.
    """
    facts, asked, findings = subject.server.facts, subject.settings.concurrency, []
    if isinstance(asked, int) and facts.slots is not None and asked > facts.slots:
        findings.append(
            Finding(
                Severity.WARNING, "concurrency", f"More requests are sent at once ({asked}) than the server works on ({facts.slots})",
                f"{subject.about}.local.concurrency is {asked}; the server says that it has {facts.slots} "
                "place(s), so the others wait there, where their deadlines run",
                f"Set {subject.about}.local.concurrency: auto, or start the server with {asked} slots.",
                subject.change("local.concurrency", "auto"), subject.about,
            )
        )  # fmt: skip
    slots = facts.slots or 1
    if (
        subject.server.divides
        and slots > 1
        and facts.window is not None
        and facts.window < wanted <= facts.window * slots
    ):
        findings.append(
            Finding(
                Severity.WARNING, "slots", f"The server has {slots} slots, which divide its context unless they share it",
                f"each has {facts.window:,} tokens. Where `--parallel {slots}` was given, they are a part each of --ctx-size, and one "
                f"slot would have {facts.window * slots:,}. MetaGPT's roles mostly wait for each other: one slot serves them best",
                subject.server.remedy_for_slots(), about=subject.about,
            )
        )  # fmt: skip
    return findings


def judge_answers(subject: Subject) -> list[Finding]:
    """What the measurement showed but for speed: failures, buffering, a cache that does nothing, prompts that are cut."""
    measured, about, findings = subject.measured, subject.about, []
    if measured is None:
        return []
    if measured.failure:
        findings.append(
            Finding(Severity.BROKEN, "chat", "The server does not answer a short chat", measured.failure,
                    measured.remedy or "Look at the server's own log.", about=about)
        )  # fmt: skip
    elif measured.prefill is None:
        busy = " It works on another request." if subject.work is not None and subject.work.busy else ""
        findings.append(
            Finding(
                Severity.WARNING, "silent", f"The server gave no answer to a prompt of 60 tokens within {LIMIT:g} seconds",
                f"either it is very slow, or something else keeps it busy.{busy}",
                "Look at the server's own log and at what else uses it, and run doctor again.", about=about,
            )
        )  # fmt: skip
    if measured.cut is not None:
        told, least = measured.cut
        findings.append(
            Finding(
                Severity.BROKEN, "cut", "The server reads only a part of a prompt, and does not say so",
                f"it counted {told:,} tokens of one that has at least {least:,}", subject.server.remedy(8192), about=about,
            )
        )  # fmt: skip
    if measured.buffered:
        findings.append(
            Finding(
                Severity.WARNING, "buffered", "Something between here and the server holds answers back until they are whole",
                f"all tokens of a short answer came at the same moment, {measured.held_back:.1f} s later than the first one of a "
                "shorter answer. So no live display, and a stalled server is noticed only when its deadline is over",
                f"Let {about}.base_url point to the server itself, or switch buffering off in the proxy (nginx: "
                "`proxy_buffering off;`).", about=about,
            )
        )  # fmt: skip
    if measured.cached is not None and measured.cached < _CACHED and not measured.buffered:
        first, again = measured.again or (0.0, 0.0)
        says = "the server says that nothing of it came from its cache; " if measured.cache_told else ""
        findings.append(
            Finding(
                Severity.WARNING, "cache", "The server reads the same beginning of a prompt again each time",
                f"{says}a prompt took {first:.1f} s to read, and {again:.1f} s again with the same beginning and another end. "
                "MetaGPT's prompts mostly repeat their beginning",
                subject.server.remedy_for_cache(), about=about,
            )
        )  # fmt: skip
    return findings
