"""How a chat model is asked, and whether it answers as a person."""

from .prompts import *
from .ai_talk import *
from .experiment import *
