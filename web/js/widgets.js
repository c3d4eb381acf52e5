// What frontends show of our widgets otherwise than they should.
import { app } from '../../../scripts/app.js'

const pack = decodeURIComponent(new URL(import.meta.url).pathname.split('/')[2])

function mend({ name, label, options, element }) {
  // The first frontends with Nodes 2.0 (1.27) round what is shown and typed to three decimals, a learning rate of 1e-4
  // to 0, unless the widget has this option, which other frontends do not know.
  if (options?.precision > 3) options.maxFractionDigits = options.precision
  // An empty text box of the canvas shows the input's name in the code, in every language.
  if (element?.placeholder === name && label) element.placeholder = label
}

app.registerExtension({
  name: 'diffusion-trainer.widgets',
  nodeCreated(node) {
    if (node.constructor?.nodeData?.python_module === `custom_nodes.${pack}`) node.widgets?.forEach(mend)
  },
})
