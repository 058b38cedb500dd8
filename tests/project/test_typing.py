"""What `make lint` has mypy look at is the whole public interface, and says what runs."""

import ast
from dataclasses import fields
from pathlib import Path

from fastlm.kernels.loss_options import LossKeywords, LossOptions

import fastlm

CLIENT = Path(__file__).with_name("typed_client.py")


def test_the_typed_client_uses_every_public_name():
    used = {
        node.attr
        for node in ast.walk(ast.parse(CLIENT.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fastlm"
    }
    assert used - set(fastlm.__all__) == {"trian_loop"}  # one of its mistakes
    assert set(fastlm.__all__) <= used


def test_the_losses_options_have_their_types():
    declared = {field.name: field.type for field in fields(LossOptions)}
    assert declared.pop("return_lse") is bool
    assert declared == LossKeywords.__annotations__
