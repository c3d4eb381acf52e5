"""Train diffusion models from ComfyUI."""
