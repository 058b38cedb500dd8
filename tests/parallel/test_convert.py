"""python -m fastlm.convert: between a sharded checkpoint and a single file."""

from dataclasses import asdict

import pytest
import torch
from checkpoints import everything, make_pair
from in_process import checkpoint, run_tiny
from training_runs import tiny_config

from fastlm import AdamW, create_model_and_optimizer, load_checkpoint
from fastlm.checkpoint import checkpoint_payload, read_checkpoint
from fastlm.convert import main
from fastlm.generate import load_model, sample_texts
from fastlm.run.resume import find

if not torch.distributed.is_available():
    pytest.skip("torch.distributed is not available", allow_module_level=True)

from fastlm.parallel.sharded import write_sharded

pytestmark = pytest.mark.usefixtures("one_thread")


def same(a, b) -> bool:
    """Types, keys, values and bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of a tied bf16 model with the split AdamW, as a directory."""
    cfg = tiny_config(tmp_path, tie_embeddings=True)
    model, _, _ = create_model_and_optimizer(cfg)
    model = model.bfloat16()
    optimizer = AdamW(model.named_parameters(), param_precision="split")
    model(torch.arange(8)[None]).float().square().mean().backward()
    optimizer.step()
    path = tmp_path / "checkpoint_5.dcp"
    extra = dict(config=asdict(cfg), samples_seen=40, run_id="r", saved_at=2.5)
    write_sharded(checkpoint_payload(model, optimizer, 5, **extra), path)
    assert len(list(path.iterdir())) == 2  # matrices are too large for commit.json
    return path


def test_a_directory_becomes_a_file_that_loads_and_generates_and_one_again(sharded, capsys):
    file, again = sharded.with_suffix(".pt"), sharded.with_name("again_5.dcp")
    assert main([str(sharded), str(file)]) == 0
    assert capsys.readouterr().out == f"wrote {file}\n"
    assert main([str(file), str(again)]) == 0
    payload = torch.load(file, weights_only=True)
    assert payload["iteration"] == 5 and payload["optimizer_state"]["state"][0]["step"] == 1
    assert type(payload["config"]["betas"]) is tuple
    for path in (file, again):
        assert same(read_checkpoint(path), read_checkpoint(sharded)), path
        texts = []
        for ckpt in (sharded, path):
            model, content = load_model(ckpt, "cpu")
            texts.append(sample_texts(model, None, prompt="1 2", num_samples=2, max_new_tokens=9))
            assert content["samples_seen"] == 40
        assert texts[0] == texts[1]
        assert find(str(path)).step == 5
    # Tied weights are stored once.
    weights = payload["model_state"]
    assert weights["lm_head.weight"].data_ptr() == weights["token_embeddings.weight"].data_ptr()
    model, _ = load_model(file, "cpu")
    optimizer = AdamW(model.bfloat16().named_parameters(), param_precision="split")
    assert load_checkpoint(model, optimizer, file) == 5
    assert same(optimizer.state_dict()["state"], payload["optimizer_state"]["state"])


def test_a_run_goes_on_from_a_directory(tmp_path, without_extras):
    settings = dict(total_steps=6, ckpt_every=3, eval_every=0, dropout=0.1)
    run_tiny(tmp_path / "straight", **settings)
    run_tiny(tmp_path / "run", **settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert main([str(checkpoints / "checkpoint_3.pt"), str(checkpoints / "checkpoint_3.dcp")]) == 0
    for path in checkpoints.glob("*.pt"):
        path.unlink()
    newest = find(str(tmp_path / "run")).path
    assert newest.name == "checkpoint_3.dcp"
    run_tiny(tmp_path / "run", ckpt_path_to_resume=str(newest), **settings)
    expected = read_checkpoint(checkpoint(tmp_path / "straight"))
    found = read_checkpoint(checkpoint(tmp_path / "run"))
    for key in ("model_state", "optimizer_state", "samples_seen"):
        assert same(found[key], expected[key]), key


def test_a_file_of_another_program_becomes_a_directory(tmp_path):
    model, optimizer = make_pair(cls=torch.optim.AdamW)
    payload = {
        "model": {f"_orig_mod.{name}": t for name, t in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "iter_num": 5,
    }
    torch.save(payload, tmp_path / "ckpt.pt")
    assert main([str(tmp_path / "ckpt.pt"), str(tmp_path / "ckpt.dcp")]) == 0
    other, fresh = make_pair(seed=1, steps=0, cls=torch.optim.AdamW)
    assert load_checkpoint(other, fresh, tmp_path / "ckpt.dcp") == 5
    assert same(everything(other, fresh), everything(model, optimizer))


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        ("nothing.pt", "a.dcp", "nothing.pt: no such checkpoint"),
        ("nothing.dcp", "a.pt", "nothing.dcp: no such checkpoint"),
        ("c.dcp", "c.pt", "c.pt: is there already; remove it, or choose another name"),
        ("c.dcp", "d.dcp", "d.dcp: it will be a file; give a name that ends with .pt"),
        ("c.pt", "d.pt", "d.pt: it will be a directory; give a name that ends with .dcp"),
        ("run", "d.dcp", "run: is no checkpoint but a directory; name a checkpoint in it"),
        ("bad.pt", "d.dcp", "bad.pt: is no readable checkpoint"),
        ("bad.dcp", "d.pt", "bad.dcp: is no whole checkpoint (it has no commit.json)"),
        ("odd.pt", "d.dcp", "odd.pt: cannot be converted (a is a complex, which no checkpoint"),
        ("c.pt", "c.pt/d.dcp", "c.pt/d.dcp: cannot be written (File exists)"),
    ],
)
def test_what_cannot_be_converted(tmp_path, monkeypatch, capsys, src, dst, message):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "bad.dcp"):
        (tmp_path / name).mkdir()
    torch.save({"iteration": 1}, "c.pt")
    torch.save({"a": 1j}, "odd.pt")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    write_sharded({"iteration": 1}, "c.dcp")
    before = sorted(tmp_path.rglob("*"))
    assert main([src, dst]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def test_help_and_missing_arguments(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "convert [-h] SRC DST" in shown and "must fit into its memory" in shown
    with pytest.raises(SystemExit, match="2"):
        main(["a.pt"])
