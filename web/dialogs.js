// Questions that hold everything else up. The browser's <dialog> keeps the focus inside and gives it back.

import { el } from "./dom.js";

/** Show a dialog and return what it was closed with: null when it was dismissed. */
function show(title, parts, buttons, { canDismiss = true } = {}) {
  return new Promise((resolve) => {
    let answer = null;
    const form = el("form", {}, el("h2", { id: "dialog-title" }, title), parts, el("div.dialog-buttons", {}, buttons));
    const dialog = el("dialog", { "aria-labelledby": "dialog-title" }, form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      answer = form.querySelector("input, textarea")?.value.trim() ?? true;
      if (answer !== "") dialog.close();
    });
    form.querySelector("[data-cancel]")?.addEventListener("click", () => dialog.close());
    dialog.addEventListener("cancel", (event) => canDismiss || event.preventDefault());
    dialog.addEventListener("close", () => {
      dialog.remove();
      // An Escape key pressed twice closes what may not be dismissed: such a dialog comes back.
      if (answer === null && !canDismiss) show(title, parts, buttons, { canDismiss }).then(resolve);
      else resolve(answer);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

const cancelButton = () => el("button.quiet-button", { type: "button", "data-cancel": true }, "Cancel");

export function askForText(title, label, value, confirm) {
  const field = el("input", { value, required: true, maxlength: 200, autocomplete: "off" });
  const answer = show(title, el("label", {}, label, field), [cancelButton(), el("button.button", {}, confirm)]);
  field.select();
  return answer;
}

export function askToConfirm(title, text, confirm) {
  return show(title, el("p", {}, text), [cancelButton(), el("button.button.danger", {}, confirm)]);
}

export function askForToken(why) {
  const field = el("textarea", { required: true, rows: 4, spellcheck: "false", autocomplete: "off" });
  field.addEventListener("input", () => {
    const isSendable = /^[\s!-~]*$/.test(field.value); // a header carries nothing else
    field.setCustomValidity(isSendable ? "" : "A token has only unaccented letters, digits and signs. Copy it again.");
  });
  const parts = [
    el("p", { role: "alert" }, why),
    el("label", {}, "Token", field),
    el("p.hint", {}, "It stays in this tab until you close it or sign out."),
  ];
  const answer = show("Sign in", parts, [el("button.button", {}, "Continue")], { canDismiss: false });
  return answer.then((token) => token.replace(/\s/g, "")); // a terminal or a mail breaks long lines
}
