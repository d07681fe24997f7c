// What text from a model may lead to: links by the user's own click, images that are kept here.

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

/** Return an image's address, or null where somebody else would be told what a model wrote. */
export function imageAddress(address) {
  const url = parse(address);
  if (!url) return null;
  const isInline = url.protocol === "blob:" || (url.protocol === "data:" && url.pathname.startsWith("image/"));
  return isInline || url.href.startsWith(new URL("attachments/", document.baseURI)) ? url.href : null;
}

export const LINK_ATTRIBUTES = { target: "_blank", rel: "noopener noreferrer nofollow" };
