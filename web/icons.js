// Line drawings on a grid of 24, drawn for this page. ChatKit's names for icons lead to the nearest one.

const DRAWINGS = {
  __proto__: null, // names come from outside
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  dots: "M5 11.6a.4.4 0 1 0 .01 0zM12 11.6a.4.4 0 1 0 .01 0zM19 11.6a.4.4 0 1 0 .01 0z",
  write: "M4 20l1-4L16 5l3 3L8 19l-4 1zM14 7l3 3",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10 11v5M14 11v5",
  copy: "M9 9h10v10H9zM5 15V5h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  "thumb-up": "M8 11v8H4.5v-8zM8 11l3.5-7c1.6 0 2.6 1.2 2.3 2.7L13.3 9h5c1.2 0 2 1.1 1.7 2.2l-1.7 6.3c-.2.9-1 1.5-1.9 1.5H8",
  "thumb-down": "M16 13V5h3.5v8zM16 13l-3.5 7c-1.6 0-2.6-1.2-2.3-2.7l.5-2.3h-5c-1.2 0-2-1.1-1.7-2.2l1.7-6.3c.2-.9 1-1.5 1.9-1.5H16",
  reload: "M19 12a7 7 0 1 1-2-4.9M17 3v4.5h-4.5",
  "arrow-up": "M12 19V6M6.5 11.5L12 6l5.5 5.5",
  "arrow-down": "M12 5v13M6.5 12.5L12 18l5.5-5.5",
  stop: "M8 8h8v8H8z",
  attach: "M18 11l-6.5 6.5a4 4 0 0 1-5.7-5.7L13 4.6a2.7 2.7 0 0 1 3.8 3.8l-7 7a1.3 1.3 0 0 1-1.9-1.9L14 7.5",
  sun: "M12 8.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7zM12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6L7 7M17 17l1.4 1.4M5.6 18.4L7 17M17 7l1.4-1.4",
  moon: "M19 14.5A7.5 7.5 0 0 1 9.5 5a7.5 7.5 0 1 0 9.5 9.5z",
  exit: "M10 5H5v14h5M14 8l4 4-4 4M18 12H9",
  warning: "M12 4l9 16H3zM12 10v4M12 17h.01",
  info: "M12 3.5a8.5 8.5 0 1 0 0 17 8.5 8.5 0 0 0 0-17zM12 11v5M12 8h.01",
  "circle-question": "M12 3.5a8.5 8.5 0 1 0 0 17 8.5 8.5 0 0 0 0-17zM9.8 9.5c.3-1.3 1.2-2 2.3-2 1.3 0 2.3.9 2.3 2.1 0 1.7-2.4 1.9-2.4 3.7M12 16.5h.01",
  lock: "M6 11h12v9H6zM8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  "chevron-right": "M9 5l7 7-7 7",
  "chevron-left": "M15 5l-7 7 7 7",
  "external-link": "M14 4h6v6M20 4l-9 9M18 14v6H4V6h6",
  search: "M10.5 4a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM15.5 15.5L20 20",
  globe: "M12 3.5a8.5 8.5 0 1 0 0 17 8.5 8.5 0 0 0 0-17zM3.5 12h17M12 3.5c-5 5-5 12 0 17M12 3.5c5 5 5 12 0 17",
  document: "M6 3h8l4 4v14H6zM14 3v4h4M9 12h6M9 16h6",
  image: "M4 5h16v14H4zM8.5 8.5a1.5 1.5 0 1 0 0 3 1.5 1.5 0 0 0 0-3zM4 17l5-4 4 3 3-3 4 3",
  lightbulb: "M9 17h6M10 20h4M9 17c0-2-3-3.5-3-7a6 6 0 0 1 12 0c0 3.5-3 5-3 7",
  sparkle: "M12 4l1.8 6.2L20 12l-6.2 1.8L12 20l-1.8-6.2L4 12l6.2-1.8z",
  bolt: "M13 3L5 14h6l-1 7 8-11h-6z",
  star: "M12 4l2.4 5.2 5.6.7-4.1 3.9 1.1 5.7-5-2.8-5 2.8 1.1-5.7L4 9.9l5.6-.7z",
  mail: "M3 6h18v12H3zM3 7l9 7 9-7",
  calendar: "M4 6h16v14H4zM4 10h16M8 3.5V8M16 3.5V8",
  clock: "M12 3.5a8.5 8.5 0 1 0 0 17 8.5 8.5 0 0 0 0-17zM12 7.5V12l3 2",
  user: "M12 4a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM4.5 20c.8-4 3.8-6 7.5-6s6.7 2 7.5 6",
  phone: "M7 4l3 4-2 2c1 2.5 3 4.5 5.5 5.5l2-2 4 3-1.5 3.5C10 20.5 3.5 14 4 5.5z",
  "map-pin": "M12 21c-4-4.5-6.5-8-6.5-11a6.5 6.5 0 0 1 13 0c0 3-2.5 6.5-6.5 11zM12 8a2 2 0 1 0 0 4 2 2 0 0 0 0-4z",
  play: "M8 5l11 7-11 7z",
  book: "M12 6c-2-1.5-5-2-8-2v14c3 0 6 .5 8 2 2-1.5 5-2 8-2V4c-3 0-6 .5-8 2zM12 6v14",
  chart: "M4 20h16M7 20v-7M12 20V5M17 20v-10",
  key: "M8 11a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM11 12l8-8M16 7l3 3",
  cube: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
  settings: "M4 8h9M17 8h3M4 16h3M11 16h9M15 5.5v5M9 13.5v5",
  suitcase: "M4 8h16v11H4zM9 8V5h6v3M4 13h16",
  code: "M9 8l-4 4 4 4M15 8l4 4-4 4",
  circle: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16z",
  dot: "M12 10.5a1.5 1.5 0 1 0 0 3 1.5 1.5 0 0 0 0-3z",
  device: "M4 5h16v11H4zM9 20h6M12 16v4",
};

const NEAREST = {
  __proto__: null,
  agent: "sparkle", analytics: "chart", atom: "sparkle", batch: "cube", "book-clock": "book", "book-closed": "book",
  "book-open": "book", bug: "warning", "check-circle": "check", "check-circle-filled": "check", compass: "map-pin",
  confetti: "sparkle", desktop: "device", "dots-horizontal": "dots", "dots-vertical": "dots", "empty-circle": "circle",
  images: "image", keys: "key", lab: "lightbulb", lifesaver: "circle-question", maps: "map-pin", mobile: "phone",
  name: "user", notebook: "book", "notebook-pencil": "write", "page-blank": "document", profile: "user",
  "profile-card": "user", "settings-slider": "settings", "sparkle-double": "sparkle", "square-code": "code",
  "square-image": "image", "square-text": "document", "star-filled": "star", wreath: "star", "write-alt": "write",
  "write-alt2": "write",
};

const SVG = "http://www.w3.org/2000/svg";

/** Return an icon by one of our names or ChatKit's ("lucide:…" too); it means nothing to a screen reader. */
export function icon(name) {
  const plain = String(name).replace(/^(lucide|vendor):/, "");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", DRAWINGS[plain] ?? DRAWINGS[NEAREST[plain]] ?? DRAWINGS.dot);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(path);
  return svg;
}
