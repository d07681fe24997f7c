// The token of whoever is signed in. It is kept for this tab's session and shown to this service alone.

import { tabMemory } from "./memory.js";

const WHY = {
  token_missing: "This service needs to know who you are. Paste a token from your sign-in.",
  token_invalid: "The service does not accept this token. Paste another one.",
  token_expired: "Your token has expired. Paste a new one to go on.",
};

/** Return the user whom the claim names; null where it is no token that the service takes. */
function userOf(token, claim) {
  try {
    const payload = atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"));
    const utf8 = Uint8Array.from(payload, (byte) => byte.charCodeAt(0)); // the claim's name may need it
    return JSON.parse(new TextDecoder().decode(utf8))[claim] ?? null;
  } catch {
    return null;
  }
}

export class Login {
  #claim;
  #asking = null;

  /** `claim` is the one that names the user; without it nobody needs to sign in. */
  constructor(claim) {
    this.#claim = claim;
  }

  get token() {
    return tabMemory.getItem("token");
  }

  /** `fetch`, with the token where the request goes to this page's own origin. */
  fetch = (address, options = {}) => {
    const url = new URL(address.url ?? address, document.baseURI);
    const headers = new Headers(options.headers ?? address.headers);
    if (this.token && url.origin === location.origin) headers.set("authorization", `Bearer ${this.token}`);
    return fetch(address, { ...options, headers });
  };

  /** Ask for a token where one is needed and none is there. From then on the page is that user's. */
  async begin() {
    if (!this.#claim) return;
    if (!this.token) await this.ask("token_missing");
    // A page that the browser kept may show what belongs to whoever was signed in then.
    const { user } = this;
    const isAnothers = () => !this.token || this.user !== user;
    addEventListener("pageshow", ({ persisted }) => persisted && isAnothers() && location.reload());
  }

  /** Ask for a token, saying why, until there is one. */
  ask(code) {
    this.#asking ??= import("./dialogs.js")
      .then(({ askForToken }) => askForToken(WHY[code] ?? WHY.token_invalid))
      .then((token) => this.#keep(token))
      .finally(() => (this.#asking = null));
    return this.#asking;
  }

  /** Who is, or was last, signed in here; null where no token could be read. */
  get user() {
    return tabMemory.getItem("user");
  }

  #keep(token) {
    const before = this.user;
    const now = userOf(token, this.#claim);
    tabMemory.setItem("token", token);
    if (now) tabMemory.setItem("user", now);
    if (!now || !before || now === before) return null;
    location.replace(location.pathname); // what is shown is not this user's
    return new Promise(() => {});
  }

  end() {
    tabMemory.removeItem("token");
    tabMemory.removeItem("user");
  }
}
