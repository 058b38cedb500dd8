"""Triton kernels, installed as `fastlm.kernels`; this folder works alone in other projects too.

Modules here import torch, triton and their siblings only. This version has none yet: on a GPU the
ops run their "torch" implementation (`fastlm.active_implementation` tells).
"""
