"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const $ = (id) => document.getElementById(id);
const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();

// --- Charts: plotly draws, the page's variables give the colours --------------------------------

const narrow = matchMedia("(max-width: 40rem)"), dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;"); // plotly reads a little HTML in names
let rates = "linear"; // or log
const hidden = { rd: new Set(), training: new Set() }; // names of lines, by part of the page

function drawCharts(part) {
  const text = variable("--text"), soft = variable("--soft"), grid = variable("--grid"), card = variable("--card");
  for (const div of document.querySelectorAll(".plot")) {
    const chart = data.charts[div.dataset.chart];
    if (part && chart.part !== part) continue;
    const traces = chart.traces.map((trace) => {
      const own = trace.style[isDark() ? "dark" : "colour"] ?? soft;
      return {
        name: escaped(trace.name), x: trace.x, y: trace.y, type: "scatter", visible: !hidden[chart.part].has(trace.name),
        mode: trace.style.marker && (chart.part === "rd" || trace.x.length < 3) ? "lines+markers" : "lines",
        line: { color: own, width: trace.style.colour ? 2 : 1.2, dash: trace.style.dash },
        marker: { color: own, size: trace.style.marker === "star" ? 11 : 8, symbol: trace.style.marker ?? "circle" },
        hovertemplate: `%{y:.4~f}<br>%{x:.4~f} ${chart.part === "rd" ? "bpp" : "steps"}<extra>%{fullData.name}</extra>`,
        hoverinfo: trace.style.colour ? undefined : "skip",
      };
    });
    // Rates of zero, as the ceiling has, are not on a logarithmic axis.
    const isLog = chart.part === "rd" && rates === "log", least = Math.min(...traces.flatMap((trace) => trace.x).filter((x) => x > 0));
    if (isLog) for (const trace of traces) trace.x = trace.x.map((x) => Math.max(x, least / 2));
    const logs = isLog && { type: "log", range: [least * 0.9, chart.x_range?.[1] ?? Math.max(...traces.flatMap((trace) => trace.x)) * 1.1].map(Math.log10), dtick: "D2" };
    const axis = (title, range) => ({
      range: range ?? undefined, title: { text: title, standoff: 8 }, gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, tickfont: { color: soft },
    });
    const layout = {
      paper_bgcolor: card, plot_bgcolor: card, font: { family: "system-ui, sans-serif", size: 12, color: text }, uirevision: rates,
      margin: { l: 50, r: 8, t: 8, b: 40 }, xaxis: { ...axis(chart.x_label, chart.x_range), ...logs }, yaxis: axis(chart.part === "rd" ? chart.y_label : "", chart.y_range),
      hovermode: "closest", dragmode: narrow.matches ? false : "zoom", showlegend: false,
      hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: text } },
    };
    Plotly.react(div, traces, layout, { displayModeBar: false, responsive: true });
  }
}

for (const button of document.querySelectorAll("[data-rates]")) button.addEventListener("click", () => {
  rates = button.dataset.rates;
  for (const other of document.querySelectorAll("[data-rates]")) other.setAttribute("aria-pressed", other === button);
  drawCharts("rd");
});

// Legends: a line that is hidden in one chart is hidden in all of its part.
for (const part of Object.keys(hidden)) {
  const buttons = [...document.querySelectorAll(`.charts.${part} .legend button`)];
  const lines = buttons.filter((button) => button.dataset.name !== undefined), all = buttons.filter((button) => !lines.includes(button));
  const update = () => {
    for (const button of lines) button.setAttribute("aria-pressed", !hidden[part].has(button.dataset.name));
    for (const button of all) button.textContent = hidden[part].size ? "Show all" : "Hide all";
    drawCharts(part);
  };
  for (const button of lines) button.addEventListener("click", () => {
    if (!hidden[part].delete(button.dataset.name)) hidden[part].add(button.dataset.name);
    update();
  });
  for (const button of all) button.addEventListener("click", () => {
    hidden[part] = new Set(hidden[part].size ? [] : lines.map((line) => line.dataset.name));
    update();
  });
}

// --- Light and dark -------------------------------------------------------------------------------

$("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  drawCharts();
  viewer?.draw();
});
for (const query of [dark, narrow]) query.addEventListener("change", () => { drawCharts(); viewer?.draw(); });

// --- Tables to sort -------------------------------------------------------------------------------

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const cells = [...table.tBodies[0].rows].map((row) => row.cells[column]);
    if (!cells.some((cell) => cell.classList.contains("number"))) return;
    [head, ...cells].forEach((cell) => cell.classList.add("number"));
  });
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const value = (row) => {
      const cell = row.cells[column];
      if (cell.classList.contains("none") || cell.dataset.value === "") return null;
      return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === null || y === null) return (x === null) - (y === null); // empty cells stay last
      if (typeof x === "number" && typeof y === "number") return direction * (x - y);
      return direction * String(x).localeCompare(String(y), undefined, { numeric: true });
    });
    table.tBodies[0].append(...rows);
  }));
}

// --- Where the reader is --------------------------------------------------------------------------

const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id).setAttribute("aria-current", "true");
  }
}, { rootMargin: "-20% 0px -70% 0px" });
document.querySelectorAll("main > section").forEach((section) => seen.observe(section));

// --- Pictures: one canvas shows A and B at one place and scale ------------------------------------

class Viewer {
  constructor(scenes) {
    this.scenes = scenes;
    this.canvas = $("canvas");
    this.context = this.canvas.getContext("2d");
    this.mode = "slider";
    this.split = 0.5;      // of the canvas's width
    this.swapped = false;  // flicker: B is on
    this.isOriginal = false;
    this.timer = null;
    this.pictures = new Map();
    this.pointers = new Map();
    scenes.forEach((scene, index) => $("scene").add(new Option(scene.name, index)));
    this.listen();
    this.choose(0);
    new ResizeObserver(() => { this.resize(); }).observe($("stage"));
  }

  // Options of A and B keep their names from one image to the next.
  choose(index) {
    this.scene = this.scenes[index];
    $("scene").value = index;
    const views = this.scene.views;
    [["view-a", 0], ["view-b", Math.min(1, views.length - 1)]].forEach(([id, other]) => {
      const select = $(id), name = select.selectedOptions[0]?.text;
      select.replaceChildren(...views.map((view, i) => new Option(view.name, i)));
      const same = views.findIndex((view) => view.name === name);
      select.value = same >= 0 ? same : other;
    });
    this.resize(true);
    this.load();
  }

  get a() { return this.scene.views[$("view-a").value]; }
  get b() { return this.scene.views[$("view-b").value]; }
  // Side by side, both panes begin at a whole pixel, so that they show the same pixels.
  get pane() { return this.mode === "side" ? Math.floor(this.canvas.clientWidth / 2) : this.canvas.clientWidth; }
  get fit() { return Math.min(this.pane / this.scene.width, this.canvas.clientHeight / this.scene.height); }

  async load() {
    const needed = [this.a, this.b, this.scene.views[0]];
    for (const view of needed) {
      if (this.pictures.has(view)) continue;
      const image = new Image();
      image.src = view.uri;
      this.pictures.set(view, image);
    }
    await Promise.allSettled(needed.map((view) => this.pictures.get(view).decode()));
    this.draw();
  }

  resize(isNew = false) {
    const stage = $("stage"), ratio = this.scene.height / this.scene.width;
    const panes = this.mode === "side" ? 2 : 1;
    const wasFit = isNew || !this.scale || Math.abs(this.scale / this.fit - 1) < 1e-3;
    this.canvas.style.height = `${Math.round(Math.min(0.72 * innerHeight, (stage.clientWidth / panes) * ratio))}px`;
    if (wasFit) this.toFit(); else this.draw();
  }

  toFit() { this.scale = this.fit; this.x = this.scene.width / 2; this.y = this.scene.height / 2; this.draw(); }

  zoom(factor, px = this.pane / 2, py = this.canvas.clientHeight / 2) {
    const least = Math.min(this.fit, 1 / (devicePixelRatio || 1));
    const scale = Math.min(16, Math.max(least, this.scale * factor));
    const dx = (px % this.pane) - this.pane / 2, dy = py - this.canvas.clientHeight / 2;
    this.x += dx / this.scale - dx / scale;
    this.y += dy / this.scale - dy / scale;
    this.scale = scale;
    this.draw();
  }

  pan(dx, dy) { this.x -= dx / this.scale; this.y -= dy / this.scale; this.draw(); }

  keepInside() {
    const clamp = (value, size, shown) => shown >= size ? size / 2 : Math.min(size - shown / 2, Math.max(shown / 2, value));
    this.x = clamp(this.x, this.scene.width, this.pane / this.scale);
    this.y = clamp(this.y, this.scene.height, this.canvas.clientHeight / this.scale);
  }

  paint(view, left, right, pane) {
    const image = this.pictures.get(view), context = this.context;
    if (!image?.complete || !image.naturalWidth || right <= left) return;
    const top = this.canvas.clientHeight / 2 - this.y * this.scale, start = pane + this.pane / 2 - this.x * this.scale;
    context.save();
    context.beginPath();
    context.rect(left, 0, right - left, this.canvas.clientHeight);
    context.clip();
    context.beginPath();
    context.rect(start, top, this.scene.width * this.scale, this.scene.height * this.scale);
    context.clip();
    context.imageSmoothingEnabled = !view.is_map && this.scale * (devicePixelRatio || 1) < 1.5;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, start, top, view.width * this.scale, view.height * this.scale);
    context.restore();
  }

  draw() {
    const width = this.canvas.clientWidth, height = this.canvas.clientHeight, density = devicePixelRatio || 1;
    if (!width || !height || !this.scale) return;
    this.keepInside();
    if (this.canvas.width !== Math.round(width * density) || this.canvas.height !== Math.round(height * density)) {
      this.canvas.width = Math.round(width * density);
      this.canvas.height = Math.round(height * density);
    }
    this.context.setTransform(density, 0, 0, density, 0, 0);
    this.context.clearRect(0, 0, width, height);
    const first = this.isOriginal ? this.scene.views[0] : this.a, second = this.isOriginal ? this.scene.views[0] : this.b;
    let tags = [first.name, second.name];
    if (this.mode === "slider") {
      const x = this.split * width;
      this.paint(first, 0, x, 0);
      this.paint(second, x, width, 0);
      this.line(x);
    } else if (this.mode === "side") {
      this.paint(first, 0, this.pane, 0);
      this.paint(second, this.pane, 2 * this.pane, this.pane);
      this.line(this.pane);
    } else {
      const view = this.swapped ? second : first;
      this.paint(view, 0, width, 0);
      tags = this.swapped ? ["", second.name] : [first.name, ""];
    }
    document.querySelector(".tag.a").textContent = tags[0] && (this.isOriginal ? "original" : `A  ${tags[0]}`);
    document.querySelector(".tag.b").textContent = tags[1] && (this.isOriginal ? "original" : `B  ${tags[1]}`);
    $("stage").classList.toggle("zoomed", this.scale > this.fit * 1.001);
    this.say();
  }

  line(x) {
    this.context.fillStyle = "rgba(255, 255, 255, .95)";
    this.context.fillRect(x - 1, 0, 2, this.canvas.clientHeight);
    this.context.fillStyle = "rgba(0, 0, 0, .45)";
    this.context.fillRect(x + 1, 0, 1, this.canvas.clientHeight);
    if (this.mode !== "slider") return;
    const y = this.canvas.clientHeight / 2;
    this.context.beginPath();
    this.context.arc(x, y, 13, 0, 7);
    this.context.fillStyle = "rgba(255, 255, 255, .95)";
    this.context.fill();
    this.context.fillStyle = "#15191f";
    this.context.font = "13px system-ui, sans-serif";
    this.context.textAlign = "center";
    this.context.textBaseline = "middle";
    this.context.fillText("◂ ▸", x, y);
  }

  // Only what has changed is written, so that screen readers say it once.
  say() {
    const parts = [["A", this.a], ["B", this.b]].map(([letter, view]) => `${letter}: ${view.name}, ${view.detail}`);
    const words = [this.scene.name, ...parts].join(". ");
    if (this.said === words) return;
    this.said = words;
    $("caption").replaceChildren(...[["A", this.a], ["B", this.b]].flatMap(([letter, view], index) => {
      const name = document.createElement("b");
      name.textContent = `${letter}  ${view.name}`;
      return [...(index ? [document.createElement("br")] : []), name, ` · ${view.detail}`];
    }));
    this.canvas.setAttribute("aria-label", words);
  }

  setMode(mode) {
    clearInterval(this.timer);
    this.mode = mode;
    this.swapped = false;
    for (const button of document.querySelectorAll("[data-mode]")) button.setAttribute("aria-pressed", button.dataset.mode === mode);
    $("divider").hidden = mode !== "slider";
    // Below three changes a second; who asks for less motion swaps by hand.
    if (mode === "flicker" && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
      this.timer = setInterval(() => { this.swapped = !this.swapped; this.draw(); }, 700);
    }
    this.resize();
  }

  setSplit(value) {
    this.split = Math.min(1, Math.max(0, value));
    $("divider").value = Math.round(this.split * 1000);
    this.draw();
  }

  setOriginal(isOriginal) {
    this.isOriginal = isOriginal;
    $("original").setAttribute("aria-pressed", isOriginal);
    this.draw();
  }

  swap() {
    if (this.mode === "flicker") {
      clearInterval(this.timer);
      this.swapped = !this.swapped;
    } else {
      [$("view-a").value, $("view-b").value] = [$("view-b").value, $("view-a").value];
    }
    this.draw();
  }

  listen() {
    const stage = $("stage");
    $("scene").addEventListener("change", (event) => this.choose(Number(event.target.value)));
    for (const id of ["view-a", "view-b"]) $(id).addEventListener("change", () => this.load());
    for (const button of document.querySelectorAll("[data-mode]")) button.addEventListener("click", () => this.setMode(button.dataset.mode));
    $("divider").addEventListener("input", (event) => this.setSplit(event.target.value / 1000));
    $("original").addEventListener("click", () => this.setOriginal(!this.isOriginal));
    const zooms = { in: () => this.zoom(1.5), out: () => this.zoom(1 / 1.5), fit: () => this.toFit(), one: () => this.zoom(1 / (this.scale * (devicePixelRatio || 1))) };
    for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", zooms[button.dataset.zoom]);
    const step = (by) => this.choose((this.scenes.indexOf(this.scene) + by + this.scenes.length) % this.scenes.length);
    const keys = {
      f: () => this.setMode("flicker"), s: () => this.setMode("slider"), d: () => this.setMode("side"), " ": () => this.swap(),
      o: () => this.setOriginal(!this.isOriginal), n: () => step(1), p: () => step(-1), "[": () => this.setSplit(this.split - 0.02),
      "]": () => this.setSplit(this.split + 0.02), "+": zooms.in, "=": zooms.in, "-": zooms.out, 0: zooms.fit, 1: zooms.one,
      ArrowLeft: () => this.pan(60, 0), ArrowRight: () => this.pan(-60, 0), ArrowUp: () => this.pan(0, 60), ArrowDown: () => this.pan(0, -60),
    };
    stage.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    stage.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && document.activeElement !== stage) return;
      event.preventDefault();
      const box = this.canvas.getBoundingClientRect();
      this.zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, event);
      const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left;
      const isFit = this.scale <= this.fit * 1.001;
      this.isSplitting = this.mode === "slider" && (isFit || Math.abs(x - this.split * box.width) < 24);
      if (this.isSplitting) this.setSplit(x / box.width);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const before = this.pointers.get(event.pointerId);
      if (!before) return;
      const box = this.canvas.getBoundingClientRect();
      if (this.pointers.size === 2) {
        const [other] = [...this.pointers.values()].filter((pointer) => pointer.pointerId !== event.pointerId);
        const distance = (pointer) => Math.hypot(pointer.clientX - other.clientX, pointer.clientY - other.clientY);
        this.zoom(distance(event) / Math.max(1, distance(before)), (event.clientX + other.clientX) / 2 - box.left, (event.clientY + other.clientY) / 2 - box.top);
      } else if (this.isSplitting) {
        this.setSplit((event.clientX - box.left) / box.width);
      } else {
        this.pan(event.clientX - before.clientX, event.clientY - before.clientY);
      }
      this.pointers.set(event.pointerId, event);
    });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
  }
}

const viewer = data.scenes.length ? new Viewer(data.scenes) : null;
drawCharts();
