"use strict";
// Draws the panels of the data block with plotly, and draws them again when the axis, the theme or the runs change.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");
  const state = { axis: "step", log: new Set(), hidden: new Set(), range: null };
  const several = data.runs.length > 1;
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const symbols = { start: "triangle-right", resume: "diamond-open", stop: "square", checkpoint: "line-ns-open" };
  const sizes = { start: 13, resume: 17, stop: 8, checkpoint: 13 }; // a resume shows around its stop
  const lineDashes = { resume: "solid", stop: "dash", checkpoint: "dot" };
  const [timeUnit, timeScale] = data.seconds < 180 ? ["s", 1] : data.seconds < 10800 ? ["min", 60] : ["h", 3600];

  function theme() {
    const css = getComputedStyle(document.documentElement);
    const names = ["ground", "card", "ink", "soft", "line", "fill", "accent", "warn"];
    const found = Object.fromEntries(names.map((name) => [name, css.getPropertyValue("--" + name).trim()]));
    found.palette = dark.matches ? data.palette.dark : data.palette.light;
    found.heat = dark.matches
      ? ["#18222d", "#1d4a70", "#2f80b8", "#7fc1ee", "#e6f5ff"]
      : ["#edf4fa", "#9cc7e6", "#3b8fc9", "#0a5a96", "#062f52"];
    found.right = dark.matches ? "#4aa8e8" : "#0072b2";
    found.wrong = dark.matches ? "#ff8b4a" : "#d04a02";
    return found;
  }

  const along = (item) => (state.axis === "step" ? item.x : item.t);
  const scaled = (value) => (state.axis === "step" || value === null ? value : value / timeScale);
  const xTitle = (panel) => (state.axis === "step" ? panel.x_label : `training time, ${timeUnit}`);
  const color = (t, number) => t.palette[number % t.palette.length];
  const dash = (t, number) => dashes[Math.floor(number / t.palette.length) % dashes.length];

  function axis(t, more) {
    const line = { gridcolor: t.line, zerolinecolor: t.line, linecolor: t.line, tickcolor: t.line };
    return { ...line, automargin: true, title: { text: "", font: { size: 12, color: t.soft }, standoff: 8 }, ...more };
  }

  function layout(t, more) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: t.soft, size: 12, family: getComputedStyle(document.body).fontFamily },
      margin: { l: 52, r: 14, t: touch.matches ? 34 : 10, b: 42 },
      hoverlabel: { bgcolor: t.card, bordercolor: t.line, font: { color: t.ink, size: 12 }, namelength: 40 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: t.soft, activecolor: t.accent },
      dragmode: touch.matches ? false : "zoom", // else a finger could not scroll the page past a plot
      showlegend: false,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: t.ink } },
      ...more,
    };
  }

  // All curves share one horizontal axis, whatever their first and last point.
  function across(panel, t) {
    const end = Math.max(scaled(state.axis === "step" ? data.steps : data.seconds), Number.MIN_VALUE);
    return axis(t, { title: titled(xTitle(panel), t), zeroline: false, range: state.range || [-0.012 * end, 1.012 * end] });
  }

  const titled = (text, t) => ({ text, font: { size: 12, color: t.soft }, standoff: 8 });

  function lines(panel, t) {
    const traces = [];
    for (const curve of panel.curves) {
      if (state.hidden.has(curve.run)) continue;
      const x = along(curve).map(scaled);
      const stroke = { color: color(t, curve.colour), dash: dash(t, curve.colour), width: curve.points ? 2 : 1.6 };
      traces.push({
        type: "scatter", mode: curve.points || x.length === 1 ? "lines+markers" : "lines", name: curve.label, x, y: curve.y, line: stroke,
        marker: { color: stroke.color, size: x.length > 80 ? 3 : 6 }, connectgaps: false, meta: { run: curve.run },
        hovertemplate: panel.percent ? "%{y:.2%}" : "%{y:.5~g}",
      });
      const lost = x.filter((_, i) => curve.y[i] === null);
      if (lost.length) {
        traces.push({
          type: "scatter", mode: "markers", name: `${curve.label}: not finite`, x: lost, y: lost.map(() => 0.03),
          yaxis: "y2", marker: { symbol: "x", size: 8, color: t.warn }, hovertemplate: "not finite", showlegend: false,
        });
      }
    }
    const shapes = panel.marks.filter((mark) => mark.kind !== "start" && !state.hidden.has(mark.run) && along(mark) !== null).map((mark) => ({
      type: "line", layer: "below", yref: "paper", y0: 0, y1: 1, x0: scaled(along(mark)), x1: scaled(along(mark)),
      opacity: mark.kind === "checkpoint" ? 0.45 : 0.8,
      line: { width: 1, dash: lineDashes[mark.kind] || "solid", color: several ? color(t, mark.colour) : t.soft },
    }));
    const log = state.log.has(panel.key);
    const y = { title: titled(panel.y_label, t), tickformat: panel.percent ? ".1~%" : ",~g" };
    return [traces, layout(t, {
      hovermode: "x unified",
      showlegend: !several && panel.curves.length > 1,
      shapes,
      uirevision: `${state.axis} ${log}`,
      xaxis: across(panel, t),
      yaxis: axis(t, { ...y, type: log ? "log" : "linear", zeroline: false }),
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    })];
  }

  function timeLine(panel, t) {
    const traces = panel.spans.map((span, run) => ({
      type: "scatter", mode: "lines", x: [0, scaled(along(span))], y: [run, run], hoverinfo: "skip", showlegend: false,
      line: { color: color(t, run), width: 6 }, opacity: 0.35, visible: !state.hidden.has(run),
    }));
    for (const kind of ["checkpoint", "start", "resume", "stop"]) {
      const marks = panel.marks.filter((mark) => mark.kind === kind && !state.hidden.has(mark.run));
      if (!marks.length) continue;
      const colors = marks.map((mark) => color(t, mark.colour));
      traces.push({
        type: "scatter", mode: "markers", name: kind, x: marks.map((mark) => scaled(along(mark))),
        y: marks.map((mark) => mark.run), text: marks.map((mark) => mark.text), hovertemplate: "%{text}<extra></extra>",
        marker: { symbol: symbols[kind], size: sizes[kind], color: colors, line: { color: colors, width: symbols[kind].endsWith("open") ? 2 : 0 } },
      });
    }
    const rows = panel.rows;
    return [traces, layout(t, {
      hovermode: "closest",
      showlegend: true,
      uirevision: state.axis,
      xaxis: across(panel, t),
      yaxis: axis(t, {
        tickvals: rows.map((_, i) => i), ticktext: several ? rows : rows.map(() => ""), range: [rows.length - 0.5, -0.5],
        fixedrange: true, showgrid: false, zeroline: false, ticks: "",
      }),
    })];
  }

  function ranks(panel, t) {
    const colorscale = t.heat.map((value, i) => [i / (t.heat.length - 1), value]);
    const trace = {
      type: "heatmap", x: panel.x, z: panel.z, zmin: panel.smallest, zmax: panel.largest, colorscale, hoverongaps: false,
      hovertemplate: "rank %{y}<br>step %{x:,.0f}<br>%{z:.4~g} ms<extra></extra>",
      colorbar: { thickness: 10, nticks: panel.z.length > 8 ? 8 : 4, outlinewidth: 0, ticksuffix: " ms", tickfont: { color: t.soft, size: 11 } },
    };
    return [[trace], layout(t, {
      xaxis: axis(t, { title: titled("optimizer step", t), showgrid: false, zeroline: false }),
      yaxis: axis(t, { title: titled("rank", t), autorange: "reversed", showgrid: false, zeroline: false, tickformat: "d", dtick: panel.z.length <= 16 ? 1 : undefined }),
    })];
  }

  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const mixed = (from, to, share) => `rgb(${channels(from).map((v, i) => Math.round(v + (channels(to)[i] - v) * share))})`;

  function confusion(panel, t, width) {
    const n = panel.classes.length;
    const totals = panel.counts.map((row) => row.reduce((sum, count) => sum + count, 0));
    let worst = 0;
    panel.counts.forEach((row, i) => row.forEach((count, j) => { if (i !== j && count) worst = Math.max(worst, count / totals[i]); }));
    // One scale for both: right above 0, wrong below, each by the square root of its share.
    const z = panel.counts.map((row, i) => row.map((count, j) => {
      if (!count) return 0;
      return i === j ? Math.sqrt(count / totals[i]) : -Math.sqrt(count / totals[i] / worst);
    }));
    const said = (count, i) => (n <= 100 ? `${count.toLocaleString("en")} of ${totals[i].toLocaleString("en")} (${((100 * count) / (totals[i] || 1)).toFixed(1)}%)` : count);
    const roomy = n <= 25 && width / n > 30;
    const stride = Math.ceil(n / Math.max(1, Math.floor(width / 22)));
    const ticks = { tickvals: panel.classes.filter((_, i) => i % stride === 0), ticktext: panel.short.filter((_, i) => i % stride === 0) };
    const trace = {
      type: "heatmap", x: panel.classes, y: panel.classes, z, zmin: -1, zmax: 1, showscale: false,
      xgap: n <= 40 ? 2 : 0, ygap: n <= 40 ? 2 : 0,
      colorscale: [[0, mixed(t.fill, t.wrong, 1)], [0.499999, mixed(t.fill, t.wrong, 0.12)], [0.5, t.fill], [0.500001, mixed(t.fill, t.right, 0.12)], [1, mixed(t.fill, t.right, 1)]],
      customdata: panel.counts.map((row, i) => row.map((count) => said(count, i))),
      hovertemplate: "true %{y}<br>predicted %{x}<br>%{customdata}<extra></extra>",
    };
    if (roomy) {
      trace.text = panel.counts.map((row) => row.map((count) => count || ""));
      trace.texttemplate = "%{text}";
      trace.textfont = { size: 11 };
    }
    const side = { type: "category", showgrid: false, ticks: "", ...ticks };
    return [[trace], layout(t, {
      margin: { l: 60, r: 8, t: touch.matches ? 34 : 8, b: 60 },
      xaxis: axis(t, { ...side, title: titled("predicted", t), tickangle: n > 4 ? -45 : 0, constrain: "domain" }),
      yaxis: axis(t, { ...side, title: titled("true", t), autorange: "reversed" }),
    })];
  }

  function scatter(panel, t) {
    const worst = new Set(panel.worst);
    const of = (marked) => panel.x.map((_, i) => i).filter((i) => worst.has(i) === marked);
    const trace = (name, places, marker) => ({
      type: "scatter", mode: "markers", name, x: places.map((i) => panel.x[i]), y: places.map((i) => panel.y[i]),
      customdata: places.map((i) => panel.index[i]), marker,
      hovertemplate: "test sample %{customdata:,}<br>true %{x:.5~g}<br>predicted %{y:.5~g}<extra></extra>",
    });
    const [low, high] = panel.range;
    const side = { zeroline: false, range: panel.range, tickformat: ",~g" };
    return [[
      trace("samples", of(false), { color: color(t, 0), size: 6, opacity: panel.x.length > 400 ? 0.45 : 0.7 }),
      trace("largest losses", of(true), { color: t.wrong, size: 8, symbol: "diamond" }),
    ], layout(t, {
      hovermode: "closest",
      shapes: [{ type: "line", layer: "below", x0: low, y0: low, x1: high, y1: high, line: { width: 1, dash: "dash", color: t.soft } }],
      margin: { l: 60, r: 14, t: touch.matches ? 34 : 10, b: 46 },
      xaxis: axis(t, { ...side, title: titled("true", t) }),
      yaxis: axis(t, { ...side, title: titled("predicted", t) }),
    })];
  }

  // A figure of the user's own, in the page's colours: what it does not set itself is as in the other plots.
  function own(panel, t) {
    const { title, template, width, height, autosize, ...asked } = structuredClone(panel.layout);
    const plain = layout(t, { showlegend: undefined, margin: { l: 60, r: 20, t: touch.matches ? 40 : 26, b: 50 } });
    const side = axis(t, { title: undefined });
    const form = { layout: { ...plain, colorway: t.palette, xaxis: side, yaxis: side } };
    return [structuredClone(panel.data), { hovermode: "closest", dragmode: plain.dragmode, ...asked, template: form }];
  }

  const kinds = { lines, timeline: timeLine, ranks, confusion, scatter, own };
  const drawn = data.panels.map((panel) => ({ panel, place: document.getElementById(`plot-${panel.key_id}`) }));
  const options = {
    responsive: true, displaylogo: false, displayModeBar: touch.matches ? true : "hover",
    modeBarButtons: touch.matches
      ? [["pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]]
      : [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    toImageButtonOptions: { scale: 2 },
  };
  let drawing = false;

  function draw(only) {
    drawing = true;
    const t = theme();
    const done = [];
    for (const { panel, place } of drawn) {
      if (only && !only(panel)) continue;
      const [traces, form] = kinds[panel.kind](panel, t, place.clientWidth);
      const file = { ...options, toImageButtonOptions: { ...options.toImageButtonOptions, filename: panel.key } };
      done.push(Plotly.react(place, traces, form, file));
    }
    return Promise.all(done).finally(() => { drawing = false; });
  }

  const overSteps = (panel) => panel.kind === "lines" || panel.kind === "timeline";
  function press(buttons, chosen) {
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button === chosen)));
  }

  draw();
  for (const { panel, place } of drawn.filter((item) => overSteps(item.panel))) {
    place.on("plotly_relayout", (change) => { // a zoom of one is a zoom of all
      if (drawing) return;
      if ("xaxis.range[0]" in change) state.range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      else if (change["xaxis.autorange"] || "xaxis.range" in change) state.range = null;
      else return;
      draw((other) => overSteps(other));
    });
  }
  const axisButtons = [...document.querySelectorAll("[data-axis]")];
  axisButtons.forEach((button) => button.addEventListener("click", () => {
    state.axis = button.dataset.axis;
    state.range = null;
    press(axisButtons, button);
    draw(overSteps);
  }));
  document.querySelectorAll("[data-log]").forEach((group) => {
    const buttons = [...group.querySelectorAll("button")];
    buttons.forEach((button) => button.addEventListener("click", () => {
      state.log[button.value === "log" ? "add" : "delete"](group.dataset.log);
      press(buttons, button);
      draw((panel) => panel.key === group.dataset.log);
    }));
  });
  document.querySelectorAll("[data-hide]").forEach((button) => button.addEventListener("click", () => {
    const run = Number(button.dataset.hide);
    const off = !state.hidden.delete(run);
    if (off) state.hidden.add(run);
    button.setAttribute("aria-pressed", String(off));
    button.textContent = off ? "show" : "hide";
    document.getElementById(`run-${run}`).classList.toggle("off", off);
    draw(overSteps);
  }));
  dark.addEventListener("change", () => draw());
})();
