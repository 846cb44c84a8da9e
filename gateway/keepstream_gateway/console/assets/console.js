// The console's own script. In: the pages, and the events of a job. Out: pages that go on by themselves.
// Every page works without it, as it was when it was loaded.
"use strict";

(() => {
  const EVENTS_SHOWN = 400;
  const TICK = 2000;
  let paused = false;

  // -- Going on: parts of the page that ask for themselves anew --

  function tick() {
    if (!paused && !document.hidden) htmx.trigger(document.body, "tick");
  }
  setInterval(tick, TICK);
  document.addEventListener("visibilitychange", tick);

  function setUpPause(button) {
    button.hidden = false;
    button.addEventListener("click", () => {
      paused = !paused;
      button.setAttribute("aria-pressed", String(paused));
      button.textContent = paused ? "Paused" : "Pause";
      if (!paused) tick();
    });
  }

  function say(trouble) {
    const place = document.getElementById("trouble");
    if (place.textContent !== trouble) place.textContent = trouble;
  }
  document.addEventListener("htmx:responseError", (event) => {
    const status = event.detail.xhr.status;
    if (status === 401) location.reload();
    else say(event.detail.xhr.getResponseHeader("x-trouble") || `This page is not up to date: the gateway answers ${status}.`);
  });
  document.addEventListener("htmx:sendError", () => say("This page is not up to date: the gateway does not answer."));
  document.addEventListener("htmx:afterRequest", (event) => { if (event.detail.successful) say(""); });
  // What is open, selected or being chosen is not to be taken away under somebody's hands.
  document.addEventListener("htmx:beforeSwap", (event) => {
    const target = event.detail.target;
    const isAsked = event.detail.requestConfig.triggeringEvent?.type === "tick";
    const selection = getSelection();
    const isSelected = selection && !selection.isCollapsed && target.contains(selection.anchorNode);
    if (isAsked && (isSelected || target.querySelector(".sure[open]"))) event.detail.shouldSwap = false;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const open of document.querySelectorAll(".sure[open]")) {
      open.open = false;
      open.querySelector("summary").focus();
    }
  });
  document.addEventListener("click", (event) => {
    for (const open of document.querySelectorAll(".sure[open]")) if (!open.contains(event.target)) open.open = false;
  });

  // -- Charts --

  const charts = [];

  function colours() {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(`--${name}`).trim();
  }

  const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, notation: "compact" });

  const clock = (at, isDay = false) => new Date(at * 1000).toISOString().slice(...(isDay ? [5, 10] : [11, 16]));

  function draw(figure, data) {
    const place = figure.querySelector(".plot");
    const colour = colours();
    const unit = figure.dataset.unit;
    const own = data.charts[figure.dataset.chart];
    figure.hidden = !own; // a cost, of which nothing is known in this time
    if (!own) return;
    const words = [...figure.querySelectorAll(".key-list li")].map((item) => item.textContent);
    const readout = figure.querySelector(".readout");
    const axis = { stroke: colour("quiet"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    place.replaceChildren();
    const chart = new uPlot({
      width: place.clientWidth,
      height: 190,
      tzDate: (at) => uPlot.tzDate(new Date(at * 1000), "Etc/UTC"),
      legend: { show: false },
      cursor: { y: false, sync: { key: "overview" }, points: { size: 7 }, drag: { setScale: false, x: false } },
      scales: { y: { range: (_, low, high) => [0, high > 0 ? high * 1.12 : 1] } },
      axes: [
        { ...axis, space: 64, size: 30, values: (_, times, __, ___, step) => times.map((at) => clock(at, step >= 86400)) },
        { ...axis, size: 52, space: 36, values: (_, ticks) => ticks.map((value) => number.format(value)) },
      ],
      series: [{}, ...own.map((_, index) => ({
        label: words[index],
        stroke: colour(`chart-${index + 1}`),
        width: 1.75,
        fill: own.length === 1 ? colour("busy-soft") : undefined,
        spanGaps: false,
        points: { size: 5, fill: colour(`chart-${index + 1}`) }, // of those that stand alone
      }))],
      hooks: {
        setCursor: [(plot) => {
          const at = plot.cursor.idx;
          readout.textContent = at == null ? "" : [
            `${clock(plot.data[0][at])} UTC`,
            ...plot.data.slice(1).map((values, index) => `${words[index]} ${values[at] == null ? "–" : number.format(values[at])}${unit}`),
          ].join(" · ");
        }],
      },
    }, [data.at, ...own], place);
    charts.push({ chart, figure, place });
  }

  async function refreshCharts(page) {
    let data;
    try {
      const answer = await fetch(page.dataset.series, { headers: { "HX-Request": "true" } });
      if (!answer.ok) return;
      data = await answer.json();
    } catch { return; }
    page.chartData = data;
    redraw(page);
  }

  function redraw(page) {
    for (const { chart } of charts.splice(0)) chart.destroy();
    for (const figure of page.querySelectorAll("[data-chart]")) draw(figure, page.chartData);
  }

  function setUpCharts(page) {
    refreshCharts(page);
    setInterval(() => { if (!paused && !document.hidden) refreshCharts(page); }, 15000);
    new ResizeObserver(() => {
      for (const { chart, place } of charts) if (chart.width !== place.clientWidth) chart.setSize({ width: place.clientWidth, height: 190 });
    }).observe(page);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (page.chartData) redraw(page); });
  }

  // -- One job: its text as it comes, by the rules of the contract for readers --

  class Answers {
    constructor(place) {
      this.place = place;
      this.clear();
    }

    clear() {
      this.place.replaceChildren();
      this.choices = new Map();
    }

    choice(index) {
      let choice = this.choices.get(index);
      if (!choice) {
        choice = { calls: new Map(), parts: new Map() };
        choice.root = this.make("article", "answer", this.place);
        if (index > 0) this.make("h3", "", choice.root).textContent = `Answer ${index + 1}`;
        this.choices.set(index, choice);
      }
      return choice;
    }

    make(tag, name, parent) {
      const element = document.createElement(tag);
      if (name) element.className = name;
      parent.append(element);
      return element;
    }

    part(choice, name) {
      let text = choice.parts.get(name);
      if (!text) {
        let parent = choice.root;
        if (name !== "content") {
          parent = this.make("details", "aside", choice.root);
          parent.open = true;
          this.make("summary", "", parent).textContent = name === "reasoning" ? "Reasoning" : "Refusal";
          if (choice.parts.has("content")) choice.root.insertBefore(parent, choice.parts.get("content").parentNode);
        }
        text = document.createTextNode("");
        this.make("div", "text", parent).append(text);
        choice.parts.set(name, text);
      }
      return text;
    }

    call(choice, index) {
      let call = choice.calls.get(index);
      if (!call) {
        const root = this.make("section", "call", choice.root);
        const head = this.make("header", "", root);
        call = { name: this.make("strong", "mono", head), id: this.make("span", "quiet mono", head), text: document.createTextNode("") };
        this.make("pre", "", root).append(call.text);
        choice.calls.set(index, call);
      }
      return call;
    }

    add(index, delta) {
      const choice = this.choice(index);
      for (const name of ["reasoning", "refusal", "content"]) if (delta[name]) this.part(choice, name).appendData(delta[name]);
      for (const piece of delta.tool_calls || []) {
        const call = this.call(choice, piece.index);
        if (piece.name) call.name.textContent = piece.name;
        if (piece.id) call.id.textContent = piece.id;
        if (piece.arguments) call.text.appendData(piece.arguments);
      }
      for (const name of Object.keys(delta.extra || {})) {
        if (name !== "reasoning_fields" && !choice.parts.has(`extra ${name}`)) {
          choice.parts.set(`extra ${name}`, null);
          this.make("p", "small quiet", choice.root).textContent = `${name} has come; it is shown when the job has ended.`;
        }
      }
    }

    replace(choices) {
      this.clear();
      for (const choice of choices) {
        this.add(choice.index, {
          ...choice,
          tool_calls: (choice.tool_calls || []).map((call, index) => ({ index, ...call })),
        });
      }
    }

    grow(isGrowing) {
      for (const choice of this.choices.values()) {
        choice.parts.get("content")?.parentNode.classList.toggle("is-growing", isGrowing);
      }
    }
  }

  function describe(event) {
    if (event.type === "delta") {
      const delta = event.delta;
      return Object.keys(delta).filter((name) => delta[name]).map((name) => `${name} ${JSON.stringify(delta[name])}`).join("  ");
    }
    if (event.type === "attempt.started") return `${event.provider}/${event.model}, ${event.reason}`;
    if (event.type === "attempt.failed") return `${event.error.code}: ${event.error.message}`;
    if (event.type === "snapshot") return `${event.choices.length} answers, whole`;
    if (event.error) return `${event.error.code}: ${event.error.message}`;
    return event.status || "";
  }

  function list(place, event) {
    const row = document.createElement("li");
    const texts = [["id", event.id], ["", event.type], ["said", describe(event)], ["at quiet", new Date(event.ts).toISOString().slice(11, 23)]];
    for (const [name, text] of texts) {
      const cell = document.createElement("span");
      cell.className = name;
      cell.textContent = text.length > 300 ? `${text.slice(0, 300)}…` : text;
      row.append(cell);
    }
    const isAtEnd = place.scrollTop + place.clientHeight > place.scrollHeight - 30;
    place.append(row);
    while (place.childElementCount > EVENTS_SHOWN) place.firstElementChild.remove();
    if (isAtEnd) place.scrollTop = place.scrollHeight;
  }

  /** Follow a job's events. Live: show what comes, and fetch what is stored at its end. */
  function follow(page, isLive) {
    const answers = isLive ? new Answers(document.getElementById("answers")) : null;
    const state = document.getElementById("state");
    const rows = document.getElementById("events");
    const source = new EventSource(page.dataset.events);
    let last = null;
    const isNext = (id) => !last || id[0] > last[0] || (id[0] === last[0] && id[1] > last[1]);
    const tell = (text) => { if (isLive && state.textContent !== text) state.textContent = text; };

    source.onmessage = (message) => {
      const event = JSON.parse(message.data);
      const id = event.id.split("-").map(Number);
      if (!isNext(id)) return;
      const isNewAttempt = last && id[0] > last[0];
      last = id;
      if (rows) list(rows, event); // a page for browsers without scripts has no list of them
      if (!isLive) {
        if (event.type.startsWith("job.")) source.close();
        return;
      }
      if (isNewAttempt) answers.clear();
      if (event.type === "delta") {
        answers.add(event.choice, event.delta);
        answers.grow(true);
        tell("The answer is coming.");
      } else if (event.type === "snapshot") {
        answers.replace(event.choices);
      } else if (event.type === "attempt.started") {
        tell(`Attempt ${event.attempt} has begun; ${event.provider} is asked for ${event.model}.`);
        htmx.trigger(document.body, "tick");
      } else if (event.type === "attempt.failed") {
        answers.clear();
        const due = event.retry_in == null ? null : new Date(event.ts + event.retry_in * 1000);
        const next = due ? ` The next one is due at ${due.toISOString().slice(11, 19)} UTC; what came is dropped.` : "";
        tell(`Attempt ${event.attempt} has failed: ${event.error.message.replace(/\.$/, "")}.${next}`);
        htmx.trigger(document.body, "tick");
      } else if (event.type.startsWith("job.")) {
        source.close();
        answers.grow(false);
        htmx.trigger(document.body, "ended");
      }
    };
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) tell("The events cannot be read at present; reload the page to try again.");
      else tell("The connection to the gateway is interrupted; it is being tried again.");
    };
    return source;
  }

  function setUpJob(page) {
    if ("live" in page.dataset) {
      follow(page, true);
      return;
    }
    const events = document.getElementById("events-of-job");
    events?.addEventListener("toggle", () => {
      if (events.open && !events.source) events.source = follow(page, false);
    });
  }

  for (const button of document.querySelectorAll("[data-pause]")) setUpPause(button);
  for (const page of document.querySelectorAll("[data-series]")) setUpCharts(page);
  for (const page of document.querySelectorAll("[data-events]")) setUpJob(page);
})();
