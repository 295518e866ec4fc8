"""What the fork server imports once, so that each run that is killed starts in a second."""

import peft
import transformers

import epiphany.trainer
import launch

__all__ = ["epiphany", "launch", "peft", "transformers"]
