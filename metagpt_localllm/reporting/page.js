"use strict";
// Tooltips, keys, zoom and the pages of the table. All else is in the HTML already.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const field = Object.fromEntries(data.fields.map((name, index) => [name, index]));
  const get = (call, name) => call[field[name]];
  const named = (call, kind) => data.names[kind][get(call, kind)];
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  for (const element of all(".js")) element.hidden = false;

  // ---------------------------------------------------------------- numbers in words, as in scales.py and wording.py

  const fixed = (value, decimals) => Math.floor(value * 10 ** decimals + 0.5) / 10 ** decimals;
  const count = (number) => (number === null ? "–" : fixed(number, 0).toLocaleString("en-US"));
  const rate = (number) => {
    if (number === null) return "–";
    const decimals = number >= 99.95 ? 0 : number >= 9.95 ? 1 : 2;
    return decimals ? fixed(number, decimals).toFixed(decimals) : count(number);
  };
  const duration = (seconds) => {
    if (seconds === null) return "–";
    if (seconds === 0) return "0 s";
    if (seconds < 0.0995) return `${Math.max(fixed(seconds * 1000, 0), 1)} ms`;
    if (seconds < 9.95) return `${fixed(seconds, seconds < 0.995 ? 2 : 1)} s`;
    if (seconds < 59.5) return `${fixed(seconds, 0)} s`;
    let whole = 0, rest = 0, units;
    for (units of [["min", "s", 1, 60, 60], ["h", "min", 60, 60, 24], ["d", "h", 3600, 24, Infinity]]) {
      const [, , part, size, limit] = units, small = fixed(seconds / part, 0);
      [whole, rest] = [Math.floor(small / size), small % size];
      if (whole < limit) break;
    }
    return `${count(whole)} ${units[0]}${rest ? ` ${rest} ${units[1]}` : ""}`;
  };
  const tickLabel = (moment, step) => {
    const decimals = Math.max(-Math.floor(Math.log10(step) + 1e-9), 0), told = [];
    let rest = Number(moment.toFixed(decimals));
    for (const [unit, seconds] of [["d", 86400], ["h", 3600], ["min", 60]]) {
      if (rest < seconds) continue;
      told.push(`${Math.floor(rest / seconds)} ${unit}`);
      rest %= seconds;
    }
    if (Number(rest.toFixed(decimals)) || !told.length) told.push(rest ? `${rest.toFixed(decimals)} s` : "0 s");
    return told.join(" ");
  };
  const share = (part, whole) => {
    if (part === null || !whole) return "–";
    const of = part / whole;
    return of > 0 && of < 0.01 ? "< 1 %" : of > 0.99 && of < 1 ? "> 99 %" : `${fixed(100 * of, 0)} %`;
  };
  const clock = (seconds) => new Date((data.begin + data.zone + seconds) * 1000).toISOString().slice(0, 19).replace("T", " ");

  const about = (call) => {
    const lines = [`${named(call, "role") || "(no role)"} · ${named(call, "action") || "(no action)"} · call ${get(call, "number")}`];
    if (data.names.run.length > 1) lines.push(`run ${named(call, "run")}`);
    lines.push(`${named(call, "outcome")}; began ${clock(get(call, "begin"))}`);
    const phases = get(call, "phases");
    for (let index = 0; index < phases.length; index += 2) lines.push(`${data.kinds[phases[index]]}: ${duration(phases[index + 1])}`);
    const cached = get(call, "cached") ? ` (${share(get(call, "cached"), get(call, "prompt"))} cached)` : "";
    const speed = get(call, "rate") === null ? "" : ` at ${rate(get(call, "rate"))} per second`;
    lines.push(`prompt ${count(get(call, "prompt"))} tokens${cached}, answer ${count(get(call, "answer"))} tokens${speed}`);
    if (get(call, "failed")) lines.push(`${get(call, "failed")} of ${get(call, "attempts")} attempts failed`);
    if (get(call, "trimmed")) lines.push(`${count(get(call, "trimmed"))} tokens trimmed`);
    if (get(call, "saved")) lines.push(`${count(get(call, "saved"))} tokens saved`);
    return lines.join("\n");
  };

  // ---------------------------------------------------------------- the tooltip

  const tip = one("#tip"), told = one("#told");
  let again = null;  // puts the tooltip of what was chosen with the keys where it belongs after scrolling
  const hide = () => { tip.hidden = true; again = null; };
  const show = (words, x, y, aloud) => {
    tip.textContent = words;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 12, document.documentElement.clientWidth - width - 4))}px`;
    tip.style.top = `${Math.max(4, y + 16 + height > innerHeight ? y - height - 12 : y + 16)}px`;
    if (aloud) told.textContent = words;
    else again = null;
  };
  addEventListener("scroll", () => { if (again) again(); else hide(); }, { passive: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // A chart's items can be gone through with the keys: choose(index) marks one and says it.
  const walk = (chart, length, choose, also = () => false) => {
    let at = -1;
    chart.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: length() - 1, PageDown: at + 10, PageUp: at - 10 };
      if (event.key in steps) at = Math.max(0, Math.min(length() - 1, steps[event.key]));
      else if (!also(event.key)) return;
      event.preventDefault();
      if (event.key in steps && length()) { choose(at); again = () => choose(at); }
    });
    chart.addEventListener("blur", hide);
    return (index) => { at = index; };
  };

  for (const plot of all(".plot:not(#scatter)")) {
    const bars = all("[data-tip]", plot);
    const choose = (index) => {
      all(".is", plot).forEach((bar) => bar.classList.remove("is"));
      const bar = bars[index], box = bar.getBoundingClientRect();
      bar.classList.add("is");
      show(bar.dataset.tip, box.left, Math.max(box.top, plot.getBoundingClientRect().top), true);
    };
    walk(plot, () => bars.length, choose);
    const area = one(".area", plot);
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect(), x = event.clientX;
      const bar = bars.find((each) => { const of = each.getBoundingClientRect(); return of.left <= x && x <= of.right; });
      if (bar) show(bar.dataset.tip, x, Math.max(event.clientY, box.top));
    });
    area.addEventListener("pointerleave", hide);
  }

  // ---------------------------------------------------------------- time to first token

  const scatter = one("#scatter");
  if (scatter) {
    const area = one(".area", scatter);
    const scale = (name) => {
      const [low, high] = scatter.dataset[name].split(",").map(Number);
      return (value) => Math.min(1, Math.max(0, Math.log(value / low) / Math.log(high / low)));
    };
    const x = scale("x"), y = scale("y");
    const places = data.points.map(([, , tokens, seconds]) => [x(tokens), 1 - y(seconds)]);
    const ring = Object.assign(document.createElement("i"), { className: "ring", hidden: true });
    const until = Object.assign(document.createElement("i"), { className: "until", hidden: true });
    area.append(until, ring);
    const choose = (index, aloud = true) => {
      const [call, kind, tokens, seconds, deadline] = data.points[index], [left, top] = places[index];
      const box = area.getBoundingClientRect();
      ring.hidden = false;
      ring.style.left = until.style.left = `${100 * left}%`;
      ring.style.top = `${100 * top}%`;
      until.hidden = !deadline;
      if (deadline) {
        const limit = 1 - y(deadline);
        until.style.top = `${100 * Math.min(top, limit)}%`;
        until.style.height = `${100 * Math.abs(top - limit)}%`;
      }
      const what = data.pointKinds[kind] === "none" ? "no token within" : "first token after";
      const limit = deadline ? `, deadline ${duration(deadline)}` : "";
      const words = `${what} ${duration(seconds)}${limit}\nprompt of ${count(tokens)} tokens\n\n${about(data.calls[call])}`;
      show(words, box.left + left * box.width, box.top + top * box.height, aloud);
    };
    const reached = walk(scatter, () => data.points.length, choose);
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const px = (event.clientX - box.left) / box.width, py = (event.clientY - box.top) / box.height;
      let best = -1, least = 24 ** 2;
      places.forEach(([left, top], index) => {
        const distance = ((left - px) * box.width) ** 2 + ((top - py) * box.height) ** 2;
        if (distance < least) [best, least] = [index, distance];
      });
      if (best >= 0) { reached(best); choose(best, false); } else { ring.hidden = until.hidden = true; hide(); }
    });
    area.addEventListener("pointerleave", () => { ring.hidden = until.hidden = true; hide(); });
    scatter.addEventListener("blur", () => { ring.hidden = until.hidden = true; });
  }

  // ---------------------------------------------------------------- the timeline

  const timeline = one("#timeline");
  if (timeline) {
    const overlay = one(".overlay", timeline), lanes = all(".rows", timeline);
    const steps = [.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200];
    const closest = data.length / 500;  // the shortest time that is shown
    let low = 0, high = data.length;

    // Seconds since the beginning → seconds on the axis, where idle stretches are folded.
    const place = (moment) => {
      let gone = 0;
      for (const [begin, end, width] of data.folds) {
        if (moment >= end) gone += end - begin - width;
        else if (moment > begin) return begin - gone + ((moment - begin) / (end - begin)) * width;
        else break;
      }
      return moment - gone;
    };
    const spans = data.calls.map((call) => {
      const begin = get(call, "begin"), seconds = get(call, "phases").filter((_, index) => index % 2);
      return [place(begin), place(seconds.reduce((sum, each) => sum + each, begin))];
    });
    const byLane = lanes.map(() => []);
    data.calls.forEach((call, index) => byLane[get(call, "role")].push(index));
    const mark = Object.assign(document.createElement("i"), { className: "chosen", hidden: true });
    let marked = -1;

    const put = (className, at, width, words) => {
      const element = Object.assign(document.createElement("i"), { className });
      element.style.left = `${(100 * (at - low)) / (high - low)}%`;
      if (width !== null) element.style.width = `${(100 * width) / (high - low)}%`;
      if (className === "tick") element.append(Object.assign(document.createElement("span"), { textContent: words }));
      overlay.append(element);
    };
    const draw = () => {
      overlay.textContent = "";
      for (const [begin, , width] of data.folds) put("fold", place(begin), width);
      const least = ((high - low) * 110) / Math.max(timeline.clientWidth, 1);
      const step = steps.find((each) => each >= least) || Math.ceil(least / 86400) * 86400;
      const edges = [0, ...data.folds.flatMap(([begin, end]) => [begin, end]), Infinity];
      let last = -Infinity;
      for (let index = 0; index < edges.length; index += 2) {
        const from = place(edges[index]), offset = edges[index] - from;
        const to = Math.min(high, edges[index + 1] === Infinity ? data.length : place(edges[index + 1]));
        for (let number = Math.ceil((Math.max(low, from) + offset) / step - 1e-9); number * step - offset <= to; number++) {
          const at = number * step - offset;
          if (at - last >= 0.6 * step) { put("tick", at, null, tickLabel(number * step, step)); last = at; }
        }
      }
      for (const lane of lanes) {
        const svg = one("svg", lane), height = svg.viewBox.baseVal.height;
        svg.setAttribute("viewBox", `${(low / data.length) * data.width} 0 ${((high - low) / data.length) * data.width} ${height}`);
      }
      frame();
      const whole = low <= 0 && high >= data.length;
      for (const button of all("[data-zoom]")) {
        const how = button.dataset.zoom;
        button.disabled = how === "in" ? high - low <= closest : how === "later" ? high >= data.length : how === "earlier" ? low <= 0 : whole;
      }
    };
    const frame = () => {
      mark.hidden = marked < 0;
      if (marked < 0) return;
      const [begin, end] = spans[marked], call = data.calls[marked];
      mark.style.left = `${(100 * (begin - low)) / (high - low)}%`;
      mark.style.width = `${(100 * (end - begin)) / (high - low)}%`;
      mark.style.top = `${get(call, "row") * data.rowHeight}px`;
      mark.style.height = `${data.rowHeight}px`;
      lanes[get(call, "role")].append(mark);
    };
    const view = (from, to) => {
      const length = Math.min(Math.max(to - from, closest), data.length);
      low = Math.max(0, Math.min((from + to - length) / 2, data.length - length));
      high = low + length;
      draw();
    };
    const zoom = (how) => {
      const length = high - low;
      const [begin, end] = marked >= 0 ? spans[marked] : [];
      const middle = marked >= 0 && begin < high && end > low ? (Math.max(begin, low) + Math.min(end, high)) / 2 : (low + high) / 2;
      if (how === "in") view(middle - length / 4, middle + length / 4);
      else if (how === "out") view(middle - length, middle + length);
      else if (how === "all") view(0, data.length);
      else view(low + (how === "later" ? length : -length) / 2, high + (how === "later" ? length : -length) / 2);
    };
    const choose = (index) => {
      marked = index;
      const [begin, end] = spans[index], length = high - low;
      if (begin < low || end > high) view((begin + end - length) / 2, (begin + end + length) / 2);
      frame();
      const box = mark.getBoundingClientRect();
      show(about(data.calls[index]), Math.max(box.left, 0), box.bottom, true);
    };
    const reached = walk(timeline, () => data.calls.length, choose, (key) => {
      const how = { "+": "in", "=": "in", "-": "out", "0": "all" }[key];
      if (how) zoom(how);
      return Boolean(how);
    });
    const timeAt = (lane, x) => { const box = lane.getBoundingClientRect(); return low + ((x - box.left) / box.width) * (high - low); };

    lanes.forEach((lane, number) => {
      let from = null;
      const drag = Object.assign(document.createElement("i"), { className: "drag" });
      lane.addEventListener("pointermove", (event) => {
        const x = timeAt(lane, event.clientX);
        if (from !== null) {
          drag.style.left = `${(100 * (Math.min(from, x) - low)) / (high - low)}%`;
          drag.style.width = `${(100 * Math.abs(x - from)) / (high - low)}%`;
          timeline.append(drag);
          return;
        }
        const row = Math.floor((event.clientY - lane.getBoundingClientRect().top) / data.rowHeight);
        let best = -1, least = ((high - low) * 6) / lane.clientWidth;
        for (const index of byLane[number]) {
          const distance = Math.max(spans[index][0] - x, x - spans[index][1], 0);
          if (get(data.calls[index], "row") === row && distance < least) [best, least] = [index, distance];
        }
        if (best < 0) { hide(); return; }
        marked = best;
        reached(best);
        frame();
        show(about(data.calls[best]), event.clientX, event.clientY);
      });
      lane.addEventListener("pointerleave", hide);
      lane.addEventListener("pointerdown", (event) => {
        if (event.pointerType !== "mouse" || event.button) return;
        from = timeAt(lane, event.clientX);
        lane.setPointerCapture(event.pointerId);
        hide();
      });
      const stop = (event) => {
        if (from === null) return;
        const to = timeAt(lane, event.clientX), wide = Math.abs(to - from) * lane.clientWidth > 8 * (high - low);
        const [begin, end] = [Math.min(from, to), Math.max(from, to)];
        from = null;
        drag.remove();
        if (wide && event.type === "pointerup") view(begin, end);
      };
      lane.addEventListener("pointerup", stop);
      lane.addEventListener("pointercancel", stop);
      lane.addEventListener("dblclick", () => zoom("all"));
    });
    for (const button of all("[data-zoom]")) button.addEventListener("click", () => zoom(button.dataset.zoom));
    new ResizeObserver(draw).observe(timeline);
  }

  // ---------------------------------------------------------------- the table of calls

  const table = one("#calls"), pager = one("#pager"), which = one("#which");
  const quotient = (call) => (get(call, "cached") === null || !get(call, "prompt") ? null : get(call, "cached") / get(call, "prompt"));
  const value = (name) => (call) => get(call, name), called = (kind) => (call) => named(call, kind);
  // Of each column: its value, how it is written, and whether it is a number, words or a name that somebody chose.
  const columns = [
    [called("run"), String, "words"], [value("number"), count], [value("begin"), clock, "words"], [called("role"), String, "name"],
    [called("action"), String, "name"], [called("outcome"), String, "words"], [value("attempts"), count], [value("queued"), duration],
    [value("ttft"), duration], [value("total"), duration], [value("prompt"), count], [quotient, (of) => share(of, 1)],
    [value("answer"), count], [value("rate"), rate],
  ].slice(data.manyRuns ? 0 : 1);
  let page = 0, down = false, sorted = columns.findIndex(([, write]) => write === clock);

  const rows = () => {
    const kept = data.calls.filter((call) => (
      which.value === "failed" ? get(call, "failed") > 0 : which.value === "unanswered" ? !named(call, "outcome").startsWith("answered") : true));
    const [key] = columns[sorted], sign = down ? -1 : 1;
    return kept.map((call) => [key(call), call]).sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);  // what is not known comes last
      return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
    }).map(([, call]) => call);
  };
  const turn = () => {
    const found = rows(), pages = Math.max(Math.ceil(found.length / data.page), 1);
    page = Math.max(0, Math.min(page, pages - 1));
    const body = document.createElement("tbody");
    for (const call of found.slice(page * data.page, (page + 1) * data.page)) {
      const row = body.insertRow();
      for (const [key, write, kind] of columns) {
        const place = row.insertCell(), words = write(key(call));
        if (!kind) place.className = "n";
        const isNone = kind === "name" && !words.trim();
        const inner = kind === "name" ? place.appendChild(document.createElement(isNone ? "span" : "bdi")) : place;
        if (isNone) inner.className = "muted";
        inner.textContent = isNone ? "(none)" : words;
      }
    }
    table.tBodies[0].replaceWith(body);
    state(found.length, pages);
  };
  const state = (length, pages) => {
    const [back, on] = all("button", pager);
    back.disabled = page === 0;
    on.disabled = page === pages - 1;
    one("[role=status]", pager).textContent = `page ${count(page + 1)} of ${count(pages)}, ${count(length)} calls`;
    all("th", table).forEach((head, index) => {
      head.setAttribute("aria-sort", index !== sorted ? "none" : down ? "descending" : "ascending");
    });
  };
  all("th", table).forEach((head, index) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      down = index === sorted ? !down : head.className === "n";  // of numbers the largest first
      [sorted, page] = [index, 0];
      turn();
    });
  });
  for (const button of all("[data-page]", pager)) button.addEventListener("click", () => { page += Number(button.dataset.page); turn(); });
  which.addEventListener("change", () => { page = 0; turn(); });
  one("#calls-note")?.remove();
  state(data.calls.length, Math.max(Math.ceil(data.calls.length / data.page), 1));
})();
