// What happens before an answer: reasoning, searches, files, steps. Shown as it grows, folded when it is over.

import { el } from "./dom.js";
import { icon } from "./icons.js";
import { markdown } from "./markdown.js";
import { drawSource } from "./messages.js";

export class Workflow {
  #tasks = el("ol.tasks");
  #summary = el("summary");
  #details = el("details", {}, this.#summary, this.#tasks);
  element = el("article.workflow", {}, el("h2.visually-hidden", {}, "Steps"), this.#details);

  constructor(item, host, isOpen = false) {
    this.replace(item);
    if (isOpen) this.#showRunning();
  }

  replace(item) {
    this.item = item;
    this.#tasks.replaceChildren(...item.workflow.tasks.map(drawTask));
    this.finish();
  }

  apply({ task, task_index: index }) {
    this.item.workflow.tasks[index] = task;
    const drawn = this.#tasks.children[index];
    if (drawn) drawn.replaceWith(drawTask(task));
    else this.#tasks.append(drawTask(task));
    this.#showRunning();
  }

  finish() {
    const { workflow } = this.item;
    this.#details.open = workflow.expanded;
    this.#summary.replaceChildren(icon(workflow.summary?.icon ?? "sparkle"), el("span", {}, summaryOf(workflow)));
    this.element.classList.remove("running");
  }

  #showRunning() {
    if (this.element.classList.contains("running")) return this.#tellCurrent();
    this.element.classList.add("running");
    this.#details.open = true;
    this.#tellCurrent();
  }

  #tellCurrent() {
    const isReasoning = this.item.workflow.type === "reasoning";
    const current = this.item.workflow.tasks.at(-1);
    const words = (!isReasoning && current && titleOf(current)) || (isReasoning ? "Thinking …" : "Working …");
    this.#summary.replaceChildren(icon("sparkle"), el("span", {}, words));
  }
}

export class TaskItem {
  constructor(item) {
    this.item = item;
    this.element = el("article.workflow", {}, el("h2.visually-hidden", {}, "Step"), el("ol.tasks", {}, drawTask(item.task)));
  }
}

function summaryOf({ type, summary, tasks }) {
  if (summary?.title) return summary.title;
  const verb = type === "reasoning" ? "Thought" : "Worked";
  if (summary?.duration !== undefined) return `${verb} for ${duration(summary.duration)}`;
  return type === "reasoning" ? "Reasoning" : titleOf(tasks.at(-1) ?? {}) || "Steps";
}

function duration(seconds) {
  if (seconds < 1) return "a moment";
  if (seconds < 60) return seconds === 1 ? "1 second" : `${seconds} seconds`;
  return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

const ICONS = { web_search: "search", file: "document", image: "image", thought: "lightbulb" };

function titleOf(task) {
  return task.title || (task.title_query && `Searching for “${task.title_query}”`) || "";
}

function drawTask(task) {
  const state = task.status_indicator ?? "none";
  const mark = state === "complete" ? "check" : (task.icon ?? ICONS[task.type] ?? "dot");
  return el(
    "li.task",
    { "data-state": state },
    el("span.mark", {}, icon(mark)),
    el(
      "div",
      {},
      el("p.task-title", {}, titleOf(task), state === "loading" && el("span.visually-hidden", {}, " (running)")),
      task.content && markdown(task.content),
      task.queries?.length > 0 && el("p.queries", {}, task.queries.map((query) => el("span.chip", {}, query))),
      task.sources?.length > 0 && el("ul.sources", {}, task.sources.map((source) => el("li", {}, drawSource(source)))),
    ),
  );
}
