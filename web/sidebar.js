// The list of conversations, the one with the last activity first.

import { el, iconButton, shortTime } from "./dom.js";
import { icon } from "./icons.js";

const PAGE_SIZE = 30;
const MOST = 100; // that the service gives at once

export class ThreadList {
  #service;
  #host;
  #list = document.querySelector("#threads");
  #older = document.querySelector("#older-threads");
  #threads = [];
  #after = null;
  #current = null;
  #running = new Set();
  #knownWords = new Map(); // first words of threads without a title

  constructor(service, host) {
    this.#service = service;
    this.#host = host;
    this.#older.addEventListener("click", () => this.loadOlder());
  }

  /** Load the list anew, as far as it was shown. */
  async load() {
    const limit = Math.min(MOST, Math.max(PAGE_SIZE, this.#threads.length));
    const page = await this.#service.request("threads.list", { limit, order: "desc" });
    const rest = this.#threads.length > limit ? this.#threads.slice(limit) : [];
    const known = new Set(page.data.map((thread) => thread.id));
    if (rest.length === 0) this.#after = page.has_more ? page.after : null;
    this.#threads = [...page.data, ...rest.filter((thread) => !known.has(thread.id))];
    this.#draw();
  }

  async loadOlder() {
    this.#older.disabled = true;
    try {
      const params = { limit: PAGE_SIZE, order: "desc", after: this.#after };
      const page = await this.#service.request("threads.list", params);
      this.#after = page.has_more ? page.after : null;
      const known = new Set(this.#threads.map((thread) => thread.id));
      const older = page.data.filter((thread) => !known.has(thread.id));
      this.#threads.push(...older);
      this.#draw();
      this.#row(older[0]?.id)?.querySelector("a").focus();
    } catch (error) {
      this.#host.onFailure(error);
    } finally {
      this.#older.disabled = false;
    }
  }

  /** Show the thread as it is now, at the top when it is new. */
  show(thread, firstWords) {
    if (firstWords) this.#knownWords.set(thread.id, firstWords);
    const place = this.#threads.findIndex(({ id }) => id === thread.id);
    if (place < 0) this.#threads.unshift(thread);
    else this.#threads[place] = thread;
    this.#draw();
  }

  mark(currentId, runningIds) {
    this.#current = currentId;
    this.#running = new Set(runningIds);
    this.#draw();
  }

  titleOf(thread) {
    return thread.title || this.#knownWords.get(thread.id) || "Conversation";
  }

  #row(id) {
    return this.#list.querySelector(`[data-thread="${CSS.escape(id ?? "")}"]`);
  }

  #draw() {
    const focused = document.activeElement?.closest?.("[data-thread]")?.dataset.thread;
    const isMenu = document.activeElement?.matches?.(".icon-button");
    const rows = new Set(this.#threads.map((thread) => this.#rowOf(thread)));
    for (const row of [...this.#list.children]) if (!rows.has(row)) row.remove();
    let place = this.#list.firstElementChild;
    for (const row of rows) {
      if (row === place) place = row.nextElementSibling;
      else this.#list.insertBefore(row, place);
    }
    this.#older.hidden = this.#after === null;
    if (focused) this.#row(focused)?.querySelector(isMenu ? "button" : "a").focus();
  }

  /** A row that would look the same stays the same: it may be under a click just now. */
  #rowOf(thread) {
    const [shown, drawn] = [this.#row(thread.id), this.#drawRow(thread)];
    return shown?.isEqualNode(drawn) ? shown : drawn;
  }

  #drawRow(thread) {
    const title = this.titleOf(thread);
    const isCurrent = thread.id === this.#current;
    const link = el(
      "a",
      {
        href: this.#host.addressOf(thread.id),
        "aria-current": isCurrent && "page",
        onclick: (event) => this.#open(event, thread.id),
      },
      el("bdi", {}, title),
      this.#running.has(thread.id) ? el("span.running", {}, "answering …") : shortTime(thread.created_at),
    );
    const menu = iconButton(icon("dots"), `Rename or delete “${title}”`, () => this.#showMenu(menu, thread));
    return el("li", { "data-thread": thread.id }, link, menu);
  }

  #open(event, id) {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return; // a new tab was asked for
    event.preventDefault();
    this.#host.open(id);
  }

  #showMenu(button, thread) {
    const choose = (action) => () => {
      menu.hidePopover();
      action.call(this, thread);
    };
    const menu = el(
      "div.menu",
      { popover: "auto" },
      el("button", { type: "button", onclick: choose(this.#rename) }, icon("write"), "Rename"),
      el("button", { type: "button", onclick: choose(this.#delete) }, icon("trash"), "Delete"),
    );
    this.#list.after(menu); // not in the row, which may be drawn anew meanwhile
    menu.addEventListener("toggle", (event) => {
      if (event.newState === "closed") menu.remove();
      else menu.querySelector("button").focus();
    });
    menu.showPopover();
    const place = button.getBoundingClientRect();
    menu.style.top = `${Math.min(place.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
    menu.style.left = `${Math.max(8, place.right - menu.offsetWidth)}px`;
  }

  async #rename(thread) {
    const { askForText } = await import("./dialogs.js");
    const title = await askForText("Rename the conversation", "Title", this.titleOf(thread), "Rename");
    if (title) {
      await this.#change(async () => {
        const renamed = await this.#service.request("threads.update", { thread_id: thread.id, title });
        this.show(renamed);
        this.#host.onRenamed(renamed);
      });
    }
    this.#row(thread.id)?.querySelector("a").focus();
  }

  async #delete(thread) {
    const { askToConfirm } = await import("./dialogs.js");
    const question = `“${this.titleOf(thread)}” and all its messages will be gone for good.`;
    if (!(await askToConfirm("Delete the conversation?", question, "Delete"))) return;
    await this.#change(async () => {
      await this.#service.request("threads.delete", { thread_id: thread.id });
      this.#threads = this.#threads.filter(({ id }) => id !== thread.id);
      this.#draw();
      this.#host.onDeleted(thread.id);
    });
  }

  async #change(change) {
    try {
      await change();
    } catch (error) {
      this.#host.onFailure(error);
    }
  }
}
