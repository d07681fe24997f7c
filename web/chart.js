// Bars, lines and areas as SVG; the same figures as a table, for those who do not see the drawing.

import { el } from "./dom.js";
import { color } from "./widgetstyle.js";

const WIDTH = 480;
const HEIGHT = 220;
const PAD = { top: 10, right: 10, bottom: 24, left: 44 };
const COLORS = ["blue", "purple", "orange", "green", "red", "yellow", "pink"];
const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export function drawChart(props) {
  const xKey = props.xAxis?.dataKey ?? props.xAxis;
  const label = (row) => String(props.xAxis?.labels?.[row[xKey]] ?? row[xKey] ?? "");
  const series = props.series.map((each, index) => ({
    ...each,
    name: each.label ?? each.dataKey,
    paint: color(each.color, {}) ?? color(COLORS[index % COLORS.length], {}),
  }));
  const plot = new Plot(props.data, series);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" });
  if (props.showYAxis) drawing.append(...plot.yAxis());
  if (!props.xAxis?.hide) drawing.append(...plot.xAxis(label));
  for (const each of series) drawing.append(...(each.type === "bar" ? plot.bars(each, label) : plot.line(each)));
  return el(
    "figure.chart",
    {},
    drawing,
    props.showLegend && el("figcaption", {}, series.map(drawLegend)),
    drawTable(props.data, series, label),
  );
}

function drawLegend({ name, paint }) {
  const mark = el("span.legend-mark");
  mark.style.backgroundColor = paint;
  return el("span", {}, mark, name);
}

function drawTable(data, series, label) {
  const rows = data.map((row) =>
    el("tr", {}, el("th", { scope: "row" }, label(row)), series.map(({ dataKey }) => el("td", {}, String(row[dataKey] ?? "")))),
  );
  const head = el("tr", {}, el("td"), series.map(({ name }) => el("th", { scope: "col" }, name)));
  const table = el("table", {}, el("caption", {}, "Chart"), el("thead", {}, head), el("tbody", {}, rows));
  return el("div.visually-hidden", {}, table); // a table itself cannot be made that small
}

/** Where figures stand in the drawing. */
class Plot {
  constructor(data, series) {
    this.data = data;
    this.stacks = [...new Set(series.filter(({ type }) => type === "bar").map((each) => each.stack ?? each.dataKey))];
    this.heights = new Map(); // "row/stack" → what is stacked there already
    const tops = data.flatMap((row) => {
      const sums = {};
      for (const { dataKey, stack } of series) sums[stack ?? dataKey] = (sums[stack ?? dataKey] ?? 0) + number(row[dataKey]);
      return Object.values(sums);
    });
    this.max = niceCeiling(Math.max(0, ...tops));
    this.min = -niceCeiling(-Math.min(0, ...tops));
    if (this.max === this.min) this.max = 1;
    this.step = (WIDTH - PAD.left - PAD.right) / Math.max(1, data.length);
  }

  x(index) {
    return PAD.left + this.step * (index + 0.5);
  }

  y(value) {
    return PAD.top + ((this.max - value) / (this.max - this.min)) * (HEIGHT - PAD.top - PAD.bottom);
  }

  yAxis() {
    const parts = [0, 0.25, 0.5, 0.75, 1].map((part) => this.min + part * (this.max - this.min));
    return (this.min < 0 ? [...new Set([this.min, 0, this.max])] : parts).flatMap((value) => {
      const y = this.y(value);
      const text = svg("text", { x: PAD.left - 6, y: y + 4, "text-anchor": "end" }, shortNumber(value));
      return [svg("line", { class: "grid", x1: PAD.left, x2: WIDTH - PAD.right, y1: y, y2: y }), text];
    });
  }

  xAxis(label) {
    const every = Math.ceil(this.data.length / 10);
    return this.data
      .map((row, index) => svg("text", { x: this.x(index), y: HEIGHT - 6, "text-anchor": "middle" }, label(row)))
      .filter((_, index) => index % every === 0);
  }

  bars({ dataKey, stack, paint, name }, label) {
    const width = (this.step * 0.7) / this.stacks.length;
    const place = this.stacks.indexOf(stack ?? dataKey);
    return this.data.map((row, index) => {
      const key = `${index}/${stack ?? dataKey}`;
      const base = this.heights.get(key) ?? 0;
      const value = number(row[dataKey]);
      this.heights.set(key, base + value);
      const [top, bottom] = [this.y(Math.max(base, base + value)), this.y(Math.min(base, base + value))];
      const x = this.x(index) - (width * this.stacks.length) / 2 + place * width;
      const hint = svg("title", {}, `${label(row)} · ${name}: ${row[dataKey] ?? ""}`);
      return svg("rect", { x: x + 1, y: top, width: width - 2, height: bottom - top, rx: 2, fill: paint }, hint);
    });
  }

  line({ type, dataKey, paint }) {
    const points = this.data.map((row, index) => `${this.x(index)},${this.y(number(row[dataKey]))}`);
    const line = svg("polyline", { points: points.join(" "), fill: "none", stroke: paint, "stroke-width": 2 });
    if (type !== "area" || !points.length) return [line];
    const floor = this.y(Math.max(0, this.min));
    const ends = [`${this.x(0)},${floor}`, ...points, `${this.x(this.data.length - 1)},${floor}`];
    return [svg("polygon", { points: ends.join(" "), fill: paint, "fill-opacity": 0.2 }), line];
  }
}

const number = (value) => (Number.isFinite(Number(value)) ? Number(value) : 0);
const shortNumber = (value) => new Intl.NumberFormat(undefined, { notation: "compact" }).format(value);

function niceCeiling(value) {
  if (value <= 0) return 0;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * size).find((step) => step >= value) ?? value;
}
