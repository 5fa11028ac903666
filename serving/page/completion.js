// The mask, and the pictures that the model makes under it.

import { call } from "./api.js";
import { curlCommand } from "./curl.js";
import { byId, copyCanvas, Figure, make, percent } from "./dom.js";
import { forgetLatency, showLatency } from "./latency.js";
import { copyCommand } from "./notice.js";
import { withoutMasked } from "./picture.js";

const PNG = "image/png";
const PATH = "reconstruct";
// Strokes and keys that follow each other at once are one change.
const PAUSE_MS = 200;
const MAX_SEED = 2 ** 32;

/** `grid` shows the mask; `onProblem(error, again)` is told of what fails. */
export class Completion {
  constructor(bundle, size, grid, onProblem) {
    Object.assign(this, { bundle, grid, onProblem, columns: size.columns, source: null, timer: null, running: null });
    this.num = size.rows * size.columns;
    const { capabilities } = bundle;
    this.figures = Object.fromEntries(["seen", "pasted", "completion", "skip"].map((name) => [name, new Figure(name, size)]));
    this.copies = {};
    for (const name of ["pasted", "completion", "skip"]) this.copies[name] = this.addCopy(name);
    const missing = "This bundle holds an encoder without a decoder, so it cannot fill in patches.";
    for (const [name, figure] of Object.entries(this.figures)) {
      const able = name === "skip" ? capabilities.skip_reconstruct : capabilities.reconstruct;
      figure.element.hidden = !able;
      figure.explain("No image yet.");
    }
    if (!capabilities.reconstruct && !capabilities.skip_reconstruct) {
      byId("completion").querySelector(".lead").textContent =
        `${missing} Its features are above. A model that cae-pipe pretrains, exported with its tokenizer, can do both.`;
      byId("features").after(byId("completion"));
    }
    if (capabilities.reconstruct) this.buildMask(bundle.default_mask_ratio);
  }

  addCopy(name) {
    const button = make("button", { type: "button", className: "copy", textContent: "Copy curl", disabled: true });
    button.setAttribute("aria-label", `Copy curl: ${this.figures[name].element.querySelector("strong").textContent}`);
    this.figures[name].element.append(button);
    return button;
  }

  buildMask(ratio) {
    byId("mask").hidden = false;
    byId("ratio").value = Math.round(100 * ratio);
    this.drawn();
    byId("ratio").addEventListener("input", () => this.drawAgain());
    byId("seed").addEventListener("input", () => byId("seed").reportValidity() && this.drawAgain());
    for (const radio of document.querySelectorAll('[name="kind"]')) radio.addEventListener("change", () => this.drawAgain());
    byId("roll").addEventListener("click", () => {
      byId("seed").value = Math.floor(Math.random() * MAX_SEED);
      this.drawAgain();
    });
    byId("invert").addEventListener("click", () => this.replace(this.grid.masked, true));
    byId("clear").addEventListener("click", () => this.replace([], false));
  }

  /** The mask is what the server draws by kind, share and seed. */
  drawn() {
    const kind = document.querySelector('[name="kind"]:checked').value;
    const ratio = byId("ratio").value / 100;
    this.mask = { mask_kind: kind, mask_ratio: ratio, seed: Number(byId("seed").value) };
    byId("ratio-text").textContent = `${percent(ratio)} of ${this.num} patches`;
  }

  drawAgain() {
    this.drawn();
    this.soon();
  }

  replace(masked, inverted) {
    const chosen = new Set(masked);
    this.grid.show([...Array(this.num).keys()].filter((index) => chosen.has(index) !== inverted));
    this.painted();
  }

  /** The mask is what the grid shows. */
  painted() {
    const { masked } = this.grid;
    this.mask = { masked: masked.join(",") };
    byId("ratio-text").textContent = `painted: ${masked.length} of ${this.num} patches`;
    this.showSeen();
    this.soon();
  }

  soon() {
    clearTimeout(this.timer);
    this.running?.abort();
    this.timer = setTimeout(() => this.run(), PAUSE_MS);
  }

  /** Another image, drawn on `canvas` as the model sees it; null where the browser cannot draw it. */
  take(source, canvas) {
    clearTimeout(this.timer);
    Object.assign(this, { source, canvas, skipped: false });
    return this.run();
  }

  async run() {
    this.running?.abort();
    const { signal } = (this.running = new AbortController());
    const { reconstruct, skip_reconstruct: skip } = this.bundle.capabilities;
    // Those of a call that was given up.
    for (const figure of Object.values(this.figures)) figure.busy(false);
    if (!this.source || !(reconstruct || skip)) return;
    try {
      if (reconstruct && this.isUsable()) {
        const answer = await this.picture("pasted", { ...this.mask, view: "pasted" }, signal);
        if (!("masked" in this.mask)) this.grid.show(answer.headers.get("x-masked-patches").split(",").map(Number));
        this.showSeen();
        await this.picture("completion", { ...this.mask, view: "completion" }, signal);
      }
      if (skip && !this.skipped) {
        await this.picture("skip", { skip_regressor: true, view: "completion" }, signal);
        this.skipped = true;
      }
    } catch (error) {
      if (error.name !== "AbortError") this.onProblem(error, () => this.run());
    }
  }

  isUsable() {
    const { masked } = this.mask;
    const count = masked === undefined ? null : masked.split(",").filter(Boolean).length;
    if (count !== 0 && count !== this.num) return true;
    const reason = count === 0 ? "Nothing is masked. Paint some patches, or roll a mask." : "Everything is masked. Leave at least one patch visible.";
    for (const name of ["pasted", "completion"]) {
      this.figures[name].explain(reason);
      this.copies[name].disabled = true;
      forgetLatency(name);
    }
    return false;
  }

  showSeen() {
    const { masked } = this.grid;
    if (!this.canvas) return this.figures.seen.explain("A browser cannot draw this file; the model reads it all the same.");
    const description = `The image with ${masked.length} of ${this.num} patches masked`;
    const seen = withoutMasked(this.canvas, masked, this.columns, this.bundle.model.patch_size);
    return this.figures.seen.show(description, (canvas) => copyCanvas(seen, canvas));
  }

  async picture(name, query, signal) {
    const figure = this.figures[name];
    figure.busy(true);
    try {
      const answer = await call(PATH, { query, body: this.source.blob, accept: PNG, signal });
      const bitmap = await createImageBitmap(new Blob([answer.data]));
      figure.show(figure.element.querySelector("strong").textContent, (canvas) => copyCanvas(bitmap, canvas));
      showLatency(name === "skip" ? "no regressor" : name, answer);
      const command = curlCommand({ source: this.source, path: PATH, query, accept: PNG, output: `${name}.png` });
      this.copies[name].onclick = () => copyCommand(command);
      this.copies[name].disabled = false;
      return answer;
    } finally {
      // A later call for the same figure keeps it busy.
      if (!signal.aborted) figure.busy(false);
    }
  }
}
