// What is remembered for this tab or this browser; where the browser forbids that, for as long as the page is open.

class Memory {
  #open;
  #meanwhile = new Map();

  constructor(open) {
    this.#open = open;
  }

  getItem(name) {
    try {
      return this.#open().getItem(name);
    } catch {
      return this.#meanwhile.get(name) ?? null;
    }
  }

  setItem(name, value) {
    try {
      this.#open().setItem(name, value);
    } catch {
      this.#meanwhile.set(name, value);
    }
  }

  removeItem(name) {
    this.#meanwhile.delete(name);
    try {
      this.#open().removeItem(name);
    } catch {
      // it holds nothing
    }
  }
}

export const tabMemory = new Memory(() => sessionStorage);
export const browserMemory = new Memory(() => localStorage);
