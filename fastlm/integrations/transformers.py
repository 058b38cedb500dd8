"""The loss and the optimizer for models of Hugging Face's transformers: apply, optimizer, restore.

    from fastlm.integrations.transformers import apply, optimizer

    apply()  # before or after the model is made
    args = TrainingArguments(..., max_grad_norm=0)
    Trainer(model, args, ..., optimizer_cls_and_kwargs=optimizer(args, max_grad_norm=1.0))

transformers is imported where it is used: pip install 'fastlm[transformers]'.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.errors import ConfigError, UserError, shown
from fastlm.ops.linear_cross_entropy import linear_cross_entropy_loss
from fastlm.optim import AdamW

MODELS = {  # module below transformers.models -> class
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_originals: dict[type, Callable[..., Any]] = {}  # class -> its own forward


def apply() -> None:
    """Training steps of Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3 (text) and GPT-2 take
    linear_cross_entropy_loss: the head and the loss in one, without the memory for the logits.

    For all models of these classes in this process, made before or later. The loss is the one that
    transformers computes, over all micro-batches with num_items_in_batch, with the final softcap of
    Gemma 2, with shift_labels and ignore_index; it is fp32 from the head on. `logits` of the output
    is None then. All else is transformers' own: evaluation, generation, a forward pass without
    labels or with logits_to_keep, a loss_function of your own, a head that is no plain nn.Linear
    (quantized, with an adapter or with hooks).
    Raises UserError where transformers is missing or too old.
    """
    for module, name in MODELS.items():
        cls = _model_class(module, name)
        if cls not in _originals:
            _originals[cls] = cls.forward
            cls.forward = _with_fused_head(cls.forward, _output_class(name))


def restore() -> None:
    """Undoes apply()."""
    while _originals:
        cls, forward = _originals.popitem()
        cls.forward = forward


def optimizer(args: Any, *, max_grad_norm: float | None = None, **options: Any) -> tuple:
    """(fastlm.AdamW, its arguments) for Trainer's optimizer_cls_and_kwargs.

    args: a TrainingArguments, whose learning_rate, adam_beta1, adam_beta2 and adam_epsilon they
    are; the Trainer itself chooses what is decayed. max_grad_norm: clips inside the step, in place
    of the Trainer, which must be told so. options: further arguments of AdamW, as
    param_precision="split" for weights in bfloat16.
    Raises ConfigError if both would clip.
    """
    if max_grad_norm is not None and args.max_grad_norm:
        raise ConfigError(
            f"max_grad_norm={max_grad_norm}, and {shown(args.max_grad_norm)} in TrainingArguments: "
            f"both would clip; set TrainingArguments(max_grad_norm=0)"
        )
    given = dict(
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        max_grad_norm=max_grad_norm,
    )
    return AdamW, {**given, **options}


def _with_fused_head(original: Callable[..., Any], output_class: type) -> Callable[..., Any]:
    @functools.wraps(original)  # the Trainer reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _takes_over(self, args, kwargs):
            return original(self, *args, **kwargs)
        rest = dict(kwargs)
        labels = rest.pop("labels")
        num_items = rest.pop("num_items_in_batch", None)
        shift_labels = rest.pop("shift_labels", None)
        ignore_index = rest.pop("ignore_index", -100)
        for name in ("logits_to_keep", "return_dict"):
            rest.pop(name, None)
        outputs = getattr(self, self.base_model_prefix)(*args, **rest)
        hidden = outputs.last_hidden_state  # (B, T, D)
        if shift_labels is None:  # the target of a position is the label of the next
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = linear_cross_entropy_loss(
            hidden,
            self.lm_head.weight,
            shift_labels.to(hidden.device).reshape(hidden.shape[:-1]),
            bias=self.lm_head.bias,
            num_items=_number(num_items, hidden),
            ignore_index=ignore_index,
            softcap=getattr(self.config, "final_logit_softcapping", None),
        )
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return output_class(loss=loss, **others)

    return forward


def _takes_over(model: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = model.lm_head
    kept, as_dict = kwargs.get("logits_to_keep", 0), kwargs.get("return_dict")
    return (
        model.training
        and kwargs.get("labels") is not None
        and len(args) <= 1  # input_ids; the places of the others differ from version to version
        and isinstance(kept, int)
        and not kept
        and (model.config.return_dict if as_dict is None else as_dict)
        and model.loss_function is ForCausalLMLoss
        and type(head) is nn.Linear
        and not (head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"))
    )


def _number(num_items: Tensor | int | float | None, hidden: Tensor) -> Tensor | int | float | None:
    """What DataParallel has scattered holds it once, in a dimension of its own."""
    if not isinstance(num_items, Tensor):
        return num_items
    return num_items.to(hidden.device).reshape(-1)[0]


def _model_class(module: str, name: str) -> type:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UserError(
            "transformers is not installed: pip install 'fastlm[transformers]'"
        ) from error
    try:
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        return getattr(found, name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(
            f"transformers {transformers.__version__} has no {name}: install 5.0 or later"
        ) from error


def _output_class(name: str) -> type:
    from transformers import modeling_outputs

    with_cross = "CausalLMOutputWithCrossAttentions"
    return getattr(modeling_outputs, with_cross if "GPT2" in name else "CausalLMOutputWithPast")
