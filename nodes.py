"""The nodes by id. Saved workflows name these ids, so an id stays for ever."""

from __future__ import annotations

from .diffusion_nodes.config import (
    AdapterConfigNode,
    AdvancedTrainConfig,
    GeneralConfig,
    ModelConfig,
    OptimizerConfigNode,
)
from .diffusion_nodes.dataset import ArBucketsNode, FrameBucketsNode, GeneralDatasetConfig, GeneralDatasetPathNode
from .diffusion_nodes.dataset_preview import DatasetPreview
from .diffusion_nodes.image_set_nodes import (
    LoadCaptionedImageSetNode,
    LoadImageSetFromFolderNode,
    LoadImageSetNode,
)
from .diffusion_nodes.lora_nodes import LoadTrainedLoRANode, SaveTrainedLoRANode, TrainLoRANode
from .diffusion_nodes.loss_plot import PlotTrainingLossNode
from .diffusion_nodes.model import model_nodes
from .diffusion_nodes.monitor import OutputDirPassthrough, TensorBoardMonitor
from .diffusion_nodes.train import Train

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "GeneralDatasetConfig": GeneralDatasetConfig,
    "GeneralDatasetPathNode": GeneralDatasetPathNode,
    "FrameBucketsNode": FrameBucketsNode,
    "ArBucketsNode": ArBucketsNode,
    "DatasetPreview": DatasetPreview,
    **model_nodes(),
    "GeneralConfig": GeneralConfig,
    "AdvancedTrainConfig": AdvancedTrainConfig,
    "ModelConfig": ModelConfig,
    "AdapterConfigNode": AdapterConfigNode,
    "OptimizerConfigNode": OptimizerConfigNode,
    "Train": Train,
    "TensorBoardMonitor": TensorBoardMonitor,
    "OutputDirPassthrough": OutputDirPassthrough,
    "LoadImageSetNode": LoadImageSetNode,
    "LoadImageSetFromFolderNode": LoadImageSetFromFolderNode,
    "LoadCaptionedImageSetNode": LoadCaptionedImageSetNode,
    "TrainLoRANode": TrainLoRANode,
    "SaveTrainedLoRANode": SaveTrainedLoRANode,
    "LoadTrainedLoRANode": LoadTrainedLoRANode,
    "PlotTrainingLossNode": PlotTrainingLossNode,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "GeneralDatasetConfig": "General Dataset Config",
    "GeneralDatasetPathNode": "General Dataset Path",
    "FrameBucketsNode": "Frame Buckets",
    "ArBucketsNode": "Aspect Ratio Buckets",
    "DatasetPreview": "Dataset Preview",
    "FluxModelNode": "Flux Model",
    "GeneralConfig": "General Training Config",
    "AdvancedTrainConfig": "Advanced Training Config",
    "ModelConfig": "Model Config",
    "AdapterConfigNode": "Adapter Config",
    "OptimizerConfigNode": "Optimizer Config",
    "Train": "Start Training",
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
