"""The report, as the command writes it and as a browser shows it."""

import asyncio
import json
import math
import os
import re
import shutil
import stat
import threading
from dataclasses import fields, replace

import pytest
from click.testing import CliRunner
from made_up_calls import MODEL, ROLES, fill, made_up

from metagpt_localllm import report as report_module
from metagpt_localllm import session
from metagpt_localllm.call import complete
from metagpt_localllm.cli import main
from metagpt_localllm.errors import LocalLLMError
from metagpt_localllm.journal import CallRecord, Journal, RunRecord
from metagpt_localllm.reporting.page import render
from metagpt_localllm.reporting.phases import phases_of
from metagpt_localllm.reporting.recorded import Recorded
from metagpt_localllm.reporting.scales import bins, count_ticks, share, tick_label
from metagpt_localllm.reporting.timeline import axis_of, rows_of
from metagpt_localllm.simulator import Machine, SimulatorThread, parse_fault
from metagpt_localllm.state import State
from metagpt_localllm.statistics import summarize
from metagpt_localllm.tiers import Caller
from metagpt_localllm.wording import duration, rate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DESK, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
#: WCAG 2.1, 1.4.3 (AA): the least contrast of text; of the parts of a figure 1.4.11 asks for 3.
LEAST_CONTRAST, LEAST_CONTRAST_OF_FIGURES = 4.5, 3.0


# --------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """One for all tests of this file: none of them may be async, since its loop runs in this thread."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def look(browser, tmp_path):
    """Opens a report; what the browser complains about, and what it asks of anybody, fails the test."""
    opened, complaints, requests = [], [], []

    def open_it(page, scheme="light", size=DESK, **options):
        if not isinstance(page, os.PathLike):
            path = tmp_path / f"{len(opened)}.html"
            path.write_text(page, encoding="utf-8")
            page = path
        context = browser.new_context(viewport=size, color_scheme=scheme, **options)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        opened.append(context)
        return tab

    yield open_it
    for context in opened:
        context.close()
    assert not complaints
    assert len(requests) == len(opened) and all(url.startswith("file:///") for url in requests)


def page_of(*args, standing=None, **options):
    runs, calls, replays = made_up(*args, **options)
    now = runs[-1].touched + 3600
    return render(Recorded(runs, standing or {run.id: run.outcome for run in runs}, calls, replays, now=now))


@pytest.fixture(scope="module")
def pages():
    return {number: page_of(number) for number in (10, 10_000)}


def scroll_to(tab, what):
    """Brings it into view; the event of scrolling, which hides tooltips, comes with one of the next frames."""
    what.scroll_into_view_if_needed()
    tab.evaluate("() => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(go, 0))))")


def overflows(tab):
    return tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize(
    "calls, scheme, size",
    [(10, "light", DESK), (10, "dark", PHONE), (10_000, "dark", DESK), (10_000, "light", PHONE)],
)
def test_it_opens_in_both_schemes_on_both_widths_with_few_and_many_calls(look, pages, calls, scheme, size):
    assert len(pages[calls].encode()) < 3e6
    tab = look(pages[calls], scheme, size)
    assert overflows(tab) == 0
    assert "MetaGPT run 2026" in tab.title() and tab.locator("html").get_attribute("lang") == "en"
    assert tab.locator("h1").count() == 1 and tab.locator("main h2").count() >= 7
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 150) is (scheme == "dark")
    runs, made, _ = made_up(calls)
    roles = {call.role for _, call in made}
    assert tab.locator("#timeline .lane").count() == len(roles)
    assert f"of {calls:,} calls were answered" in tab.locator(".headline").inner_text()
    # What is drawn is to be seen, and within its frame.
    boxes = tab.evaluate("[...document.querySelectorAll('#timeline path.decode')].map(each => each.getBoundingClientRect().width)")
    assert boxes and all(0 < width <= size["width"] for width in boxes)
    # The labels of an axis do not run into each other.
    for axis in ("#scatter .x span", "#timeline .tick span", ".three figure:nth-child(2) .x span"):
        spans = tab.evaluate("(of) => [...document.querySelectorAll(of)].map(e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right])", axis)
        assert len(spans) >= 2 and all(right <= left for (_, right), (left, _) in zip(spans, spans[1:])), axis


def luminance(colour):
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_and_all_marks_stand_out_from_what_is_behind_them(look, pages, scheme):
    tab = look(pages[10], scheme)
    pairs = tab.evaluate("""() => {
      const behind = (element) => {
        for (; element; element = element.parentElement) {
          const colour = getComputedStyle(element).backgroundColor;
          if (!/, 0\\)$/.test(colour)) return colour;
        }
      };
      const found = {};
      for (const element of document.querySelectorAll("body *")) {
        if ([...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && element.checkVisibility())
          found[`${getComputedStyle(element).color} on ${behind(element)}`] = element.outerHTML.slice(0, 80);
      }
      return found;
    }""")
    assert len(pairs) >= 3
    for pair, where in pairs.items():
        assert contrast(*pair.split(" on ")) >= LEAST_CONTRAST, (pair, where)
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    marks = tab.evaluate("[...document.querySelectorAll('.key')].map(each => [each.className, getComputedStyle(each).backgroundColor])")
    assert {"prefill", "decode", "failed"} <= {word for name, _ in marks for word in name.split()}
    for name, colour in marks:
        assert "cached" in name or contrast(colour, back) >= LEAST_CONTRAST_OF_FIGURES, (name, colour)


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_names_and_errors_are_text_whatever_they_hold(look, size):
    tab = look(page_of(200), size=size)
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 2 and overflows(tab) == 0
    lanes = tab.locator("#timeline .lane").all_inner_texts()
    for role in ROLES:
        said = re.sub("[\u202e\u0000]", "\ufffd", role) or "(none)"
        assert any(lane.startswith(said) for lane in lanes), role
    sentences = tab.locator(".sentence").all_inner_texts()
    assert any('500 <b>"boom"</b> </script><script>alert(3)</script>' in one and one.endswith("{{data}}") for one in sentences)
    tab.locator("#timeline").focus()
    for _ in range(12):
        tab.keyboard.press("ArrowRight")
    tab.locator("#calls th button").first.click()


def test_the_timeline_is_read_with_the_keys_and_the_mouse(look, pages):
    tab = look(pages[10])
    timeline, told, tip = tab.locator("#timeline"), tab.locator("#told"), tab.locator("#tip")
    first = json.loads(re.search(r'id="data">(.*?)</script>', pages[10], re.S)[1])["names"]["role"][0]
    shown = lambda: [float(part) for part in tab.locator("#timeline svg").first.get_attribute("viewBox").split()]  # noqa: E731
    whole = shown()
    timeline.focus()
    tab.keyboard.press("ArrowRight")
    assert f"{first} · " in told.text_content() and "call 1\n" in told.text_content() and tip.is_visible()
    tab.keyboard.press("ArrowRight")
    assert "call 2\n" in told.text_content() and "decode: " in told.text_content()
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    tab.keyboard.press("+")
    tab.keyboard.press("+")
    assert math.isclose(shown()[2], whole[2] / 4, rel_tol=1e-6)
    assert len(tab.locator("#timeline .tick").all()) >= 3
    tab.keyboard.press("End")  # goes there, if it is not in sight
    assert shown()[0] > 0 and "call 10\n" in told.text_content()
    tab.keyboard.press("0")
    assert shown() == whole
    rows = tab.locator("#timeline .rows").first
    scroll_to(tab, rows)
    box = rows.bounding_box()
    tab.mouse.move(box["x"] + 2, box["y"] + 11)
    assert tip.is_visible() and "call 1\n" in tip.text_content()
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 11)
    tab.mouse.up()
    assert 0.4 < shown()[2] / whole[2] < 0.6
    tab.get_by_role("button", name="Whole run").click()
    assert shown() == whole and tab.get_by_role("button", name="Zoom out").is_disabled()


def test_the_other_figures_are_read_with_the_keys_and_the_mouse(look, pages):
    tab = look(pages[10])
    told, tip = tab.locator("#told"), tab.locator("#tip")
    scatter = tab.locator("#scatter")
    scatter.focus()
    tab.keyboard.press("Home")
    assert "deadline" in told.text_content() and "prompt of" in told.text_content()
    for plot in tab.locator(".plot:not(#scatter)").all():
        plot.focus()
        tab.keyboard.press("ArrowRight")
        assert re.search(r" of \d", told.text_content())
    scroll_to(tab, scatter)
    place = tab.evaluate("""() => {
      const data = JSON.parse(document.getElementById("data").textContent), [, , tokens, seconds] = data.points[0];
      const at = (name, value) => { const [a, b] = document.getElementById("scatter").dataset[name].split(",").map(Number);
                                    return Math.log(value / a) / Math.log(b / a); };
      const box = document.querySelector("#scatter .area").getBoundingClientRect();
      return [box.left + at("x", tokens) * box.width, box.top + (1 - at("y", seconds)) * box.height];
    }""")
    tab.mouse.move(*place)
    assert tip.is_visible() and "first token after" in tip.text_content()


def test_the_calls_are_paged_sorted_and_chosen_and_written_as_the_server_wrote_them(look, pages):
    tab = look(pages[10_000])
    rows, status = tab.locator("#calls tbody tr"), tab.locator("#pager [role=status]")
    written = rows.all_inner_texts()
    assert len(written) == 50 and status.inner_text() == "page 1 of 200, 10,000 calls"
    began, total = tab.locator("#calls th button").nth(1), tab.locator("#calls th button").nth(8)
    began.click()
    began.click()
    assert tab.locator("#calls th").nth(1).get_attribute("aria-sort") == "ascending"
    assert rows.all_inner_texts() == written  # by page.js now: it writes numbers as scales.py does
    tab.get_by_role("button", name="Next").click()
    assert status.inner_text().startswith("page 2") and rows.all_inner_texts() != written
    total.click()
    _, made, _ = made_up(10_000)
    longest = max(figures.total or 0 for figures in Recorded([], {}, made).figures)
    assert duration(longest) in rows.first.inner_text() and status.inner_text().startswith("page 1")
    tab.locator("#which").select_option("failed")
    failed = sum(1 for _, call in made if any("error" in attempt for attempt in call.attempts))
    assert status.inner_text().endswith(f" {failed:,} calls")


def test_without_javascript_all_figures_and_tables_are_there(look, pages):
    tab = look(pages[10], size=PHONE, java_script_enabled=False)
    assert "calls were answered" in tab.locator(".headline").inner_text()
    for selector in ("#timeline path", "#scatter path", ".plot .bar", "#calls tbody tr", ".sentence", "#timeline .tick"):
        assert tab.locator(selector).count() >= 2, selector
    assert not tab.locator("button").first.is_visible() and "Without JavaScript" in tab.locator("noscript").inner_text()


def test_it_is_printed_dark_on_white_and_without_buttons(look, pages):
    tab = look(pages[10], "dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.locator("#pager").is_visible() and not tab.locator("nav").is_visible()


def test_nights_between_runs_are_folded(look):
    tab = look(page_of(60, runs=3, idle=30_000.0))
    assert "3 runs of MetaGPT" in tab.locator("h1").inner_text()
    assert tab.locator("#timeline .fold").count() == 5 and "idle stretches" in tab.locator(".note").first.inner_text()
    labels = tab.locator("#timeline .tick span").all_inner_texts()
    assert any(" h" in label for label in labels) and labels == list(dict.fromkeys(labels))
    assert tab.locator("#calls th").first.inner_text().startswith("run")


# ------------------------------------------------------------------------------------ of a real run


@pytest.fixture
def real_run(ask, tmp_path):
    """Five calls of two roles on the simulator: one breaks off, one is refused, one has a prompt that is too long, one fails."""
    faults = [parse_fault(text) for text in ("drop:on=2,after=6", "error:on=4,status=500")]
    machine = Machine(prefill_speed=2000, decode_speed=50, context=1024, slots=1)
    settings = {"retry": {"attempts": 2, "backoff": {"initial": 0, "max": 0}}, "journal": {"enabled": True}}

    async def work(server):
        long = [{"role": "user", "content": "the secret task"}]
        for number in range(30):
            long += [{"role": "assistant", "content": f"word {number} " * 40}, {"role": "user", "content": f"go on {number}"}]
        for number, text in enumerate(("the secret task", "another one", "a third", long)):
            call = ask(server, text, settings, api_key="sk-very-secret", max_tokens=64)
            role = "Architect" if number == 0 else "Engineer"
            await complete(type(call)(**{**vars(call), "caller": Caller("WriteCode", role, role)}))

    with SimulatorThread(machine, faults=faults, scale=100) as server:
        # Not in this thread, where the browser's loop may run.
        failure = []
        thread = threading.Thread(target=lambda: failure.extend(_error_of(work(server))))
        thread.start()
        thread.join()
        assert not failure, failure
    (opened,) = session._sessions.values()
    opened.end()
    return tmp_path / "state.db"


def _error_of(work):
    try:
        asyncio.run(work)
    except (LocalLLMError, Exception) as error:
        return [error]
    return []


def run_report(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_a_real_run_is_told_as_it_was(real_run, tmp_path, look):
    output = tmp_path / "report.html"
    result = run_report("--path", real_run, "--output", output)
    assert result.exit_code == 0, result.output
    assert "4 calls" in result.output and stat.S_IMODE(output.stat().st_mode) == 0o600
    journal = Journal(State(real_run))
    everything = journal.recorded()
    total = summarize(Recorded([], {}, everything).figures, ())[0]
    assert (total.answered, sum(total.errors.values())) == (4, 2) and total.trimmed_tokens > 0
    tab = look(output)
    tiles = " ".join(tab.locator(".tiles").inner_text().split())
    for figure in ("4 of 4", f"attempts failed {sum(total.errors.values())}", f"tokens trimmed {total.trimmed_tokens:,}",
                   f"cache {share(total.cached_share)}", f"per second {rate(total.decode_rate)}"):  # fmt: skip
        assert figure in tiles, figure
    sentences = tab.locator(".sentence").all_inner_texts()
    details = [attempt["detail"] for _, call in everything for attempt in call.attempts if "error" in attempt]
    assert len(sentences) == 2 and all(any(detail in sentence for sentence in sentences) for detail in details)
    assert [lane.split(" ")[0] for lane in tab.locator("#timeline .lane p").all_inner_texts()] == ["Architect", "Engineer"]
    assert tab.locator("#timeline path.failed").count() >= 1
    page = output.read_text()
    assert "secret" not in page and "go on 7" not in page and "word3 word4" not in page


# ------------------------------------------------------------------------------------------ the command


def test_by_default_it_is_the_last_run_in_the_current_folder(tmp_path, monkeypatch):
    ids = fill(tmp_path / "state.db", 30, runs=3, idle=1000)
    monkeypatch.chdir(tmp_path)
    assert run_report("--path", "state.db").exit_code == 0
    page = (tmp_path / "metagpt-report.html").read_text()
    assert f"MetaGPT run {ids[-1]}" in page and ids[0] not in page
    assert "a secret" not in page and MODEL in page


@pytest.mark.parametrize(
    "arguments, found",
    [(["--all"], [0, 1, 2]), (["--run", "last"], [2]), (["--run", "20260101-120001"], [1]),
     (["--since", "2025-10-09T15:30:00+00:00"], [1, 2]), (["--since", "2020-01-01", "--run", "20260101-120000"], [0])],
)  # fmt: skip
def test_which_runs_it_is_about(tmp_path, arguments, found):
    ids = fill(tmp_path / "state.db", 30, runs=3, idle=10_000, replayed=0.0)  # replays are of today
    output = tmp_path / "report.html"
    result = run_report("--path", tmp_path / "state.db", "--output", output, *arguments)
    assert result.exit_code == 0, result.output
    page = output.read_text()
    assert [index for index, id in enumerate(ids) if id in page] == found


@pytest.mark.parametrize(
    "arguments, said",
    [(["--run", "nonsense"], "there is no run 'nonsense'"), (["--since", "2099-01-01"], "no calls are recorded"),
     (["--all", "--run", "last"], "exclude each other"), (["--since", "soon"], "neither a length of time"),
     (["--output", "no/such/folder.html"], "there is no folder")],
)  # fmt: skip
def test_what_cannot_be_reported_is_said(tmp_path, arguments, said):
    fill(tmp_path / "state.db", 5)
    result = run_report("--path", tmp_path / "state.db", "--output", tmp_path / "report.html", *arguments)
    assert result.exit_code and said in " ".join(result.output.split()) and not (tmp_path / "report.html").exists()


def test_without_a_journal_or_a_run_it_says_so_and_writes_nothing(tmp_path):
    output, file = tmp_path / "report.html", tmp_path / "state.db"
    result = run_report("--path", file, "--output", output)
    assert result.exit_code == 1 and "there is no journal" in result.output and not file.exists()
    journal = Journal(State(file))
    journal.begin_run(RunRecord("20260101-0", "k", ("metagpt",), "/", 1.0, 1.0))
    assert journal.flush() and journal.forget("20260101-0")
    result = run_report("--path", file, "--output", output)
    assert result.exit_code == 1 and "no run is recorded yet" in result.output
    journal.begin_run(RunRecord("20260101-1", "k", ("metagpt",), "/", 1.0, 1.0))
    assert journal.flush()
    result = run_report("--path", file, "--output", output)
    assert result.exit_code == 1 and "no calls are recorded in run 20260101-1" in result.output and not output.exists()


def test_only_an_earlier_report_is_overwritten(tmp_path):
    fill(tmp_path / "state.db", 5)
    output = tmp_path / "thesis.html"
    output.write_text("<!doctype html><title>years of work</title>")
    once = ("--path", tmp_path / "state.db", "--output", output)
    refused = run_report(*once)
    assert refused.exit_code == 2 and "--force" in refused.output and "years of work" in output.read_text()
    assert run_report(*once, "--force").exit_code == 0 and "years of work" not in output.read_text()
    os.chmod(output, 0o644)
    assert run_report(*once).exit_code == 0 and stat.S_IMODE(output.stat().st_mode) == 0o600
    link = tmp_path / "link.html"
    link.symlink_to(output)
    assert run_report("--path", tmp_path / "state.db", "--output", link).exit_code == 0 and link.is_symlink()
    for other in (tmp_path, "/dev/null"):
        assert run_report("--path", tmp_path / "state.db", "--output", other, "--force").exit_code == 2
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_it_opens_in_the_browser(tmp_path, monkeypatch):
    fill(tmp_path / "state.db", 5)
    opened = []
    monkeypatch.setattr(report_module.webbrowser, "open", lambda address: bool(opened.append(address)))
    result = run_report("--path", tmp_path / "state.db", "--output", tmp_path / "a b.html", "--open")
    assert result.exit_code == 0 and opened == [(tmp_path / "a b.html").as_uri()] and "No browser was found" in result.output


# ----------------------------------------------------------------------------------------------- pure


#: What a disk may have made of a value.
DAMAGED = (None, -1, 1e300, float("nan"), float("inf"), "x", [], {}, [7], [{}], [{"at": "x"}], {"a": 1}, True)
OF_CALL = [field.name for field in fields(CallRecord) if field.name not in ("number", "digest", "outcome", "superseded")]


@pytest.mark.parametrize("field", OF_CALL)
def test_a_damaged_record_spoils_no_report(field):
    runs, calls, replays = made_up(3)
    for value in DAMAGED:
        damaged = [(run, replace(call, **{field: value}) if call.number == 2 else call) for run, call in calls]
        page = render(Recorded(runs, {}, damaged, replays, now=runs[0].touched))
        data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
        assert len(data["calls"]) >= 2 and "nan%" not in page and "inf%" not in page


def kinds(call, until=0.0):
    return [(phase.kind, round(phase.seconds, 6)) for phase in phases_of(call, until)]


def test_the_phases_of_a_call_are_without_gaps():
    failed = {"at": 112.0, "ended": 120.0, "error": "StreamStalled", "ttft": 3.0}
    answered = {"at": 125.0, "ended": 140.0, "ttft": 5.0}
    call = CallRecord(1, "d", started=100.0, ended=140.5, outcome="done", queued=12.0, attempts=[failed, answered])
    assert kinds(call) == [
        ("queued", 12.0), ("failed", 8.0), ("pause", 5.0), ("prefill", 5.0), ("decode", 10.0), ("pause", 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "call, expected",
    [
        (CallRecord(1, "d", started=10.0, attempts=[{"at": 12.0}]), [("pause", 2.0), ("open", 18.0)]),
        (CallRecord(1, "d", started=10.0, ended=15.0, outcome="cancelled", attempts=[{"at": 12.0}]), [("pause", 2.0), ("open", 3.0)]),
        (CallRecord(1, "d", started=10.0, ended=15.0, outcome="failed"), [("pause", 5.0)]),
        (CallRecord(1, "d", started=10.0, ended=9.0, outcome="done", attempts=[{"at": "x"}, 7, {"at": float("nan")}]), []),
        (CallRecord(1, "d", started=10.0, ended=12.0, outcome="done", attempts=[{"at": 5.0, "ttft": 6.0, "ended": 12.0}]),
         [("prefill", 1.0), ("decode", 1.0)]),
        (CallRecord(1, "d", started=10.0, ended=20.0, outcome="done", queued=4.0, attempts=[{"at": 16.0, "ended": 20.0}]),
         [("pause", 2.0), ("queued", 4.0), ("prefill", 4.0)]),
    ],
    ids=["running", "cancelled", "never sent", "damaged", "a clock that was set back", "without a time to first token"],
)  # fmt: skip
def test_phases_of_calls_that_are_not_whole(call, expected):
    assert kinds(call, 30.0) == expected


def test_the_axis_folds_what_is_idle_for_long_and_nothing_else():
    axis = axis_of([(0.0, 600.0), (630.0, 1200.0), (40_000.0, 40_600.0)])
    (fold,) = axis.folds
    assert (fold.begin, fold.end) == (1200.0, 40_000.0) and fold.width < 60
    assert axis.place(900.0) == 900.0 and axis.place(40_300.0) == pytest.approx(1500.0 + fold.width)
    assert axis.place(40_600.0) == pytest.approx(axis.length)


def test_calls_at_the_same_time_have_rows_of_their_own():
    assert rows_of([(0, 10), (2, 4), (3, 8), (5, 6), (10, 12)]) == [0, 1, 2, 1, 0]
    assert max(rows_of([(0, 10)] * 100)) == 5


def test_ticks_are_as_exact_as_their_step():
    assert [tick_label(*of) for of in ((8.65, 0.05), (90.0, 30), (5400, 1800), (90_000, 3600), (0.0, 5))] == [
        "8.65 s", "1 min 30 s", "1 h 30 min", "1 d 1 h", "0 s",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0], [0.01, 500.0], [2.0, 2.9, 3.4], [30.0, 240.0], [99.0, 100.0, 1000.0]])
def test_bins_hold_all_values(values):
    edges, _ = bins(values, of_time=True)
    assert edges == sorted(set(edges)) and 2 <= len(edges) <= 24
    assert edges[0] <= min(values) and max(values) <= edges[-1]


def test_counts_have_whole_ticks():
    assert [count_ticks(most) for most in (1, 2, 5, 1358)] == [[0, 1], [0, 1, 2], [0, 3, 6], [0, 1000, 2000]]
