// Structured input: the assistant asks, and goes on when its questions are answered or skipped.

import { el } from "./dom.js";

export class Questions {
  #host;

  constructor(item, host) {
    this.item = item;
    this.#host = host;
    this.element = el(
      "article.questions",
      {},
      el("h2.visually-hidden", {}, "Questions for you"),
      item.status === "pending" ? this.#form() : el("dl", {}, item.inputs.map(drawAnswer)),
    );
  }

  #form() {
    const fields = this.item.inputs.map((input) => drawQuestion(input, `${this.item.id}-${input.id}`));
    const skip = el("button.quiet-button", { type: "button", onclick: () => this.#send(form, "skipped") }, "Skip");
    const form = el("form.card", {}, fields, el("div.card-foot", {}, skip, el("button.button", {}, "Answer")));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(form, "answered");
    });
    return form;
  }

  async #send(form, status) {
    const answers = Object.fromEntries(this.item.inputs.map((input, index) => [input.id, answerIn(form, index)]));
    form.inert = true;
    const wasTaken = await this.#host.answerQuestions(this.item, status === "answered" ? { status, answers } : { status });
    form.inert = wasTaken;
  }
}

function answerIn(form, index) {
  const values = [...form.querySelectorAll("fieldset")[index].elements]
    .filter((field) => field.type !== "radio" && field.type !== "checkbox" ? field.value.trim() : field.checked)
    .map((field) => field.value.trim());
  return values.length ? { values } : { values, skipped: true };
}

function drawQuestion(input, name) {
  const description = input.description && el("p.hint", {}, input.description);
  if (input.type !== "multiple_choice") {
    return el("fieldset", {}, el("legend", {}, input.question), description, freeform(input.question));
  }
  const type = input.multiple ? "checkbox" : "radio";
  const choices = input.options.map(({ value }) => el("label.choice", {}, el("input", { type, name, value }), value));
  const own = el("input", { type: "text", placeholder: "Something else", "aria-label": `${input.question} Something else` });
  const fieldset = el("fieldset", {}, el("legend", {}, input.question), description, choices, own);
  // One answer means one: own words undo a choice, and a choice undoes own words.
  if (!input.multiple) {
    own.addEventListener("input", () => {
      for (const choice of fieldset.querySelectorAll("[type=radio]")) choice.checked = false;
    });
    fieldset.addEventListener("change", (event) => event.target.type === "radio" && (own.value = ""));
  }
  return fieldset;
}

function freeform(name) {
  return el("textarea", { rows: 2, "aria-label": name });
}

function drawAnswer({ question, answer }) {
  const words = answer?.values?.length && !answer.skipped ? answer.values.join(", ") : "Skipped";
  return el("div", {}, el("dt", {}, question), el("dd", {}, words));
}
