"""Which of torch's kernels a run computes with. No GPU is needed: what torch would choose on one is
stood in for, what is set in torch is torch's own."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from in_process import checkpoint, run_tiny
from torch.nn import attention
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import losses, tiny_config

from fastlm import ConfigError, linear_cross_entropy_loss
from fastlm.model_loss import ModelLoss
from fastlm.run import backends as module
from fastlm.run.backends import backends
from fastlm.run.environment import environment
from fastlm.step import create_model, graphs_compiled

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")
CPU = torch.device("cpu")


@pytest.fixture
def on_cuda(monkeypatch):
    """The run is on CUDA, where torch takes the first kernel of the order in force."""
    monkeypatch.setattr(module, "select_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(module, "attention_kernel", lambda *_: kernels()[0])


def kernels() -> list[str]:
    return [name(b) for b in attention._cur_sdpa_kernel_backends(with_priority=True)]


def name(backend: SDPBackend) -> str:
    return backend.name.split("_")[0].lower()


@pytest.mark.parametrize("settings, expected", [({}, "high"), ({"tf32": False}, "highest")])
def test_float32_runs_by_tf32_on_cuda_unless_told_otherwise(on_cuda, tmp_path, settings, expected):
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), backends(tiny_config(tmp_path, **settings)):
        assert torch.get_float32_matmul_precision() == expected
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
    with backends(tiny_config(tmp_path, dtype="bfloat16", **settings)):
        assert torch.get_float32_matmul_precision() == before


@pytest.fixture
def by_backend(monkeypatch):
    """A caller has set the precision by torch's newer switches, of which it tells no whole. (Where
    the older one has been used in the process before, it may.)"""
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    places[0].fp32_precision = "tf32"

    def refuse():
        raise RuntimeError("mix of the legacy and new APIs")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_float32_matmul_precision", refuse)
        yield lambda: [place.fp32_precision for place in places]
    torch.set_float32_matmul_precision(before)


def test_a_precision_that_was_set_for_a_backend(on_cuda, by_backend, tmp_path):
    before = by_backend()
    with backends(tiny_config(tmp_path, tf32=False)):
        assert by_backend()[0] == "ieee"
    assert by_backend() == before
    now = environment(CPU, torch.float32, compiled=False)
    assert now["matmul_precision"].startswith("cuda tf32, cpu ")


def test_all_of_a_run_is_on_the_device_it_names(monkeypatch, tmp_path):
    """Seeds go to the current device's generator."""
    entered = []
    monkeypatch.setattr(module, "select_device", lambda name: torch.device("cuda:1"))
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: contextlib.nullcontext(entered.append(device))
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bool(entered))
    with backends(tiny_config(tmp_path, dtype="auto")):
        assert set(entered) == {torch.device("cuda:1")} and len(entered) == 2


def test_tf32_is_no_matter_on_a_cpu(tmp_path):
    before = torch.get_float32_matmul_precision()
    with backends(tiny_config(tmp_path)):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("wanted", ["cudnn", "flash"])
def test_attention_asked_for_goes_first_and_the_others_stay(on_cuda, tmp_path, wanted):
    before = kernels()
    with pytest.raises(KeyError), backends(tiny_config(tmp_path, attention=wanted)):
        assert kernels()[0] == wanted and sorted(kernels()) == sorted(before)
        raise KeyError
    assert kernels() == before
    with backends(tiny_config(tmp_path)):
        assert kernels() == before


def test_compiled_attention_is_not_taken_from_one_kernel_to_another(on_cuda, tmp_path):
    heads = torch.ones(1, 1, 4, 4)

    def graphs() -> int:  # made by a call of a function that torch.compile knows by its code
        before = graphs_compiled()
        torch.compile(attend)(heads)
        return graphs_compiled() - before

    def attend(x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    assert [graphs(), graphs()] == [1, 0]
    with backends(tiny_config(tmp_path, dtype="bfloat16", attention="flash")):
        assert [graphs(), graphs()] == [1, 0]
    with backends(tiny_config(tmp_path, dtype="bfloat16")):
        assert [graphs(), graphs()] == [1, 0]
    assert graphs() == 0


def test_attention_that_torch_would_not_choose_is_an_error(on_cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "attention_kernel", lambda *_: "efficient")
    before, cfg = kernels(), tiny_config(tmp_path, attention="cudnn")
    message = (
        r"attention='cudnn': it cannot run here \(a GPU, float32, heads of 16, dropout 0\); "
        r"use --attention auto, which takes 'efficient'"
    )
    with pytest.raises(ConfigError, match=message), backends(cfg):
        pass
    assert kernels() == before
    with backends(cfg, own_model=True):  # whose attention is not known
        assert kernels()[0] == "cudnn"


@pytest.mark.skipif(
    not hasattr(attention, "restore_flash_attention_impl"), reason="torch 2.10 activates none"
)
def test_flash_attention_3_is_active_during_the_run_alone(on_cuda, tmp_path, monkeypatch):
    cfg, events = tiny_config(tmp_path, attention="fa3"), []
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    message = "attention='fa3': flash_attn_interface cannot be imported .*install FlashAttention 3"
    with pytest.raises(ConfigError, match=message), backends(cfg):
        pass
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace())

    def register():
        events.append("on")
        return SimpleNamespace(remove=lambda: events.append("off"))

    monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    with backends(cfg):
        assert attention.current_flash_attention_impl() == "FA3" and kernels()[0] == "flash"
        assert events == ["on"]
    assert attention.current_flash_attention_impl() is None and events == ["on", "off"]


def test_torch_tells_the_kernel_that_it_chooses(tmp_path):
    found = module.attention_kernel(tiny_config(tmp_path), CPU, torch.bfloat16)
    assert found in ("flash", "math")  # what a CPU has
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        assert module.attention_kernel(tiny_config(tmp_path), CPU, torch.bfloat16) == "math"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fp8_head": True}, r"fp8_head: .* has no matrix units for float8, which NVIDIA GPUs"),
        ({"fp8_head": True, "vocab_size": 60}, r"fp8_head with vocab_size=60, d_model=32: both"),
        ({"attention": "flash"}, "attention='flash': it chooses among CUDA's kernels"),
        ({"residual_dtype": "bfloat16"}, "residual_dtype='bfloat16' with matmuls in float32"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        run_tiny(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def residual_dtypes(cfg, device=CPU) -> set[torch.dtype]:
    """Those of what the blocks of the model take."""
    model = create_model(cfg)
    loss = ModelLoss(model, device, cfg)
    loss.device, seen = CPU, []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    ids = torch.zeros(2, cfg.context_len, dtype=torch.int64)
    loss(ids, ids).backward()
    assert model.token_embeddings.weight.grad.dtype == torch.float32
    return set(seen)


def test_the_residual_streams_dtype(tmp_path):
    def seen(device=CPU, **settings):
        return residual_dtypes(tiny_config(tmp_path, **settings), device)

    assert seen(dtype="float32") == seen(dtype="bfloat16") == {torch.float32}
    assert seen(dtype="bfloat16", residual_dtype="bfloat16") == {torch.bfloat16}
    # On CUDA it follows the matmuls, except into float16, whose range a stream may leave.
    cuda = torch.device("cuda")
    assert seen(cuda, dtype="bfloat16") == {torch.bfloat16}
    assert seen(cuda, dtype="bfloat16", residual_dtype="float32") == {torch.float32}
    assert seen(cuda, dtype="float32") == seen(cuda, dtype="float16") == {torch.float32}


def test_a_bfloat16_residual_stream_learns_about_the_same(tmp_path):
    found = {}
    for residual in ("float32", "bfloat16"):
        run_tiny(
            tmp_path / residual, dtype="bfloat16", residual_dtype=residual, lr_max=3e-3, lr_min=1e-3
        )
        found[residual] = list(losses(tmp_path / residual).values())
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.01)
    assert found["bfloat16"] != found["float32"]


class Matmuls(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_joint_projections_are_fewer_products_of_the_same_weights(tmp_path, dtype):
    ids = torch.arange(128).view(4, 32) % 64
    found, names = {}, []
    mixes = dict(value_residual=True, embedding_residual=True)
    for joint in (False, True):
        cfg = tiny_config(tmp_path, joint_projections=joint, dtype=dtype, **mixes)
        torch.manual_seed(0)
        model = create_model(cfg)
        loss = ModelLoss(model, CPU, cfg)
        with Matmuls() as forward:
            found[joint] = [loss(ids, ids)]
        found[joint][0].backward()
        found[joint] += [parameter.grad for parameter in model.parameters()]
        names.append([name for name, _ in model.named_parameters()])
        # Of each of two layers: q, k, v, the output; w1, w3, w2. (The head's are not seen.)
        assert forward.count == 2 * (4 if joint else 7)
    assert names[0] == names[1]
    close = dict(rtol=1e-4, atol=1e-6) if dtype == "float32" else dict(rtol=0.05, atol=1e-4)
    for separate, joint in zip(*found.values(), strict=True):
        torch.testing.assert_close(joint, separate, **close)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_joint_projections_go_on_from_a_checkpoint_of_separate_ones(tmp_path, optimizer):
    settings = dict(optimizer=optimizer, ckpt_every=6)
    run_tiny(tmp_path / "separate", **settings)
    half = str(checkpoint(tmp_path / "separate", 6))
    run_tiny(tmp_path / "joint", joint_projections=True, ckpt_path_to_resume=half, **settings)
    expected, got = losses(tmp_path / "separate"), losses(tmp_path / "joint")
    assert list(got) == list(range(6, 12))
    assert got == pytest.approx({step: expected[step] for step in got}, rel=1e-4)


def test_an_fp8_head_is_for_training_and_learns_about_the_same(tmp_path, monkeypatch):
    asked = []

    def noting(*tensors, fp8, **options):
        asked.append((torch.is_grad_enabled(), fp8))
        return linear_cross_entropy_loss(*tensors, fp8=fp8, **options)

    monkeypatch.setattr("fastlm.model_loss.linear_cross_entropy_loss", noting)
    monkeypatch.setattr(module, "_multiplies_fp8", lambda device: True)
    found = {}
    for fp8 in (False, True):
        run_tiny(tmp_path / str(fp8), fp8_head=fp8, dtype="bfloat16", lr_max=3e-3, lr_min=1e-3)
        found[fp8] = list(losses(tmp_path / str(fp8)).values())
        assert set(asked) == {(True, fp8), (False, False)}
        asked.clear()
    assert found[True] == pytest.approx(found[False], rel=0.01)
    assert found[True] != found[False]


def test_what_an_fp8_head_has_trained_is_evaluated_on_any_device(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as gpu:
        gpu.setattr(module, "_multiplies_fp8", lambda device: True)
        run_tiny(tmp_path / "run", fp8_head=True, total_steps=2)
    stored = dict(fp8_head=True, ckpt_path_to_resume=str(checkpoint(tmp_path / "run")))
    run_tiny(tmp_path / "again", eval_only=True, **stored)
    assert "[VAL] val_loss" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="use --no-fp8-head"):
        run_tiny(tmp_path / "again", total_steps=4, **stored)


@pytest.mark.parametrize("major_minor, hip", [((8, 6), None), ((9, 0), None), ((9, 4), "6.3")])
def test_which_gpus_multiply_float8(monkeypatch, major_minor, hip):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: major_minor)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert module._multiplies_fp8(torch.device("cuda")) == (major_minor == (9, 0) and hip is None)
    assert not module._multiplies_fp8(CPU)


@pytest.mark.parametrize("scope", ["model", "block"])
def test_the_compile_mode_reaches_torch(tmp_path, monkeypatch, scope):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: modes.append(options["mode"]) or f)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: modes.append(options["mode"])
    )
    for mode, expected in (("default", None), ("max-autotune-no-cudagraphs",) * 2):
        cfg = tiny_config(tmp_path, compile=True, compile_scope=scope, compile_mode=mode)
        ModelLoss(create_model(cfg), CPU, cfg)
        assert set(modes) == {expected}
        modes.clear()


@pytest.mark.exhaustive
def test_a_run_whose_matmuls_are_tuned_computes_the_same(tmp_path):
    found = {}
    for mode in ("default", "max-autotune-no-cudagraphs"):
        torch.compiler.reset()
        cfg = tiny_config(tmp_path, compile=True, compile_mode=mode)
        torch.manual_seed(0)
        loss = ModelLoss(create_model(cfg), CPU, cfg)
        ids = torch.arange(2 * cfg.context_len).view(2, -1) % cfg.vocab_size
        found[mode] = loss(ids, ids)
        found[mode].backward()
    torch.testing.assert_close(*found.values())


def test_a_compiled_embedding_repeats_its_gradient_on_a_cpu(tmp_path):
    # 4,096 additions to 16 rows, which torch.compile spreads over the threads in any order.
    torch.manual_seed(0)
    table = torch.randn(16, 128, requires_grad=True)
    tokens, upstream = torch.randint(0, 16, (4096,)), torch.randn(4096, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.compiler.reset()
        with backends(tiny_config(tmp_path, compile=True)):
            assert torch.are_deterministic_algorithms_enabled()
            rows = torch.compile(lambda: torch.nn.functional.embedding(tokens, table) * 1)
            found = [torch.autograd.grad(rows(), table, upstream)[0] for _ in range(20)]
            assert all(torch.equal(gradient, found[0]) for gradient in found)
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # of a caller, who wants errors
    try:
        with backends(tiny_config(tmp_path, compile=True)):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    for settings in (
        {"compile": False},
        {"compile": True, "compile_mode": "max-autotune-no-cudagraphs"},
    ):
        with backends(tiny_config(tmp_path, **settings)):
            assert not torch.are_deterministic_algorithms_enabled()
