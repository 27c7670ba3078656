"""The methods of the verb 'audit'."""

from palimpsest.audit.cbod import CBOD
from palimpsest.audit.muse import Course, Muse
from palimpsest.audit.sok_unlearning import RemovalOrSuppression
from palimpsest.audit.stopping import stop_when_forgotten

__all__ = ["CBOD", "Course", "Muse", "RemovalOrSuppression", "stop_when_forgotten"]
