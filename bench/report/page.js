"use strict";
// Sorting, filtering, plots, colors and downloads of the report. Everything it needs is in the page.
(() => {
  const root = document.documentElement;
  const find = (selector, within = document) => Array.from(within.querySelectorAll(selector));
  const byId = (name) => document.getElementById(name);
  const json = (name) => JSON.parse(byId(name).textContent);
  const say = (text) => { byId("said").textContent = text; };

  async function unpack(name) {
    const bytes = Uint8Array.from(atob(byId(name).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  // ------------------------------------------------------------------ tables

  const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

  function compare(column, numeric, sign) {
    return (left, right) => {
      const [a, b] = [left.cells[column], right.cells[column]];
      if (!numeric) return sign * words.compare(a.textContent, b.textContent);
      const [x, y] = [a.dataset.value, b.dataset.value];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (Number(x) - Number(y));
    };
  }

  function sort(header) {
    const table = header.closest("table");
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of find("th[aria-sort]", table)) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort(compare(header.cellIndex, header.classList.contains("number"), up ? 1 : -1));
    table.tBodies[0].append(...rows);
    say(`sorted by ${header.textContent}, ${up ? "ascending" : "descending"}`);
  }

  function filter(input) {
    const rows = Array.from(byId(input.dataset.table).tBodies[0].rows);
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = Array.from(row.cells, (cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    const many = wanted.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
    input.parentElement.querySelector("output").textContent = many;
  }

  for (const button of find("thead button")) {
    button.addEventListener("click", () => sort(button.closest("th")));
  }
  for (const input of find("input[data-table]")) {
    input.addEventListener("input", () => filter(input));
  }

  // ------------------------------------------------------------------ plots

  const figures = json("figures");
  const drawn = new Set();
  const PRINTED = 660; // CSS pixels that fit a page of A4 or letter
  let ready = false;

  function colored(trace, color) {
    const tone = color(`--tone-${trace.meta.tone}`);
    const made = structuredClone(trace);
    if (trace.mode === "lines") made.line.color = tone;
    else made.marker = { ...trace.marker, color: tone, line: { color: color("--ground"), width: 1 } };
    if (trace.type === "bar") made.insidetextfont = { color: color("--on-tone") };
    for (const bars of [made.error_x, made.error_y]) {
      if (bars) bars.color = trace.type === "bar" ? color("--text") : tone;
    }
    return made;
  }

  function axis(given, color) {
    const line = { gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--quiet") };
    return { fixedrange: true, automargin: true, ticks: "outside", tickcolor: color("--quiet"), ...line, ...given };
  }

  function draw(place, width) {
    const style = getComputedStyle(root);
    const color = (name) => style.getPropertyValue(name).trim();
    const { data, layout } = structuredClone(figures[place.id]);
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--text") };
    const look = {
      ...layout, font, height: place.clientHeight, width: width || place.clientWidth,
      dragmode: false, hovermode: "closest", showlegend: data.length > 1,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 48, r: 12, t: 8, b: 44 },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
      hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--quiet"), font: { color: color("--text") } },
      xaxis: axis(layout.xaxis, color), yaxis: axis(layout.yaxis, color),
      shapes: (layout.shapes || []).map((s) => ({ ...s, line: { ...s.line, color: color("--text") } })),
    };
    window.Plotly.react(place, data.map((trace) => colored(trace, color)), look, { displayModeBar: false });
    drawn.add(place);
  }

  const redraw = (places, width) => { if (ready) for (const place of places) draw(place, width); };

  async function plots() {
    const places = find(".plot");
    if (!places.length) return;
    const script = document.createElement("script");
    script.textContent = await unpack("plotly");
    document.head.append(script);
    ready = true;
    const seen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) { seen.unobserve(target); draw(target); }
      }
    }, { rootMargin: "600px" });
    for (const place of places) seen.observe(place);
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth !== width) { width = window.innerWidth; redraw(drawn); }
    });
  }

  plots().catch((error) => {
    for (const place of find(".plot")) {
      place.style.height = "auto";
      place.textContent = `This browser cannot draw the plot (${error.message}); the tables have its numbers.`;
    }
  });

  // ------------------------------------------------------------------ light and dark

  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("theme"); } catch { return null; } };

  function paint(theme) {
    root.dataset.theme = theme;
    byId("theme").setAttribute("aria-pressed", String(theme === "dark"));
  }

  function apply() {
    paint(stored() || (system.matches ? "dark" : "light"));
    redraw(drawn);
  }

  byId("theme").addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", theme); } catch { /* a page that may keep nothing */ }
    paint(theme);
    redraw(drawn);
  });
  system.addEventListener("change", apply);
  apply();

  let before = "light";
  window.addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    paint("light");
    redraw(find(".plot"), PRINTED);
  });
  window.addEventListener("afterprint", () => { paint(before); redraw(find(".plot")); });

  // ------------------------------------------------------------------ downloads, where we are

  const stems = new Map(json("files").map((file) => [file.key, file.stem]));

  for (const button of find("button[data-run]")) {
    button.addEventListener("click", async () => {
      const { run, kind } = button.dataset;
      const type = kind === "json" ? "application/json" : "text/csv";
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([await unpack(`${run}-${kind}`)], { type }));
      link.download = `${stems.get(run)}-results.${kind}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
      say(`${link.download} downloaded`);
    });
  }

  const links = new Map(find("nav a").map((link) => [link.hash.slice(1), link]));
  links.values().next().value.setAttribute("aria-current", "true");
  const where = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  for (const section of find("main > section")) where.observe(section);
})();
