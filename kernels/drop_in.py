"""cross_entropy_loss by the Triton kernels alone, for any project that has torch and triton.

It is registered as an op of torch's dispatcher under this package's own name, so that a copy of
this folder in another project and fastlm itself do not meet.
"""

import os

from . import cross_entropy as _row_kernels
from .cross_entropy_op import define_cross_entropy

_device_types = ["cuda"]  # ROCm's, too
if os.environ.get("TRITON_INTERPRET") == "1":
    _device_types.append("cpu")

cross_entropy_loss = define_cross_entropy(
    (__package__ or "kernels").replace(".", "_"),
    {device_type: lambda: _row_kernels for device_type in _device_types},
)
