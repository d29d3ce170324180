"""Big-Little networks for speech."""

from __future__ import annotations

from blnet.speech.models import bl_resnet22, resnet22
from blnet.speech.network import SpeechNet, SpeechNetConfig

__all__ = ["SpeechNet", "SpeechNetConfig", "bl_resnet22", "resnet22"]
