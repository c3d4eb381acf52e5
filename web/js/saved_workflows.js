// Opens canvases that earlier versions of the package saved: their values are stored by position, and the
// positions have changed. What is known of them is in layouts.json; it is told apart by count and shape.
import { app } from '../../../scripts/app.js'

const WIDGETS = ['INT', 'FLOAT', 'STRING', 'BOOLEAN', 'COMBO']
const known = fetch(new URL('../layouts.json', import.meta.url)).then(answer => answer.json())
const pack = decodeURIComponent(new URL(import.meta.url).pathname.split('/')[2])
const definitions = new Map()

/** Name, type and default of each stored value of a node, in today's order. */
function widgets({ required = {}, optional = {} }) {
  return Object.entries({ ...required, ...optional })
    .filter(([, [type, options]]) => !options?.forceInput && (Array.isArray(type) || WIDGETS.includes(type)))
    .map(([name, [type, options]]) => ({ name, type, value: options?.default ?? (Array.isArray(type) ? type[0] : '') }))
}

function fits(stored, { count, when }) {
  const is = (value, what) => what === 'switch' ? typeof value === 'boolean'
    : what === 'text' ? typeof value === 'string' : what.includes(value)
  return stored.length === count && Object.entries(when).every(([place, what]) => is(stored[place], what))
}

/** Today's stored values of a node, by position. */
function adopt(kind, stored, tables) {
  const order = widgets(definitions.get(kind))
  const layout = tables.layouts[kind]?.find(layout => fits(stored, layout))
  const names = layout?.names ?? order.map(widget => widget.name)
  const values = new Map(stored.map((value, place) => [names[place], value]))
  for (const [name, words] of Object.entries(tables.values[kind] ?? {}))
    values.set(name, words[values.get(name)] ?? values.get(name))
  for (const [name, gate] of Object.entries(tables.only_if[kind] ?? {}))
    if (values.get(gate) === false) values.set(name, '')
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
    if (nodeData.python_module === `custom_nodes.${pack}`) definitions.set(nodeData.name, nodeData.input ?? {})
  },
  async beforeConfigureGraph(graph) {
    const tables = await known
    for (const { nodes } of [graph, ...(graph.definitions?.subgraphs ?? [])])
      for (const node of nodes ?? [])
        if (Array.isArray(node.widgets_values) && definitions.has(node.type) &&
            (tables.layouts[node.type] || tables.values[node.type]))
          node.widgets_values = adopt(node.type, node.widgets_values, tables)
  },
})
