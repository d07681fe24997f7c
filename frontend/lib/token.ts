// The panel's `fetch`: it shows the chat service who is asking.

export class NotSignedIn extends Error {
  constructor() {
    super("You are signed out. Sign in and send your message again.");
    this.name = "NotSignedIn";
  }
}

/** A service cannot be reached; the message says what to look at. */
export class NoAnswer extends Error {
  constructor(message: string) {
    super(message);
    this.name = "NoAnswer";
  }
}

/**
 * Return a `fetch` that adds a token of Better Auth to requests to the chat service, and to no others.
 *
 * A token that the service refuses is renewed once, and tokens of anybody else than the user are not used: another may have
 * signed in in the same browser. Throws `NotSignedIn` and `NoAnswer`, whose messages are for users.
 */
export function fetchWithToken(apiUrl: string, authUrl: string, userId: string): typeof fetch {
  const apiOrigin = new URL(apiUrl).origin;
  let token: Promise<string> | undefined; // one for all requests, and one renewal for all that were refused

  function ask(): Promise<string> {
    const asked = requestToken(authUrl, userId);
    asked.catch(() => {
      if (token === asked) token = undefined;
    });
    return asked;
  }

  async function send(request: Request, token: string): Promise<Response> {
    request.headers.set("authorization", `Bearer ${token}`);
    try {
      return await fetch(request);
    } catch (error) {
      if (request.signal.aborted) throw error; // stopped by the user
      throw new NoAnswer( // not there, or not for this page: a browser does not tell the two apart
        `The chat service does not answer this page at ${apiUrl}. Is this device online, ` +
          `is the service running, and does its ALLOWED_ORIGINS name ${location.origin}?`,
      );
    }
  }

  return async (input, init) => {
    const request = new Request(input, init);
    if (new URL(request.url).origin !== apiOrigin) return fetch(request);
    const used = (token ??= ask());
    const response = await send(request.clone(), await used);
    if (response.status !== 401) return response;
    if (token === used) token = ask();
    return send(request, await (token ??= ask()));
  };
}

async function requestToken(authUrl: string, userId: string): Promise<string> {
  const asked = fetch(`${authUrl}/api/auth/token`, { credentials: "include", cache: "no-store" });
  const response = await asked.catch(() => undefined);
  if (response?.status === 401) throw new NotSignedIn();
  if (!response?.ok) throw new NoAnswer("The sign-in service does not answer. Try again in a moment.");
  const { token } = (await response.json()) as { token: string };
  if (userOf(token) !== userId) throw new NotSignedIn();
  return token;
}

function userOf(token: string): unknown {
  const payload = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"); // RFC 7515: base64url
  return JSON.parse(atob(payload)).sub;
}
