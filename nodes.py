"""The nodes by id. Saved workflows name these ids, so an id stays for ever.

Classes are imported when they are first used; see `diffusion_nodes.deferred`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from .diffusion_nodes.deferred import deferred
from .diffusion_nodes.model_contracts import contracts

if missing := [name for name in ("pydantic", "tomli_w", "psutil") if find_spec(name) is None]:
    raise ImportError(f"{', '.join(missing)} is not installed; run: python -m pip install -r requirements.txt")

MODULES = {
    "dataset": (
        "GeneralDatasetConfig", "GeneralDatasetPathNode", "EditModelDatasetPathNode", "MultiImageEditDatasetPathNode",
        "MaskDatasetPathNode", "FrameBucketsNode", "ArBucketsNode", "AddDatasetFolderNode", "DatasetOptionsNode",
        "EvalDatasetConfig", "EvalFromDatasetNode"),
    "dataset_preview": ("DatasetPreview",),
    "model": tuple(contracts()),
    "config": (
        "GeneralConfig", "AdvancedTrainConfig", "ModelConfig", "AdapterConfigNode", "OptimizerConfigNode"),
    "run_config": ("TrainingSamplerConfig", "MoreTrainConfigNode", "RunEnvironmentNode"),
    "train": ("Train",),
    "training_plan": ("TrainingPlan",),
    "monitor": ("TensorBoardMonitor", "OutputDirPassthrough"),
    "image_set_nodes": ("LoadImageSetNode", "LoadImageSetFromFolderNode", "LoadCaptionedImageSetNode"),
    "lora_nodes": ("TrainLoRANode", "SaveTrainedLoRANode", "LoadTrainedLoRANode"),
    "loss_plot": ("PlotTrainingLossNode",),
}  # fmt: skip
"""The ids by the module that holds the class of that name."""

NODE_CLASS_MAPPINGS: dict[str, type] = {
    name: deferred(module, name) for module, names in MODULES.items() for name in names
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "GeneralDatasetConfig": "General Dataset Config",
    "GeneralDatasetPathNode": "General Dataset Path",
    "EditModelDatasetPathNode": "Edit Model Dataset Path",
    "MultiImageEditDatasetPathNode": "Multi Image Edit Dataset Path",
    "MaskDatasetPathNode": "Mask Dataset Path",
    "FrameBucketsNode": "Frame Buckets",
    "ArBucketsNode": "Aspect Ratio Buckets",
    "AddDatasetFolderNode": "Add Dataset Folder",
    "DatasetOptionsNode": "More Dataset Options",
    "EvalDatasetConfig": "Evaluation Dataset Config",
    "EvalFromDatasetNode": "Dataset For Evaluation",
    "DatasetPreview": "Dataset Preview",
    **{name: contract.title for name, contract in contracts().items()},
    "GeneralConfig": "General Training Config",
    "AdvancedTrainConfig": "Advanced Training Config",
    "ModelConfig": "Model Config",
    "AdapterConfigNode": "Adapter Config",
    "OptimizerConfigNode": "Optimizer Config",
    "TrainingSamplerConfig": "Training Sampler Config",
    "MoreTrainConfigNode": "More Training Settings",
    "RunEnvironmentNode": "Run Environment",
    "Train": "Start Training",
    "TrainingPlan": "Training Plan",
    "TensorBoardMonitor": "TensorBoard Monitor",
    "OutputDirPassthrough": "Output Directory Passthrough",
    "LoadImageSetNode": "Load Image Set",
    "LoadImageSetFromFolderNode": "Load Image Set From Folder",
    "LoadCaptionedImageSetNode": "Load Captioned Image Set",
    "TrainLoRANode": "Train LoRA",
    "SaveTrainedLoRANode": "Save Trained LoRA",
    "LoadTrainedLoRANode": "Load Trained LoRA",
    "PlotTrainingLossNode": "Plot Training Loss",
}


def adopt_prompt(prompt: dict[str, Any]) -> None:
    """Turns what earlier versions of our nodes saved in a prompt into today's, in place."""
    from .diffusion_nodes import saved_workflows

    saved_workflows.adopt_prompt(prompt, NODE_CLASS_MAPPINGS)
