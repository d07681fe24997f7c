// What the assistant may ask of this page. Add yours here: a tool's answer goes back to the assistant, an effect and a
// widget's client action have none.

import { setTheme } from "./theming.js";
import { copyText } from "./dom.js";

export const tools = {
  get_local_time() {
    const { locale, timeZone } = Intl.DateTimeFormat().resolvedOptions();
    return { time: new Date().toISOString(), time_zone: timeZone, locale };
  },
  set_theme({ theme }) {
    return { theme: setTheme(theme) };
  },
};

export const effects = {
  set_theme: ({ theme }) => setTheme(theme),
};

export const clientActions = {
  copy_text: ({ text }) => copyText(String(text)),
  set_theme: ({ theme }) => setTheme(theme),
};

/** Run a tool and return its output; what goes wrong is an output too, for the assistant to read. */
export async function runTool(name, parameters) {
  if (!Object.hasOwn(tools, name)) return { error: `This page has no tool named ${name}.` };
  try {
    return await tools[name](parameters);
  } catch (error) {
    return { error: `The tool failed: ${error.message}` };
  }
}

/** Carry out an effect, and tell other scripts of the page, as OpenAI's panel does. */
export function carryOut(name, data) {
  document.dispatchEvent(new CustomEvent("chatkit.effect", { detail: { name, data } }));
  if (Object.hasOwn(effects, name)) effects[name](data ?? {});
}
