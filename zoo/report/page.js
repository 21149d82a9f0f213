"use strict";
(() => {
  // Names and messages are only ever put in as text, never as markup.
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const { columns, rows, kinds } = read("data");
  const models = rows.map((values, index) => {
    const model = { index };
    columns.forEach((name, at) => { model[name] = values[at]; });
    model.spec = `${model.source}:${model.name}`;
    model.speedup = model.ms_after ? model.ms / model.ms_after : null;
    model.lower = model.name.toLowerCase();
    return model;
  });
  let details = null; // read when the first model is opened

  // ------------------------------------------------------------------------------------------- elements

  const fill = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("--")) element.style.setProperty(name, value);
      else if (value !== null && value !== false && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
    return element;
  };
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  const count = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en-US"));
  const brief = (value) => {
    if (value === null || value === undefined) return "–";
    if (value >= 1e9) return `${(value / 1e9).toFixed(2)} G`;
    if (value >= 1e6) return `${(value / 1e6).toFixed(2)} M`;
    return value >= 1e4 ? `${(value / 1e3).toFixed(1)} k` : count(value);
  };
  const digits = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
  const power = (value) => (value === null ? "–" : value === 0 ? "0" : value.toExponential(0).replace("-", "−"));
  const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
  const change = (before, after, show) =>
    before === null ? "–" : after === null || after === undefined ? show(before)
      : [h("span", { class: "was" }, `${show(before)} → `), show(after)];

  // ------------------------------------------------------------------------------------------- the table

  const COLUMNS = [
    { key: "name", title: "Model", class: "name", text: true },
    { key: "family", title: "Family", class: "wide", text: true, cell: (m) => m.family },
    { key: "kind", title: "Outcome", cell: (m) => [dot(m.kind), kinds[m.kind][1]] },
    { key: "folds", title: "Folds", class: "n middle", cell: (m) => count(m.folds) },
    { key: "convs", title: "Convs", class: "n middle", cell: (m) => change(m.convs, m.convs_after, count) },
    { key: "norms", title: "Norms", class: "n wide", cell: (m) => change(m.norms, m.norms_after, count) },
    { key: "parameters", title: "Parameters", class: "n wide",
      cell: (m) => change(m.parameters, m.parameters_after, brief) },
    { key: "ms", title: "Latency, ms", class: "n middle", cell: (m) => change(m.ms, m.ms_after, digits) },
    { key: "speedup", title: "Speed-up", class: "n", cell: (m) => (m.speedup ? `${m.speedup.toFixed(2)}×` : "–") },
    { key: "error", title: "Error", class: "n wide", cell: (m) => power(m.error) },
    { key: "seconds", title: "Took, s", class: "n wide", cell: (m) => (m.seconds === null ? "–" : m.seconds.toFixed(1)) },
  ];
  const dot = (kind) => h("span", { class: "dot", "--of": `var(--${kinds[kind][0]})` });

  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const heads = COLUMNS.map((column) => {
    const button = h("button", { type: "button" }, column.title);
    button.addEventListener("click", () => sortBy(column));
    return h("th", { scope: "col", class: column.class, "data-key": column.key }, button);
  });
  table.tHead.append(h("tr", {}, heads));

  for (const model of models) {
    const pageId = `model-${model.index}`;
    model.button = h("button", { type: "button", "aria-expanded": "false", "aria-controls": pageId }, model.name);
    model.row = h("tr", { class: "row", "data-spec": model.spec },
      COLUMNS.map((column) => h("td", { class: column.class }, column.key === "name" ? model.button : column.cell(model))));
    model.row.model = model;
    model.page = null;
  }

  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr.row");
    if (!row || (!event.target.closest("button") && String(getSelection()))) return;
    toggle(row.model, !row.model.open);
    remember();
  });

  // ------------------------------------------------------------------------------------------- state

  const q = document.getElementById("q");
  const familyBox = document.getElementById("family");
  const kindBox = document.getElementById("kind");
  const chips = [...document.querySelectorAll(".chips button")];
  const state = { sort: "name", down: false };

  const tally = (key) => models.reduce((sums, m) => sums.set(m[key], (sums.get(m[key]) || 0) + 1), new Map());
  [...tally("family")].sort((a, b) => (a[0] < b[0] ? -1 : 1))
    .forEach(([name, n]) => familyBox.append(h("option", { value: name }, `${name} (${n})`)));
  const byKind = tally("kind");
  kinds.forEach(([kind, words], number) => {
    if (byKind.has(number)) kindBox.append(h("option", { value: kind }, `${words} (${byKind.get(number)})`));
  });

  const matcher = (text) => {
    const wanted = text.trim().toLowerCase();
    if (!/[*?[]/.test(wanted)) return (name) => name.includes(wanted);
    // The shell pattern of the command line.
    const source = wanted.replace(/[.+^${}()|\\]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".")
      .replace(/\[!/g, "[^");
    try {
      const pattern = new RegExp(`^${source}$`);
      return (name) => pattern.test(name);
    } catch {
      return (name) => name.includes(wanted);
    }
  };

  const visible = () => models.filter((model) => !model.row.hidden);

  function filter() {
    const fits = matcher(q.value);
    let shown = 0;
    for (const model of models) {
      const is = fits(model.lower) && (!familyBox.value || model.family === familyBox.value) &&
        (!kindBox.value || kinds[model.kind][0] === kindBox.value);
      model.row.hidden = !is;
      if (model.page) model.page.hidden = !is || !model.open;
      shown += is;
    }
    chips.forEach((chip) => chip.setAttribute("aria-pressed", String(chip.dataset.kind === kindBox.value)));
    document.getElementById("shown").textContent =
      shown === models.length ? plural(shown, "model") : `${count(shown)} of ${plural(models.length, "model")}`;
    drawCharts(visible());
  }

  function sort() {
    const { sort: key, down } = state;
    const sign = down ? -1 : 1;
    const ordered = [...models].sort((a, b) => {
      const [x, y] = [a[key], b[key]];
      if (x === y) return a.lower < b.lower ? -1 : a.lower > b.lower ? 1 : a.index - b.index;
      if (x === null || x === undefined) return 1; // what is not known stays last
      if (y === null || y === undefined) return -1;
      return (x < y ? -1 : 1) * sign;
    });
    body.append(...ordered.flatMap((model) => (model.page ? [model.row, model.page] : [model.row])));
    heads.forEach((head) => {
      if (head.dataset.key === key) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }

  function sortBy(column) {
    const again = state.sort === column.key;
    state.down = again ? !state.down : !column.text && column.key !== "kind";
    state.sort = column.key;
    sort();
    remember();
  }

  // The address says what is shown, so that a view can be sent to somebody.
  function remember() {
    const words = new URLSearchParams();
    if (q.value) words.set("q", q.value);
    if (familyBox.value) words.set("family", familyBox.value);
    if (kindBox.value) words.set("outcome", kindBox.value);
    if (state.sort !== "name" || state.down) words.set("sort", (state.down ? "-" : "") + state.sort);
    models.filter((model) => model.open).slice(0, 8).forEach((model) => words.append("open", model.spec));
    const text = String(words);
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  }

  function recall() {
    const words = new URLSearchParams(location.hash.slice(1));
    q.value = words.get("q") || "";
    const choose = (box, value) => { box.value = [...box.options].some((o) => o.value === value) ? value : ""; };
    choose(familyBox, words.get("family") || "");
    choose(kindBox, words.get("outcome") || "");
    const key = (words.get("sort") || "name").replace(/^-/, "");
    state.sort = COLUMNS.some((column) => column.key === key) ? key : "name";
    state.down = (words.get("sort") || "").startsWith("-");
    const open = new Set(words.getAll("open"));
    models.forEach((model) => { if (Boolean(model.open) !== open.has(model.spec)) toggle(model, open.has(model.spec)); });
    sort();
    filter();
    const first = models.find((model) => model.open);
    if (first) first.row.scrollIntoView({ block: "start" });
  }

  let waiting = 0;
  const changed = () => { filter(); remember(); };
  q.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(changed, 80); });
  familyBox.addEventListener("change", changed);
  kindBox.addEventListener("change", changed);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("filters").addEventListener("reset", () => setTimeout(changed));
  chips.forEach((chip) => chip.addEventListener("click", () => {
    kindBox.value = kindBox.value === chip.dataset.kind ? "" : chip.dataset.kind;
    changed();
  }));
  addEventListener("hashchange", recall);

  // ------------------------------------------------------------------------------------------- plots

  const CHARTS = [
    { title: "Latency", note: "after, as a multiple of before, by milliseconds before", axis: "ms before",
      x: (m) => m.ms, y: (m) => (m.ms && m.ms_after !== null ? m.ms_after / m.ms : null), same: "as before",
      say: (m) => `${digits(m.ms)} → ${digits(m.ms_after)} ms` },
    { title: "Parameters", note: "after, as a multiple of before, by number before", axis: "parameters before",
      x: (m) => m.parameters, y: (m) => (m.parameters && m.parameters_after !== null ? m.parameters_after / m.parameters : null), same: "as before",
      say: (m) => `${brief(m.parameters)} → ${brief(m.parameters_after)} parameters` },
    { title: "Error", note: "of the collapsed network in float64, by the noise floor of its dtype", axis: "noise floor",
      x: (m) => m.noise, y: (m) => m.error, log: true, same: "error = noise",
      say: (m) => `error ${power(m.error)}, noise floor ${power(m.noise)}` },
  ];
  const WIDTH = 400, HEIGHT = 270, LEFT = 52, RIGHT = 12, TOP = 12, BOTTOM = 40;

  const logTicks = (low, high) => {
    const found = [];
    const decades = Math.log10(high / low);
    const steps = decades > 2.5 ? [1] : [1, 2, 5];
    const every = Math.max(1, Math.ceil(decades / 6));
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += 1) {
      for (const step of steps) {
        const value = step * 10 ** e;
        if (value >= low && value <= high && e % every === 0) found.push(value);
      }
    }
    return found;
  };
  const linearTicks = (low, high) => {
    const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5].find((n) => (high - low) / n <= 6) || 10;
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9; n += 1) found.push(Number((n * step).toFixed(6)));
    return found;
  };
  const scale = (values, log, from, to) => {
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (log) [low, high] = low * 1.5 < high ? [low / 1.25, high * 1.25] : [low / 2, high * 2];
    else {
      const room = Math.max((high - low) * 0.06, 0.01);
      [low, high] = [Math.max(0, low - room), high + room];
    }
    const f = log ? Math.log10 : (x) => x;
    const at = (value) => from + ((f(value) - f(low)) / (f(high) - f(low))) * (to - from);
    return { low, high, at, ticks: log ? logTicks(low, high) : linearTicks(low, high) };
  };
  const tick = (value) => (value > 0 && (value < 0.001 || value >= 1e4)
    ? (value < 0.001 ? power(value) : brief(value).replace(/\.0+(?=\s|$)/, "")) : String(Number(value.toPrecision(6))));

  function drawCharts(shown) {
    document.getElementById("charts").replaceChildren(...CHARTS.map((chart) => figure(chart, shown)));
  }

  function figure(chart, shown) {
    const points = shown.map((m) => [m, chart.x(m), chart.y(m)])
      .filter(([, x, y]) => x > 0 && Number.isFinite(y) && (y > 0 || !chart.log));
    const caption = h("figcaption", {}, h("strong", {}, chart.title), ` ${chart.note}`);
    if (!points.length) return h("figure", {}, caption, h("p", { class: "faint" }, "No model of the table has these numbers."));
    const x = scale(points.map((p) => p[1]), true, LEFT, WIDTH - RIGHT);
    const extra = chart.log ? points.map((p) => p[1]) : [1]; // what is compared with stays in sight
    const y = scale([...points.map((p) => p[2]), ...extra], chart.log, HEIGHT - BOTTOM, TOP);
    const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
      "aria-label": `${chart.title}: ${plural(points.length, "model")}; the numbers are in the table` });
    for (const value of y.ticks) {
      const at = y.at(value);
      svg.append(s("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }),
        s("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, tick(value)));
    }
    for (const value of x.ticks) {
      const at = x.at(value);
      svg.append(s("line", { class: "grid", x1: at, x2: at, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 }),
        s("text", { x: at, y: HEIGHT - BOTTOM + 17, "text-anchor": "middle" }, tick(value)));
    }
    svg.append(s("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, chart.axis));
    const [line, words] = sameLine(chart, x, y);
    svg.append(line);
    const radius = points.length > 300 ? 2.6 : points.length > 60 ? 3.4 : 4.5;
    for (const [model, px, py] of points) {
      const circle = s("circle", { cx: x.at(px).toFixed(1), cy: y.at(py).toFixed(1), r: radius },
        s("title", {}, `${model.spec}: ${chart.say(model)}`));
      circle.addEventListener("click", () => visit(model));
      svg.append(circle);
    }
    svg.append(words);
    return h("figure", {}, caption, svg);
  }

  function sameLine(chart, x, y) {
    const low = chart.log ? Math.max(x.low, y.low) : 1;
    const high = chart.log ? Math.min(x.high, y.high) : 1;
    if (low > high) return ["", ""];
    const ends = chart.log ? [x.at(low), y.at(low), x.at(high), y.at(high)] : [LEFT, y.at(1), WIDTH - RIGHT, y.at(1)];
    const words = s("text", { x: ends[2] - 4, y: ends[3] + (chart.log ? 14 : -5), "text-anchor": "end", class: "word" }, chart.same);
    return [s("line", { class: "same", x1: ends[0], y1: ends[1], x2: ends[2], y2: ends[3] }), words];
  }

  function visit(model) {
    toggle(model, true);
    remember();
    model.row.scrollIntoView({ block: "center" });
    model.button.focus({ preventScroll: true });
  }

  // ------------------------------------------------------------------------------------------- one model

  function toggle(model, open) {
    model.open = open;
    model.button.setAttribute("aria-expanded", String(open));
    model.row.classList.toggle("open", open);
    if (open && !model.page) {
      details = details || read("details");
      const cell = h("td", { class: "page", colspan: COLUMNS.length }, page(model, details.models[model.index]));
      model.page = h("tr", { id: `model-${model.index}` }, cell);
      model.row.after(model.page);
    }
    if (model.page) model.page.hidden = !open || model.row.hidden;
  }

  function page(model, data) {
    const more = data.more || {};
    return h("div", { class: "model" },
      h("p", {}, h("strong", {}, model.spec), ` — ${kinds[model.kind][1]}: ${data.sentence}`),
      h("div", { class: "about" }, data.sizes && sizes(data.sizes),
        h("ul", {}, [...(data.facts || []), ...(data.notes || [])].map((text) => h("li", {}, text)), links(data.files))),
      data.trace && h("pre", {}, data.trace),
      data.regions && regions(data.regions),
      data.folds && folds(data.folds, more.folds),
      reasons("Refused", data.refusals, more.refusals),
      !data.refusals && data.counts ? counts(data.counts) : null,
      reasons("Left without a block", data.left, more.left),
      data.untraced && untraced(data.untraced, more.untraced));
  }

  const links = (files) => (files || []).map((file) =>
    h("li", {}, h("a", { href: file.split("/").map(encodeURIComponent).join("/") }, file)));

  const grid = (headings, lines) => h("div", { class: "inner" }, h("table", {},
    h("thead", {}, h("tr", {}, headings.map(([title, cls]) => h("th", { scope: "col", class: cls }, title)))),
    h("tbody", {}, lines.map((line) => h("tr", {}, line.map((cell, at) => h("td", { class: headings[at][1] }, cell)))))));

  function sizes(known) {
    const parts = [["parameters", count], ["bytes", brief], ["convs", count], ["norms", count], ["linears", count],
      ["multiply-adds", brief]];
    const table = grid([["", null], ...known.map((size) => [size[0], "n"])],
      parts.map(([name, show], at) => [name, ...known.map((size) => show(size[at + 1]))]));
    table.classList.add("sizes");
    return table;
  }

  const left = (number) => (number ? h("p", { class: "faint" }, `and ${count(number)} more in the file of details`) : null);

  function folds(lines, more) {
    const { strings } = details;
    const cells = lines.map(([module, names, into, before, after, error]) => [
      h("code", {}, strings[module] && h("span", { class: "was" }, `${strings[module]} `), strings[names]), strings[into],
      change(before, after, count), power(error)]);
    return h("details", {}, h("summary", {}, plural(lines.length + (more || 0), "fold")),
      grid([["Layers", null], ["Become", null], ["Numbers", "n"], ["Error", "n"]], cells), left(more));
  }

  function reasons(title, lines, more) {
    if (!lines) return null;
    const groups = new Map();
    for (const line of lines) groups.set(line[1], [...(groups.get(line[1]) || []), line]);
    const ordered = [...groups].sort((a, b) => b[1].length - a[1].length);
    return h("section", {}, h("h3", {}, `${title}: ${plural(lines.length + (more || 0), "layer")}`),
      ordered.map(([reason, members]) => h("details", {},
        h("summary", {}, `${details.strings[reason]} (${count(members.length)})`),
        h("ul", {}, members.map(([layer, , message]) => h("li", {}, h("code", {}, details.strings[layer] || "(model)"),
          details.strings[message] ? ` ${details.strings[message]}` : ""))))), left(more));
  }

  const counts = (lines) => h("section", {}, h("h3", {}, "Refused"),
    h("ul", {}, lines.map(([reason, number]) => h("li", {}, `${reason} (${plural(number, "layer")})`))));

  const untraced = (lines, more) => h("details", {}, h("summary", {}, `Not traced: ${plural(lines.length, "module")}`),
    h("ul", {}, lines.map(([layer, message]) => h("li", {}, h("code", {}, layer || "(model)"), ` ${message}`))), left(more));

  // ------------------------------------------------------------------------------------------- drawings

  function regions(list) {
    const shapes = list.map(([number, where, before, after]) => h("div", { class: "region" },
      h("div", {}, `${plural(number, "fold")} of this shape, for example `,
        h("code", {}, where)),
      h("div", { class: "sides" }, drawing(before, "before"), h("div", { class: "becomes", "aria-hidden": "true" }, "→"),
        drawing(after, "after"))));
    const some = shapes.splice(0, 3);
    const rest = shapes.length
      ? h("details", {}, h("summary", {}, `${plural(shapes.length, "more shape")}`), shapes) : null;
    return h("section", {}, h("h3", {}, "Folded regions"), some, rest);
  }

  function drawing(drawn, side) {
    if (!drawn) return h("p", { class: "faint" }, `${side}: not drawn`);
    const [width, height, nodes, edges] = details.layouts[drawn[0]];
    const texts = nodes.map((_, at) => details.strings[drawn[1 + 2 * at]].split("\n"));
    const label = texts.map((lines) => lines.join(" ").trim()).join(", ");
    const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${side}: ${label}` });
    for (const points of edges) svg.append(...edge(points));
    for (const [at, [x, y, wide, high, kind]] of nodes.entries()) {
      const [first, second] = texts[at];
      const path = details.strings[drawn[2 + 2 * at]];
      const end = kind === "input" || kind === "output";
      const group = s("g", {}, s("title", {}, path || first));
      group.append(s("rect", { class: "box", x: x - wide / 2, y: y - high / 2, width: wide, height: high,
        rx: end ? 12 : 4, fill: end ? "var(--page)" : `var(--${kind}, var(--other))` }));
      group.append(s("text", { x, y: second ? y - 2 : y + 4 }, first));
      if (second) group.append(s("text", { x, y: y + 12, class: "small" }, second));
      svg.append(group);
    }
    return h("div", { class: "side" }, svg);
  }

  function edge(points) {
    let line = `M${points[0]},${points[1]}`;
    for (let i = 2; i < points.length; i += 2) {
      const [x0, y0, x, y] = points.slice(i - 2, i + 2);
      const middle = (y0 + y) / 2;
      line += x0 === x ? `L${x},${y}` : `C${x0},${middle} ${x},${middle} ${x},${y}`;
    }
    const [x, y] = points.slice(-2);
    return [s("path", { class: "line", d: line }), s("path", { class: "tip", d: `M${x - 3.5},${y - 6}L${x},${y}L${x + 3.5},${y - 6}Z` })];
  }

  body.append(...models.map((model) => model.row));
  recall();
  document.documentElement.dataset.ready = "yes";
})();
