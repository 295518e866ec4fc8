"""What the fork server imports once, so that each killed run starts in a second."""

import peft
import transformers

import launch
import session

__all__ = ["launch", "peft", "session", "transformers"]
