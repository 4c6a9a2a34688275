// Reads the built site as a reader does and prints what was seen as JSON.
// usage: node browse.mjs HTML_DIR CHROMIUM PAGE ...      (paths in HTML_DIR)
import { chromium } from 'playwright-core';
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [folder, executablePath, ...pages] = process.argv.slice(2);
const root = path.resolve(folder);
const TYPES = { '.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css', '.svg': 'image/svg+xml', '.png': 'image/png', '.json': 'application/json', '.woff2': 'font/woff2', '.woff': 'font/woff' };

const server = http.createServer((request, response) => {
  const file = path.join(root, decodeURIComponent(new URL(request.url, 'http://x').pathname));
  if (!file.startsWith(root) || !fs.existsSync(file) || fs.statSync(file).isDirectory()) {
    response.writeHead(404);
    return response.end();
  }
  response.writeHead(200, { 'content-type': TYPES[path.extname(file)] || 'application/octet-stream' });
  fs.createReadStream(file).pipe(response);
});
await new Promise((done) => server.listen(0, '127.0.0.1', done));
const base = `http://127.0.0.1:${server.address().port}/`;

const browser = await chromium.launch({
  executablePath,
  args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--no-first-run'],
});

const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, colorScheme: 'light' });

// Open a page that notes everything that goes wrong on it.
async function open(address) {
  const page = await context.newPage();
  const seen = { errors: [], outside: [], bytes: 0 };
  page.on('console', (m) => m.type() === 'error' && seen.errors.push(m.text().slice(0, 200)));
  page.on('pageerror', (e) => seen.errors.push(String(e).slice(0, 200)));
  page.on('requestfailed', (r) => seen.errors.push(`failed: ${r.url().slice(0, 160)}`));
  page.on('request', (r) => /^(https?:)/.test(r.url()) && !r.url().startsWith(base) && seen.outside.push(r.url().slice(0, 160)));
  page.on('response', async (r) => {
    if (r.status() >= 400) seen.errors.push(`${r.status()} ${r.url().slice(0, 160)}`);
    if (/html-manager|require\.js/.test(r.url())) return;
    seen.bytes += (await r.body().catch(() => '')).length;
  });
  await page.goto(address, { waitUntil: 'load' });
  await settle(page);
  return { page, seen };
}

// Wait until formulas are set and sliders stand.
async function settle(page) {
  await page.evaluate(() => window.MathJax?.startup?.promise);
  const views = await page.locator('script[type="application/vnd.jupyter.widget-view+json"]').count();
  if (views)
    await page.waitForFunction((n) => document.querySelectorAll('.cell_output .jupyter-widgets').length >= n, views, { timeout: 20000 }).catch(() => {});
  await page.waitForTimeout(200);
}

// Press a key on every slider and see which leave the picture as it was.
async function drive(page) {
  const handles = page.locator('.noUi-handle');
  const result = { sliders: await handles.count(), stuck: [], unnamed: 0 };
  for (let i = 0; i < result.sliders; i++) {
    const handle = handles.nth(i);
    if (!(await handle.getAttribute('aria-label'))) result.unnamed++;
    const frame = () => handle.evaluate((h) => [...h.closest('.cell_output').querySelectorAll('img')].filter((x) => x.offsetParent).map((x) => x.src.length + x.alt).join('|'));
    const before = await frame();
    await handle.focus();
    for (const key of ['ArrowRight', 'ArrowLeft', 'ArrowLeft']) {
      await page.keyboard.press(key);
      await page.waitForTimeout(120);
      if ((await frame()) !== before) break;
    }
    if ((await frame()) === before) result.stuck.push(i);
    await page.keyboard.press('Home');
  }
  return result;
}

const look = () => {
  const color = getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number);
  return {
    math: document.querySelectorAll('mjx-container').length,
    formulas: document.querySelectorAll('article .math').length,
    badMath: document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
    code: document.querySelectorAll('article div.highlight pre').length,
    copy: document.querySelectorAll('article button.copybtn').length,
    noAlt: document.querySelectorAll('article img:not([alt]), article img[alt=""]').length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    brightness: (color[0] + color[1] + color[2]) / 765,
    theme: document.documentElement.dataset.theme,
  };
};

const report = { pages: {} };
for (const name of pages) {
  const { page, seen } = await open(base + name);
  const entry = { ...(await page.evaluate(look)), ...(await drive(page)) };
  await page.emulateMedia({ colorScheme: 'dark' });
  await page.waitForFunction(() => document.documentElement.dataset.theme === 'dark', null, { timeout: 5000 }).catch(() => {});
  entry.dark = await page.evaluate(look);
  await page.emulateMedia({ colorScheme: 'light' });
  await page.setViewportSize({ width: 390, height: 844 });
  await page.waitForTimeout(150);
  entry.phone = await page.evaluate(look);
  report.pages[name] = { ...entry, ...seen };
  await page.close();
}

// The theme switch, on the first page.
{
  const { page } = await open(base + pages[0]);
  const themes = [];
  for (let i = 0; i < 3; i++) {
    await page.locator('button.theme-switch-button:visible').first().click();
    themes.push(await page.evaluate(() => document.documentElement.dataset.mode));
  }
  report.themes = themes;
  await page.close();
}

// Search, and one page straight from the disk.
{
  const { page, seen } = await open(`${base}search.html?q=compression`);
  await page.waitForSelector('#search-results li', { timeout: 10000 }).catch(() => {});
  report.search = { hits: await page.locator('#search-results li').count(), ...seen };
  await page.close();
}
{
  const name = pages.find((p) => p.startsWith('chapters/')) || pages[0];
  const start = Date.now();
  const { page, seen } = await open(pathToFileURL(path.join(root, name)).href);
  const seconds = (Date.now() - start) / 1000;
  report.disk = { name, seconds, ...(await page.evaluate(look)), ...(await drive(page)), ...seen };
  await page.close();
}

await browser.close();
server.close();
console.log(JSON.stringify(report));
