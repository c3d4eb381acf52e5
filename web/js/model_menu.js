// Offers the files of ComfyUI's model folders for the path inputs of our nodes, in the node's menu. The inputs
// stay texts, as saved workflows have them; what is offered comes with the node's definition.
import { app } from '../../../scripts/app.js'

const offers = new Map()

function note(definition) {
  const inputs = { ...definition.input?.required, ...definition.input?.optional }
  const found = Object.entries(inputs).filter(([, [, options]]) => options?.suggestions?.length)
  if (found.length) offers.set(definition.name, found.map(([name, [, options]]) => [name, options.suggestions]))
}

function choose(node, name, file) {
  const widget = node.widgets?.find(widget => widget.name === name)
  if (!widget) return
  widget.value = file
  widget.callback?.(file, app.canvas, node)
  node.setDirtyCanvas?.(true, true)
}

function menu(node) {
  return (offers.get(node.comfyClass ?? node.type) ?? []).map(([name, files]) => ({
    content: `${node.widgets?.find(widget => widget.name === name)?.label ?? name} ▸ models`,
    has_submenu: true,
    submenu: { options: files.map(file => ({ content: file, callback: () => choose(node, name, file) })) },
  }))
}

app.registerExtension({
  name: 'diffusion-trainer.model-menu',
  beforeRegisterNodeDef(nodeType, nodeData) {
    note(nodeData)
    if (app.collectNodeMenuItems || !offers.has(nodeData.name)) return
    const before = nodeType.prototype.getExtraMenuOptions  // frontends of 2025 do not ask extensions
    nodeType.prototype.getExtraMenuOptions = function (canvas, options) {
      const result = before?.apply(this, arguments)
      options.unshift(...menu(this), null)
      return result
    }
  },
  refreshComboInNodes(definitions) { Object.values(definitions).forEach(note) },
  getNodeMenuItems: menu,
})
