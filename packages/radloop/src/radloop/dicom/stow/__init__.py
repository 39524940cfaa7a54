"""A STOW-RS origin server (PS3.18 section 10.5): instances by HTTP POST, as durable as by C-STORE."""

from __future__ import annotations

from radloop.dicom.stow.server import Sender as Sender
from radloop.dicom.stow.server import Stow as Stow
