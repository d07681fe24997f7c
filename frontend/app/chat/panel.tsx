"use client";

import { ChatKit, useChatKit, type ColorScheme } from "@openai/chatkit-react";
import { useEffect, useState, useSyncExternalStore } from "react";
import { runAction } from "@/lib/client-tools";
import { panelOptions } from "@/lib/options";
import { PANEL_SCRIPT } from "@/lib/panel-script";
import type { PublicSettings } from "@/lib/settings";
import { fetchWithToken, NoAnswer, NotSignedIn } from "@/lib/token";

const PATIENCE_SECONDS = 10;

interface PanelProps {
  settings: PublicSettings;
  userId: string;
  thread: string | null;
}

export function Panel({ settings, userId, thread }: PanelProps) {
  const [theme, setTheme] = useTheme();
  const [problem, setProblem] = useState<Error>();
  const [state, setState] = useState<"loading" | "ready" | "missing">("loading");
  const [withToken] = useState(() => fetchWithToken(settings.apiUrl, settings.authUrl, userId));
  const page = { fetch: noticing, setTheme, theme, thread };

  async function noticing(...request: Parameters<typeof fetch>): Promise<Response> {
    try {
      const response = await withToken(...request);
      setProblem(undefined);
      return response;
    } catch (error) {
      if (error instanceof NotSignedIn || error instanceof NoAnswer) setProblem(error);
      throw error;
    }
  }

  const { control, sendCustomAction } = useChatKit({
    ...panelOptions(settings, page),
    widgets: {
      async onAction(action, item) {
        const isKnown = await runAction(action.type, action.payload ?? {}, page);
        if (!isKnown) await sendCustomAction(action, item.id); // then the agent's `handle_action` has it
      },
    },
    onReady: () => setState("ready"),
    onThreadChange: ({ threadId }) => keepInAddress(threadId),
    // What is said in a chat is not for logs: only the kind of an error and the name of an event are.
    onError: ({ error }) => console.error("ChatKit:", error.name),
    onLog: ({ name }) => console.debug("ChatKit:", name),
  });

  useEffect(() => {
    const missing = () => setState((now) => (now === "ready" ? now : "missing"));
    const timer = setTimeout(missing, PATIENCE_SECONDS * 1000);
    if (!customElements.get("openai-chatkit")) fetch(PANEL_SCRIPT, { mode: "no-cors" }).catch(missing);
    return () => clearTimeout(timer);
  }, []);

  return (
    <>
      {problem && (
        <div role="alert">
          <p>{problem.message}</p>
          {problem instanceof NotSignedIn && <a href="/sign-in">Sign in</a>}
        </div>
      )}
      {state === "loading" && <p role="status">Loading the chat …</p>}
      {state === "missing" && <Missing settings={settings} />}
      <ChatKit control={control} className="panel" hidden={state === "missing"} />
    </>
  );
}

function Missing({ settings }: { settings: PublicSettings }) {
  return (
    <div role="alert">
      <h1>The chat panel is not there</h1>
      <p>It comes from {new URL(PANEL_SCRIPT).host} and did not start.</p>
      <ul>
        <li>Is that address reachable from this browser, and not held back by a blocker or a proxy?</li>
        <li>
          Is NEXT_PUBLIC_CHATKIT_DOMAIN_KEY (now {settings.domainKey}) the key that OpenAI gave for {location.host}?
        </li>
      </ul>
      <button onClick={() => location.reload()}>Try again</button>
    </div>
  );
}

/** Return the theme, which is the system's until one is set, and the function that sets it. */
function useTheme(): [ColorScheme, (theme: ColorScheme) => void] {
  const system = useSyncExternalStore<ColorScheme>(onSystemTheme, systemTheme, () => "light");
  const [chosen, setChosen] = useState<ColorScheme>();
  const theme = chosen ?? system;
  useEffect(() => {
    document.documentElement.style.colorScheme = theme;
  }, [theme]);
  return [theme, setChosen];
}

const darkSystem = () => matchMedia("(prefers-color-scheme: dark)");

function systemTheme(): ColorScheme {
  return darkSystem().matches ? "dark" : "light";
}

function onSystemTheme(changed: () => void): () => void {
  const query = darkSystem();
  query.addEventListener("change", changed);
  return () => query.removeEventListener("change", changed);
}

/** Keep the conversation in the address, so that a reload comes back to it. */
function keepInAddress(threadId: string | null): void {
  const url = new URL(location.href);
  if (threadId) url.searchParams.set("thread", threadId);
  else url.searchParams.delete("thread");
  history.replaceState(null, "", url);
}
