// Attachments of the message that is being written. Two phases: the service is told of a file and says where its bytes
// go; then they go there.

import { el, iconButton } from "./dom.js";
import { icon } from "./icons.js";

/** Kinds that not every system knows by their names' ends. */
const KINDS = { csv: "text/csv", json: "application/json", md: "text/markdown", txt: "text/plain" };

function kindOf(file) {
  return file.type || KINDS[file.name.split(".").pop().toLowerCase()] || "";
}

export class Uploads {
  #service;
  #settings;
  #onChange;
  #onProblem;
  #onRefused;
  #uploads = [];
  #list = document.querySelector("#attachments");

  constructor(service, settings, { onChange, onProblem, onRefused }) {
    this.#service = service;
    this.#settings = settings;
    this.#onChange = onChange;
    this.#onProblem = onProblem;
    this.#onRefused = onRefused;
  }

  get isBusy() {
    return this.#uploads.some((upload) => upload.state === "sending");
  }

  /** What is to be done before anything is sent, if anything is. */
  get problem() {
    const failed = this.#uploads.find((upload) => upload.state === "failed");
    return failed && `${failed.name} was not uploaded. Remove it, and attach it again if you want to send it.`;
  }

  add(files) {
    for (const file of files) {
      const problem = this.#problemWith(file);
      if (problem) this.#onProblem(problem);
      else this.#begin(file);
    }
  }

  /** Return the uploaded attachments, and forget them here. */
  take() {
    const attachments = this.#uploads.filter(({ state }) => state === "done").map(({ attachment }) => attachment);
    for (const upload of this.#uploads) upload.preview && URL.revokeObjectURL(upload.preview);
    this.#uploads = [];
    this.#draw();
    return attachments;
  }

  /** Have attachments here again that were taken. Whether they were sent is not known: they are never deleted. */
  restore(attachments) {
    const again = (attachment) => ({ name: attachment.name, attachment, state: "done", mayBeSent: true });
    this.#uploads.push(...attachments.map(again));
    this.#draw();
  }

  #problemWith(file) {
    const { attachment_types: types, max_attachment_bytes: most } = this.#settings;
    if (!types.includes(kindOf(file))) return `${file.name}: files of this kind cannot be attached.`;
    if (file.size > most) return `${file.name} is larger than ${(most / 2 ** 20).toFixed(0)} MiB.`;
    return file.size === 0 ? `${file.name} is empty.` : null;
  }

  async #begin(file) {
    const isImage = file.type.startsWith("image/");
    const upload = { name: file.name, state: "sending", progress: 0, preview: isImage ? URL.createObjectURL(file) : null };
    this.#uploads.push(upload);
    this.#draw();
    try {
      const params = { name: file.name, size: file.size, mime_type: kindOf(file) };
      upload.attachment = await this.#service.request("attachments.create", params);
      if (!this.#uploads.includes(upload)) return this.#delete(upload); // removed meanwhile
      await this.#sendBytes(upload, file);
      upload.state = "done";
    } catch (error) {
      upload.state = "failed";
      if (this.#uploads.includes(upload)) this.#onProblem(`${file.name} could not be uploaded. ${error.message}`);
      if (error.needsLogin) this.#onRefused(error);
    }
    this.#draw();
  }

  /** `fetch` tells nothing about what it has sent, so this is the older way. */
  #sendBytes(upload, file) {
    const descriptor = upload.attachment.upload_descriptor;
    if (!descriptor) return null; // the service has the bytes already
    return new Promise((resolve, reject) => {
      const request = (upload.request = new XMLHttpRequest());
      request.open(descriptor.method, descriptor.url);
      for (const [name, value] of Object.entries(descriptor.headers ?? {})) request.setRequestHeader(name, value);
      request.upload.onprogress = (event) => {
        upload.progress = event.loaded / (event.total || file.size);
        upload.bar.value = upload.progress;
      };
      request.onload = () => (request.status < 300 ? resolve() : reject(new Error(messageOf(request))));
      request.onerror = () => reject(new Error("The connection was lost."));
      request.onabort = () => reject(new Error("It was removed."));
      request.send(file);
    });
  }

  #remove(upload) {
    this.#uploads = this.#uploads.filter((each) => each !== upload);
    upload.request?.abort();
    if (upload.preview) URL.revokeObjectURL(upload.preview);
    if (upload.attachment && !upload.mayBeSent) this.#delete(upload);
    this.#draw();
    document.querySelector("#message").focus();
  }

  /** What nobody will send need not be kept; should this fail, the service clears it away in its time. */
  #delete(upload) {
    this.#service.request("attachments.delete", { attachment_id: upload.attachment.id }).catch(() => {});
  }

  #draw() {
    this.#list.hidden = this.#uploads.length === 0;
    this.#list.replaceChildren(...this.#uploads.map((upload) => this.#drawUpload(upload)));
    this.#onChange();
  }

  #drawUpload(upload) {
    upload.bar = el("progress", { max: 1, value: upload.progress, "aria-label": `Uploading ${upload.name}` });
    return el(
      "li.upload",
      { "data-state": upload.state },
      upload.preview ? el("img", { src: upload.preview, alt: "" }) : icon("document"),
      el("span.name", {}, upload.name),
      upload.state === "sending" && upload.bar,
      upload.state === "failed" && el("span.failed", {}, "not uploaded"),
      iconButton(icon("close"), `Remove ${upload.name}`, () => this.#remove(upload)),
    );
  }
}

function messageOf(request) {
  try {
    return JSON.parse(request.responseText).message;
  } catch {
    return `The service answered with status ${request.status}.`;
  }
}
