"""Models, dialogues, generation, metrics, statistics, plots and run records."""

from .errors import *
from .paths import *
from .config import *
from .texts import *
from .dialogues import *
from .models import *
from .generation import *
from .statistics import *
from .metrics import *
from .records import *
from .plots import *
