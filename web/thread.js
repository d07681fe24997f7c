// One conversation: its items as they are stored, and the turn that is adding to them.

import { runTool, carryOut, clientActions } from "./clienttools.js";
import { el } from "./dom.js";
import { icon } from "./icons.js";
import { markdown } from "./markdown.js";
import { AssistantMessage, GeneratedImage, UserMessage, userText } from "./messages.js";
import { ConnectionLost, Refusal } from "./protocol.js";

const PAGE_SIZE = 50;
const CHUNK_SIZE = 20;
const LOOK_AGAIN_SECONDS = 3;

const VIEWS = {
  user_message: UserMessage,
  assistant_message: AssistantMessage,
  generated_image: GeneratedImage,
};

/** Views that many conversations do without; fetched when the first item of their kind comes. */
const RARE_VIEWS = {
  widget: async () => (await import("./widgets.js")).Widget,
  workflow: async () => (await import("./workflow.js")).Workflow,
  task: async () => (await import("./workflow.js")).TaskItem,
  structured_input: async () => (await import("./questions.js")).Questions,
};

async function prepareViews(items) {
  for (const { type } of items) {
    if (RARE_VIEWS[type] && !VIEWS[type]) VIEWS[type] = await RARE_VIEWS[type]();
  }
}

export class Conversation extends EventTarget {
  #service;
  #announce;
  #views = new Map(); // by item id, in the order of the thread
  #open = new Set(); // ids of items that the running turn has not finished
  #earlier = null; // the cursor of older items; null when there are none
  #turn = null;
  #turnCount = 0;
  #notice = null; // what is to be said about the last turn
  #follows = true;
  #scrolledTo = 0;
  #lookAgain = 0;
  #isAnsweredElsewhere = false; // in another tab, or since before a reload

  #items = el("div.items");
  #progress = el("p.progress", { role: "status", hidden: true });
  #tail = el("div.tail");
  #more = el("button.quiet-button", { type: "button", hidden: true, onclick: () => this.loadEarlier() }, "Show earlier");
  #content = el("div.content", {}, this.#more, this.#items, this.#progress, this.#tail);
  #toEnd = el("button.to-end", { type: "button", "aria-label": "Go to the end", hidden: true }, icon("arrow-down"));
  #scroller = el("div.scroller", { tabindex: 0, role: "region", "aria-label": "Messages" }, this.#content);
  element = el("section.thread", { "aria-label": "Conversation" }, this.#scroller, this.#toEnd);

  constructor(service, announce, id = null) {
    super();
    this.#service = service;
    this.#announce = announce;
    this.id = id;
    this.thread = null;
    this.#scroller.addEventListener("scroll", () => this.#onScroll(), { passive: true });
    this.#toEnd.addEventListener("click", () => this.scrollToEnd());
    new ResizeObserver(() => this.#follows && this.scrollToEnd()).observe(this.#content);
    // What is above comes when it is scrolled to; the button is for those who do not scroll.
    new IntersectionObserver((seen) => seen.some((each) => each.isIntersecting) && this.loadEarlier()).observe(this.#more);
  }

  get isRunning() {
    return this.#turn !== null;
  }

  get canStop() {
    return this.#turn?.canStop ?? false;
  }

  get status() {
    return this.thread?.status ?? { type: "active" };
  }

  // --- what is stored -----------------------------------------------------------------------------------------------

  /** Load the thread and its newest items. */
  async load() {
    const [thread, page] = await this.#loadNewest();
    this.#setThread(thread);
    this.#setEarlier(page);
    this.#items.replaceChildren();
    this.#views.clear();
    for (const item of page.data.reverse()) this.#put(item);
    this.#drawTail();
    this.scrollToEnd();
  }

  /** Ask for the thread and then its items: when it says that no answer is being written, they are all there. */
  async #loadNewest() {
    const thread = await this.#service.request("threads.get_by_id", { thread_id: this.id }, { is_answering: true });
    const page = await this.#service.request("items.list", { thread_id: this.id, limit: PAGE_SIZE, order: "desc" });
    await prepareViews(page.data);
    return [thread, page];
  }

  async loadEarlier() {
    if (!this.#earlier || this.#more.disabled) return;
    this.#more.disabled = true;
    try {
      const params = { thread_id: this.id, limit: PAGE_SIZE, order: "desc", after: this.#earlier };
      const page = await this.#service.request("items.list", params);
      await prepareViews(page.data);
      const fromEnd = this.#scroller.scrollHeight - this.#scroller.scrollTop;
      this.#setEarlier(page);
      this.#prepend(page.data.reverse());
      this.#scroller.scrollTop = this.#scroller.scrollHeight - fromEnd;
    } catch (error) {
      this.#tellFailure(error);
    } finally {
      this.#more.disabled = false;
    }
  }

  /** Show what is stored now, changing only what differs: another tab or a turn that went on may have added to it. */
  async refresh() {
    if (this.isRunning) return;
    if (this.#notice?.isLost) this.#forgetNotice();
    if (!this.id) return;
    const turnBefore = this.#turnCount;
    const [thread, page] = await this.#loadNewest();
    if (this.#turnCount !== turnBefore) return; // what was asked for is old by now
    if (page.has_more && !page.data.some(({ id }) => this.#views.has(id))) return this.load(); // too much to catch up with
    this.#setThread(thread);
    const stored = page.data.reverse();
    this.#dropAllBut(stored, page.has_more);
    for (const item of stored) {
      const shown = this.#views.get(item.id);
      if (!shown || JSON.stringify(shown.item) !== JSON.stringify(item)) this.#put(item);
    }
    if (this.#notice?.isBusy && !this.#isAnsweredElsewhere) this.#notice = null;
    this.#drawTail();
  }

  #dropAllBut(stored, hasMore) {
    const ids = new Set(stored.map((item) => item.id));
    // Items before the oldest one of the page may well be stored.
    let isCovered = !hasMore;
    for (const [id, view] of [...this.#views]) {
      isCovered ||= id === stored[0]?.id;
      if (isCovered && !ids.has(id)) this.#remove(id, view);
    }
  }

  #setThread(thread) {
    this.thread = thread;
    this.#isAnsweredElsewhere = thread.is_answering && !this.isRunning;
    this.dispatchEvent(new Event("thread"));
  }

  #setEarlier(page) {
    this.#earlier = page.has_more ? page.after : null;
    this.#more.hidden = !page.has_more;
  }

  rename(title) {
    this.#setThread({ ...this.thread, title });
  }

  // --- turns --------------------------------------------------------------------------------------------------------

  /** Send a message; return the draft when it was not taken, for another try. */
  async send(draft) {
    const input = {
      content: draft.text ? [{ type: "input_text", text: draft.text }] : [],
      attachments: draft.attachments.map((attachment) => attachment.id),
      inference_options: draft.model ? { model: draft.model } : {},
    };
    const pending = new UserMessage({ content: input.content, attachments: draft.attachments });
    pending.element.classList.add("pending");
    this.#append(pending.element);
    this.#follows = true;
    let isTaken = false;
    const onEvent = ({ type, item }) => {
      if (type !== "thread.item.done" || item.type !== "user_message") return;
      isTaken = true;
      pending.element.remove();
    };
    await (this.id
      ? this.#run("threads.add_user_message", { thread_id: this.id, input }, onEvent)
      : this.#run("threads.create", { input }, onEvent));
    pending.element.remove();
    return isTaken ? null : draft;
  }

  /** Answer the last message again; what followed it goes once there is something new. */
  async retry() {
    const message = this.#lastMessage();
    if (!message) return;
    const ids = [...this.#views.keys()];
    const shown = ids.slice(ids.indexOf(message.id) + 1); // what else came after the message must not go unseen
    this.#dropAfter(message.id);
    const params = { thread_id: this.id, item_id: message.id };
    await this.#run("threads.retry_after_item", params, undefined, { is_last: true, shown_item_ids: shown });
    if (this.#isUnanswered() || this.#onlyThinks()) await this.refresh().catch(() => {}); // what followed has stayed
  }

  stop() {
    this.#turn?.abort.abort();
  }

  async #run(type, params, onEvent = () => {}, metadata) {
    if (this.isRunning) return this.#tell("warning", "Wait until the answer is finished, or stop it.");
    // Stopped before it has an id, a new thread could not be found again, and its message would make another one.
    const turn = { abort: new AbortController(), canStop: Boolean(this.id) };
    this.#turn = turn;
    this.#turnCount++;
    this.#isAnsweredElsewhere = false;
    clearTimeout(this.#lookAgain);
    this.#forgetNotice();
    this.#showProgress("");
    this.dispatchEvent(new Event("turn"));
    let failure = null;
    try {
      for await (const event of this.#service.stream(type, params, turn.abort.signal, metadata)) {
        if (event.item) await prepareViews([event.item]);
        this.#apply(event);
        onEvent(event);
      }
      if (this.#open.size) throw new ConnectionLost(); // it ended in the middle of an item
    } catch (error) {
      failure = error;
    }
    this.#turn = null;
    this.#endTurn(failure, turn.abort.signal.aborted);
    await this.#answerTool();
  }

  #endTurn(failure, wasStopped) {
    for (const id of this.#open) this.#views.get(id)?.finish?.();
    this.#open.clear();
    this.#progress.hidden = true;
    this.#drawTail();
    if (wasStopped) this.#onStopped();
    else if (failure) this.#tellFailure(failure);
    else if (!this.#notice) this.#announce(this.#lastAnswer() || "The answer is complete.");
    this.dispatchEvent(new Event("turn"));
  }

  #onStopped() {
    this.#tell("info", "Stopped.");
    // The service stores what it had shown as soon as it sees that nobody listens.
    setTimeout(() => this.refresh().catch(() => {}), 700);
  }

  #apply(event) {
    switch (event.type) {
      case "thread.created":
      case "thread.updated":
        this.id = event.thread.id;
        if (event.type === "thread.created") this.#turn.canStop = true;
        return this.#setThread(event.thread);
      case "thread.item.added":
        this.#open.add(event.item.id);
        this.#progress.hidden = true;
        return this.#put(event.item, true);
      case "thread.item.updated":
        return this.#views.get(event.item_id)?.apply?.(event.update);
      case "thread.item.done":
      case "thread.item.replaced":
        this.#open.delete(event.item.id);
        if (event.item.type !== "user_message") this.#progress.hidden = true;
        return this.#put(event.item);
      case "thread.item.removed":
        this.#open.delete(event.item_id);
        return this.#remove(event.item_id, this.#views.get(event.item_id));
      case "stream_options":
        this.#turn.canStop = event.stream_options.allow_cancel;
        return this.dispatchEvent(new Event("turn"));
      case "progress_update":
        return this.#showProgress(event.text, event.icon);
      case "client_effect":
        return carryOut(event.name, event.data);
      case "notice":
        return this.#tell(event.level, event.message, { title: event.title, isInThread: true });
      case "error":
        return this.#tellError(event);
    }
  }

  /** Show an item: in its place when it is known, else at the end. `isOpen` while more of it may come. */
  #put(item, isOpen = false) {
    const shown = this.#views.get(item.id);
    if (shown?.replace && shown.item.type === item.type) return shown.replace(item);
    const view = this.#view(item, isOpen);
    if (shown) shown.element.replaceWith(view.element);
    else this.#append(view.element);
    this.#views.set(item.id, view);
  }

  #view(item, isOpen = false) {
    const View = VIEWS[item.type];
    const view = View ? new View(item, this, isOpen) : { item, element: drawOther(item) };
    view.element.dataset.item = item.id;
    return view;
  }

  #prepend(items) {
    const views = items.map((item) => this.#view(item));
    for (let end = views.length; end > 0; end -= CHUNK_SIZE) {
      const elements = views.slice(Math.max(0, end - CHUNK_SIZE), end).map((view) => view.element);
      this.#items.prepend(el("div.chunk", {}, elements));
    }
    this.#views = new Map([...views.map((view) => [view.item.id, view]), ...this.#views]);
  }

  /** Items stand in chunks, because the browser then looks after a chunk that is out of sight as one thing. */
  #append(element) {
    let chunk = this.#items.lastElementChild;
    if (!chunk || chunk.children.length >= CHUNK_SIZE) {
      chunk = el("div.chunk");
      this.#items.append(chunk);
    }
    chunk.append(element);
  }

  #remove(id, view) {
    view?.element.remove();
    this.#views.delete(id);
  }

  #dropAfter(itemId) {
    let isAfter = false;
    for (const [id, view] of [...this.#views]) {
      if (isAfter) this.#remove(id, view);
      isAfter ||= id === itemId;
    }
    for (const notice of this.#items.querySelectorAll(".notice")) notice.remove();
  }

  // --- what the items ask for -----------------------------------------------------------------------------------------

  /** Send a widget's action where it wants to go. */
  async act(item, action) {
    if (action.handler === "client") return this.#actHere(action);
    const params = { thread_id: this.id, item_id: item.id, action: { type: action.type, payload: action.payload } };
    if (action.streaming !== false) return this.#run("threads.custom_action", params);
    try {
      const { updated_item: updated } = await this.#service.request("threads.sync_custom_action", params);
      if (updated) await prepareViews([updated]);
      if (updated) this.#put(updated);
    } catch (error) {
      this.#tellFailure(error);
    }
  }

  #actHere(action) {
    if (!Object.hasOwn(clientActions, action.type)) {
      return this.#tell("warning", `This page has no action named ${action.type}.`);
    }
    return clientActions[action.type](action.payload ?? {});
  }

  /** Send the answers to an item's questions; return whether they were taken. */
  async answerQuestions(item, input) {
    await this.#run("threads.add_structured_input", { thread_id: this.id, item_id: item.id, input });
    return this.#views.get(item.id)?.item.status !== "pending";
  }

  /** Return whether the feedback was taken. */
  async giveFeedback(item, kind) {
    try {
      await this.#service.request("items.feedback", { thread_id: this.id, item_ids: [item.id], kind });
      this.#announce("Thank you for the feedback.");
      return true;
    } catch (error) {
      this.#tellFailure(error);
      return false;
    }
  }

  /** When the turn ended with a call of a tool of this page, run it and send what it gives. */
  async #answerTool() {
    const call = this.#pendingCall();
    if (!call || this.isRunning || this.#notice) return;
    const result = await runTool(call.name, call.arguments);
    const params = { thread_id: this.id, result };
    if (!this.isRunning) await this.#run("threads.add_client_tool_output", params, undefined, { item_id: call.id });
    if (this.#views.get(call.id)?.item === call) await this.refresh().catch(() => {}); // its output is stored with it
  }

  #pendingCall() {
    const newest = [...this.#views.values()].at(-1)?.item;
    return newest?.type === "client_tool_call" && newest.status === "pending" ? newest : null;
  }

  // --- the end of the thread ------------------------------------------------------------------------------------------

  /** Show what is to be said about the last turn, and offer what can be done next. */
  #drawTail() {
    this.#tail.replaceChildren(...(this.#notice ? [this.#notice.element] : []), ...this.#offers());
    if (this.#isAnsweredElsewhere) this.#lookSoon();
  }

  #offers() {
    const isOver = this.#notice && this.#notice.level !== "info";
    if (this.#isAnsweredElsewhere && !isOver) return [el("p.hint", {}, "An answer is being written.")];
    if (isOver || this.isRunning || this.status.type !== "active" || !this.#lastMessage()) return [];
    const button = (words, onclick) => el("button.quiet-button", { type: "button", onclick }, icon("reload"), words);
    if (this.#pendingCall()) return [button("Go on", () => this.#answerTool())];
    const again = button("Answer again", () => this.retry());
    return this.#isUnanswered() ? [el("p.hint", {}, "This message has no answer yet."), again] : [again];
  }

  #forgetNotice() {
    this.#notice = null;
    this.#drawTail();
  }

  #lookSoon() {
    clearTimeout(this.#lookAgain);
    this.#lookAgain = setTimeout(() => {
      if (this.element.isConnected) this.refresh().catch((error) => error instanceof ConnectionLost && this.#lookSoon());
    }, LOOK_AGAIN_SECONDS * 1000);
  }

  #isUnanswered() {
    return [...this.#views.values()].at(-1)?.item.type === "user_message";
  }

  #onlyThinks() {
    const item = [...this.#views.values()].at(-1)?.item;
    return item?.type === "workflow" && item.workflow.type === "reasoning";
  }

  #lastMessage() {
    return [...this.#views.values()].findLast((view) => view.item.type === "user_message")?.item;
  }

  #lastAnswer() {
    const item = [...this.#views.values()].at(-1)?.item;
    return item?.type === "assistant_message" ? item.content.map(({ text }) => text).join(" ").slice(0, 2000) : "";
  }

  /** The words of the first message, for a thread that has no title yet. */
  get firstWords() {
    const first = [...this.#views.values()].find((view) => view.item.type === "user_message")?.item;
    return !this.#earlier && first ? userText(first).trim().slice(0, 80) : "";
  }

  #showProgress(text, iconName = "sparkle") {
    const dots = el("span.dots", { "aria-hidden": "true" }, el("i"), el("i"), el("i"));
    this.#progress.replaceChildren(...(text ? [icon(iconName), el("span", {}, text)] : [dots, el("span.visually-hidden", {}, "Answering")]));
    this.#progress.hidden = false;
  }

  #tellError({ message, code, allow_retry: mayRetry }) {
    const words = message ?? "Something went wrong. " + (code && code !== "custom" ? `(${code})` : "");
    this.#tell("danger", words, { canRetry: mayRetry });
  }

  #tellFailure(error) {
    if (error instanceof Refusal) {
      if (!error.needsLogin) this.#tell("danger", error.message, { isBusy: error.code === "thread_busy" });
      this.dispatchEvent(new CustomEvent("refused", { detail: error }));
    } else if (error instanceof ConnectionLost) {
      this.#tell("warning", "The connection was lost. What the service has kept is shown when it is back.", { isLost: true });
      this.dispatchEvent(new CustomEvent("lost"));
    } else {
      console.error(error);
      this.#tell("danger", "This page could not read the answer. Reload it.");
    }
  }

  #tell(level, message, { title, canRetry = false, isInThread = false, ...until } = {}) {
    const retry =
      canRetry && el("button.button", { type: "button", onclick: () => this.retry() }, icon("reload"), "Try again");
    const element = el(
      "div.notice",
      { role: level === "danger" ? "alert" : "status" },
      icon(level === "info" ? "info" : "warning"),
      el("div", {}, title && el("strong", {}, title), markdown(message)),
      retry,
    );
    element.classList.add(level);
    this.#follows = true;
    if (isInThread) return this.#append(element);
    this.#notice = { element, level, ...until };
    this.#drawTail();
  }

  // --- scrolling ------------------------------------------------------------------------------------------------------

  scrollToEnd() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  #onScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    const toEnd = scrollHeight - clientHeight - scrollTop;
    // Text that came since the last scroll may have moved the end away; only who scrolls up wants to stay.
    if (toEnd < 40) this.#follows = true;
    else if (scrollTop < this.#scrolledTo) this.#follows = false;
    this.#scrolledTo = scrollTop;
    this.#toEnd.hidden = toEnd < 200;
  }
}

function drawOther(item) {
  if (item.type === "end_of_turn") return el("div", { hidden: true });
  if (item.type !== "client_tool_call") return el("article.step", {}, icon("info"), `An item of the kind ${item.type}.`);
  const words = item.status === "pending" ? `Waiting for this page: ${item.name}` : `Asked this page: ${item.name}`;
  return el("article.step", {}, icon("device"), el("span", {}, words));
}
