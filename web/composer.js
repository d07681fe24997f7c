// The message that is being written, and the buttons around it.

import { el } from "./dom.js";
import { icon } from "./icons.js";
import { tabMemory } from "./memory.js";

const find = (selector) => document.querySelector(selector);

const NO_UPLOADS = { isBusy: false, take: () => [], restore: () => {} };

/** A file that is dropped where nothing takes it would be opened in place of the page. */
function keepThePage(event) {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
}

export class Composer {
  #form = find("#composer");
  #field = find("#message");
  #note = find("#composer-note");
  #model = find("#model");
  #send = find("#send");
  #stop = find("#stop");
  #closed = find("#closed");
  #uploads = NO_UPLOADS;
  #onSend;
  #onRefused;
  #state = { isRunning: false, canStop: false };

  constructor(service, settings, { onSend, onStop, onRefused }) {
    this.#onSend = onSend;
    this.#onRefused = onRefused;
    this.#send.append(icon("arrow-up"));
    this.#stop.append(icon("stop"));
    this.#stop.addEventListener("click", onStop);
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    for (const kind of ["dragover", "drop"]) addEventListener(kind, keepThePage);
    this.#field.addEventListener("input", () => this.#update());
    this.#field.addEventListener("keydown", (event) => this.#onKey(event, onStop));
    if (settings.models.length) this.#offerModels(settings.models);
    if (settings.attachments) this.#offerAttachments(service, settings);
    this.#update();
  }

  focus() {
    // On a phone the focus would bring up the keyboard.
    if (matchMedia("(hover: hover)").matches) this.#field.focus();
  }

  /** Say something about the message; nothing to say no more. */
  note(text = "") {
    this.#note.textContent = text;
  }

  /** Have a draft here again that was not sent after all, before what was written meanwhile. */
  restore(draft) {
    this.#field.value = [draft.text, this.#field.value].filter(Boolean).join("\n\n");
    this.#uploads.restore(draft.attachments);
    this.#update();
  }

  /** Fit the thread: whether it is answering, and whether it takes messages at all. */
  show({ isRunning, canStop, status }) {
    this.#state = { isRunning, canStop };
    const isActive = status.type === "active";
    this.#form.hidden = !isActive;
    this.#closed.hidden = isActive;
    this.#closed.replaceChildren(icon("lock"), el("span", {}, status.reason || `This conversation is ${status.type}.`));
    this.#update();
  }

  #submit() {
    const text = this.#field.value.trim();
    if (this.#send.disabled) return;
    this.note(this.#uploads.problem);
    if (this.#uploads.problem) return;
    const draft = { text, attachments: this.#uploads.take(), model: this.#model.value };
    this.#field.value = "";
    this.#update();
    this.#onSend(draft);
  }

  #onKey(event, onStop) {
    // While an input method composes, Enter belongs to it.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.#submit();
    } else if (event.key === "Escape" && this.#state.canStop) {
      onStop();
    }
  }

  #update() {
    const { isRunning, canStop } = this.#state;
    const hasFocus = [this.#send, this.#stop].includes(document.activeElement);
    const isEmpty = !this.#field.value.trim() && find("#attachments").children.length === 0;
    this.#send.hidden = isRunning && canStop;
    this.#send.disabled = isEmpty || isRunning || this.#uploads.isBusy;
    this.#stop.hidden = !(isRunning && canStop);
    if (hasFocus) this.#field.focus(); // the button that had it is gone
    this.#field.style.height = "auto";
    this.#field.style.height = `${Math.min(this.#field.scrollHeight, innerHeight / 3)}px`;
  }

  #offerModels(models) {
    this.#model.hidden = false;
    const names = ["Default model", ...models];
    this.#model.append(...names.map((name, index) => el("option", { value: index ? name : "" }, name)));
    const chosen = tabMemory.getItem("model");
    if (models.includes(chosen)) this.#model.value = chosen;
    this.#model.addEventListener("change", () => tabMemory.setItem("model", this.#model.value));
  }

  /** Take files; the code for it comes with the first of them. */
  async #attach(files, service, settings) {
    const taken = [...files]; // the browser empties its own list
    const { Uploads } = await import("./uploads.js");
    if (this.#uploads === NO_UPLOADS) {
      this.#uploads = new Uploads(service, settings, {
        onChange: () => this.#update(),
        onProblem: (problem) => this.note(problem),
        onRefused: this.#onRefused,
      });
    }
    this.#uploads.add(taken);
  }

  #offerAttachments(service, settings) {
    const take = (list) => this.#attach(list, service, settings);
    const files = find("#files");
    const attach = find("#attach");
    attach.hidden = false;
    attach.append(icon("attach"));
    attach.addEventListener("click", () => files.click());
    files.accept = settings.attachment_types.join(",");
    files.addEventListener("change", () => {
      take(files.files);
      files.value = "";
    });
    this.#field.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length === 0) return;
      event.preventDefault();
      take(event.clipboardData.files);
    });
    this.#takeDrops(take);
  }

  #takeDrops(take) {
    const page = find("main");
    page.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      this.#form.classList.add("drop");
    });
    page.addEventListener("dragleave", (event) => {
      if (!page.contains(event.relatedTarget)) this.#form.classList.remove("drop");
    });
    page.addEventListener("drop", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      this.#form.classList.remove("drop");
      take(event.dataTransfer.files);
    });
  }
}
