// The patches over the picture: painted with mouse or finger, walked and toggled with the keyboard.

/**
 * `onPaint` is called after each stroke or key that changed the mask, `onPoint` with the patch under pointer or focus.
 * Without `paintable` patches can be pointed at and not masked.
 */
export class PatchGrid {
  constructor(element, { rows, columns, paintable, onPaint, onPoint, announce }) {
    Object.assign(this, { element, rows, columns, paintable, onPaint, onPoint, announce });
    this.mask = new Uint8Array(rows * columns);
    this.current = 0;
    this.stroke = null;
    this.cells = this.build();
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("focusin", (event) => this.onPoint(this.cells.indexOf(event.target)));
    element.addEventListener("pointerdown", (event) => this.down(event));
    element.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) element.addEventListener(name, () => this.up());
  }

  build() {
    const { element, rows, columns } = this;
    element.replaceChildren();
    element.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
    element.setAttribute("aria-rowcount", rows);
    element.setAttribute("aria-colcount", columns);
    if (this.paintable) element.setAttribute("aria-multiselectable", "true");
    const cells = [];
    for (let row = 0; row < rows; row++) {
      const line = element.appendChild(document.createElement("div"));
      line.setAttribute("role", "row");
      for (let column = 0; column < columns; column++) {
        const cell = line.appendChild(document.createElement("div"));
        cell.setAttribute("role", "gridcell");
        cell.tabIndex = cells.length ? -1 : 0;
        cells.push(cell);
      }
    }
    cells.forEach((_, index) => this.label(index, cells));
    return cells;
  }

  label(index, cells = this.cells) {
    const masked = Boolean(this.mask[index]);
    const state = this.paintable ? `, ${masked ? "masked" : "visible"}` : "";
    cells[index].setAttribute("aria-label", `${this.place(index)}${state}`);
    if (this.paintable) cells[index].setAttribute("aria-selected", masked);
  }

  place(index) {
    return `row ${Math.floor(index / this.columns) + 1}, column ${(index % this.columns) + 1}`;
  }

  get masked() {
    return [...this.mask.keys()].filter((index) => this.mask[index]);
  }

  /** Show a mask that came from elsewhere. */
  show(masked) {
    const next = new Uint8Array(this.mask.length);
    for (const index of masked) next[index] = 1;
    next.forEach((value, index) => this.set(index, value));
  }

  set(index, value) {
    if (this.mask[index] === value) return;
    this.mask[index] = value;
    this.label(index);
  }

  focus(index) {
    this.cells[this.current].tabIndex = -1;
    this.current = index;
    this.cells[index].tabIndex = 0;
    this.cells[index].focus({ preventScroll: true });
  }

  /** Mark the patch that the maps compare with. */
  mark(index) {
    this.element.querySelector(".pointed")?.classList.remove("pointed");
    this.cells[index].classList.add("pointed");
  }

  key(event) {
    const { rows, columns, current } = this;
    const [row, column] = [Math.floor(current / columns), current % columns];
    const targets = {
      ArrowUp: [Math.max(row - 1, 0), column],
      ArrowDown: [Math.min(row + 1, rows - 1), column],
      ArrowLeft: [row, Math.max(column - 1, 0)],
      ArrowRight: [row, Math.min(column + 1, columns - 1)],
      Home: [event.ctrlKey ? 0 : row, 0],
      End: [event.ctrlKey ? rows - 1 : row, columns - 1],
    };
    if (event.key in targets) {
      const [y, x] = targets[event.key];
      this.focus(y * columns + x);
    } else if (this.paintable && (event.key === " " || event.key === "Enter")) {
      this.set(current, this.mask[current] ? 0 : 1);
      this.tell(current);
      this.onPaint();
    } else {
      return;
    }
    event.preventDefault();
  }

  tell(index) {
    const state = this.mask[index] ? "masked" : "visible";
    this.announce(`Row ${this.place(index).slice(4)} ${state}. ${this.masked.length} of ${this.mask.length} masked.`);
  }

  /** The patch under the pointer, the nearest where it has left the picture. */
  at(event) {
    const box = this.element.getBoundingClientRect();
    const part = (position, size, count) => Math.min(count - 1, Math.max(0, Math.floor((position / size) * count)));
    const column = part(event.clientX - box.left, box.width, this.columns);
    return part(event.clientY - box.top, box.height, this.rows) * this.columns + column;
  }

  down(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    const index = this.at(event);
    this.focus(index);
    if (!this.paintable) return;
    this.element.setPointerCapture(event.pointerId);
    // The first patch decides whether the stroke hides or shows.
    this.stroke = { value: this.mask[index] ? 0 : 1, last: index };
    this.set(index, this.stroke.value);
  }

  move(event) {
    const index = this.at(event);
    this.onPoint(index);
    if (!this.stroke) return;
    for (const passed of this.between(this.stroke.last, index)) this.set(passed, this.stroke.value);
    this.stroke.last = index;
  }

  up() {
    if (!this.stroke) return;
    this.tell(this.stroke.last);
    this.stroke = null;
    this.onPaint();
  }

  /** The patches on the line between two: a fast stroke skips some. */
  between(from, to) {
    const { columns } = this;
    const [y, x] = [Math.floor(from / columns), from % columns];
    const [dy, dx] = [Math.floor(to / columns) - y, (to % columns) - x];
    const steps = Math.max(Math.abs(dy), Math.abs(dx), 1);
    return Array.from({ length: steps + 1 }, (_, k) => Math.round(y + (dy * k) / steps) * columns + Math.round(x + (dx * k) / steps));
  }
}
