// Widgets: ChatKit's components as elements. A component that is not known, or not as it should be, is shown as what
// it says; none can break the page.

import { imageAddress } from "./addresses.js";
import { drawChart } from "./chart.js";
import { el } from "./dom.js";
import { icon } from "./icons.js";
import { markdown } from "./markdown.js";
import * as style from "./widgetstyle.js";

await new Promise((resolve) => {
  const styles = el("link", { rel: "stylesheet", href: new URL("widgets.css", import.meta.url).href });
  styles.addEventListener("load", resolve);
  styles.addEventListener("error", resolve); // unstyled is better than unseen
  document.head.append(styles);
});

export class Widget {
  #host;
  #fieldCount = 0;

  constructor(item, host) {
    this.#host = host;
    this.element = el("article.widget");
    this.replace(item);
  }

  replace(item) {
    this.item = item;
    const focused = focusPath(this.element);
    this.element.replaceChildren(el("h2.visually-hidden", {}, "Answer"), this.#draw(item.widget));
    focusAt(this.element, focused);
  }

  apply(update) {
    switch (update.type) {
      case "widget.root.updated":
        return this.replace({ ...this.item, widget: update.widget });
      case "widget.component.updated":
        return this.#change(update.component_id, (component) => {
          for (const key of Object.keys(component)) delete component[key];
          Object.assign(component, update.component);
        });
      case "widget.streaming_text.value_delta":
        return this.#change(update.component_id, (component) => {
          component.value = (component.value ?? "") + update.delta;
          component.streaming = !update.done;
        });
    }
  }

  /** Change one component and draw it alone. */
  #change(id, change) {
    const component = findComponent(this.item.widget, id);
    if (!component) return;
    change(component);
    const drawn = this.element.querySelector(`[data-component="${CSS.escape(id)}"]`);
    drawn?.replaceWith(this.#draw(component));
  }

  #draw = (component) => {
    let element;
    try {
      element = (Object.hasOwn(drawers, component.type) ? drawers[component.type] : drawUnknown)(component, this);
    } catch {
      element = drawUnknown(component, this);
    }
    if (component?.id) element.dataset.component = component.id;
    if (component?.theme) element.dataset.theme = component.theme;
    return element;
  };

  children(component) {
    return [component.children ?? []].flat().map(this.#draw);
  }

  fieldId(name) {
    return `${this.item.id}-${name}-${this.#fieldCount++}`;
  }

  /** Run an action with the values of the form around it, and show that it runs as it asks to be shown. */
  async act(action, source, { values = {}, auto = "self" } = {}) {
    const form = source.closest("form");
    const payload = withValues(action.payload, { ...(form && formValues(form)), ...values });
    const behavior = !action.loadingBehavior || action.loadingBehavior === "auto" ? auto : action.loadingBehavior;
    const busy = { self: source, container: this.element }[behavior];
    busy?.classList.add("busy");
    if (busy) busy.inert = true;
    try {
      await this.#host.act(this.item, { ...action, payload });
    } finally {
      busy?.classList.remove("busy");
      if (busy) busy.inert = false;
    }
  }
}

function findComponent(component, id) {
  if (component?.id === id) return component;
  for (const child of [component?.children ?? []].flat()) {
    const found = findComponent(child, id);
    if (found) return found;
  }
  return null;
}

// A widget that is drawn anew keeps the focus where it was, counted among all that can have it.
const FOCUSABLE = "button, input, select, textarea, a[href], summary";

function focusPath(element) {
  return [...element.querySelectorAll(FOCUSABLE)].indexOf(document.activeElement);
}

function focusAt(element, place) {
  if (place >= 0) element.querySelectorAll(FOCUSABLE)[place]?.focus();
}

// --- forms -----------------------------------------------------------------------------------------------------------

/** Return the values of a form's fields by name. */
function formValues(form) {
  const values = {};
  for (const field of form.elements) {
    if (!field.name || (field.type === "radio" && !field.checked)) continue;
    values[field.dataset.name ?? field.name] = field.type === "checkbox" ? field.checked : field.value;
  }
  return values;
}

/** Return the payload with the values in it: `todo.title` goes to `payload.todo.title`, and what is there stays. */
export function withValues(payload, values) {
  if (Object.keys(values).length === 0 || !isObject(payload ?? {})) return payload;
  const merged = structuredClone(payload ?? {});
  for (const [name, value] of Object.entries(values)) {
    const path = name.split(".");
    const last = path.pop();
    let at = merged;
    for (const step of path) if (isObject(at)) at = Object.hasOwn(at, step) ? at[step] : (at[step] = {});
    if (isObject(at) && !Object.hasOwn(at, last)) at[last] = value;
  }
  return merged;
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

function onSubmit(form, run) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(event.submitter ?? form);
  });
  return form;
}

/** Finish a field: its name, and its action for when it changes. */
function field(element, component, widget, value = () => element.value) {
  element.id ||= widget.fieldId(component.name);
  element.setAttribute("name", component.name);
  if (component.disabled) element.disabled = true;
  if (component.required) element.required = true;
  if (component.block) element.classList.add("block");
  if (component.pill) element.classList.add("pill");
  if (component.autoFocus) requestAnimationFrame(() => element.focus());
  if (component.onChangeAction) {
    element.addEventListener("change", () =>
      widget.act(component.onChangeAction, element, { values: { [component.name]: value() }, auto: "none" }),
    );
  }
  return element;
}

/** A field that no Label describes is called by its placeholder or its name. */
function named(element, component) {
  requestAnimationFrame(() => {
    const root = element.closest("form, article.widget");
    const label = root?.querySelector(`label[data-field="${CSS.escape(component.name)}"]`);
    if (label) label.htmlFor = element.id;
    else element.setAttribute("aria-label", component.placeholder ?? component.name);
  });
  return element;
}

const day = (time) => (time ? String(time).slice(0, 10) : undefined);

// --- components ------------------------------------------------------------------------------------------------------

function box(tag, direction) {
  return (component, widget) => {
    const element = el(tag, {}, widget.children(component));
    style.styleBox(element, component, component.direction ?? direction);
    return element;
  };
}

function text(tag, sized) {
  return (component) => {
    const element = el(tag, { "data-size": component.size, "data-weight": component.weight }, String(component.value));
    if (sized) element.setAttribute("role", "heading");
    if (sized) element.setAttribute("aria-level", "3");
    style.styleText(element, component);
    return element;
  };
}

const drawers = {
  Basic: box("div.box", "col"),
  Box: box("div.box", "col"),
  Row: box("div.box.row", "row"),
  Col: box("div.box", "col"),
  Transition: box("div.box", "col"),
  Card: drawCard,
  ListView: drawList,
  ListViewItem: drawListItem,
  Form(component, widget) {
    const form = box("form.box", "col")(component, widget);
    const action = component.onSubmitAction;
    return onSubmit(form, (source) => action && widget.act(action, source, { auto: "container" }));
  },
  Title: text("p.title", true),
  Caption: text("p.caption"),
  Text(component, widget) {
    if (!component.editable) return text("p.text")(component);
    const input = el("input.text", { value: component.value, placeholder: component.editable.placeholder });
    if (component.editable.pattern) input.pattern = component.editable.pattern;
    return named(field(input, component.editable, widget), component.editable);
  },
  Markdown: (component) => el("div", {}, markdown(String(component.value))),
  Label(component) {
    const label = text("label.label")(component);
    label.dataset.field = component.fieldName;
    return label;
  },
  Badge: ({ label, color, variant, size, pill }) =>
    el("span.badge", { "data-color": color, "data-variant": variant, "data-size": size, "data-pill": pill }, label),
  Icon(component) {
    const element = el("span.widget-icon", { "data-size": component.size }, icon(component.name));
    style.styleText(element, { color: component.color });
    return element;
  },
  Image: drawImage,
  Divider(component) {
    const rule = el("hr", { "data-flush": component.flush });
    style.styleDivider(rule, component);
    return rule;
  },
  Spacer(component) {
    const spacer = el("div.spacer");
    style.styleSpacer(spacer, component);
    return spacer;
  },
  Button: drawButton,
  Input: (component, widget) =>
    named(
      field(
        el("input", {
          type: component.inputType ?? "text",
          value: component.defaultValue,
          placeholder: component.placeholder,
          pattern: component.pattern,
          autocomplete: "off",
        }),
        component,
        widget,
      ),
      component,
    ),
  Textarea: (component, widget) =>
    named(
      field(
        el("textarea", { rows: component.rows ?? 3, placeholder: component.placeholder }, component.defaultValue ?? ""),
        component,
        widget,
      ),
      component,
    ),
  Select: drawSelect,
  DatePicker: (component, widget) =>
    named(
      field(
        el("input", {
          type: "date",
          value: day(component.defaultValue),
          min: day(component.min),
          max: day(component.max),
        }),
        component,
        widget,
      ),
      component,
    ),
  Checkbox(component, widget) {
    const input = el("input", { type: "checkbox", checked: component.defaultChecked });
    field(input, component, widget, () => input.checked);
    return el("label.choice", {}, input, component.label ?? component.name);
  },
  RadioGroup: drawRadioGroup,
  Chart: drawSizedChart,
  Table: (component, widget) => el("div.table", {}, el("table", {}, el("tbody", {}, widget.children(component)))),
  "Table.Row": (component, widget) => el("tr", {}, widget.children(component)),
  "Table.Cell": (component, widget) => el("td", {}, widget.children(component)),
};
drawers.TableRow = drawers["Table.Row"];
drawers.TableCell = drawers["Table.Cell"];

function drawCard(component, widget) {
  const card = el(component.asForm ? "form.card" : "div.card", { "data-size": component.size });
  const body = el("div.box", {}, widget.children(component));
  const { background, border, padding } = component;
  style.styleBox(card, { background, border, padding });
  if (component.status) card.append(drawStatus(component.status));
  card.append(component.collapsed ? el("details", {}, el("summary", {}, "Show"), body) : body);
  const { confirm, cancel } = component;
  const run = (each, source) => each && widget.act(each.action, source, { auto: "container" });
  const cancelButton =
    cancel && el("button.quiet-button", { type: "button", onclick: (event) => run(cancel, event.target) }, cancel.label);
  const confirmButton = confirm && el("button.button", { type: component.asForm ? "submit" : "button" }, confirm.label);
  if (confirm || cancel) card.append(el("div.card-foot", {}, cancelButton, confirmButton));
  if (component.asForm) onSubmit(card, (source) => run(confirm, source));
  else confirmButton?.addEventListener("click", () => run(confirm, confirmButton));
  return card;
}

function drawStatus(status) {
  const favicon = status.favicon && imageAddress(status.favicon);
  const mark = favicon ? el("img", { src: favicon, alt: "" }) : status.icon && icon(status.icon);
  return el("p.status", {}, mark, status.text);
}

function drawList(component, widget) {
  const items = widget.children(component);
  const limit = component.limit >= 1 ? Math.floor(component.limit) : items.length;
  const list = el("ul.list", {}, items.slice(0, limit));
  const more = el("button.quiet-button", { type: "button" }, "Show more");
  more.addEventListener("click", () => {
    list.append(...items.slice(limit));
    more.remove();
    items[limit].querySelector("button")?.focus();
  });
  return el("div.card", {}, component.status && drawStatus(component.status), list, limit < items.length && more);
}

function drawListItem(component, widget) {
  const row = el("div.box.row", {}, widget.children(component));
  style.styleBox(row, { gap: component.gap, align: component.align });
  const item = el("li", {}, row);
  if (component.onClickAction) {
    // It covers the row; buttons in the row stand above it.
    const open = el("button.cover", { type: "button", "aria-label": row.textContent.trim() || "Open" });
    open.addEventListener("click", () => widget.act(component.onClickAction, open));
    item.prepend(open);
  }
  return item;
}

function drawButton(component, widget) {
  const { label, iconStart, iconEnd, onClickAction } = component;
  const colour = component.color ?? component.style ?? "secondary";
  const button = el(
    "button.widget-button",
    {
      type: component.submit ? "submit" : "button",
      disabled: component.disabled,
      "aria-label": label ? undefined : (iconStart ?? "Button"),
      "data-color": colour,
      "data-variant": component.variant ?? (colour === "primary" ? "solid" : "soft"),
      "data-size": component.size,
      "data-pill": component.pill,
      "data-block": component.block,
      "data-uniform": component.uniform,
    },
    iconStart && icon(iconStart),
    label,
    iconEnd && icon(iconEnd),
  );
  if (onClickAction && !component.submit) button.addEventListener("click", () => widget.act(onClickAction, button));
  return button;
}

function drawImage(component) {
  const address = imageAddress(component.src);
  if (!address) return el("p.not-loaded", {}, `Image: ${component.alt ?? ""} (${component.src})`);
  const image = el("img.widget-image", { src: address, alt: component.alt ?? "", "data-frame": component.frame });
  style.styleImage(image, component);
  return image;
}

function drawSelect(component, widget) {
  const options = component.options.map(({ value, label, disabled, description }) =>
    el("option", { value, disabled, selected: value === component.defaultValue }, description ? `${label} – ${description}` : label),
  );
  const empty = el("option", { value: "" }, component.placeholder ?? "");
  const isEmptyOffered = component.clearable || component.defaultValue === undefined;
  return named(field(el("select", {}, isEmptyOffered && empty, options), component, widget), component);
}

function drawRadioGroup(component, widget) {
  const group = widget.fieldId(component.name); // groups of the same name in two widgets are two groups
  const choices = (component.options ?? []).map((option) => {
    const { value, label, disabled } = option;
    const input = el("input", { type: "radio", value, checked: value === component.defaultValue });
    field(input, { ...component, disabled: component.disabled || disabled }, widget);
    input.name = group;
    input.dataset.name = component.name;
    return el("label.choice", {}, input, label);
  });
  const label = component.ariaLabel ?? component.name;
  return el("div.box", { role: "radiogroup", "aria-label": label, "data-direction": component.direction }, choices);
}

function drawSizedChart(component) {
  const chart = drawChart(component);
  style.styleSize(chart, component);
  return chart;
}

/** What a component says, and its children. */
function drawUnknown(component, widget) {
  const words = ["title", "label", "value", "text", "name", "alt"].map((key) => component?.[key]).filter(isText);
  let children = [];
  try {
    children = widget.children(component ?? {});
  } catch {
    // It is no component at all.
  }
  const unreadable = words.length + children.length === 0 ? JSON.stringify(component) : "";
  return el("div.unknown", {}, words.map((word) => el("p", {}, String(word))), children, unreadable);
}

const isText = (value) => typeof value === "string" || typeof value === "number";
