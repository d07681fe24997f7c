// The ChatKit protocol: JSON is posted to one address; JSON, or a stream of events, comes back.

/** The service refused, in its own words. */
export class Refusal extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }

  get needsLogin() {
    return this.status === 401;
  }
}

/** No answer, or an answer that broke off. Whether the service acted on the request is not known. */
export class ConnectionLost extends Error {}

export class Service {
  #url;
  #login;

  constructor(url, login) {
    this.#url = url;
    this.#login = login;
  }

  /** Post an operation that answers at once, and return its answer. */
  async request(type, params, metadata) {
    const response = await this.#post(type, params, undefined, metadata);
    try {
      return await response.json();
    } catch {
      throw new ConnectionLost();
    }
  }

  /** Post an operation that streams, and yield its events. It is never posted twice: that would run it twice. */
  async *stream(type, params, signal, metadata) {
    const response = await this.#post(type, params, signal, metadata);
    if (!response.headers.get("content-type")?.startsWith("text/event-stream")) throw unreadable(response);
    try {
      yield* parseEvents(response.body);
    } catch (error) {
      if (error instanceof SyntaxError || signal.aborted) throw error;
      throw new ConnectionLost();
    }
  }

  async #post(type, params, signal, metadata) {
    const options = {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ type, params, metadata }),
      signal,
    };
    let response;
    try {
      response = await this.#login.fetch(this.#url, options);
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ConnectionLost();
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function refusal(response) {
  try {
    const { code, message } = await response.json();
    return new Refusal(response.status, code, message);
  } catch {
    return unreadable(response);
  }
}

function unreadable(response) {
  const message = `The answer came from something else than this service (status ${response.status}).`;
  return new Refusal(response.status, "unreadable", message);
}

/** Yield the JSON of each event of a `text/event-stream`; comments between events keep the connection alive. */
export async function* parseEvents(bytes) {
  const decoder = new TextDecoder();
  const reader = bytes.getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const text = line.endsWith("\r") ? line.slice(0, -1) : line;
      if (text.startsWith("data:")) {
        data.push(text.slice(5));
      } else if (text === "" && data.length) {
        yield JSON.parse(data.join("\n"));
        data = [];
      }
    }
  }
}
