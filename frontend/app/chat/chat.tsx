"use client";

import { createAuthClient } from "better-auth/react";
import dynamic from "next/dynamic";
import { useEffect, useState } from "react";
import type { PublicSettings } from "@/lib/settings";

// In the browser alone: its script may change the element before React would find it as the server sent it.
const Panel = dynamic(() => import("./panel").then(({ Panel }) => Panel), { ssr: false });

interface ChatProps {
  settings: PublicSettings;
  user: { id: string; name: string };
  /** The conversation to begin with. */
  thread: string | null;
}

export function Chat({ settings, user, thread }: ChatProps) {
  const [authClient] = useState(() => createAuthClient({ baseURL: settings.authUrl }));
  const [problem, setProblem] = useState("");
  const { data: session, isPending, error } = authClient.useSession();
  const isSomebodyElse = !isPending && !error && session?.user.id !== user.id;

  useEffect(() => {
    if (isSomebodyElse) location.assign("/sign-in"); // signed out, or in as another, in another tab
  }, [isSomebodyElse]);

  useEffect(() => {
    // A page that the browser kept for its Back button may be another user's by now. Safari keeps `no-store` ones too.
    const reload = ({ persisted }: PageTransitionEvent) => persisted && location.reload();
    addEventListener("pageshow", reload);
    return () => removeEventListener("pageshow", reload);
  }, []);

  async function signOut() {
    const { error } = await authClient.signOut().catch((error) => ({ error }));
    if (error) setProblem("You are still signed in: the sign-in service does not answer. Try again in a moment.");
    else location.assign("/sign-in"); // loaded anew: the token is forgotten with the page
  }

  return (
    <div className="chat">
      <header>
        <span>{user.name}</span>
        <button onClick={signOut}>Sign out</button>
      </header>
      {problem && <p role="alert">{problem}</p>}
      {!isSomebodyElse && <Panel settings={settings} userId={user.id} thread={thread} />}
    </div>
  );
}
