// What the assistant may have this page do. Add yours here.

import type { ColorScheme } from "@openai/chatkit-react";

type Values = Record<string, unknown>;

/** What the page lends to its tools. */
export interface Page {
  setTheme(theme: ColorScheme): void;
}

/** Client tools: what they return goes back to the assistant. */
const tools: Record<string, (values: Values, page: Page) => Values | Promise<Values>> = {
  get_local_time() {
    const { locale, timeZone } = Intl.DateTimeFormat().resolvedOptions();
    return { time: new Date().toISOString(), time_zone: timeZone, locale };
  },
  set_theme(values, page) {
    const theme = values.theme === "dark" ? "dark" : "light";
    page.setTheme(theme);
    return { theme };
  },
};

/** Actions of widgets that say `handler: "client"`. */
const actions: Record<string, (values: Values, page: Page) => void | Promise<void>> = {
  copy_text: (values) => navigator.clipboard.writeText(String(values.text)),
  set_theme: (values, page) => void tools.set_theme(values, page),
};

/** Run a client tool. What goes wrong is an output too: the assistant can read it and go on. */
export async function runTool(name: string, values: Values, page: Page): Promise<Values> {
  if (!Object.hasOwn(tools, name)) return { error: `This page has no tool named ${name}.` };
  try {
    return await tools[name](values, page);
  } catch (error) {
    return { error: `The tool failed: ${error instanceof Error ? error.message : error}` };
  }
}

/** Carry out a widget's action and return whether this page knows it. */
export async function runAction(name: string, values: Values, page: Page): Promise<boolean> {
  if (!Object.hasOwn(actions, name)) return false;
  await actions[name](values, page);
  return true;
}
