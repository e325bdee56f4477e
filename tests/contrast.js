// The contrast of all text that is shown (WCAG 2.2, 1.4.3): [kind of element, [the worst ratio, what it says]], the worst first.
(() => {
  const parse = (colour) => {
    const [r, g, b, alpha = 1] = colour.match(/[\d.]+/g).map(Number);
    return colour.startsWith("color(srgb") ? [255 * r, 255 * g, 255 * b, alpha] : [r, g, b, alpha];
  };
  const over = (upper, lower) => [0, 1, 2].map((i) => upper[i] * upper[3] + lower[i] * (1 - upper[3])).concat(1);
  const linear = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const above = (node) => (node ? [...above(node.parentElement), node] : []);
  const worst = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.data.trim(), node = walk.currentNode.parentElement, styles = above(node).map((n) => getComputedStyle(n));
    if (!text || !node.getClientRects().length || node.closest("script, button:disabled, .katex-mathml")) continue;
    const paper = styles.reduce((below, style) => over(parse(style.backgroundColor), below), [255, 255, 255, 1]);
    const ink = parse(node.namespaceURI.endsWith("svg") ? styles.at(-1).fill : styles.at(-1).color);
    ink[3] *= styles.reduce((product, style) => product * Number(style.opacity), 1);
    const [low, high] = [luminance(over(ink, paper)) + 0.05, luminance(paper) + 0.05].sort((a, b) => a - b);
    const kind = `${node.tagName}.${node.getAttribute("class") ?? ""} ${node.style.background}`;
    if (!(worst[kind]?.[0] <= high / low)) worst[kind] = [Math.round((100 * high) / low) / 100, text.slice(0, 30)];
  }
  return Object.entries(worst).sort((a, b) => a[1][0] - b[1][0]);
})()
