"""Chats and the ends of texts, exported and read: what transformers makes of them is what fastlm
trains on and samples from."""

import json

import numpy as np
import pytest
import torch
from prepared_data import quiet, shard_tokens
from tokenizers import AddedToken, Tokenizer, processors
from training_runs import tiny_config, write_prepared

import fastlm
from fastlm import generate as generate_module
from fastlm.data.files import open_data
from fastlm.data.text import find_text_files
from fastlm.data.tokenizer import train_tokenizer
from fastlm.export import export, main
from fastlm.huggingface_tokenizer import special_tokens
from fastlm.prepare import prepare
from fastlm.train import train

pytestmark = pytest.mark.usefixtures("one_thread")

CHATS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {i} + {i}?\n\n  Think."},
        {"role": "assistant", "content": f"It is {2 * i}.\nReally. "},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": ""},
    ]
    for i in range(20)
]
FORMS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
BYTES = train_tokenizer(["def f(x): return x\n"], 257)


def exported_run(place, data) -> None:
    cfg = tiny_config(place / "run", vocab_size=data.manifest.vocab_size, total_steps=1)
    train(data, cfg)
    assert main(["--ckpt", str(place / "run"), "--out", str(place / "out")]) == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_run_on_chats_is_exported_with_its_template(form, tmp_path, monkeypatch, without_extras):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS)
    (tmp_path / "chats.jsonl").write_text(lines)
    tokenizer = train_tokenizer([lines], 300)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in FORMS[form]])
    tokenizer.save("t.json")
    files = find_text_files(["chats.jsonl"], "messages")
    prepare(files, "data", chat=True, tokenizer="t.json", val_fraction=0.3, log=quiet)
    exported_run(tmp_path, open_data(["data"]))

    theirs = transformers.AutoTokenizer.from_pretrained("out")
    rendered = [theirs.apply_chat_template(chat, return_dict=False) for chat in CHATS]
    assert len({len(ids) for ids in rendered}) > 1
    written = []
    for split in ("train", "val"):
        ids = shard_tokens(tmp_path / "data", split)
        documents = np.split(ids, np.flatnonzero(ids == 0) + 1)
        assert documents.pop().size == 0
        # The token that ends a document is what stands before the next.
        written += [[0, *document[:-1].tolist()] for document in documents]
    assert sorted(rendered) == sorted(written)
    # An answer is asked for by what stands before one.
    asked = theirs.apply_chat_template(
        CHATS[3][:2], add_generation_prompt=True, return_dict=False, tokenize=True
    )
    answered = theirs.apply_chat_template(CHATS[3][:3], return_dict=False)
    assert answered[: len(asked)] == asked
    assert theirs.decode(answered[len(asked) :]).startswith("It is 6.\nReally. ")

    turn = theirs.convert_tokens_to_ids(FORMS[form][-1])
    assert (theirs.eos_token_id, theirs.bos_token_id) == (turn, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [turn, 0]
    with torch.no_grad():  # whatever it reads, the end of the turn is likeliest
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[turn] = model.model(torch.tensor([asked])).last_hidden_state[0, -1]
    found = model.generate(torch.tensor([asked]), do_sample=False, max_new_tokens=3)
    assert found[0].tolist() == [*asked, turn]


def test_a_run_on_text_has_one_end_and_no_template(tmp_path, without_extras):
    exported_run(tmp_path, open_data([str(write_prepared(tmp_path / "data"))]))
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())  # noqa: E731
    assert read("generation_config.json") == {"bos_token_id": 0, "eos_token_id": 0}
    assert read("config.json")["eos_token_id"] == 0
    settings = read("tokenizer_config.json")
    assert settings["eos_token"] == settings["bos_token"] == "<|endoftext|>"
    assert "chat_template" not in settings


def model_directory(place, tokenizer: Tokenizer, settings: dict, generation: dict) -> str:
    torch.manual_seed(0)
    model = fastlm.TransformerLM(tokenizer.get_vocab_size(), 16, 2, 1, 32)
    export(model, place, tokenizer=tokenizer.to_str())
    (place / "tokenizer.json").write_text(tokenizer.to_str())  # export leaves the processor out
    (place / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    (place / "generation_config.json").write_text(json.dumps(generation))
    return str(place)


def with_bos(*, post_processor: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_str(BYTES.to_str())
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if post_processor:
        special = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, special)
    return tokenizer


@pytest.mark.parametrize(
    "post_processor, settings",
    [(False, {}), (True, {}), (True, {"add_bos_token": False}), (True, {"add_bos_token": True})],
)
def test_what_begins_a_text_is_what_transformers_puts_there(tmp_path, post_processor, settings):
    transformers = pytest.importorskip("transformers")
    tokenizer = with_bos(post_processor=post_processor)
    settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    directory = model_directory(tmp_path / "m", tokenizer, settings, {})
    theirs = transformers.AutoTokenizer.from_pretrained(directory)("def f").input_ids
    plain = tokenizer.encode("def f", add_special_tokens=False).ids
    assert [*special_tokens(directory, tokenizer.to_str(), {}).begin, *plain] == theirs


def test_an_export_begins_no_text_as_training_never_did(tmp_path):
    """Of a tokenizer that adds a BOS, cuts and fills: prepare does none of it, so neither an export
    nor a prompt has any."""
    transformers = pytest.importorskip("transformers")
    tokenizer = with_bos(post_processor=True)
    torch.manual_seed(0)
    model = fastlm.TransformerLM(tokenizer.get_vocab_size(), 16, 2, 1, 32)
    export(model, tmp_path / "m", tokenizer=tokenizer.to_str())
    plain = tokenizer.encode("def f", add_special_tokens=False).ids
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m")("def f").input_ids == plain
    whole = generate_module.sample_texts(model, tokenizer.to_str(), prompt="def f", num_samples=1)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9, direction="left")
    odd = tokenizer.to_str()
    assert generate_module.sample_texts(model, odd, prompt="def f", num_samples=1) == whole
    assert special_tokens(tmp_path / "m", odd, {}).begin == [tokenizer.token_to_id("<s>")]


def test_a_directory_of_transformers_is_not_exported_again(tmp_path, capsys):
    directory = model_directory(tmp_path / "m", with_bos(post_processor=False), {}, {})
    assert main(["--ckpt", directory, "--out", str(tmp_path / "again")]) == 2
    assert "is a directory of transformers already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_without_a_tokenizer_the_ids_begin_and_end_a_text(monkeypatch):
    model = fastlm.TransformerLM(32, 16, 2, 1, 32)
    monkeypatch.setattr(
        generate_module, "generate", lambda model, ids, *_, **__: torch.cat((ids, ENDED), dim=1)
    )
    ENDED = torch.tensor([[5, 9, 7]])
    sample = lambda **marks: generate_module.sample_texts(model, None, num_samples=1, **marks)  # noqa: E731
    assert sample(ends=[9]) == ["0 5"]
    assert sample(end_of_text=7) == ["7 5 9"]
    assert sample(begin=[3], ends=[5]) == ["3"] and sample() == ["0 5 9 7"]


@pytest.mark.parametrize(
    "bos, post_processor, settings",
    [
        ("<s>", True, {"bos_token": "<s>"}),
        ("<s>", False, {"bos_token": {"content": "<s>"}, "add_bos_token": True}),
        ("<|endoftext|>", False, {"bos_token": "<s>"}),  # as text is in fastlm's own training
    ],
)
def test_generate_begins_and_ends_as_the_directory_says(
    tmp_path, monkeypatch, capsys, bos, post_processor, settings
):
    tokenizer = with_bos(post_processor=post_processor)
    end = tokenizer.token_to_id("</s>")
    directory = model_directory(tmp_path / "m", tokenizer, settings, {"eos_token_id": [3, end]})
    prompts = []

    def generate(model, prompt, *arguments, **keywords):
        prompts.append(prompt[0].tolist())
        following = [*tokenizer.encode(" f", add_special_tokens=False).ids, end, 70]
        return torch.tensor([[*prompts[-1], *following]])

    monkeypatch.setattr(generate_module, "generate", generate)
    assert generate_module.main(["--ckpt", directory, "--prompt", "def"]) == 0
    plain = tokenizer.encode("def", add_special_tokens=False).ids
    assert prompts == [[tokenizer.token_to_id(bos), *plain]]
    assert capsys.readouterr().out == "def f\n"


def test_a_token_that_begins_and_ends_stands_between_documents(tmp_path):
    tokenizer = with_bos(post_processor=False)
    begin, end = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    generation = {"bos_token_id": end, "eos_token_id": [begin, end]}
    directory = model_directory(tmp_path / "m", tokenizer, {}, generation)
    found = special_tokens(directory, tokenizer.to_str(), {"eos_token_id": 5})
    assert found == ([], end, [begin, end])
    (tmp_path / "m" / "generation_config.json").unlink()
    assert special_tokens(directory, None, {"eos_token_id": 5}) == ([], None, [5])
    settings = tmp_path / "m" / "tokenizer_config.json"
    settings.write_text('{"add_bos_token": true, "bos_token": "<bos>"}')
    with pytest.raises(fastlm.CheckpointError, match="with bos_token='<bos>', which tokenizer"):
        special_tokens(directory, tokenizer.to_str(), {})
    settings.write_text("[")
    with pytest.raises(fastlm.CheckpointError, match=r"tokenizer_config\.json: cannot be read"):
        special_tokens(directory, tokenizer.to_str(), {})
