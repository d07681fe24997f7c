"use client";

import { createAuthClient } from "better-auth/react";
import { useState, type FormEvent } from "react";

export function SignInForm({ authUrl }: { authUrl: string }) {
  const [authClient] = useState(() => createAuthClient({ baseURL: authUrl }));
  const [isNew, setIsNew] = useState(false);
  const [isBusy, setIsBusy] = useState(false);
  const [problem, setProblem] = useState("");

  // Better Auth takes requests of its own origin alone, and 127.0.0.1 is not localhost.
  const noAnswer = () =>
    location.origin === new URL(authUrl).origin
      ? `The sign-in service does not answer at ${authUrl}. Try again in a moment.`
      : `This page cannot reach the sign-in service: open the app at ${authUrl}.`;

  async function submit(event: FormEvent<HTMLFormElement>) {
    event.preventDefault();
    const form = new FormData(event.currentTarget);
    const [name, email, password] = ["name", "email", "password"].map((field) => String(form.get(field) ?? ""));
    setIsBusy(true);
    setProblem("");
    try {
      const { error } = isNew
        ? await authClient.signUp.email({ name, email, password })
        : await authClient.signIn.email({ email, password });
      if (!error) {
        location.assign("/chat"); // loaded anew: nothing of an earlier user is left in memory
        return;
      }
      setProblem(error.message || noAnswer());
    } catch {
      setProblem(noAnswer());
    }
    setIsBusy(false);
  }

  return (
    <main className="sign-in">
      <h1>{isNew ? "Sign up" : "Sign in"}</h1>
      {/* `post`, so that a form sent before the scripts run does not put the password into the address. */}
      <form method="post" onSubmit={submit}>
        {isNew && (
          <label>
            Name <input name="name" autoComplete="name" required />
          </label>
        )}
        <label>
          E-mail <input name="email" type="email" autoComplete="email" required />
        </label>
        <label>
          Password{" "}
          <input
            name="password"
            type="password"
            autoComplete={isNew ? "new-password" : "current-password"}
            minLength={8}
            required
          />
        </label>
        {problem && <p role="alert">{problem}</p>}
        <button disabled={isBusy}>{isNew ? "Sign up" : "Sign in"}</button>
      </form>
      <button className="plain" onClick={() => setIsNew(!isNew)}>
        {isNew ? "I have an account" : "I have no account yet"}
      </button>
    </main>
  );
}
