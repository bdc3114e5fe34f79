"""Perturb the KV cache by layer range, and compare with other ways to steer."""

from .layers import *
from .cache import *
from .attributes import *
from .settings import *
from .pplm import *
from .traces import *
from .reference import *
from .vectors import *
from .guided import *
from .distil import *
from .methods import *
from .making import *
from .grid import *
from .scores import *
from .report import *
from .own_attribute import *
