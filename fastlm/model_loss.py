"""A model and its loss in one module: what compiles, spreads or shards a model goes around this.

B batch, T context length, D model width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from fastlm.config import TrainingConfig
from fastlm.hardware import autocast, check_compiler, select_dtype
from fastlm.model import TransformerLM
from fastlm.model_interface import compile_blocks, has_fused_head
from fastlm.ops.cross_entropy import cross_entropy_loss
from fastlm.ops.linear_cross_entropy import linear_cross_entropy_loss


class ModelLoss(nn.Module):
    """The loss of `model`, whose matmuls are in cfg.dtype; the loss is fp32.

    model: (B, T) ids to (B, T, V) logits. If it has hidden(x), (B, T) ids to (B, T, D), and
    lm_head, an nn.Linear, the head and the loss are one fused op, and no logits exist.
    """

    def __init__(self, model: nn.Module, device: torch.device, cfg: TrainingConfig):
        super().__init__()
        self.model, self.device = model, device
        self.dtype = select_dtype(cfg.dtype, device)
        self.is_fused, self.fp8_head = has_fused_head(model), cfg.fp8_head
        if isinstance(model, TransformerLM):
            narrow = device.type == "cuda" and self.dtype == torch.bfloat16
            narrow = narrow if cfg.residual_dtype == "auto" else cfg.residual_dtype == "bfloat16"
            model.residual_follows_autocast = narrow
            for layer in model.layers:
                layer.attn.joint = layer.ffn.joint = cfg.joint_projections
        self._output = self._model_output
        if cfg.compile:
            check_compiler(device)
            mode = None if cfg.compile_mode == "default" else cfg.compile_mode
            # Shapes are fixed: a graph for each mode, and no recompilation for a changed size.
            if cfg.compile_scope == "block":
                compile_blocks(model, mode)
            else:
                self._output = torch.compile(self._model_output, dynamic=False, mode=mode)

    def forward(
        self, x: Tensor, y: Tensor, num_items: Tensor | int | None = None, *, summed: bool = False
    ) -> Tensor:
        """x, y: (B, T), y -100 where there is no target -> the loss in nats, fp32, 0-d.

        The mean over the targets, or, with num_items, their sum over num_items, or, summed, the sum
        alone. The loss is outside the compiled graph, so that the upstream gradient is 1 and
        gradients made with it are returned without another pass.
        """
        options = {"reduction": "sum" if summed else "mean", "num_items": num_items}
        output = self._output(x)
        if not self.is_fused:
            return cross_entropy_loss(output, y, **options)
        head, fp8 = self.model.lm_head, self.fp8_head and self.model.training
        return linear_cross_entropy_loss(output, head.weight, y, bias=head.bias, fp8=fp8, **options)

    def summed(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (B, T) -> sum of the targets' losses in nats, fp32."""
        return self(x, y, summed=True)

    def _model_output(self, x: Tensor) -> Tensor:
        """x: (B, T) -> what the loss takes: (B, T, D) in the matmuls' dtype, or (B, T, V)."""
        with autocast(self.device, self.dtype):
            return self.model.hidden(x).to(self.dtype) if self.is_fused else self.model(x)
