"""--doc-mask: what a document's tokens become does not depend on the documents before it."""

import itertools
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from in_process import TRAIN, VAL, checkpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import losses, same, state, tiny_config, write_prepared

from fastlm import ConfigError, TransformerLM, save_checkpoint, train_loop
from fastlm.data.files import open_data
from fastlm.generate import generate, sample_texts
from fastlm.model import document_mask
from fastlm.pretrained import load_model
from fastlm.run.finish import _whole_model
from fastlm.step import create_model
from fastlm.train import train

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")

END = 0
DOCUMENTS = [[5, 3, 9, END], [END], [7, 7, 2, 11, 4, END], [8, 1]]


def packed() -> torch.Tensor:
    return torch.tensor([list(itertools.chain(*DOCUMENTS))])


def model(**options) -> TransformerLM:
    torch.manual_seed(0)
    net = TransformerLM(
        vocab_size=16, d_model=32, num_heads=2, num_layers=2, max_seq_len=16, **options
    )
    net.document_end = END
    return net


def test_the_mask():
    found = document_mask(torch.tensor([[5, END, 7, 8]]), END, torch.bfloat16)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert found.shape == (1, 1, 4, 4) and found.dtype == torch.bfloat16
    assert found[0, 0].exp().int().tolist() == expected


class Masks(TorchDispatchMode):
    """Counts the tensors with a place for each pair of 12 positions that are made."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = [x for x in args if isinstance(x, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.shape[-2:] == (12, 12):
            self.count += not any(result.data_ptr() == x.data_ptr() for x in known)
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_one_mask_serves_all_layers(autocast):
    counts = []
    for layers in (1, 3):
        net = TransformerLM(16, 32, 2, layers, 16)
        net.document_end = END
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Masks() as masks:
            net(packed()[:, :12]).sum().backward()
        counts.append(masks.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_are_what_they_are_alone(dtype):
    """Values and gradients: rotary positions are relative, so these restart, too."""
    net = model(qk_norm=True, value_residual=True, embedding_residual=True).to(dtype)
    together = net(packed())
    alone = torch.cat([net(torch.tensor([document])) for document in DOCUMENTS], dim=1)
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.1, rtol=0.05)
    torch.testing.assert_close(together, alone, **tolerance)
    net.document_end = None
    assert not torch.allclose(net(packed())[:, 4:], alone[:, 4:], **tolerance)
    if dtype == torch.float32:
        gradients = [
            torch.autograd.grad(out.square().sum(), list(net.parameters()))
            for out in (together, alone)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_recomputed_in_backward_it_is_the_same():
    nets = [model(), model(activation_checkpointing=True)]
    for net in nets:
        net(packed()).square().sum().backward()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    "prompt", [[[END], [END]], [[3, END, 5], [END, 7, 2]], [[6, 4, 1, 2], [9, 8, 3, END]]]
)
def test_sampled_text_is_that_of_the_masked_forward(prompt):
    """Also where the rows of a batch end their documents at different places."""
    net = model(num_kv_heads=1).eval()
    expected = torch.tensor(prompt)
    got = generate(net, expected, 12, temperature=0)
    with torch.no_grad():
        for _ in range(12):
            following = net(expected)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, following), dim=1)
    assert torch.equal(got, expected)
    net.document_end = None
    assert not torch.equal(generate(net, torch.tensor(prompt), 12, temperature=0), got)


def test_a_checkpoint_and_a_gathered_model_are_sampled_with_it(tmp_path):
    """The first token is drawn from the end of text, which nothing behind it sees."""
    cfg = tiny_config(tmp_path, vocab_size=16, doc_mask=True, context_len=16)
    net = create_model(cfg)
    net.document_end = END
    save_checkpoint(net, None, 1, tmp_path / "a.pt", config=asdict(cfg), end_of_text=END)
    loaded, _ = load_model(tmp_path / "a.pt", "cpu")
    runner = SimpleNamespace(is_sharded=True, model=net)
    gathered = _whole_model(
        SimpleNamespace(runner=runner, cfg=cfg), {"model_state": net.state_dict()}
    )
    for prompt in ("", "5 3 9 2"):
        texts = [
            sample_texts(m, None, prompt=prompt, num_samples=1, max_new_tokens=8, temperature=0)
            for m in (net, loaded, gathered)
        ]
        assert texts[0] == texts[1] == texts[2]
        ids = [int(word) for word in texts[0][0].split()]
        for t in range(len(prompt.split()) or 1, len(ids)):
            with torch.no_grad():
                assert int(net(torch.tensor([ids[:t]]))[0, -1].argmax()) == ids[t]
    save_checkpoint(net, None, 1, tmp_path / "b.pt", config=asdict(cfg) | {"doc_mask": False})
    assert load_model(tmp_path / "b.pt", "cpu")[0].document_end is None


def test_a_masked_model_is_not_trained_as_if_it_had_no_mask(tmp_path):
    net = create_model(cfg := tiny_config(tmp_path))
    net.document_end = END
    with pytest.raises(ConfigError, match="doc_mask=False: the model has a document_end"):
        train_loop(TRAIN, VAL, cfg, model=net)


def test_a_run_resumes_with_it(tmp_path):
    data = open_data([str(write_prepared(tmp_path / "data"))])

    def run(name, **settings):
        cfg = tiny_config(tmp_path / name, vocab_size=300, total_steps=6, doc_mask=True, **settings)
        return train(data, cfg)

    assert run("straight").document_end == data.manifest.end_of_text
    run("half", ckpt_every=3)
    run("rest", ckpt_path_to_resume=str(checkpoint(tmp_path / "half", 3)))
    assert same(state(checkpoint(tmp_path / "rest")), state(checkpoint(tmp_path / "straight")))
    assert len(losses(tmp_path / "straight")) == 6


def test_data_that_does_not_say_where_documents_end(tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match="no manifest that says which token ends a document"):
        train_loop(TRAIN, VAL, tiny_config(tmp_path / "a", doc_mask=True))
    # In a mixture, too: nobody knows whether its documents end with the others' token.
    np.save(tmp_path / "raw.npy", np.zeros(2000, dtype=np.uint16))
    sources = [f"{write_prepared(tmp_path / 'data')}:1", f"{tmp_path / 'raw.npy'}:1"]
    cfg = tiny_config(tmp_path / "c", vocab_size=300, doc_mask=True)
    for paths in (sources, sources[::-1]):
        with pytest.raises(ConfigError, match=r"True: \S*raw\.npy has no manifest that says"):
            train(open_data(paths), cfg)
    own = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 64))
    with pytest.raises(ConfigError, match="Sequential is no TransformerLM"):
        train_loop(TRAIN, VAL, tiny_config(tmp_path / "b", doc_mask=True), model=own)
