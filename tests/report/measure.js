// What a reader would trip over, measured in the opened page.
() => {
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const paper = (element) => {
    for (; element; element = element.parentElement) {
      const { backgroundColor } = getComputedStyle(element);
      if (numbers(backgroundColor)[3] !== 0) return backgroundColor;
    }
    return "rgb(255, 255, 255)";
  };
  const visible = (element) => element.checkVisibility({ contentVisibilityAuto: true }) && element.getBoundingClientRect().width > 0;
  const own = (element) => [...element.childNodes].filter((n) => n.nodeType === Node.TEXT_NODE).map((n) => n.data.trim()).join("");
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const found = { faint: [], overlapping: [], outside: [], small: [], cut: [] };

  for (const element of document.querySelectorAll("body *")) {
    if (element.closest("title") || !own(element) || !visible(element)) continue;
    const style = getComputedStyle(element);
    const ratio = contrast(element.closest("svg") ? style.fill : style.color, paper(element));
    if (ratio < 4.5) found.faint.push(`${ratio.toFixed(2)} ${own(element)}`);
  }
  for (const mark of document.querySelectorAll("polyline, circle")) {
    const style = getComputedStyle(mark);
    const ratio = contrast(mark.localName === "polyline" ? style.stroke : style.fill, paper(mark));
    if (ratio < 3) found.faint.push(`${ratio.toFixed(2)} ${mark.localName}`);
  }
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")];
    const boxes = texts.map((t) => t.getBoundingClientRect());
    texts.forEach((text, i) => {
      const pixels = (parseFloat(getComputedStyle(text).fontSize) * frame.width) / svg.viewBox.baseVal.width;
      if (pixels < 10) found.small.push(`${pixels.toFixed(1)} px: ${text.textContent}`);
      const inside = boxes[i].left >= frame.left - 1 && boxes[i].right <= frame.right + 1 && boxes[i].top >= frame.top - 1 && boxes[i].bottom <= frame.bottom + 1;
      if (!inside) found.outside.push(text.textContent);
      texts.slice(0, i).forEach((other, j) => {
        if (meet(boxes[i], boxes[j])) found.overlapping.push(`${svg.ariaLabel}: ${other.textContent} | ${text.textContent}`);
      });
    });
  }
  for (const element of document.querySelectorAll("h1, h2, p, li, summary, .pairs th, .pairs td")) {
    if (visible(element) && element.scrollWidth > element.clientWidth + 1) found.cut.push(element.textContent.trim());
  }
  const body = getComputedStyle(document.body);
  return {
    ...found,
    plots: [...document.querySelectorAll("svg")].map((s) => [s.getBoundingClientRect().width, s.getBoundingClientRect().height]),
    scrolled: [...document.querySelectorAll(".scroll")].filter((e) => e.scrollWidth > e.clientWidth + 1).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    background: body.backgroundColor,
    ink: body.color,
    hidden: [...document.querySelectorAll("section *")].filter((e) => !e.closest("svg") && own(e) && !visible(e)).length,
  };
}
