// Draws the charts when they come into view, and lets the reader ask, hide, sort and filter. All data is in the page.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const names = read("names"), looks = read("looks"), root = document.documentElement;
  const MARKS = { // a marker of radius 4 at the centre of a 26 × 12 box
    o: "M17 6a4 4 0 1 0-8 0a4 4 0 1 0 8 0z", s: "M9.5 2.5h7v7h-7z", D: "M13 1.5L17.5 6L13 10.5L8.5 6z", "^": "M13 2L17.5 9.5H8.5z",
    v: "M13 10L8.5 2.5H17.5z", P: "M11.5 2h3v2.500h2.500v3h-2.500v2.500h-3v-2.500h-2.500v-3h2.500z",
    X: "M9.500 4L11 2.500L13 4.500L15 2.500L16.500 4L14.500 6L16.500 8L15 9.500L13 7.500L11 9.500L9.500 8L11.500 6z",
    "*": "M13 1l1.200 3.500h3.600l-2.900 2.200l1.100 3.600l-3-2.200l-3 2.200l1.100-3.600L8.200 4.500h3.600z",
    "<": "M9 6L16.500 1.500V10.500z", ">": "M17 6L9.500 1.500V10.500z", h: "M13 1.500l4 2.250v4.500l-4 2.250l-4-2.250v-4.500z", d: "M13 1L16 6L13 11L10 6z",
    "|": "M13 0.500V11.500",
  };
  const NEUTRAL = { light: "#777777", dark: "#9aa1ab", symbol: "circle", marker: "o", dash: "solid" };
  // Plotly reads a little HTML in every text: a name is shown letter by letter.
  const escape = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  let printing = false;
  const isDark = () => !printing && (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const look = (series) => looks[series.scheme] || NEUTRAL;
  const faded = (color, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16)).join(",")},${alpha})`;

  const short = (value) => {
    for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
      if (value >= size && value < 1e15) return `${+(value / size).toPrecision(3)}${unit}`;
    return value >= 1e15 || (value > 0 && value < 1e-3) ? value.toExponential(0).replace("e+", "e") : String(+value.toPrecision(3));
  };

  function logTicks(values) {
    let low = Infinity, high = -Infinity;
    for (const v of values) if (v > 0) { low = Math.min(low, v); high = Math.max(high, v); }
    if (!(high > 0)) return {};
    const all = [], wide = high > 1e3 * low;
    for (let e = Math.floor(Math.log10(low)) - 1; e <= Math.ceil(Math.log10(high)); e++)
      for (const m of wide ? [1] : high > 3 * low ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9]) all.push(+(m * 10 ** e).toPrecision(3));
    return { tickmode: "array", tickvals: all, ticktext: all.map(short) };
  }

  function lines(text, most) { // words on lines of at most so many letters
    const out = [""];
    for (const word of text.split(" ")) {
      if (out.at(-1).length + word.length + 1 > most && out.at(-1)) out.push("");
      out[out.length - 1] += (out.at(-1) ? " " : "") + word;
    }
    return out.map(escape).join("<br>");
  }

  function axis(spec, values, narrow, which, beside = 0) { // beside: letters that the other axis takes of the width
    const style = getComputedStyle(root), color = (name) => printing ? { "--soft": "#444", "--grid": "#eee", "--rule": "#ccc" }[name] : style.getPropertyValue(name).trim();
    const out = { title: { text: lines(spec.label, narrow ? 38 - beside : 90), standoff: which === "y" ? 10 : 14 }, gridcolor: color("--grid"), linecolor: color("--rule"),
      zerolinecolor: color("--rule"), tickcolor: color("--rule"), ticks: "outside", ticklen: 4, automargin: true, showline: true };
    if (spec.words.length) {
      const most = narrow ? 17 : 60;
      return { ...out, showline: false, ticks: "", range: [spec.words.length - 0.5, -0.5], tickvals: spec.words.map((_, i) => i), showgrid: true,
        ticktext: spec.words.map((w) => escape(w.length > most ? w.slice(0, most - 1) + "…" : w)), zeroline: false };
    }
    if (spec.log) {
      Object.assign(out, { type: "log", minor: { showgrid: false } }, logTicks(values));
      if (spec.ticks.length) Object.assign(out, { tickmode: "array", tickvals: spec.ticks.map((t) => t[0]), ticktext: spec.ticks.map((t) => t[1]) });
    }
    if (spec.shown) out.range = spec.log ? spec.shown.map(Math.log10) : spec.shown;
    return out;
  }

  function traces(view, hidden) {
    const out = [], shade = isDark() ? "dark" : "light";
    for (const s of view.series) {
      const l = look(s), color = l[shade], visible = !hidden.has(s.name);
      const base = { type: "scatter", name: escape(s.name), showlegend: false, visible, x: s.x, y: s.y };
      const about = `%{text}<br>${escape(view.x.label)}: %{x:.5~g}` + (view.y.words.length ? "" : `<br>${escape(view.y.label)}: %{y:.5~g}`) + "<extra></extra>";
      const title = `<b>${escape(s.name)}</b>`;
      if (s.kind === "band") {
        out.push({ ...base, x: [...s.x, ...[...s.x].reverse()], y: [...s.high, ...[...s.low].reverse()], mode: "lines", fill: "toself",
          line: { width: 0 }, fillcolor: faded(color, shade === "dark" ? 0.2 : 0.13), hoverinfo: "skip" });
        continue;
      }
      let text = title;
      if (s.run && s.kind === "line") {
        text = new Array(s.x.length);
        s.run.forEach(([start, run], i) => text.fill(`${title}<br>${escape(names[run])}`, start, i + 1 < s.run.length ? s.run[i + 1][0] : s.x.length));
      } else if (s.run) text = s.run.map((run) => run < 0 ? title : `${title}<br>${escape(names[run])}`);
      else if (view.y.words.length && s.kind === "span" && !s.scheme) text = s.y.map((i) => escape(view.y.words[i]));
      if (s.kind === "line" || s.kind === "steps") {
        const line = { color, width: s.run ? 1.1 : 1.7, dash: l.dash, shape: s.kind === "steps" ? "hv" : "linear" };
        const quiet = !s.run && !s.scheme;
        out.push({ ...base, mode: "lines", line: quiet ? { ...line, width: 1.1, color: NEUTRAL[shade] } : line, text, opacity: s.run && s.x.length > 4000 ? 0.75 : 1,
          connectgaps: false, ...(quiet || !s.run ? { hoverinfo: "skip" } : { hovertemplate: about }) });
        continue;
      }
      const tick = l.marker === "|";
      const trace = { ...base, mode: "markers", text, hovertemplate: about, cliponaxis: false,
        marker: { color, size: tick ? 16 : s.kind === "span" ? 9 : 7.5, symbol: l.symbol + (s.hollow || tick ? "-open" : ""), line: { color, width: tick ? 2.2 : s.hollow ? 1.4 : 0 } } };
      if (s.kind === "span")
        trace.error_x = { type: "data", symmetric: false, array: s.high.map((h, i) => h - s.x[i]), arrayminus: s.low.map((v, i) => s.x[i] - v), color: faded(color, 0.55), thickness: 2, width: 0 };
      out.push(trace);
    }
    return out;
  }

  const charts = [...document.querySelectorAll("figure.chart")].map((figure) => {
    const plot = figure.querySelector(".plot"), legend = figure.querySelector(".legend"), note = figure.querySelector(".note");
    const state = { figure, plot, drawn: false, views: null, view: null, hidden: new Set() };

    state.draw = () => {
      if (!state.views) {
        state.views = JSON.parse(figure.querySelector("script.views").textContent);
        state.view = state.views[0];
      }
      const view = state.view, narrow = plot.clientWidth < 560;
      const soft = printing ? "#444" : getComputedStyle(root).getPropertyValue("--soft").trim();
      const all = (key) => view.series.flatMap((s) => key === "x" ? [...s.x, ...(s.kind === "span" ? [...s.low, ...s.high] : [])] : s.y);
      const layout = { margin: { l: view.y.words.length ? 8 : 58, r: 14, t: 10, b: 50 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: "system-ui, sans-serif", size: narrow ? 11 : 12.5, color: soft }, hovermode: "closest", dragmode: narrow ? false : "zoom",
        xaxis: axis(view.x, view.x.log ? all("x") : [], narrow, "x", view.y.words.length ? 16 : 0), yaxis: axis(view.y, view.y.log ? all("y") : [], narrow, "y"), showlegend: false,
        shapes: [["x", view.x.mark], ["y", view.y.mark]].filter((m) => m[1] !== null).map(([which, at]) => ({ type: "line", layer: "below", line: { width: 1, color: NEUTRAL[isDark() ? "dark" : "light"] },
          ...(which === "x" ? { xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: 1 } : { xref: "paper", yref: "y", x0: 0, x1: 1, y0: at, y1: at }) })) };
      Plotly.react(plot, traces(view, state.hidden), layout, { displaylogo: false, responsive: true, displayModeBar: false });
      note.textContent = view.note;
      list();
      state.drawn = true;
    };

    function list() {
      const listed = [], seen = new Set();
      for (const s of state.view.series) if (s.listed && !seen.has(s.name)) { seen.add(s.name); listed.push(s); }
      legend.replaceChildren(...listed.map((s) => {
        const button = document.createElement("button"), color = look(s)[isDark() ? "dark" : "light"], hollow = s.hollow && !s.scheme;
        button.type = "button";
        button.setAttribute("aria-pressed", String(!state.hidden.has(s.name)));
        button.title = "Click: hide or show. Twice: this one alone.";
        const line = s.kind === "line" || s.kind === "steps" || state.view.series.some((o) => o.name === s.name && o.kind === "line");
        const marks = state.view.series.some((o) => o.name === s.name && (o.kind === "points" || o.kind === "span"));
        const dash = look(s).dash === "solid" ? "" : ` stroke-dasharray="${look(s).dash.replace(/px/g, "")}"`;
        button.innerHTML = `<svg width="26" height="12" viewBox="0 0 26 12" aria-hidden="true">` + (line ? `<path d="M1 6H25" stroke="${color}" stroke-width="1.6" fill="none"${dash}/>` : "") +
          (marks ? `<path d="${MARKS[look(s).marker]}" fill="${hollow ? "none" : color}" stroke="${color}"/>` : "") + "</svg>";
        button.append(s.name);
        button.addEventListener("click", () => { toggle(s.name); });
        button.addEventListener("dblclick", () => {
          const others = listed.map((o) => o.name).filter((n) => n !== s.name), alone = others.every((n) => state.hidden.has(n)) && state.before;
          state.hidden = new Set(alone ? [] : others);
          state.before = !alone;
          state.draw();
        });
        return button;
      }));
    }

    function toggle(name) {
      if (!state.hidden.delete(name)) state.hidden.add(name);
      const which = state.view.series.flatMap((s, i) => s.name === name ? [i] : []);
      Plotly.restyle(plot, { visible: !state.hidden.has(name) }, which);
      for (const button of legend.children) if (button.textContent === name) button.setAttribute("aria-pressed", String(!state.hidden.has(name)));
    }

    const answers = () => Object.fromEntries([...figure.querySelectorAll(".choice")].map((c) =>
      [c.dataset.question, c.querySelector("select")?.value ?? c.querySelector("[aria-pressed=true]").dataset.answer]));
    const ask = (question) => {
      const wanted = answers(), fits = (v) => Object.entries(wanted).filter(([q, a]) => v.choice[q] === a).length;
      const able = state.views.filter((v) => v.choice[question] === wanted[question]);
      state.view = able.reduce((best, v) => fits(v) > fits(best) ? v : best, able[0]);
      state.draw();
    };
    for (const choice of figure.querySelectorAll(".choice")) {
      choice.querySelector("select")?.addEventListener("change", () => { if (!state.views) state.draw(); ask(choice.dataset.question); });
      for (const button of choice.querySelectorAll("button"))
        button.addEventListener("click", () => {
          for (const other of choice.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
          if (!state.views) state.draw();
          ask(choice.dataset.question);
        });
    }
    return state;
  });

  const nearing = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) {
      nearing.unobserve(entry.target);
      charts.find((c) => c.figure === entry.target).draw();
    }
  }, { rootMargin: "300px 0px" });
  for (const chart of charts) nearing.observe(chart.figure);
  const redraw = () => { for (const chart of charts) if (chart.drawn) chart.draw(); };
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => { printing = true; for (const chart of charts) chart.draw(); for (const d of document.querySelectorAll("details")) d.open = true; });
  addEventListener("afterprint", () => { printing = false; redraw(); });

  for (const box of document.querySelectorAll(".table")) {
    const body = box.querySelector("tbody"), heads = [...box.querySelectorAll("th")], rows = [...body.rows];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => { const cell = row.cells[column], value = cell.dataset.value; return value === undefined ? cell.textContent : Number(value); };
      const keyed = rows.map((row, i) => [key(row), i, row]);
      const sign = down ? -1 : 1;
      keyed.sort(([a, i], [b, j]) => {
        const numbers = (typeof b === "number") - (typeof a === "number"); // what is no number comes last either way
        return numbers || sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true })) || i - j;
      });
      body.append(...keyed.map((k) => k[2]));
    }));
    const input = box.querySelector("input"), output = box.querySelector("output");
    input?.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        row.text ??= [...row.cells].filter((c) => !c.classList.contains("code")).map((c) => c.textContent).join(" ").toLowerCase();
        row.hidden = !words.every((word) => row.text.includes(word));
        shown += !row.hidden;
      }
      output.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
    });
    body.addEventListener("click", (event) => {
      const cell = event.target.closest("td.code");
      if (!cell || !String(getSelection()).length === false) return;
      navigator.clipboard?.writeText(cell.textContent).then(() => { cell.classList.add("copied"); setTimeout(() => cell.classList.remove("copied"), 900); }, () => {});
    });
  }

  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const reading = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) {
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of document.querySelectorAll("main > section")) reading.observe(section);

  document.getElementById("save-fit")?.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(read("fit"), null, 2)], { type: "application/json" }));
    link.download = "fit.json";
    link.click();
  });
})();
