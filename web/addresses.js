// What text from a model may lead to: links by the user's own click, images from this service alone.

const LINK_SCHEMES = ["http:", "https:", "mailto:"];

function parse(address) {
  try {
    return new URL(address, document.baseURI);
  } catch {
    return null;
  }
}

/** Return the address when a link may go there, else null. */
export function linkAddress(address) {
  const url = parse(address);
  return url && LINK_SCHEMES.includes(url.protocol) ? url.href : null;
}

/** Return the address when an image may be loaded from it, else null: one elsewhere could carry out what it was told. */
export function imageAddress(address) {
  const url = parse(address);
  if (!url) return null;
  const isInline = url.protocol === "blob:" || (url.protocol === "data:" && url.pathname.startsWith("image/"));
  return isInline || url.origin === location.origin ? url.href : null;
}

export const LINK_ATTRIBUTES = { target: "_blank", rel: "noopener noreferrer nofollow" };
