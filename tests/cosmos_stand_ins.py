"""What diffusers' Cosmos-Predict2 takes from packages that tests do not need: of torchvision the size of a mask changed
to the nearest; and NVIDIA's guardrail, of which miniatures with random weights have no use."""

from types import SimpleNamespace

import numpy as np
import torch
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos import pipeline_cosmos2_text2image
from diffusers.utils import import_utils, is_torchvision_available


class PassingGuardrail(torch.nn.Module):
    """Lets all through."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


def resize(mask_NCHW: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    return torch.nn.functional.interpolate(mask_NCHW, size, mode=interpolation)


if not is_torchvision_available():
    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
pipeline_cosmos2_text2image.CosmosSafetyChecker = PassingGuardrail
import_utils._cosmos_guardrail_available = True
