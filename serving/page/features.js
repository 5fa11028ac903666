// The maps of what the encoder gives for each patch: similarity, principal components, attention.

import { drawMap, drawScale, mixed, scaled } from "./colours.js";
import { byId, Figure, make, percent } from "./dom.js";
import { cosines, normalized, principalComponents } from "./pca.js";

const COLOURS = ["red", "green", "blue"];
const NO_CLASS_TOKEN = "This encoder has no class token, and so no attention of one: it was trained with the mean of its patches.";

/** `onPoint` is called with the patch that is pointed at in a map. */
export class Features {
  constructor(size, onPoint) {
    Object.assign(this, size, { num: size.rows * size.columns, head: null, attention: null, unit: null });
    this.anchor = Math.floor(size.rows / 2) * size.columns + Math.floor(size.columns / 2);
    this.figures = ["similarity", "pca", "attention"].map((name) => new Figure(name, size));
    [this.similarity, this.pca, this.attentionFigure] = this.figures;
    for (const figure of this.figures) {
      figure.onPoint(onPoint);
      figure.explain("No image yet.");
    }
    for (const canvas of document.querySelectorAll("canvas.scale")) drawScale(canvas);
  }

  /** Show `patches` {shape: [1, N, D], data} and `attention` {shape: [1, heads, N], data}, null where there is none. */
  show(patches, attention) {
    const width = patches.shape[2];
    this.width = width;
    this.unit = normalized(patches.data, this.num, width);
    this.showComponents(patches.data, width);
    this.attention = attention && { heads: attention.shape[1], data: attention.data };
    if (attention) this.showHeads();
    else this.attentionFigure.explain(NO_CLASS_TOKEN);
    this.attentionFigure.element.querySelector(".legend").hidden = !attention;
    byId("heads").hidden = !attention;
    this.point(this.anchor);
  }

  showComponents(patches, width) {
    const { scores, shares } = principalComponents(patches, this.num, width, COLOURS.length);
    const ranges = scores.map((values) => [Math.min(...values), Math.max(...values)]);
    this.pca.show("Patches coloured by the principal components of their features", (canvas) =>
      drawMap(canvas, this.rows, this.columns, (index) => mixed(scores.map((values) => values[index]), ranges)),
    );
    this.pca.element.querySelector(".shares").replaceChildren(
      ...COLOURS.map((colour, k) => make("li", {}, make("i", { className: colour }), `${colour} ${percent(shares[k])}`)),
      make("li", {}, "of the variance"),
    );
  }

  /** Compare one patch with all. */
  point(index) {
    this.anchor = index;
    if (!this.unit) return;
    const values = cosines(this.unit, this.num, this.width, index);
    const low = Math.min(...values);
    this.similarity.show(`Similarity of every patch to ${this.place(index)}`, (canvas) =>
      drawMap(canvas, this.rows, this.columns, (k) => scaled(values[k], low, 1)),
    );
    label(this.similarity, decimal(low), decimal(1));
    const mean = (values.reduce((sum, value) => sum + value, 0) - values[index]) / Math.max(1, this.num - 1);
    reading(this.similarity, `${this.place(index)}: mean cosine ${decimal(mean)}`);
    for (const figure of this.figures) figure.point(index);
    this.readAttention();
  }

  place(index) {
    return `row ${Math.floor(index / this.columns) + 1}, column ${(index % this.columns) + 1}`;
  }

  /** Attention [N] of one head, or the mean of all for null. */
  ofHead(head) {
    const { heads, data } = this.attention;
    if (head !== null) return data.subarray(head * this.num, (head + 1) * this.num);
    return Float64Array.from({ length: this.num }, (_, index) => {
      let sum = 0;
      for (let h = 0; h < heads; h++) sum += data[h * this.num + index];
      return sum / heads;
    });
  }

  showHeads() {
    const choices = [null, ...Array(this.attention.heads).keys()];
    if (!choices.includes(this.head)) this.head = null;
    byId("heads").querySelector("div").replaceChildren(
      ...choices.map((head) => {
        const radio = make("input", { type: "radio", name: "head", checked: head === this.head });
        radio.addEventListener("change", () => this.showAttention(head));
        const canvas = make("canvas");
        this.draw(canvas, this.ofHead(head));
        canvas.setAttribute("aria-hidden", "true");
        canvas.style.aspectRatio = `${this.columns} / ${this.rows}`;
        return make("label", {}, radio, canvas, make("span", {}, head === null ? "mean" : `head ${head + 1}`));
      }),
    );
    this.showAttention(this.head);
  }

  draw(canvas, values) {
    const high = Math.max(...values);
    drawMap(canvas, this.rows, this.columns, (index) => scaled(values[index], 0, high));
  }

  showAttention(head) {
    this.head = head;
    const values = this.ofHead(head);
    const name = head === null ? "mean of the heads" : `head ${head + 1}`;
    this.attentionFigure.show(`Attention of the class token, ${name}`, (canvas) => this.draw(canvas, values));
    label(this.attentionFigure, "0 %", percent(Math.max(...values), 1));
    this.attentionFigure.point(this.anchor);
    this.readAttention();
  }

  readAttention() {
    if (!this.attention) return reading(this.attentionFigure, "");
    const share = percent(this.ofHead(this.head)[this.anchor], 1);
    return reading(this.attentionFigure, `${this.place(this.anchor)}: ${share}, even would be ${percent(1 / this.num, 1)}`);
  }

  busy(value) {
    for (const figure of this.figures) figure.busy(value);
  }
}

const decimal = (value) => value.toFixed(2).replace("-", "−");

function label(figure, low, high) {
  const [left, right] = figure.element.querySelectorAll(".legend div span");
  left.textContent = low;
  right.textContent = high;
}

function reading(figure, text) {
  figure.element.querySelector(".reading").textContent = text;
}
