"""Train diffusion models from ComfyUI: what ComfyUI reads when it loads the package."""

from .diffusion_nodes import comfy
from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, adopt_prompt

WEB_DIRECTORY = "./web"

comfy.before_prompts(adopt_prompt)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
