"""Perturb the KV cache by layer range, and compare with other ways to steer."""

from .layers import *
from .pplm import *
from .reference import *
