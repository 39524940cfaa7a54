"""Audit messages (PS3.15 section A.5, IHE ATNA) made of ledger rows, and a syslog sink for them."""

from __future__ import annotations

from radloop.dicom.audit.message import auditable as auditable
from radloop.dicom.audit.message import message as message
from radloop.dicom.audit.syslog import Sink as Sink
from radloop.dicom.audit.syslog import drain as drain
