"""Ops of torch's dispatcher in the namespace fastlm."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("fastlm", "FRAGMENT")


def register_op(name: str, schema: str, fake: Callable, *keys: str) -> Callable:
    """Makes a function the op fastlm::<name> for the dispatch keys ("CPU", "CUDA").

    Not torch.library.custom_op: its first call imports torch._dynamo, which takes seconds that
    generating a line of text has no other need for, and each call takes longer.
    """

    def register(function):
        LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        for key in keys:
            LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"fastlm::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.fastlm, name).default

    return register
