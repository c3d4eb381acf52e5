// Opens a workflow in ComfyUI's page and says, as JSON, what a user would see there.
//
//     PLAYWRIGHT_DIR=... node browser.mjs URL WORKFLOW.json PICTURE.png [--vue] [--zh] [--run SECONDS]
//
// PLAYWRIGHT_DIR holds node_modules/playwright-core; CHROMIUM names the browser (/usr/bin/chromium).
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { createRequire } from 'node:module'

const { chromium } = createRequire(path.join(process.env.PLAYWRIGHT_DIR, '/'))('playwright-core')
const [url, workflowPath, picture, ...flags] = process.argv.slice(2)
const workflow = JSON.parse(fs.readFileSync(workflowPath, 'utf8'))
const seconds = flags.includes('--run') ? Number(flags[flags.indexOf('--run') + 1]) : 0

// What ComfyUI's own page prints without any package, and what it cannot load without the internet.
const OWN = [/user\.css/, /userdata/, /missingModelMetadata/, /deprecated/, /graph accessed before initialization/,
  /apple-mobile-web-app-capable/, /reading 'id'\)\s+at onChange/, /Content Security Policy/, /net::ERR_FAILED/]
const setting = (name, value) => fetch(`${url}/api/settings/${name}`, { method: 'POST', body: JSON.stringify(value) })
await setting('Comfy.TutorialCompleted', true)
await setting('Comfy.Minimap.Visible', false)
await setting('Comfy.VueNodes.Enabled', flags.includes('--vue'))
await setting('Comfy.Locale', flags.includes('--zh') ? 'zh' : 'en')

const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'browser-'))
const context = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', headless: true,
  viewport: { width: 2300, height: 1640 }, args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking'],
})
const seen = { errors: [], missing: [], widgets: {}, stored: {}, labels: {}, drawn: [], outcome: null }
try {
  const page = context.pages()[0] ?? await context.newPage()
  const outside = address => /^https?:/.test(address.href) && address.host !== new URL(url).host
  await page.route(outside, route => route.abort())
  const note = (text, place = '') =>
    OWN.some(own => own.test(text) || own.test(place)) || seen.errors.push(`${place} ${text}`.trim().slice(0, 1000))
  page.on('console', message => message.type() === 'error' && note(message.text(), message.location()?.url))
  page.on('pageerror', error => note(String(error.stack ?? error)))
  await page.addInitScript(() => {  // texts on a canvas can only be read where they are drawn
    window.drawn = new Set()
    const draw = CanvasRenderingContext2D.prototype.fillText
    CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
      window.drawn.add(String(text))
      return draw.call(this, text, ...rest)
    }
  })
  await page.goto(url, { waitUntil: 'load', timeout: 120000 })
  await page.waitForFunction(() => window.app?.graph && window.app.vueAppReady !== false &&
    Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 50, null, { timeout: 120000 })
  await page.waitForTimeout(2000)
  await page.keyboard.press('Escape')
  seen.missing = await page.evaluate(types => types.filter(type => !window.LiteGraph.registered_node_types[type]),
    workflow.nodes.map(node => node.type))
  await page.evaluate(async workflow => {
    for (const kind of ['success', 'error', 'interrupted'])
      window.app.api.addEventListener(`execution_${kind}`, () => { window.outcome = kind })
    await window.app.loadGraphData(workflow)
  }, workflow)
  await page.waitForTimeout(1500)
  await page.evaluate(() => {
    const scale = window.app.canvas.ds
    scale.scale = 1
    scale.offset[0] = 100
    scale.offset[1] = 120
    window.drawn.clear()
    window.app.canvas.setDirty(true, true)
  })
  if (seconds) {
    await page.evaluate(() => window.app.queuePrompt(0))
    await page.waitForFunction(() => window.outcome, null, { timeout: seconds * 1000 })
    seen.outcome = await page.evaluate(() => window.outcome)
  }
  await page.waitForTimeout(2000)
  seen.widgets = await page.evaluate(() => Object.fromEntries(window.app.graph.nodes.map(
    node => [node.id, Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value]))])))
  seen.labels = await page.evaluate(() => Object.fromEntries(window.app.graph.nodes.map(node => [node.type, {
    title: node.title,
    ...Object.fromEntries((node.widgets ?? []).map(({ name, label, element }) => [name, element?.placeholder ?? label])),
    ...Object.fromEntries([...node.inputs ?? [], ...node.outputs ?? []].filter(slot => !slot.widget).map(
      ({ name, type, label, localized_name: shown }) => [`${name} (${type})`, label ?? shown])),
  }])))
  seen.stored = await page.evaluate(() => Object.fromEntries(window.app.graph.serialize().nodes.map(node => [node.id, node])))
  seen.drawn = await page.evaluate(() => [...window.drawn,
    ...[...document.querySelectorAll('[data-node-id] input')].map(input => input.value)])
  await page.screenshot({ path: picture })
} finally {
  await context.close()
  fs.rmSync(profile, { recursive: true, force: true })
}
console.log(JSON.stringify(seen))
