// What was said: messages of the user and of the assistant, with their sources, attachments and actions.

import { imageAddress, LINK_ATTRIBUTES, linkAddress } from "./addresses.js";
import { el, iconButton } from "./dom.js";
import { icon } from "./icons.js";
import { copied, MarkdownView } from "./markdown.js";

export class UserMessage {
  constructor(item) {
    this.item = item;
    this.element = el(
      "article.user",
      {},
      el("h2.visually-hidden", {}, "You said"),
      item.quoted_text && el("blockquote.quoted", {}, item.quoted_text),
      item.attachments.length > 0 && el("ul.attachments", {}, item.attachments.map(drawAttachment)),
      item.content.length > 0 && el("div.bubble", {}, item.content.map(drawUserContent)),
    );
  }
}

/** The user's words alone, as they go back into the message field. */
export function userText(item) {
  return item.content.map((part) => part.text).join("");
}

function drawUserContent(part) {
  return part.type === "input_tag" ? el("span.tag", {}, part.text) : el("span", {}, part.text);
}

function drawAttachment(attachment) {
  const address = attachment.preview_url && imageAddress(attachment.preview_url);
  if (address) return el("li.picture", {}, el("img", { src: address, alt: attachment.name, loading: "lazy" }));
  return el("li.chip", {}, icon(attachment.type === "image" ? "image" : "document"), el("span", {}, attachment.name));
}

export class AssistantMessage {
  #parts = [];
  #body = el("div");
  #foot = el("div.foot");
  #host;

  constructor(item, host) {
    this.#host = host;
    this.element = el("article.assistant", {}, el("h2.visually-hidden", {}, "Answer"), this.#body, this.#foot);
    this.replace(item);
  }

  /** Show the item as it is now; without `done` more of it may come. */
  replace(item, done = true) {
    this.item = item;
    item.content.forEach((content, index) => this.#part(index).finish(content.text));
    this.#drawSources();
    if (done) this.finish();
  }

  apply(update) {
    const index = update.content_index;
    const part = this.#part(index);
    const contents = this.item.content;
    while (contents.length <= index) contents.push({ type: "output_text", text: "", annotations: [] });
    switch (update.type) {
      case "assistant_message.content_part.text_delta":
        contents[index].text += update.delta;
        part.append(update.delta);
        break;
      case "assistant_message.content_part.annotation_added":
        contents[index].annotations.splice(update.annotation_index, 0, update.annotation);
        this.#drawSources();
        break;
      default: // a part was added, or is done: it is told as a whole
        contents[index] = update.content;
        part.finish(update.content.text);
        this.#drawSources();
    }
  }

  /** Nothing more will come: offer what can be done with an answer. */
  finish() {
    for (const part of this.#parts) part.finish();
    if (!this.text.trim()) return;
    const copy = iconButton(icon("copy"), "Copy answer", () => copied(copy, this.text));
    this.#foot.replaceChildren(copy, ...this.#feedbackButtons());
  }

  get text() {
    return this.item.content.map((content) => content.text).join("\n\n");
  }

  #part(index) {
    while (this.#parts.length <= index) {
      const part = new MarkdownView();
      this.#parts.push(part);
      this.#body.append(part.element, el("ol.sources", { "aria-label": "Sources", hidden: true }));
    }
    return this.#parts[index];
  }

  #drawSources() {
    this.item.content.forEach((content, index) => {
      const list = this.#part(index).element.nextElementSibling;
      const annotations = content.annotations ?? [];
      list.hidden = annotations.length === 0;
      list.replaceChildren(...annotations.map((annotation) => el("li", {}, drawSource(annotation.source))));
    });
  }

  #feedbackButtons() {
    const kinds = { positive: "Good answer", negative: "Bad answer" };
    const buttons = Object.entries(kinds).map(([kind, name]) =>
      iconButton(icon(kind === "positive" ? "thumb-up" : "thumb-down"), name, (event) => give(kind, event), {
        "aria-pressed": "false",
      }),
    );
    const give = async (kind, event) => {
      const pressed = event.currentTarget;
      if (!(await this.#host.giveFeedback(this.item, kind))) return;
      for (const button of buttons) button.setAttribute("aria-pressed", String(button === pressed));
    };
    return buttons;
  }
}

export function drawSource(source) {
  const address = source.type === "url" && linkAddress(source.url);
  const title = source.title || source.filename || source.url || source.id;
  const from = source.attribution || (address && new URL(address).hostname) || source.filename;
  return [
    address ? el("a", { href: address, ...LINK_ATTRIBUTES }, title) : el("span", {}, title),
    from && from !== title && el("span.from", {}, ` ${from}`),
    source.description && el("span.description", {}, ` ${source.description}`),
  ];
}

export class GeneratedImage {
  #progress = null;

  constructor(item) {
    this.item = item;
    this.element = el("article.generated", {}, el("h2.visually-hidden", {}, "Generated image"));
    this.#draw();
  }

  replace(item) {
    this.item = item;
    this.#progress = null;
    this.#draw();
  }

  apply(update) {
    this.item.image = update.image;
    this.#progress = update.progress ?? null;
    this.#draw();
  }

  finish() {
    this.#progress = null;
    this.#draw();
  }

  #draw() {
    const url = this.item.image?.url;
    const address = url && imageAddress(url);
    const isDrawing = this.#progress !== null && this.#progress < 1;
    this.element.replaceChildren(
      this.element.firstElementChild,
      address
        ? el("img", { src: address, alt: "Generated image" })
        : el("p.not-loaded", {}, url ? `Image: ${url}` : "An image is being drawn …"),
      isDrawing ? el("progress", { value: this.#progress, max: 1, "aria-label": "Image progress" }) : "",
    );
  }
}
