// Stored values of our nodes. The canvas stores them by position, and positions change when a node gets an input.
// So each node also stores the names of its inputs, and they are put in today's order when the canvas opens.
// Canvases of the old package have no names: layouts.json tells its versions apart by count and shape.
import { app } from '../../../scripts/app.js'

const WIDGETS = ['INT', 'FLOAT', 'STRING', 'BOOLEAN', 'COMBO']
const known = fetch(new URL('../layouts.json', import.meta.url)).then(answer => answer.json())
const pack = decodeURIComponent(new URL(import.meta.url).pathname.split('/')[2])
const definitions = new Map()
const NAMES = 'input names'

/** Name, type and default of each stored value of a node, in today's order. */
function widgets({ required = {}, optional = {} }) {
  return Object.entries({ ...required, ...optional })
    .filter(([, [type, options]]) => !options?.forceInput && (Array.isArray(type) || WIDGETS.includes(type)))
    .flatMap(([name, [type, options]]) => [
      { name, type, value: options?.default ?? (Array.isArray(type) ? type[0] : '') },
      ...(options?.control_after_generate || (type === 'INT' && ['seed', 'noise_seed'].includes(name))
        ? [{ name: 'control_after_generate', value: 'fixed' }] : []),
    ])
}

function fits(stored, { count, when }) {
  const is = (value, what) => what === 'switch' ? typeof value === 'boolean'
    : what === 'text' ? typeof value === 'string' : what.includes(value)
  return stored.length === count && Object.entries(when).every(([place, what]) => is(stored[place], what))
}

/** Today's stored values of a node, by position. */
function adopt(kind, stored, given, tables) {
  const order = widgets(definitions.get(kind))
  const today = order.map(widget => widget.name)
  const named = given?.some((name, place) => name !== today[place]) && { names: given }
  const layout = named || (!given && tables.layouts[kind]?.find(layout => fits(stored, layout)))
  const names = layout?.names ?? today
  const values = new Map(stored.map((value, place) => [names[place], value]))
  for (const [name, words] of Object.entries(tables.values[kind] ?? {}))
    values.set(name, words[values.get(name)] ?? values.get(name))
  for (const [name, gate] of Object.entries(tables.only_if[kind] ?? {}))
    if (values.get(gate) === false) values.set(name, '')
  if (!layout && given) return stored
  if (!layout) return stored.map((value, place) => place < names.length ? values.get(names[place]) : value)
  return order.map(({ name, type, value }) => {
    const kept = values.has(name) ? values.get(name) : value
    return ['INT', 'FLOAT'].includes(type) && typeof kept === 'string' && kept.trim() !== '' && !isNaN(kept)
      ? Number(kept) : kept
  })
}

app.registerExtension({
  name: 'diffusion-trainer.saved-workflows',
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.python_module !== `custom_nodes.${pack}`) return
    definitions.set(nodeData.name, nodeData.input ?? {})
    const before = nodeType.prototype.onSerialize
    nodeType.prototype.onSerialize = function (stored) {
      before?.apply(this, arguments)
      stored.properties = { ...stored.properties, [NAMES]: (this.widgets ?? []).map(widget => widget.name) }
    }
  },
  async beforeConfigureGraph(graph) {
    const tables = await known
    for (const { nodes } of [graph, ...(graph.definitions?.subgraphs ?? [])])
      for (const node of nodes ?? [])
        if (Array.isArray(node.widgets_values) && definitions.has(node.type))
          node.widgets_values = adopt(node.type, node.widgets_values, node.properties?.[NAMES], tables)
  },
})
