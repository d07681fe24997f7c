// Elements without markup: nothing that comes from outside is ever parsed as HTML here.

/**
 * Return an element. `tag` may carry classes ("div.card"), `on…` properties are listeners, all others attributes;
 * those that are null, undefined or false are left out, and so are such children.
 */
export function el(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (isAbsent(value)) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => !isAbsent(child)));
  return element;
}

function isAbsent(value) {
  return value === null || value === undefined || value === false;
}

/** A button that shows an icon only; its name is for those who do not see it, and in a tooltip for those who do. */
export function iconButton(icon, name, onclick, properties = {}) {
  return el("button.icon-button", { type: "button", "aria-label": name, title: name, onclick, ...properties }, icon);
}

/** Copy, and return whether it was allowed. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Plain http beyond this machine has no clipboard API, and a browser may refuse it: there is an older way.
  }
  const focused = document.activeElement;
  const field = el("textarea.visually-hidden");
  field.value = text;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  focused.focus();
  return isCopied;
}

/** A time as short as it can be told today: the hour, the day, or the day with its year. */
export function shortTime(isoTime, now = new Date()) {
  const time = new Date(isoTime);
  if (Number.isNaN(time.getTime())) return el("span");
  const sameYear = time.getFullYear() === now.getFullYear();
  const format =
    time.toDateString() === now.toDateString()
      ? { hour: "2-digit", minute: "2-digit" }
      : { day: "numeric", month: "short", year: sameYear ? undefined : "numeric" };
  const text = new Intl.DateTimeFormat(undefined, format).format(time);
  return el("time", { datetime: isoTime, title: time.toLocaleString() }, text);
}
