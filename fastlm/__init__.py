"""fastlm: train causal language models fast on the hardware you have.

Importing it loads neither Triton nor the compiled extension and touches no device.
"""

from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# In the root of a checkout `import fastlm` finds the sources there. The extension and the kernels
# then come from where pip installed them (extension.py refuses a binary of other sources).
__path__ = extend_path(__path__, __name__)

from fastlm.checkpoint import load_checkpoint, save_checkpoint
from fastlm.config import TrainingConfig
from fastlm.data.files import TokenDataset, load_token_dataset
from fastlm.errors import (
    CheckpointError,
    CompileError,
    ConfigError,
    DataError,
    DeviceError,
    DivergedError,
    ExtensionError,
    OutputError,
    UserError,
)
from fastlm.evaluate import evaluate_model_loss, validate
from fastlm.hardware import keep_freed_memory, select_device
from fastlm.model import TransformerLM, count_parameters
from fastlm.model_config import ModelConfig
from fastlm.ops.causal_attention import causal_attention
from fastlm.ops.cross_entropy import check_labels, cross_entropy_loss
from fastlm.ops.dispatch import active_implementation
from fastlm.ops.gather_batch import gather_batch, get_batch
from fastlm.ops.linear_cross_entropy import (
    LinearCrossEntropyPlan,
    linear_cross_entropy_loss,
    linear_cross_entropy_plan,
)
from fastlm.optim import AdamW, clip_gradients
from fastlm.pretrained import from_pretrained
from fastlm.run.plot import LivePlotter, plot_lr_schedule
from fastlm.schedule import (
    cosine_lr_schedule,
    get_cosine_schedule_with_warmup,
    wsd_lr_schedule,
)
from fastlm.step import create_model_and_optimizer, set_seed

if TYPE_CHECKING:
    from fastlm.train import train_loop

__version__ = "0.2.0"

__all__ = [
    "AdamW",
    "CheckpointError",
    "CompileError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "DivergedError",
    "ExtensionError",
    "LinearCrossEntropyPlan",
    "LivePlotter",
    "ModelConfig",
    "OutputError",
    "TokenDataset",
    "TrainingConfig",
    "TransformerLM",
    "UserError",
    "active_implementation",
    "causal_attention",
    "check_labels",
    "clip_gradients",
    "cosine_lr_schedule",
    "count_parameters",
    "create_model_and_optimizer",
    "cross_entropy_loss",
    "evaluate_model_loss",
    "from_pretrained",
    "gather_batch",
    "get_batch",
    "get_cosine_schedule_with_warmup",
    "keep_freed_memory",
    "linear_cross_entropy_loss",
    "linear_cross_entropy_plan",
    "load_checkpoint",
    "load_token_dataset",
    "plot_lr_schedule",
    "save_checkpoint",
    "select_device",
    "set_seed",
    "train_loop",
    "validate",
    "wsd_lr_schedule",
]


if not TYPE_CHECKING:  # by which every name would exist

    def __getattr__(name: str) -> Any:
        # Lazily: `python -m fastlm.train` warns when the package has imported its module already.
        if name == "train_loop":
            from fastlm.train import train_loop

            return train_loop
        raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
