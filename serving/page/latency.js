// How long the calls took, one row each, in one scale.

import { byId, make } from "./dom.js";

const STAGES = ["read", "decode", "queue", "inference", "encode", "network"];
const rows = new Map();

byId("latency-key").append(
  ...STAGES.map((stage) => make("li", {}, make("i", { className: `stage-${stage}` }), stage)),
);

const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

/** `answer` is what `call` gave. A row of the same name is replaced. */
export function showLatency(name, { total, stages }) {
  const served = stages.reduce((sum, [, duration]) => sum + duration, 0);
  rows.set(name, { total, stages: [...stages, ["network", Math.max(0, total - served)]] });
  const longest = Math.max(...[...rows.values()].map((row) => row.total));
  byId("latency").tBodies[0].replaceChildren(...[...rows].map(([label, row]) => drawn(label, row, longest)));
}

export function forgetLatency(name) {
  rows.delete(name);
}

function drawn(label, { total, stages }, longest) {
  const bar = make("div", { className: "bar" });
  bar.style.width = `${(100 * total) / longest}%`;
  for (const [stage, duration] of stages) {
    const part = bar.appendChild(make("span", { className: `stage-${stage}`, title: `${stage} ${ms(duration)}` }));
    part.style.flexGrow = duration;
  }
  const spoken = stages.map(([stage, duration]) => `${stage} ${ms(duration)}`).join(", ");
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", spoken);
  const name = make("th", { scope: "row" }, label);
  return make("tr", {}, name, make("td", {}, bar), make("td", { className: "total" }, ms(total)));
}
