// The panel's options. What else there is to set: the types of @openai/chatkit.

import type { ChatKitOptions, ColorScheme, ModelOption } from "@openai/chatkit-react";
import { runTool, type Page } from "./client-tools";
import type { PublicSettings } from "./settings";

// The service refuses what its own settings do not allow, and tells pages nothing of them: these four must agree with them.

/** The models that users may choose, such as `{ id: "small", label: "Small" }`, with ids of the service's MODELS. */
const MODELS: ModelOption[] = [];

/** The media types that may be uploaded: the service's ATTACHMENT_TYPES. */
const ATTACHMENT_TYPES = [
  "image/png",
  "image/jpeg",
  "image/gif",
  "image/webp",
  "application/pdf",
  "text/plain",
  "text/markdown",
  "text/csv",
  "application/json",
  "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
  "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
  "application/vnd.openxmlformats-officedocument.presentationml.presentation",
];

/** How large a file may be: the service's MAX_ATTACHMENT_BYTES. */
const MAX_ATTACHMENT_BYTES = 20 * 1024 * 1024;

/** Whether users may dictate: `false` where the service's model server, or its offline demo, has no TRANSCRIBE_MODEL. */
const DICTATION = true;

export function panelOptions(
  settings: PublicSettings,
  page: Page & { fetch: typeof fetch; theme: ColorScheme; thread: string | null },
): ChatKitOptions {
  return {
    api: {
      url: `${settings.apiUrl}/chatkit`,
      domainKey: settings.domainKey,
      fetch: page.fetch,
      uploadStrategy: { type: "two_phase" },
    },
    initialThread: page.thread,
    theme: {
      colorScheme: page.theme,
      radius: "round",
      color: { accent: { primary: page.theme === "dark" ? "#8ab4ff" : "#1f5fd0", level: 1 } },
    },
    header: { title: { enabled: true } },
    history: { enabled: true, showRename: true, showDelete: true },
    startScreen: {
      greeting: "What can I help with?",
      prompts: [
        { label: "What can you do?", prompt: "What can you do?", icon: "circle-question" },
        { label: "Show me a widget", prompt: "Show me a widget", icon: "cube" },
        { label: "What time is it?", prompt: "What time is it on my clock?", icon: "clock" },
      ],
    },
    threadItemActions: { feedback: true, retry: true },
    composer: {
      placeholder: "Write a message",
      attachments: {
        enabled: true,
        maxSize: MAX_ATTACHMENT_BYTES,
        accept: Object.fromEntries(ATTACHMENT_TYPES.map((type) => [type, []])),
      },
      models: MODELS.length ? MODELS : undefined,
      dictation: { enabled: DICTATION },
    },
    onClientTool: ({ name, params }) => runTool(name, params, page),
  };
}
