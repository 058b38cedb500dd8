"""fastlm's loss and optimizer under the Trainer of transformers: losses equal to its own."""

import copy

import pytest
import torch
from torch.utils.data import Dataset

import fastlm.integrations.transformers as integration
from fastlm import AdamW, ConfigError
from fastlm.integrations.transformers import MODELS, apply, optimizer, restore

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # the Trainer's own need
pytestmark = pytest.mark.usefixtures("one_thread")

V, T = 61, 12
EXHAUSTIVE = pytest.mark.exhaustive
SIZES = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, pad_token_id=None, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
GEMMA = dict(head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    # Caps that bend the logits of a tiny model.
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **GEMMA, final_logit_softcapping=0.5),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **GEMMA),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=None,
        eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip


class Windows(Dataset):
    """Random ids; how many labels are ignored differs from window to window."""

    def __init__(self, count: int = 24):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(V, (count, T), generator=generator)
        self.labels = self.ids.clone()
        for row in range(count):
            self.labels[row, : row % (T - 2)] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


@pytest.fixture(autouse=True)
def _restored():
    transformers.utils.logging.set_verbosity_error()
    yield
    restore()


@pytest.fixture
def calls(monkeypatch):
    """How many losses fastlm has computed."""
    made = []
    own = integration.linear_cross_entropy_loss
    monkeypatch.setattr(
        integration, "linear_cross_entropy_loss", lambda *a, **k: made.append(1) or own(*a, **k)
    )
    return made


def model_of(name: str):
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[name])(CONFIGS[name]())
    with torch.no_grad():  # logits that differ from one another
        model.lm_head.weight *= 20
    return model


def trained(model, directory, *, with_fastlm: bool, **settings):
    """(losses of the steps, loss of the evaluation)."""
    arguments = dict(
        output_dir=str(directory), max_steps=4, per_device_train_batch_size=2,
        gradient_accumulation_steps=3, learning_rate=1e-2, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
        weight_decay=0.1, adam_beta2=0.95, optim="adamw_torch", dataloader_pin_memory=False,
        max_grad_norm=0.0 if with_fastlm else 0.5,
    )  # fmt: skip
    args = transformers.TrainingArguments(**{**arguments, **settings})
    given = dict(optimizer_cls_and_kwargs=optimizer(args, max_grad_norm=0.5)) if with_fastlm else {}
    trainer = transformers.Trainer(model, args, train_dataset=Windows(), **given)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    if with_fastlm:
        inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert isinstance(inner, AdamW) and inner.last_grad_norm is not None
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.evaluate(Windows(6))["eval_loss"]


@pytest.mark.parametrize(
    "name",
    [
        # The other four have llama's head and loss; test_gradients_of_one_step has them all.
        name if name in ("llama", "gemma2", "gpt2") else pytest.param(name, marks=EXHAUSTIVE)
        for name in MODELS
    ],
)
def test_the_trainer_reaches_the_same_losses(name, tmp_path, calls):
    """With micro-batches of unequal numbers of labels: a mean of means would be another loss."""
    theirs, ours = model_of(name), model_of(name)
    expected, evaluated = trained(theirs, tmp_path, with_fastlm=False)
    assert not calls
    apply()
    found, found_evaluated = trained(ours, tmp_path, with_fastlm=True)
    assert len(calls) == 4 * 3
    assert len(expected) == 4 and max(expected) - min(expected) > 1e-3
    assert found == pytest.approx(expected, rel=1e-4)
    assert found_evaluated == pytest.approx(evaluated, rel=1e-4)
    for (parameter, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_one_step(name, calls):
    """Where no optimizer evens out what differs."""
    batch = {"input_ids": Windows().ids[:3], "labels": Windows().labels[7:10]}
    found = []
    for swapped in (False, True):
        model = model_of(name).train()
        if swapped:
            apply()
        losses = []
        for extra in ({}, {"num_items_in_batch": torch.tensor(40)}, {"num_items_in_batch": 17}):
            output = model(**batch, **extra)
            output.loss.backward()
            losses.append(output.loss.item())
        assert (output.logits is None) == swapped
        found.append((losses, [p.grad for p in model.parameters()]))
    (expected, gradients), (losses, ours) = found
    assert len(calls) == 3 and losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-6)


def test_what_is_no_training_step_stays_theirs(calls):
    batch = {"input_ids": Windows().ids[:3], "labels": Windows().labels[:3]}
    model = model_of("gemma2")
    expected = model.train()(**batch)
    apply()
    apply()  # twice is once
    model.eval()
    output = model(**batch)
    torch.testing.assert_close(output.logits, expected.logits)
    assert output.loss.item() == pytest.approx(expected.loss.item())
    model.train()
    assert model(input_ids=batch["input_ids"]).logits is not None
    assert model(**batch, return_dict=False)[1].shape == (3, T, V)
    assert model(**batch, logits_to_keep=T).logits.shape == (3, T, V)
    assert not calls
    own = copy.deepcopy(model)
    own.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    assert own(**batch).loss.item() == pytest.approx(expected.logits.sum().item(), rel=1e-4)
    hooked = copy.deepcopy(model)
    seen = []
    hooked.lm_head.register_forward_hook(lambda *_: seen.append(1))
    hooked(**batch)
    assert seen == [1] and not calls
    # What the Trainer and generate() ask of it.
    with torch.no_grad():
        assert model.eval().generate(batch["input_ids"], max_new_tokens=2).shape == (3, T + 2)

    assert model.train()(**batch).logits is None and len(calls) == 1
    restore()
    torch.testing.assert_close(model(**batch).logits, expected.logits)
    assert len(calls) == 1 and "fastlm" not in type(model).forward.__code__.co_filename


def test_labels_that_are_shifted_already_and_another_ignored_one(calls):
    model = model_of("llama").train()
    ids, labels = Windows().ids[:3], Windows().labels[:3]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    others = labels.masked_fill(labels == -100, -1)
    cases = (dict(labels=labels, shift_labels=shifted), dict(labels=others, ignore_index=-1))
    expected = [model(input_ids=ids, **case).loss.item() for case in cases]
    apply()
    found = [model(ids, **case).loss.item() for case in cases]
    assert found == pytest.approx(expected, rel=1e-6) and len(calls) == 2
    assert model(ids, labels=labels, output_hidden_states=True).hidden_states is not None


@EXHAUSTIVE
def test_a_training_step_is_one_graph(calls):
    model, batch = model_of("gemma2").train(), {"input_ids": Windows().ids[:3]}
    batch |= {"labels": Windows().labels[:3], "num_items_in_batch": torch.tensor(20)}
    expected = model(**batch).loss.item()
    apply()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**batch)
    output.loss.backward()
    assert output.logits is None and calls
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_optimizers_arguments():
    args = transformers.TrainingArguments(learning_rate=3e-4, adam_beta1=0.8, max_grad_norm=0)
    cls, options = optimizer(args, max_grad_norm=2.0, skip_nonfinite=True)
    assert cls is AdamW
    made = cls([torch.nn.Parameter(torch.ones(2))], **options)
    assert made.defaults["betas"] == (0.8, 0.999) and made.defaults["lr"] == 3e-4
    with pytest.raises(ConfigError, match=r"max_grad_norm=2.0, and 1.0 in .*both would clip"):
        optimizer(transformers.TrainingArguments(), max_grad_norm=2.0)


def test_without_transformers_the_extra_is_named(monkeypatch):
    import sys

    from fastlm.errors import UserError

    monkeypatch.setitem(sys.modules, "transformers", None)
    for module in [name for name in sys.modules if name.startswith("transformers.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(UserError, match=r"pip install 'fastlm\[transformers\]'"):
        apply()
