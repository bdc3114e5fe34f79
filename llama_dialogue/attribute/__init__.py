"""Read act and emotion from hidden states; judge replies by a second model."""

from .features import *
from .head import *
from .judge import *
from .scoring import *
from .defaults import *
from .probes import *
from .experiment import *
from .evaluation import *
