"""What the trainer loads when it starts."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
import train
train.load_package()
train.import_diffusers()
import diffusers, transformers
diffusers.FluxPipeline, diffusers.FluxTransformer2DModel, transformers.T5EncoderModel, transformers.CLIPTextModel
assert not {"peft", "bitsandbytes"} & set(sys.modules)
import bitsandbytes  # who wants it gets it
assert bitsandbytes.optim.AdamW8bit
"""


def test_models_bring_no_packages_that_are_not_used() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, check=True, timeout=120)
