// Curves, copying, the theme, and whether the page is live. It asks this server alone.
"use strict";
(() => {
  const root = document.documentElement;
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // ------------------------------------------------------------------ theme and copying
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.id === "theme") {
      root.dataset.theme = isDark() ? "light" : "dark";
      try { localStorage.setItem("fedtune-theme", root.dataset.theme); } catch { /* not kept */ }
      draw();
    } else if (button.dataset.copy) {
      await copy(document.getElementById(button.dataset.copy));
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    }
  });

  async function copy(element) {
    try {
      await navigator.clipboard.writeText(element.textContent);
    } catch { // no clipboard: select it, for Ctrl-C
      getSelection().selectAllChildren(element);
    }
  }

  // ------------------------------------------------------------------ live
  const link = document.getElementById("link");
  const say = (state, words) => {
    link.dataset.state = state;
    link.querySelector(".said").textContent = words;
  };
  document.body.addEventListener("htmx:sseOpen", () => say("live", "live"));
  document.body.addEventListener("htmx:sseError", () => say("lost", "not connected"));
  document.body.addEventListener("sse:change", () => fetchSeries()); // at each part of the page

  // ------------------------------------------------------------------ curves
  const section = document.querySelector("[data-series]");
  const plots = new Map(), wanted = new Map();
  let series = null, asked = false, again = false;

  async function fetchSeries() {
    if (!section) return;
    if (asked) { again = true; return; }
    asked = true;
    try {
      const answer = await fetch(section.dataset.series);
      if (answer.ok) { series = await answer.json(); draw(); }
    } catch { /* the next event asks again */ }
    asked = false;
    if (again) { again = false; fetchSeries(); }
  }

  const short = (value) => value == null ? "–" : String(Number(value.toPrecision(4)));
  const above = (value) => value == null ? "–" : String(Math.ceil(value * 1000 - 1e-6) / 1000); // never less than was spent
  const named = (text) => text.charAt(0).toUpperCase() + text.slice(1).replaceAll("_", " ");

  function draw() {
    if (!series) return;
    wanted.clear();
    if (series.own) own(); else run();
    for (const panel of document.querySelectorAll("[data-chart]")) panel.hidden = !wanted.has(panel.dataset.chart);
    for (const [key, plotted] of wanted) show(key, ...plotted); // once every panel has its width
    root.dataset.drawn = String((series.rounds ?? series.own[0]?.rounds ?? []).length);
  }

  function run() {
    const { metric } = series;
    const names = new Set([...Object.keys(series.quality), ...Object.keys(series.selection), ...Object.keys(series.base)]);
    quality("quality", metric && names.has(metric) ? metric : null);
    quality("loss", metric !== "loss" && names.has("loss") ? "loss" : null);
    epsilon();
  }

  /** A site's own training loss: one line for each of its newest studies. */
  function own() {
    const rounds = [...new Set(series.own.flatMap((one) => one.rounds))].sort((a, b) => a - b);
    if (!rounds.length) return;
    const lines = series.own.map((one, at) => ({
      label: one.study, stroke: css(`--site-${at}`), width: 2, spanGaps: true,
      points: { show: rounds.length < 40, size: 5 },
    }));
    const columns = series.own.map((one) => {
      const by = new Map(one.rounds.map((round, at) => [round, one.losses[at]]));
      return rounds.map((round) => by.get(round) ?? null);
    });
    wanted.set("own", ["Mean loss of the records that each round drew here", [rounds, ...columns], lines, {}]);
  }

  function quality(key, name) {
    const base = name ? series.base[name] : undefined;
    const measured = name ? series.quality[name] ?? [] : [];
    const chosen = name ? series.selection[name] ?? [] : [];
    const has = (values) => values.some((value) => value !== null);
    if (!name || !(has(measured) || has(chosen))) return;
    const start = base === undefined ? null : base;
    const pad = (values) => [start, ...(values.length ? values : series.rounds.map(() => null))];
    const lines = [], data = [[0, ...series.rounds]];
    if (has(chosen)) {
      lines.push({ label: "selection records", stroke: css("--accent-soft"), width: 2, points: { show: false } });
      data.push([null, ...chosen]);
    }
    if (has(measured)) {
      const sparse = measured.filter((value) => value !== null).length < 40;
      lines.push({ label: "evaluation records", stroke: css("--accent"), width: has(chosen) ? 0 : 2.4, spanGaps: true, points: { show: sparse, size: 8, fill: css("--accent") } });
      data.push(pad(measured));
    }
    const marks = { base: start, start: series.start[name], bounds: series.intervals[name] ?? {}, last: series.rounds.at(-1) };
    wanted.set(key, [named(name), data, lines, { marks, bounded: series.bounded.includes(name) }]);
  }

  function epsilon() {
    const curves = new Map(); // sites whose figures are the same share a line, which names them all
    for (const [name, values] of Object.entries(series.epsilon)) {
      const same = JSON.stringify(values.map(above));
      curves.set(same, [...(curves.get(same) ?? []), name]);
    }
    if (!curves.size) return;
    const groups = [...curves.values()];
    const lines = groups.map((names, at) => ({
      label: names.length > 4 ? `${names.length} sites` : names.join(", "), stroke: css(`--site-${at % 6}`), width: 2, dash: at >= 6 ? [6, 4] : undefined,
      points: { show: series.rounds.length < 40, size: 5 }, said: above,
    }));
    const data = [[0, ...series.rounds], ...groups.map(([name]) => [0, ...series.epsilon[name]])];
    wanted.set("epsilon", ["ε reported, by site", data, lines, { marks: { planned: series.planned }, fromZero: true }]);
  }

  function show(key, title, data, lines, { marks = {}, bounded = false, fromZero = false }) {
    const panel = document.querySelector(`[data-chart="${key}"]`);
    panel.querySelector("h2").textContent = title;
    const plot = panel.querySelector(".plot");
    const ink = css("--quiet"), grid = { stroke: css("--line"), width: 1 };
    const font = "12px system-ui, sans-serif";
    const options = {
      width: plot.clientWidth, height: 240,
      scales: { x: { time: false }, y: { range: (_, low, high) => range(low, high, marks, bounded, fromZero) } },
      axes: [
        { stroke: ink, grid: { show: false }, ticks: { show: false }, font, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000] },
        { stroke: ink, grid, ticks: { show: false }, font, size: 48 },
      ],
      series: [{ label: "round" }, ...lines],
      legend: { show: false },
      cursor: { points: { size: 8 }, drag: { x: true, y: false } },
      hooks: {
        drawAxes: [(self) => drawMarks(self, marks)],
        setCursor: [(self) => tell(panel, self, lines)],
      },
    };
    plots.get(key)?.destroy();
    plots.set(key, new uPlot(options, data, plot));
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", described(title, data, lines, marks));
    tell(panel, plots.get(key), lines);
  }

  function range(low, high, marks, bounded, fromZero) {
    const edges = [low, high, marks.base, marks.start, marks.planned, ...(marks.bounds?.after ?? []), ...(marks.bounds?.before ?? [])]
      .filter((value) => value !== null && value !== undefined);
    const bottom = Math.min(...edges), top = Math.max(...edges), room = (top - bottom || 1) * 0.08;
    if (fromZero) return [0, top + room];
    return bounded ? [Math.max(0, bottom - room), Math.min(1, top + room)] : [bottom - room, top + room];
  }

  /** The base as a dashed line with its interval; the end's interval; what is planned. */
  function drawMarks(self, marks) {
    const { ctx, bbox } = self, ratio = devicePixelRatio;
    const y = (value) => self.valToPos(value, "y", true);
    const line = (value, label) => {
      ctx.strokeStyle = ctx.fillStyle = css("--quiet");
      ctx.lineWidth = ratio;
      ctx.setLineDash([5 * ratio, 4 * ratio]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y(value));
      ctx.lineTo(bbox.left + bbox.width, y(value));
      ctx.stroke();
      ctx.setLineDash([]);
      ctx.font = `${11 * ratio}px system-ui, sans-serif`;
      ctx.textAlign = "right";
      ctx.fillText(label, bbox.left + bbox.width - 4 * ratio, y(value) - 5 * ratio);
    };
    ctx.save();
    const before = marks.bounds?.before, after = marks.bounds?.after;
    if (before) {
      ctx.fillStyle = css("--band");
      ctx.fillRect(bbox.left, y(before[1]), bbox.width, y(before[0]) - y(before[1]));
    }
    if (after) {
      const x = self.valToPos(marks.last, "x", true) - 2 * ratio;
      ctx.strokeStyle = css("--accent");
      ctx.lineWidth = 2 * ratio;
      ctx.beginPath();
      for (const edge of after) { ctx.moveTo(x - 5 * ratio, y(edge)); ctx.lineTo(x + 5 * ratio, y(edge)); }
      ctx.moveTo(x, y(after[0]));
      ctx.lineTo(x, y(after[1]));
      ctx.stroke();
    }
    if (marks.base !== null && marks.base !== undefined) line(marks.base, "base alone");
    if (marks.start !== null && marks.start !== undefined) line(marks.start, "public text alone");
    if (marks.planned) line(marks.planned, "planned");
    ctx.restore();
  }

  /** The legend, with the figures under the cursor, else the newest. */
  function tell(panel, self, lines) {
    const at = self.cursor.idx ?? self.data[0].length - 1;
    const legend = panel.querySelector(".legend");
    legend.replaceChildren(Object.assign(document.createElement("span"), { textContent: `round ${self.data[0][at]}` }));
    lines.slice(0, 12).forEach((one, index) => {
      const value = self.data[index + 1][at];
      if (value === null && lines.length > 1 && self.cursor.idx === null) return;
      const entry = document.createElement("span"), key = document.createElement("i");
      key.style.background = one.stroke;
      entry.append(key, `${one.label} ${(one.said ?? short)(value)}`);
      legend.append(entry);
    });
  }

  function described(title, data, lines, marks) {
    const parts = lines.map((one, index) => {
      const values = data[index + 1].filter((value) => value !== null);
      const said = one.said ?? short;
      return `${one.label} from ${said(values[0])} to ${said(values.at(-1))}`;
    });
    const base = marks.base === undefined || marks.base === null ? "" : `; base alone ${short(marks.base)}`;
    return `${title} over ${data[0].at(-1)} rounds: ${parts.join("; ")}${base}`;
  }

  let resized;
  addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(draw, 120); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  fetchSeries();
})();
