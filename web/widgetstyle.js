// ChatKit's props for size, space and colour as styles. Set one by one through the style object, which the page's
// policy allows; a value that is not CSS is ignored by the browser, and none may name an address.

const SPACE = 4; // pixels in a spacing unit
const RADII = { none: 0, "2xs": 2, xs: 4, sm: 6, md: 8, lg: 10, xl: 12, "2xl": 16, "3xl": 20, "4xl": 24, full: 9999 };
const FLEX = { start: "flex-start", end: "flex-end", between: "space-between", around: "space-around", evenly: "space-evenly" };
const TEXT_COLORS = {
  prose: "--text", primary: "--text", emphasis: "--text", secondary: "--text-2", tertiary: "--text-2",
  success: "--good", warning: "--caution", danger: "--bad",
};
const SURFACES = {
  surface: "--surface", "surface-secondary": "--surface-2", "surface-tertiary": "--surface-3",
  "surface-elevated": "--surface", "surface-elevated-secondary": "--surface-2",
};
const BORDERS = { default: "--line", subtle: "--line", strong: "--line-strong" };
const HUES = {
  red: 25, orange: 55, amber: 75, yellow: 95, lime: 125, green: 150, emerald: 160, teal: 180, cyan: 210, sky: 235,
  blue: 255, indigo: 275, violet: 290, purple: 305, fuchsia: 325, pink: 350, rose: 10, discovery: 305, info: 255,
};

const NAMES_AN_ADDRESS = /url|image|expression|\\/i; // a backslash would hide the letters

function set(element, property, value) {
  if (value === null || value === undefined || NAMES_AN_ADDRESS.test(value)) return;
  element.style.setProperty(property, value);
}

const pixels = (value) => (typeof value === "number" ? `${value}px` : value);
const space = (value) => (typeof value === "number" ? `${value * SPACE}px` : value);

/** A colour token, a primitive such as `red-100`, CSS, or one of each for light and dark. */
export function color(value, tokens = TEXT_COLORS) {
  if (!value || NAMES_AN_ADDRESS.test(value)) return undefined;
  if (typeof value === "object") return `light-dark(${color(value.light, tokens)}, ${color(value.dark, tokens)})`;
  if (tokens[value]) return `var(${tokens[value]})`;
  const [, name, step] = /^([a-z]+)-(\d{2,3})$/.exec(value) ?? [];
  if (name === "gray" || name in HUES) return primitive(name, Number(step));
  return HUES[value] === undefined ? value : primitive(value, 500);
}

function primitive(name, step) {
  const lightness = 1 - (step / 1000) * 0.74;
  const chroma = name === "gray" ? 0.01 : 0.12 * Math.sin((Math.PI * Math.min(step, 900)) / 1000) + 0.02;
  return `oklch(${lightness.toFixed(3)} ${chroma.toFixed(3)} ${HUES[name] ?? 260})`;
}

function styleSpacing(element, kind, value) {
  if (value === null || typeof value !== "object") return set(element, kind, space(value));
  const { x, y } = value;
  const sides = { top: value.top ?? y, bottom: value.bottom ?? y, left: value.left ?? x, right: value.right ?? x };
  for (const [side, size] of Object.entries(sides)) set(element, `${kind}-${side}`, space(size));
}

function styleBorder(element, border) {
  if (border === null || border === undefined) return;
  if (typeof border === "number" || "size" in border) return styleEdge(element, "border", border);
  const { x, y } = border;
  const sides = { top: border.top ?? y, bottom: border.bottom ?? y, left: border.left ?? x, right: border.right ?? x };
  for (const [side, edge] of Object.entries(sides)) styleEdge(element, `border-${side}`, edge);
}

function styleEdge(element, property, edge) {
  if (edge === null || edge === undefined) return;
  const { size, color: paint, style } = typeof edge === "number" ? { size: edge } : edge;
  set(element, property, `${size}px ${style ?? "solid"} ${color(paint ?? "default", BORDERS)}`);
}

export function styleSize(element, props) {
  set(element, "width", pixels(props.width ?? props.size));
  set(element, "height", pixels(props.height ?? props.size));
  set(element, "min-width", pixels(props.minWidth ?? props.minSize));
  set(element, "min-height", pixels(props.minHeight ?? props.minSize));
  set(element, "max-width", pixels(props.maxWidth ?? props.maxSize));
  set(element, "max-height", pixels(props.maxHeight ?? props.maxSize));
  set(element, "aspect-ratio", props.aspectRatio);
  set(element, "flex", props.flex);
}

export function styleBox(element, props, direction) {
  styleSize(element, props);
  if (direction) set(element, "flex-direction", direction === "row" ? "row" : "column");
  set(element, "align-items", FLEX[props.align] ?? props.align);
  set(element, "justify-content", FLEX[props.justify] ?? props.justify);
  set(element, "flex-wrap", props.wrap);
  set(element, "gap", space(props.gap));
  styleSpacing(element, "padding", props.padding);
  styleSpacing(element, "margin", props.margin);
  styleBorder(element, props.border);
  set(element, "border-radius", props.radius in RADII ? `${RADII[props.radius]}px` : props.radius);
  set(element, "background-color", color(props.background, SURFACES));
}

export function styleText(element, props) {
  set(element, "color", color(props.color));
  set(element, "width", pixels(props.width));
  set(element, "text-align", props.textAlign);
  if (props.maxLines) {
    element.classList.add("clamped");
    set(element, "-webkit-line-clamp", String(props.maxLines));
  }
  if (props.minLines) set(element, "min-height", `${props.minLines * 1.5}em`);
  element.classList.toggle("truncated", props.truncate === true);
  element.classList.toggle("italic", props.italic === true);
  element.classList.toggle("struck", props.lineThrough === true);
}

export function styleImage(element, props) {
  styleBox(element, props);
  set(element, "object-fit", props.fit);
  set(element, "object-position", props.position);
}

export function styleDivider(element, props) {
  set(element, "border-top-color", color(props.color, BORDERS));
  set(element, "border-top-width", pixels(props.size));
  set(element, "margin-block", space(props.spacing));
}

export function styleSpacer(element, props) {
  set(element, "flex-basis", space(props.minSize));
}
