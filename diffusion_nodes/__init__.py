"""Everything that knows ComfyUI: the nodes, and what they ask of their host."""
