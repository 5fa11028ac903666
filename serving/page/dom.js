// Small parts of the page that several modules use.

export const byId = (id) => document.getElementById(id);

export function make(tag, fields = {}, ...children) {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
}

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

/** A figure of the page: a picture or, where there is none, a sentence that says why; a mark on one patch. */
export class Figure {
  constructor(name, { rows, columns, width, height }) {
    this.element = document.querySelector(`[data-figure="${name}"]`);
    this.canvas = make("canvas", { hidden: true });
    this.canvas.setAttribute("role", "img");
    this.empty = make("p", { className: "empty" });
    this.mark = make("div", { className: "mark", hidden: true });
    const frame = make("div", { className: "frame" }, this.canvas, this.empty, this.mark);
    frame.style.aspectRatio = `${width} / ${height}`;
    this.mark.style.width = `${100 / columns}%`;
    this.mark.style.height = `${100 / rows}%`;
    Object.assign(this, { frame, rows, columns });
    this.element.prepend(frame);
  }

  /** Shown by `draw`, which gets the canvas. */
  show(description, draw) {
    draw(this.canvas);
    this.canvas.setAttribute("aria-label", description);
    this.canvas.hidden = false;
    this.empty.hidden = true;
  }

  explain(reason) {
    this.empty.textContent = reason;
    this.empty.hidden = false;
    this.canvas.hidden = true;
    this.mark.hidden = true;
  }

  point(index) {
    this.mark.hidden = this.canvas.hidden || index === null;
    if (index === null) return;
    this.mark.style.left = `${(100 * (index % this.columns)) / this.columns}%`;
    this.mark.style.top = `${(100 * Math.floor(index / this.columns)) / this.rows}%`;
  }

  /** Call `listener` with the patch under the pointer. */
  onPoint(listener) {
    const tell = (event) => {
      const box = this.frame.getBoundingClientRect();
      const column = Math.floor(((event.clientX - box.left) / box.width) * this.columns);
      const row = Math.floor(((event.clientY - box.top) / box.height) * this.rows);
      if (row >= 0 && row < this.rows && column >= 0 && column < this.columns) listener(row * this.columns + column);
    };
    this.frame.addEventListener("pointermove", tell);
    this.frame.addEventListener("pointerdown", tell);
  }

  busy(value) {
    this.frame.toggleAttribute("data-busy", value);
  }
}

/** A canvas drawn onto another, whose size becomes the same. */
export function copyCanvas(source, target) {
  target.width = source.width;
  target.height = source.height;
  target.getContext("2d").drawImage(source, 0, 0);
}
