// Stands in for OpenAI's panel, at the panel's address: it notes the options that it is given, and reaches the service
// through nothing else. Tests press its buttons by calling its methods.

customElements.define(
  "openai-chatkit",
  class extends HTMLElement {
    thread = null;

    setOptions(options) {
      const isFirst = !this.options;
      this.options = options;
      if (isFirst) requestIdleCallback(() => this.#begin()); // the panel loads a frame first, which takes longer
    }

    async #begin() {
      this.#tell("ready");
      if (this.options.initialThread) await this.open(this.options.initialThread);
    }

    /** Ask the service, as the panel does. */
    request(type, params = {}) {
      const { url, fetch } = this.options.api;
      const headers = { "content-type": "application/json" };
      return fetch(url, { method: "POST", headers, body: JSON.stringify({ type, params }) });
    }

    async ask(type, params) {
      const response = await this.request(type, params);
      const answer = await response.json();
      if (!response.ok) throw new Error(answer.message);
      return answer;
    }

    async open(thread) {
      await this.#shown(async () => {
        this.thread = thread;
        await this.#load();
      });
    }

    async say(text, attachments = []) {
      await this.#shown(async () => {
        const input = { content: [{ type: "input_text", text }], attachments, inference_options: {} };
        if (this.thread) await this.#stream("threads.add_user_message", { thread_id: this.thread, input });
        else await this.#stream("threads.create", { input });
        await this.#load();
      });
    }

    /** Upload a file in two phases and return its id. */
    async upload(name, mimeType, text) {
      const { fetch } = this.options.api;
      const body = new Blob([text], { type: mimeType });
      const attachment = await this.ask("attachments.create", { name, mime_type: mimeType, size: body.size });
      const { url, method, headers } = attachment.upload_descriptor;
      const response = await fetch(url, { method, headers, body });
      if (!response.ok) throw new Error(`the upload was answered with ${response.status}`);
      return attachment.id;
    }

    async #stream(type, params) {
      const response = await this.request(type, params);
      if (!response.ok) throw new Error((await response.json()).message);
      const lines = (await response.text()).split("\n").filter((line) => line.startsWith("data: "));
      for (const event of lines.map((line) => JSON.parse(line.slice("data: ".length)))) {
        if (event.type === "thread.created") {
          this.thread = event.thread.id;
          this.#tell("thread.change", { threadId: this.thread });
        }
        if (event.type === "error") throw new Error(event.message);
        if (event.type === "thread.item.done" && event.item.type === "client_tool_call") await this.#call(event.item);
      }
    }

    async #call({ name, arguments: params }) {
      const result = await this.options.onClientTool({ name, params });
      await this.#stream("threads.add_client_tool_output", { thread_id: this.thread, result });
    }

    async #load() {
      const { data } = await this.ask("items.list", { thread_id: this.thread, order: "asc", limit: 100 });
      this.replaceChildren(
        ...data.map((item) => {
          const words = (item.content ?? []).map((part) => part.text);
          const files = (item.attachments ?? []).map((attachment) => `[${attachment.name}]`);
          return Object.assign(document.createElement("p"), { textContent: [...words, ...files].join(" ") });
        }),
      );
    }

    /** What goes wrong is shown, as the panel does. */
    async #shown(work) {
      try {
        await work();
      } catch (error) {
        this.append(Object.assign(document.createElement("p"), { textContent: `Problem: ${error.message}` }));
        this.#tell("error", { error });
      }
    }

    #tell(name, detail) {
      this.dispatchEvent(new CustomEvent(`chatkit.${name}`, { detail }));
    }
  },
);
