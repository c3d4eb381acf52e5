"""The trainer: settings, data, engine, run folders. Nothing here knows ComfyUI."""
