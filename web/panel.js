// OpenAI's ChatKit panel, from OpenAI's CDN, with the settings of this service. (Options: @openai/chatkit 1.9.)

import { carryOut, clientActions, runTool } from "./clienttools.js";
import { el } from "./dom.js";
import { Login } from "./login.js";
import { loadSettings } from "./settings.js";
import { currentTheme, onThemeChange } from "./theming.js";

const SCRIPT = "https://cdn.platform.openai.com/deployments/chatkit/chatkit.js";
const PATIENCE_SECONDS = 10;

function options(settings, login) {
  return {
    api: {
      url: new URL("chatkit", document.baseURI).href,
      domainKey: settings.domain_key,
      fetch: (address, init) => fetchWithLogin(login, address, init),
      uploadStrategy: uploadStrategy(settings),
    },
    theme: currentTheme(),
    initialThread: new URL(location.href).searchParams.get("thread"),
    startScreen: {
      greeting: settings.greeting,
      prompts: settings.prompts.map((prompt) => ({ label: prompt, prompt })),
    },
    history: { enabled: true, showDelete: true, showRename: true },
    threadItemActions: { feedback: true, retry: true },
    composer: composer(settings),
    onClientTool: ({ name, params }) => runTool(name, params),
    widgets: { onAction: async ({ type, payload }) => clientActions[type]?.(payload ?? {}) },
  };
}

function composer(settings) {
  return {
    attachments: settings.attachments
      ? {
          enabled: true,
          maxSize: settings.max_attachment_bytes,
          accept: Object.fromEntries(settings.attachment_types.map((type) => [type, []])),
        }
      : { enabled: false },
    models: settings.models.length ? settings.models.map((id) => ({ id, label: id })) : undefined,
    dictation: { enabled: settings.dictation },
  };
}

function uploadStrategy(settings) {
  if (settings.upload_strategy === "two_phase") return { type: "two_phase" };
  return { type: "direct", uploadUrl: new URL("attachments", document.baseURI).href };
}

/** The panel shows why a request was refused; here it leads to a new token too. */
async function fetchWithLogin(login, address, init) {
  const response = await login.fetch(address, init);
  if (response.status === 401) {
    const { code } = await response.clone().json().catch(() => ({}));
    login.ask(code);
  }
  return response;
}

function loadScript() {
  return new Promise((resolve, reject) => {
    setTimeout(() => reject(new Error(`It did not answer within ${PATIENCE_SECONDS} seconds.`)), PATIENCE_SECONDS * 1000);
    const script = el("script", { src: SCRIPT, async: true });
    script.addEventListener("error", () => reject(new Error("It could not be loaded.")));
    customElements.whenDefined("openai-chatkit").then(resolve);
    document.head.append(script);
  });
}

/** Resolve when the panel says that it is ready; reject when it does not within its time. */
function isReady(panel) {
  return new Promise((resolve, reject) => {
    panel.addEventListener("chatkit.ready", resolve, { once: true });
    setTimeout(() => reject(new Error(`It did not start within ${PATIENCE_SECONDS} seconds.`)), PATIENCE_SECONDS * 1000);
  });
}

function explain(error, settings) {
  const own = new URL(location.href);
  own.searchParams.set("panel", "own");
  const key = settings.domain_key;
  return el(
    "div.notice.danger",
    { role: "alert" },
    el(
      "div",
      {},
      el("h1", {}, "The ChatKit panel is not there"),
      el("p", {}, `${error.message} It comes from ${new URL(SCRIPT).host}.`),
      el("p", {}, "Is that address reachable from this browser, and not held back by a blocker or a proxy?"),
      el("p", {}, `Is CHATKIT_DOMAIN_KEY (now ${key}) the key that OpenAI gave for ${location.host}?`),
      el("p", {}, el("a", { href: own.href }, "Use the page of this service instead")),
    ),
  );
}

const place = document.querySelector("#panel");
const settings = await loadSettings((trouble) => (place.textContent = trouble));
const login = new Login(settings.login);
await login.begin();
try {
  await loadScript();
  const panel = document.createElement("openai-chatkit");
  panel.setOptions(options(settings, login));
  onThemeChange(() => panel.setOptions(options(settings, login)));
  panel.addEventListener("chatkit.effect", ({ detail }) => carryOut(detail.name, detail.data));
  panel.addEventListener("chatkit.thread.change", ({ detail }) => keepInAddress(detail.threadId));
  place.append(panel);
  await isReady(panel);
} catch (error) {
  place.prepend(explain(error, settings));
}

function keepInAddress(threadId) {
  const url = new URL(location.href);
  if (threadId) url.searchParams.set("thread", threadId);
  else url.searchParams.delete("thread");
  history.replaceState(null, "", url);
}
