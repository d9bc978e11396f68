"use strict";
// Values under the pointer. Everything else on the page works without it.

// What lies between a place and a value; see data-x and data-y of svg.py.
function scale(text, logarithmic) {
  const [low, high, start, end] = text.split(" ").map(Number);
  return (place) => {
    const share = (place - start) / (end - start);
    return logarithmic ? low * (high / low) ** share : low + share * (high - low);
  };
}

function short(value) {
  const size = Math.abs(value);
  return size >= 1e4 || Number.isInteger(value)
    ? Math.round(value).toLocaleString("en")
    : String(Number(value.toPrecision(4)));
}

function read(chart) {
  const logarithmic = chart.dataset.log === "1";
  const lines = [...chart.querySelectorAll(".line")].map((line) => ({
    name: [names[line.dataset.run], line.dataset.name].filter(Boolean).join(" "),
    points: [...line.getAttribute("d").matchAll(/[ML](\S+?) ([^ML]+)/g)].map((point) => [
      Number(point[1]),
      Number(point[2]),
    ]),
  }));
  return {
    lines: lines.filter((line) => line.points.length),
    x: scale(chart.dataset.x, false),
    y: scale(chart.dataset.y, logarithmic),
  };
}

const names = [...document.querySelectorAll(".bar .key")].map((key) => key.textContent.trim());
const charts = new Map();

function show(chart, pointer) {
  if (!charts.has(chart)) charts.set(chart, read(chart));
  const { lines, x, y } = charts.get(chart);
  const box = chart.getBoundingClientRect();
  const at = ((pointer.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
  const found = lines.map(({ name, points }) => ({
    name,
    point: points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)),
  }));
  if (!found.length) return;
  const place = found.reduce((a, b) =>
    Math.abs(b.point[0] - at) < Math.abs(a.point[0] - at) ? b : a,
  ).point[0];
  const values = found.map(({ name, point }) => `${name} ${short(y(point[1]))}`.trim());
  const unit = chart.dataset.label.replace(" in steps", "");
  const position = chart.classList.contains("by-seconds")
    ? `${Number(x(place).toPrecision(4))} ${unit}`
    : `${unit} ${short(Math.round(x(place)))}`;
  chart.parentNode.querySelector(".readout").textContent = [position, ...values].join(" · ");
  let cursor = chart.querySelector(".cursor");
  if (!cursor) {
    cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
    cursor.setAttribute("class", "cursor");
    chart.append(cursor);
  }
  const [, , bottom, top] = chart.dataset.y.split(" ");
  cursor.setAttribute("d", `M${place} ${bottom}V${top}`);
}

for (const chart of document.querySelectorAll("svg.chart")) {
  for (const kind of ["pointermove", "pointerdown"]) {
    chart.addEventListener(kind, (pointer) => show(chart, pointer));
  }
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
