// The page: it brings the list, the open conversation and the message field together, and the address with them.

import { Composer } from "./composer.js";
import { el } from "./dom.js";
import { icon } from "./icons.js";
import { Login } from "./login.js";
import { ConnectionLost, Refusal, Service } from "./protocol.js";
import { fetchSettings, loadSettings, UNREACHABLE, untilItWorks } from "./settings.js";
import { ThreadList } from "./sidebar.js";
import { currentTheme, onThemeChange, setTheme } from "./theming.js";
import { Conversation } from "./thread.js";

const find = (selector) => document.querySelector(selector);

const settings = await loadSettings(showBanner);
const login = new Login(settings.login);
const service = new Service("chatkit", login);
const running = new Map(); // conversations that go on while another one is shown, by thread id
let conversation = null;

const composer = new Composer(service, settings, {
  onSend: (draft) => send(draft),
  onStop: () => conversation.stop(),
  onRefused,
});
const list = new ThreadList(service, {
  addressOf,
  open: (id) => go(id),
  onRenamed: ({ id, title }) => [...running.values(), conversation].find((each) => each.thread?.id === id)?.rename(title),
  onDeleted: (id) => id === conversation.id && go(null),
  onFailure,
});

// --- conversations -------------------------------------------------------------------------------------------------

function newConversation(id) {
  const made = new Conversation(service, announce, id);
  made.addEventListener("thread", () => onThread(made));
  made.addEventListener("turn", () => onTurn(made));
  made.addEventListener("refused", (event) => onRefused(event.detail));
  made.addEventListener("lost", waitForService);
  return made;
}

/** Show a thread, or a new conversation for null; the address follows, or came first. */
async function go(id, { isAddressSet = false } = {}) {
  closeSidebar();
  if (id && id === conversation?.id) return composer.focus();
  composer.note();
  const isLoaded = running.has(id);
  conversation = running.get(id) ?? newConversation(id);
  if (!isAddressSet) history.pushState(null, "", addressOf(id));
  show();
  if (id && !isLoaded) await load(conversation).catch(onFailure);
  if (!id) showStart();
  if (!find(".menu")) composer.focus(); // a menu keeps it
}

/** Load a conversation, or `refresh` it. */
async function load(opened, how = "load") {
  try {
    await opened[how]();
  } catch (error) {
    if (!(error instanceof Refusal && error.status === 404)) throw error;
    if (opened === conversation) {
      history.replaceState(null, "", addressOf(null)); // or Back would lead here again
      await go(null, { isAddressSet: true });
    }
    composer.note("This conversation does not exist, or is not yours.");
  }
}

function show() {
  if (!conversation.element.isConnected) find("#conversation").replaceChildren(conversation.element);
  showTitle();
  composer.show(conversation);
  list.mark(conversation.id, running.keys());
}

function showTitle() {
  const { thread, id } = conversation;
  const title = thread ? list.titleOf(thread) : id ? "Loading …" : "New conversation";
  find("#title").textContent = title;
  document.title = `${title} · Chat`;
}

function showStart() {
  const prompts = settings.prompts.map((prompt) =>
    el("button.prompt", { type: "button", onclick: () => send({ text: prompt, attachments: [] }) }, prompt),
  );
  const start = el("div.start", {}, el("h2", {}, settings.greeting), el("div.prompts", {}, prompts));
  find("#conversation").replaceChildren(start);
}

async function send(draft) {
  const sender = conversation;
  if (!sender.element.isConnected) find("#conversation").replaceChildren(sender.element);
  const unsent = await sender.send(draft);
  if (!unsent) return;
  composer.restore(unsent);
  if (sender !== conversation) composer.note("A message to another conversation was not sent. It is here again.");
}

function onThread(changed) {
  const { thread, id } = changed;
  list.show(thread, thread.title ? "" : changed.firstWords);
  if (changed.isRunning) running.set(id, changed);
  if (changed !== conversation) return;
  if (addressedThread() !== id) history.pushState(null, "", addressOf(id));
  show();
}

function onTurn(changed) {
  if (changed.id) {
    if (changed.isRunning) running.set(changed.id, changed);
    else running.delete(changed.id);
  }
  if (changed.thread && changed.firstWords) list.show(changed.thread, changed.thread.title ? "" : changed.firstWords);
  list.mark(conversation.id, running.keys());
  if (!changed.isRunning) list.load().catch(() => {}); // its place in the list has changed
  if (changed !== conversation) return;
  showTitle();
  composer.show(changed);
  if (changed.isRunning && document.activeElement === document.body) composer.focus(); // what had it is gone
}

// --- the address ---------------------------------------------------------------------------------------------------

function addressOf(id) {
  const url = new URL(location.href);
  if (id) url.searchParams.set("thread", id);
  else url.searchParams.delete("thread");
  return url.pathname + url.search;
}

function addressedThread() {
  return new URL(location.href).searchParams.get("thread");
}

// --- when it does not work -----------------------------------------------------------------------------------------

function onFailure(error) {
  if (error instanceof Refusal) return onRefused(error, error.message);
  if (error instanceof ConnectionLost) return waitForService();
  console.error(error);
  showBanner("Something went wrong on this page. Reload it.");
}

async function onRefused(error, words) {
  if (error.needsLogin) {
    await login.ask(error.code);
    await refreshAll();
  } else if (error.code === "thread_busy") {
    conversation.refresh().catch(() => {});
  } else if (words) {
    composer.note(words);
  }
}

let isWaiting = false;

/** When the service is there again, show what is stored. */
async function waitForService() {
  if (isWaiting) return;
  isWaiting = true;
  showBanner(UNREACHABLE);
  await untilItWorks(async () => {
    await fetchSettings();
    await showStored().catch((error) => {
      if (error instanceof ConnectionLost) throw error;
      onFailure(error);
    });
  }, showBanner);
  isWaiting = false;
  announce("The service is back.");
}

async function showStored() {
  await list.load();
  await load(conversation, conversation.id && !conversation.thread ? "load" : "refresh");
}

const refreshAll = () => showStored().catch(onFailure);

function showBanner(text) {
  find("#banner").textContent = text;
}

function announce(text) {
  find("#announcer").textContent = text;
}

// --- around it -----------------------------------------------------------------------------------------------------

function openSidebar() {
  document.body.classList.add("sidebar-open");
  find("#shade").hidden = false;
  find("main").inert = true;
  find("#open-sidebar").setAttribute("aria-expanded", "true");
  find("#new-thread").focus();
}

function closeSidebar() {
  if (!document.body.classList.contains("sidebar-open")) return;
  document.body.classList.remove("sidebar-open");
  find("#shade").hidden = true;
  find("main").inert = false;
  find("#open-sidebar").setAttribute("aria-expanded", "false");
  find("#open-sidebar").focus();
}

function showTheme() {
  const other = currentTheme() === "dark" ? "light" : "dark";
  find("#theme").replaceChildren(icon(other === "dark" ? "moon" : "sun"), other === "dark" ? "Dark" : "Light");
}

function fitOut() {
  find("#new-thread").append(icon("plus"), "New conversation");
  find("#new-thread").addEventListener("click", () => go(null));
  find("#open-sidebar").append(icon("menu"));
  find("#open-sidebar").addEventListener("click", openSidebar);
  find("#close-sidebar").append(icon("close"));
  find("#close-sidebar").addEventListener("click", closeSidebar);
  find("#shade").addEventListener("click", closeSidebar);
  addEventListener("keydown", (event) => event.key === "Escape" && closeSidebar());
  find("#theme").addEventListener("click", () => setTheme(currentTheme() === "dark" ? "light" : "dark"));
  onThemeChange(showTheme);
  showTheme();
  find(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address stays
    find("#message").focus();
  });
  find("#sign-out").hidden = !settings.login;
  find("#sign-out").append(icon("exit"), "Sign out");
  find("#sign-out").addEventListener("click", () => {
    login.end();
    location.assign(location.pathname);
  });
}

fitOut();
await login.begin();
addEventListener("popstate", () => go(addressedThread(), { isAddressSet: true }));
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && refreshAll());
addEventListener("focus", () => refreshAll());
addEventListener("offline", waitForService);
list.load().catch(onFailure);
await go(addressedThread(), { isAddressSet: true });
